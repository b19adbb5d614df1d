"""What goes wrong while a model is trained: NaN, memory, disk, kills and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refused
from training_cases import command_for, digest, read_metrics

import train
import utils
from methods.possibility import training


def test_a_nan_loss_stops_the_run_and_names_the_last_good_checkpoint(
        tiny_dir, train_file, tmp_path, capsys, monkeypatch):
    """The sixth micro-step is poisoned: check_4 is the last good one, the log says why."""
    real = training.compute_loss

    def poisoned(model, batch, args, step):
        loss, parts = real(model, batch, args, step)
        return (loss * float("nan") if step == 5 else loss), parts

    monkeypatch.setattr(training, "compute_loss", poisoned)
    message = refused(capsys, 6, train.main, command_for(
        tiny_dir, train_file, tmp_path, "--num_train_epochs", "5"))
    assert "loss is nan at micro-step 5" in message
    assert "check_4" in message and "--learning_rate" in message
    assert [p.name for p in utils.checkpoints_in(tmp_path / "peft")] == ["check_4"]
    last = read_metrics(tmp_path / "peft")[-1]
    assert last["loss"] is None and last["reason"] == "loss is nan"


def test_running_out_of_memory_names_four_levers(
        tiny_dir, train_file, tmp_path, capsys, monkeypatch):
    def full(model, batch, args, step):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "compute_loss", full)
    message = refused(capsys, 75, train.main, command_for(tiny_dir, train_file, tmp_path))
    for lever in ("--per_device_train_batch_size", "--max_length", "--gradient_checkpointing",
                  "--load_in_4bit"):
        assert lever in message


def test_running_out_of_memory_in_a_save_is_told_like_any_other(
        tiny_dir, train_file, tmp_path, capsys, monkeypatch):
    def full(model, folder, state_dict=None):
        raise MemoryError("out of memory")

    monkeypatch.setattr(training, "save", full)
    message = refused(capsys, 75, train.main, command_for(
        tiny_dir, train_file, tmp_path, "--num_train_epochs", "5"))
    assert "out of memory at micro-step 4" in message
    assert not utils.checkpoints_in(tmp_path / "peft")


SMALL_DISK = """
import resource, sys, train
from modeling import checkpoints
finish = checkpoints.finish_adapter
def finish_large(folder, tokenizer, run):
    finish(folder, tokenizer, run)
    if folder.name == "checkpoint-4":
        (folder / "big").write_bytes(b"x" * 10_000_000)
checkpoints.finish_adapter = finish_large
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))
train.main(sys.argv[1:])
"""


def test_a_full_disk_keeps_the_last_checkpoint(tiny_dir, train_file, tmp_path):
    """Files may grow to 5 MB only (RLIMIT_FSIZE); the second save writes one of 10 MB."""
    argv = command_for(tiny_dir, train_file, tmp_path, "--num_train_epochs", "5")
    done = subprocess.run([sys.executable, "-c", SMALL_DISK, *argv], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 75, done.stderr[-2000:]
    assert f"disk full writing {tmp_path / 'peft' / 'check_8'} (after " in done.stderr
    assert "MB free" in done.stderr
    assert f"last good checkpoint: {tmp_path / 'peft' / 'check_4'}" in done.stderr
    assert [p.name for p in utils.checkpoints_in(tmp_path / "peft")] == ["check_4"]
    assert not (tmp_path / "peft" / ".staging").exists()


def test_a_disk_that_is_full_when_a_save_is_sealed_leaves_no_half_checkpoint(
        tiny_dir, train_file, tmp_path, capsys, monkeypatch):
    def full(staging, final):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils, "seal", full)
    message = refused(capsys, 75, train.main, command_for(
        tiny_dir, train_file, tmp_path, "--num_train_epochs", "5"))
    assert "disk full writing" in message and "last good checkpoint: None" in message
    assert not utils.checkpoints_in(tmp_path / "peft")
    assert not (tmp_path / "peft" / ".staging").exists()


def test_a_tracker_that_cannot_start_is_a_warning(tiny_dir, train_file, tmp_path, capsys):
    train.main(command_for(tiny_dir, train_file, tmp_path, "--max_steps", "2",
                           "--report_to", "comet_ml"))
    assert "warning: --report_to comet_ml does not start" in capsys.readouterr().err
    assert (tmp_path / "peft" / "check_2").is_dir()


# ---- kills and signals --------------------------------------------------------------------------


KILLER = """
# One whole run, then one that is killed ten times at random moments and finished at the 11th start.
# Forks of one process that has loaded everything, so that a start takes no seconds.
import os, random, signal, sys, time
import accelerate, peft, torch
import infer, train, utils
from methods.possibility import inference, training
from modeling import checkpoints
from training import preview
def slow(call):  # a save takes 0.2 s, so that about half of the kills fall into one
    def wrapped(*args):
        time.sleep(0.05)
        call(*args)
        time.sleep(0.05)
    return wrapped
utils.seal, checkpoints.finish_adapter = slow(utils.seal), slow(checkpoints.finish_adapter)
def start(name):
    child = os.fork()
    if child == 0:
        try:
            train.main([*sys.argv[2:], "--exp_name", name, "--resume"])
        except SystemExit as stop:
            os._exit(stop.code or 0)
        os._exit(0)
    return child
print("ended", os.waitstatus_to_exitcode(os.waitpid(start("whole"), 0)[1]), flush=True)
rng, inside = random.Random(11), 0
for attempt in range(11):
    child = start("killed")
    if attempt < 10:
        time.sleep(rng.uniform(0.6, 1.6))
        os.kill(child, signal.SIGKILL)
        inside += os.path.isdir(sys.argv[1] + "/killed/.staging")
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
print("inside a save", inside)
"""


def test_ten_kills_at_random_moments_also_inside_saves_end_with_the_same_bytes(
        tiny_dir, train_file, tmp_path):
    """40 epochs of 4 rows with dropout, saved every 4 micro-steps; ten SIGKILLs and resumes."""
    argv = command_for(tiny_dir, train_file, tmp_path, "--num_train_epochs", "40")
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path), *argv], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=200)
    printed = done.stdout.splitlines()
    codes = [int(line.split()[1]) for line in printed if line.startswith("ended")]
    assert codes == [0] + [-signal.SIGKILL] * 10 + [0], done.stdout + done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 2, "some kills fall inside a save"
    assert digest(tmp_path / "killed" / "check_160") == digest(tmp_path / "whole" / "check_160")
    steps = [line["step"] for line in read_metrics(tmp_path / "killed")]
    assert steps == list(range(2, 161, 2)), "no log line is lost or doubled"


def start_training(argv: list[str], folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(is_there, seconds: float) -> None:
    deadline = time.time() + seconds
    while not is_there() and time.time() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_stops_and_names_the_way_on(tiny_dir, train_file, tmp_path, signum, code):
    run = start_training(command_for(tiny_dir, train_file, tmp_path, "--num_train_epochs", "5000",
                                     "--save_steps", "20000"), tmp_path)
    wait_for((tmp_path / "peft" / "metrics.jsonl").exists, 60)
    run.send_signal(signum)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code, errors[-2000:]
    saved = utils.checkpoints_in(tmp_path / "peft")
    assert len(saved) == 1 and not utils.missing_files(saved[0])
    assert (f"stopped by signal {int(signum)}, saved {saved[0]}; "
            "the same command with --resume goes on") in errors


def test_a_second_interrupt_stops_at_once_and_keeps_the_last_checkpoint(
        tiny_dir, train_file, tmp_path):
    """An update has 200 micro-steps and a checkpoint. In the second update, the first Ctrl-C waits
    for its end, the second does not."""
    run = start_training(command_for(
        tiny_dir, train_file, tmp_path, "--num_train_epochs", "5000", "--save_steps", "200",
        "--gradient_accumulation_steps", "200"), tmp_path)
    wait_for(lambda: utils.checkpoints_in(tmp_path / "peft"), 90)
    run.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert run.poll() is None, "the first one lets the update end"
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130, errors[-2000:]
    saved = [p.name for p in utils.checkpoints_in(tmp_path / "peft")]
    assert saved == ["check_200"], "no later one was written"
    assert "Traceback" not in errors and not utils.missing_files(tmp_path / "peft" / "check_200")
