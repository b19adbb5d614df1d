"""train.py on the tiny model: what a run leaves, what its flags do, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import CHATML, DIALOGUES, ROOT, command, write_jsonl
from safetensors.torch import load_file
from training_cases import command_for, digest, read_metrics, read_run, train_whole
from transformers.models.llama.modeling_llama import LlamaMLP

import train
import utils
from modeling.checkpoints import load_checkpoint
from modeling.models import load_model
from training import runs


@pytest.fixture(scope="module")
def finished(tiny_dir, train_file, tmp_path_factory):
    return train_whole(tiny_dir, train_file, tmp_path_factory.mktemp("runs"))


# ---- what a run leaves --------------------------------------------------------------------------


def test_a_run_leaves_whole_checkpoints_that_plain_peft_loads(finished, tiny_dir):
    """20 micro-steps saved every 4: check_4 ... check_20; nothing else that looks like one."""
    from peft import PeftModel

    saved = utils.checkpoints_in(finished)
    assert [p.name for p in saved] == [f"check_{n}" for n in (20, 16, 12, 8, 4)]
    assert not any(utils.missing_files(p) for p in saved)
    run = read_run(finished / "check_20")
    assert run["method"] == "peft" and run["args"]["num_response_per_input"] == 4
    assert len(run["row_hashes"]) == 4
    assert not list(finished.rglob("training_args.bin")), "no pickle of arguments"
    base = load_model(str(tiny_dir))
    ids = torch.tensor([[5, 6, 7]])
    before = base(ids).logits
    loaded = PeftModel.from_pretrained(base, finished / "check_20").eval()
    ours, tokenizer, _ = load_checkpoint(str(finished / "check_20"))
    torch.testing.assert_close(loaded(ids).logits, ours(ids).logits, rtol=0, atol=0)
    assert not torch.allclose(before, ours(ids).logits) and tokenizer.chat_template == CHATML


def test_the_adapter_holds_exactly_its_own_tensors_and_all_moved(finished):
    """2 layers x (q, v) x (A, B) = 8 tensors; every B started at zero."""
    weights = load_file(finished / "check_20" / "adapter_model.safetensors")
    assert set(weights) == {
        f"base_model.model.model.layers.{i}.self_attn.{m}_proj.lora_{x}.weight"
        for i in (0, 1) for m in "qv" for x in "AB"}
    assert all(w.abs().sum() > 0 for w in weights.values())


def test_metrics_hold_both_losses_and_fall(finished):
    lines = read_metrics(finished)
    assert [line["step"] for line in lines] == list(range(2, 21, 2))
    assert all({"mle_loss", "ul_loss"} <= set(line) for line in lines)
    assert lines[-1]["mle_loss"] < lines[0]["mle_loss"]


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(
        finished, tiny_dir, train_file, tmp_path):
    for name, seed in (("again", "42"), ("other", "43")):
        train.main(command_for(tiny_dir, train_file, tmp_path, "--exp_name", name,
                               "--num_train_epochs", "1", "--seed", seed))
    assert digest(tmp_path / "again" / "check_4") == digest(finished / "check_4")
    assert digest(tmp_path / "other" / "check_4") != digest(finished / "check_4")


def test_the_last_micro_steps_are_trained_and_saved_although_no_multiple(
        tiny_dir, train_file, tmp_path):
    """3 micro-steps, accumulation 2, saves every 4: a full update, one of one step, check_3."""
    train.main(command_for(tiny_dir, train_file, tmp_path, "--max_steps", "3"))
    assert [p.name for p in utils.checkpoints_in(tmp_path / "peft")] == ["check_3"]


def test_one_row_and_a_batch_of_eight_work(tiny_dir, tmp_path):
    file = write_jsonl(tmp_path / "one.jsonl", DIALOGUES[:1])
    train.main(command_for(tiny_dir, file, tmp_path, "--per_device_train_batch_size", "8",
                           "--num_train_epochs", "2"))
    assert (tmp_path / "peft" / "check_1").is_dir()


@pytest.mark.parametrize(("more", "method"), [
    (["--no_ul"], "otm"), (["--method", "oto"], "oto"), (["--no_ul", "--number"], "peft")])
def test_methods_are_recorded_as_what_they_are(tiny_dir, train_file, tmp_path, more, method):
    train.main(command_for(tiny_dir, train_file, tmp_path, "--exp_name", "x", "--max_steps", "2",
                           *more))
    run = read_run(tmp_path / "x" / "check_2")
    assert run["method"] == run["args"]["method"] == method and run["args"]["no_ul"] is True


def test_a_checkpoint_remembers_the_lora_settings_that_no_flag_gave(
        tiny_dir, train_file, tmp_path):
    """The defaults for Llama, of which the tiny model is one: r 64, alpha 16, dropout 0.1, q v."""
    train.main(["--model_name", str(tiny_dir), "--train_file", str(train_file), "--max_steps", "1",
                "--output_dir", str(tmp_path)])
    args = read_run(tmp_path / "peft" / "check_1")["args"]
    settings = {name: value for name, value in args.items() if name.startswith("lora_")}
    assert settings == {"lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.1,
                        "lora_target_modules": ["q_proj", "v_proj"]}


# ---- flags that act -----------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "rates"), [
    ([], [0.01, 0.01, 0.01]),
    (["--lr_scheduler_type", "linear"], [0.01, 0.01 * 2 / 3, 0.01 / 3]),
    (["--lr_warmup_steps", "2"], [0, 0.005, 0.01]),
])
def test_the_learning_rate_stays_falls_to_zero_or_rises_first(
        tiny_dir, train_file, tmp_path, more, rates):
    """Three updates. linear: the line ends at 0 after the third; warm-up: 0/2, 1/2, 2/2."""
    train.main(command_for(tiny_dir, train_file, tmp_path, "--num_train_epochs", "2",
                           "--max_steps", "6", "--save_steps", "6", *more))
    state = json.loads((tmp_path / "peft" / "check_6" / "trainer_state.json").read_text())
    shown = [line["learning_rate"] for line in state["log_history"] if "learning_rate" in line]
    assert shown == pytest.approx(rates)


def test_the_gradient_norm_is_clipped_where_flags_say_so_and_epsilon_damps_the_update(
        tiny_dir, train_file, tmp_path):
    """One update at rate 1 from B = 0, in which only B has a gradient g. AdamW's first step is
    -g / (|g| + epsilon), so with epsilon 1e4 it is -g / 1e4, as long as the clipped gradient:
    |g| itself, 0.3 with --clip_norm, or what --max_grad_norm says. A second run has epsilon 1e3.
    """
    once = ["--lora_dropout", "0", "--learning_rate", "1", "--max_steps", "1",
            "--gradient_accumulation_steps", "1", "--loss_steps", "1"]
    lengths = {}
    for name, more in {"free": [], "clip": ["--clip_norm"], "max": ["--max_grad_norm", "0.1"],
                       "damped": ["--adam_epsilon", "1e3"]}.items():
        train.main(command_for(tiny_dir, train_file, tmp_path, "--exp_name", name,
                               *once, "--adam_epsilon", "1e4", *more))
        folder = tmp_path / name / "check_1"
        update = [w.flatten() for key, w in
                  load_file(folder / "adapter_model.safetensors").items() if "lora_B" in key]
        lengths[name] = torch.cat(update).norm().item()
        state = json.loads((folder / "trainer_state.json").read_text())
        norm = state["log_history"][0]["grad_norm"]  # before it is clipped
    assert norm > 0.3
    assert lengths["free"] == pytest.approx(norm / 1e4, rel=1e-2)
    assert lengths["clip"] == pytest.approx(0.3 / 1e4, rel=1e-2)
    assert lengths["max"] == pytest.approx(0.1 / 1e4, rel=1e-2)
    assert lengths["damped"] == pytest.approx(norm / 1e3, rel=1e-2)


def test_gradient_checkpointing_computes_every_layer_twice_and_changes_no_byte(
        tiny_dir, train_file, tmp_path, monkeypatch):
    """2 layers, 4 micro-steps: 8 calls of the MLP on the way forth, 8 more on the way back."""
    calls, forward = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(1) or forward(self, x))
    counts = {}
    for name, more in (("plain", []), ("less", ["--gradient_checkpointing"])):
        calls.clear()
        train.main(command_for(tiny_dir, train_file, tmp_path, "--exp_name", name,
                               "--num_train_epochs", "1", *more))
        counts[name] = len(calls)
    assert counts == {"plain": 8, "less": 16}
    assert digest(tmp_path / "plain" / "check_4") == digest(tmp_path / "less" / "check_4")


def test_warmup_steps_are_likelihood_only_with_peft_as_published_and_the_learning_rates_elsewhere():
    words = ["--train_file", "x", "--warmup_steps", "7"]
    args = train.read_flags(words)
    assert (args.likelihood_only_steps, args.lr_warmup_steps) == (7, 0)
    args = train.read_flags([*words, "--method", "diffuse"])
    assert args.lr_warmup_steps == 7
    args = train.read_flags(["--train_file", "x", "--lr_warmup_steps", "7"])
    assert (args.likelihood_only_steps, args.lr_warmup_steps) == (-1, 7)


def test_a_hyphenated_flag_and_a_config_train_from_the_command_line(
        tiny_dir, train_file, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"train_file: {train_file}\nmodel_name: {tiny_dir}\nlearning_rate: 1e-4\n"
        "lora_target_modules: [q_proj]\nmax_steps: 9\n")
    done = command("train.py", "--config", "run.yaml", "--max-steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path / "checkpoints" / "peft" / "check_2")
    assert run["args"]["learning_rate"] == 1e-4 and run["args"]["max_steps"] == 2
    assert "next: python infer.py --model_name_or_path checkpoints/peft/check_2/" in done.stdout


# ---- several processes --------------------------------------------------------------------------


def test_only_the_first_process_prints_and_the_others_get_their_screen_back(monkeypatch, capsys):
    for rank, printed in (("0", "inside\noutside\n"), ("1", "outside\n")):
        monkeypatch.setenv("RANK", rank)
        with runs.only_main_process_prints():
            print("inside")
        print("outside")
        assert capsys.readouterr().out == printed


def test_two_processes_give_the_loss_of_one_with_twice_the_accumulation(
        tiny_dir, train_file, tmp_path):
    """8 contexts: two processes x 1 context x accumulation 1 sees the updates of one process x 2.

    accelerate's `--cpu` starts a single process unless mpirun is there; `--multi_gpu` starts two,
    also on a CPU.
    """
    more = ["--num_train_epochs", "2", "--lora_dropout", "0", "--save_steps", "4",
            "--loss_steps", "1"]
    train.main(command_for(tiny_dir, train_file, tmp_path, "--exp_name", "alone", *more))
    pair = command_for(tiny_dir, train_file, tmp_path, "--exp_name", "pair", *more,
                       "--gradient_accumulation_steps", "1")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
              "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", "0", str(ROOT / "train.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *pair], cwd=tmp_path, env=env, capture_output=True, text=True,
                          timeout=90)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("next: python infer.py") == 1
    two = load_file(tmp_path / "pair" / "check_4" / "adapter_model.safetensors")
    one = load_file(tmp_path / "alone" / "check_8" / "adapter_model.safetensors")
    assert two.keys() == one.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    alone, both = ([line["mle_loss"] for line in read_metrics(tmp_path / name)]
                   for name in ("alone", "pair"))
    assert both == pytest.approx(alone, rel=1e-5)
