"""The folder of a run: who holds it, what is refused before step 1, and where a run goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, refused
from training_cases import command_for, digest, read_metrics, read_run, train_whole

import train
import utils
from training import runs


@pytest.fixture(scope="module")
def finished(tiny_dir, train_file, tmp_path_factory):
    return train_whole(tiny_dir, train_file, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def begun(finished, tmp_path):
    """The folder of a run of which only check_4 is there."""
    shutil.copytree(finished / "check_4", tmp_path / "peft" / "check_4")
    return tmp_path / "peft"


# ---- refusals -----------------------------------------------------------------------------------


def test_a_used_folder_is_refused_and_left_alone(finished, tiny_dir, train_file, capsys):
    before = digest(finished / "check_20")
    message = refused(capsys, 2, train.main, command_for(
        tiny_dir, train_file, finished.parent, "--exp_name", "whole"))
    assert "already holds check_20" in message
    assert "--resume" in message and "--exp_name" in message
    assert digest(finished / "check_20") == before


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(
        train_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = refused(capsys, 2, train.main,
                      command_for("no_such_model", train_file, tmp_path / "file"))
    assert "cannot be written" in message and "--output_dir" in message


HOLDER = """
import pathlib, sys, time
from training import runs
with runs.claim_run_dir(pathlib.Path(sys.argv[1]), None):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_folder_are_refused_with_the_owner(tiny_dir, train_file, tmp_path, capsys):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "peft")], cwd=ROOT,
                              stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        message = refused(capsys, 2, train.main, command_for(tiny_dir, train_file, tmp_path))
        assert f"is in use by pid {holder.pid} on " in message and "--exp_name" in message
    finally:
        holder.kill()
        holder.wait()
    # the lock of a dead process is free
    train.main(command_for(tiny_dir, train_file, tmp_path, "--max_steps", "2"))
    assert (tmp_path / "peft" / "check_2").is_dir()


def test_a_refused_run_leaves_the_folder_free(tmp_path, capsys):
    (tmp_path / "check_4").mkdir()
    for _ in range(2):
        def claim():
            with runs.claim_run_dir(tmp_path, None):
                pass

        assert "already holds check_4" in refused(capsys, 2, claim)
    with runs.claim_run_dir(tmp_path, "newest"):
        assert "pid" in (tmp_path / ".owner").read_text()


def test_an_unknown_model_fails_fast_offline(train_file, tmp_path, capsys):
    start = time.time()
    message = refused(capsys, 3, train.main,
                      command_for("nobody/no-such-model", train_file, tmp_path))
    assert 'model "nobody/no-such-model" not found locally and HF_HUB_OFFLINE=1' in message
    assert "smollm2" in message and time.time() - start < 5


def test_lora_targets_that_match_nothing_list_the_models_modules(
        tiny_dir, train_file, tmp_path, capsys):
    message = refused(capsys, 2, train.main, command_for(
        tiny_dir, train_file, tmp_path, "--lora_target_modules", "c_attn"))
    assert "--lora_target_modules c_attn" in message
    assert "q_proj" in message and "all-linear" in message


def test_too_little_disk_is_told_before_the_first_step(
        tiny_dir, train_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    message = refused(capsys, 2, train.main, command_for(tiny_dir, train_file, tmp_path))
    assert "checkpoints need about" in message and "--save_steps" in message


# ---- resume -------------------------------------------------------------------------------------


def test_a_run_that_goes_on_ends_with_the_bytes_of_one_that_was_never_interrupted(
        begun, finished, tiny_dir, train_file, capsys):
    train.main(command_for(tiny_dir, train_file, begun.parent, "--resume",
                           "--num_train_epochs", "5"))
    said = capsys.readouterr()
    assert "resuming from" in said.out and "warning" not in said.err
    assert digest(begun / "check_20") == digest(finished / "check_20")


def test_a_finished_run_is_told_so_and_not_trained_on(finished, tiny_dir, train_file, capsys):
    before = read_metrics(finished)
    train.main(command_for(tiny_dir, train_file, finished.parent, "--exp_name", "whole",
                           "--num_train_epochs", "5", "--resume"))
    assert "this run is finished" in capsys.readouterr().out
    assert read_metrics(finished) == before


def test_a_checkpoint_that_knows_less_flags_goes_on_without_a_warning(
        begun, finished, tiny_dir, train_file, capsys):
    """run.json as it was before there were schedules, a warm-up, and names for numbered prompts."""
    run = read_run(begun / "check_4")
    for name in ("lr_scheduler_type", "lr_warmup_steps", "run_name", "draw_after",
                 "likelihood_only_steps", "numbered_prompts"):
        del run["args"][name]
    run["args"] |= {"number": True, "warmup_steps": -1}
    text = json.dumps(run)
    (begun / "check_4" / "run.json").write_text(text)
    marker = json.loads((begun / "check_4" / "COMPLETE.json").read_text())
    marker["files"]["run.json"] = len(text)
    (begun / "check_4" / "COMPLETE.json").write_text(json.dumps(marker))
    train.main(command_for(tiny_dir, train_file, begun.parent, "--resume",
                           "--num_train_epochs", "5"))
    assert "warning" not in capsys.readouterr().err
    assert digest(begun / "check_20") == digest(finished / "check_20")


@pytest.mark.parametrize(("more", "what"), [
    (["--seed", "7"], "seed was 42, now it is 7"),
    (["--lora_r", "8"], "lora_r was 4, now it is 8"),
    (["--no_ul"], "method was peft, now it is otm"),
    (["--limit", "3"], "data_sha256 was"),
])
def test_resuming_another_run_is_refused(finished, tiny_dir, train_file, capsys, more, what):
    message = refused(capsys, 2, train.main, command_for(
        tiny_dir, train_file, finished.parent, "--exp_name", "whole", "--resume", *more))
    assert what in message and "hint:" in message


def test_other_rows_are_learnt_where_allow_data_change_says_so(
        begun, tiny_dir, train_file, capsys):
    """check_4 of 4 rows goes on with 3 of them: 5 epochs are then 15 micro-steps."""
    argv = command_for(tiny_dir, train_file, begun.parent, "--resume", "--limit", "3",
                       "--num_train_epochs", "5")
    assert "hint: --allow_data_change goes on" in refused(capsys, 2, train.main, argv)
    train.main([*argv, "--allow_data_change"])
    assert utils.newest_checkpoint(begun).name == "check_15"
    assert len(read_run(begun / "check_15")["row_hashes"]) == 3


def test_a_named_checkpoint_that_is_incomplete_is_refused_with_what_it_lacks(
        tiny_dir, train_file, tmp_path, capsys):
    half = tmp_path / "peft" / "check_4"
    half.mkdir(parents=True)
    message = refused(capsys, 2, train.main, command_for(
        tiny_dir, train_file, tmp_path, "--resume", str(half)))
    assert "incomplete, it lacks COMPLETE.json" in message


def test_resume_with_only_incomplete_checkpoints_starts_anew_and_says_so(
        finished, tiny_dir, train_file, tmp_path, capsys):
    half = tmp_path / "peft" / "check_8"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    train.main(command_for(tiny_dir, train_file, tmp_path, "--resume", "--num_train_epochs", "5"))
    said = capsys.readouterr().err
    assert "skipping" in said and "check_8: incomplete (no COMPLETE.json)" in said
    assert "starting from step 0" in said
    assert digest(tmp_path / "peft" / "check_20") == digest(finished / "check_20")


def test_resume_with_another_batch_size_goes_on_with_a_warning(begun, tiny_dir, train_file, capsys):
    """Ten steps of two rows are five epochs of four."""
    train.main(command_for(tiny_dir, train_file, begun.parent, "--resume", "--num_train_epochs",
                           "5", "--per_device_train_batch_size", "2"))
    assert "per_device_train_batch_size was 1, now 2" in capsys.readouterr().err
    assert (begun / "check_10").is_dir()


@pytest.mark.parametrize(("schedule", "warned"), [
    ("linear", True), ("constant_with_warmup", False)])
def test_a_longer_run_is_warned_of_where_the_learning_rate_depends_on_its_length(
        tiny_dir, train_file, tmp_path, capsys, schedule, warned):
    argv = command_for(tiny_dir, train_file, tmp_path, "--max_steps", "4",
                       "--num_train_epochs", "5", "--lr_scheduler_type", schedule)
    train.main(argv)
    train.main([*argv, "--max_steps", "8", "--resume"])
    assert ("max_steps was 4, now 8" in capsys.readouterr().err) == warned
