"""Method spt: its flags, and runs of train.py from the command to the checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_model, refused
from safetensors.torch import load_file
from spt_cases import ROWS, finished, frozen_hash, packed, prepared, spt_args  # noqa: F401

import train
import trees
from methods.spt import training
from modeling import softprompts
from modeling.checkpoints import load_checkpoint
from modeling.softprompts import soft_prompts

WEIGHTS = "adapter_model.safetensors"

# ---- flags --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "problem"), [
    (["--K", "0"], "--num_prompts 0 must be at least 1"),
    (["--num_virtual_tokens", "0"], "--prompt_length 0 must be at least 1"),
    (["--tau_sim", "0"], "--tau_sim 0 must be above 0"),
    (["--w_ctr", "-1"], "--w_ctr -1 must be at least 0"),
    (["--retriever_learning_rate", "0"], "--retriever_learning_rate 0 must be above 0"),
    (["--w_lm", "0", "--w_sel", "0", "--w_fuse", "0", "--w_ctr", "0"],
     "there is nothing to learn"),
    (["--lora_r", "8"], "--lora_r does nothing with method spt"),
    (["--lora_target_modules", "q_proj"], "--lora_target_modules does nothing with method spt"),
    (["--load_in_4bit"], "--load_in_4bit does not work with method spt"),
    (["--max_context_turns", "0"], "--max_context_turns 0 keeps no turn"),
    (["--ul_weight", "1"], "option --ul_weight is unknown for this method"),
    (["--retriever", "dense"], "invalid choice"),
])
def test_flags_that_cannot_work_are_refused(capsys, flags, problem):
    assert problem in refused(capsys, 2, spt_args, *flags)


def test_published_weights_are_the_defaults():
    args = spt_args()
    assert (args.num_prompts, args.prompt_length, args.fusion) == (4, 8, "probs")
    assert (args.w_lm, args.w_sel, args.w_fuse, args.w_ctr) == (1, 0.4, 1, 0.4)
    assert (args.tau_gold, args.tau_sim, args.ctr_threshold) == (1, 1, 20)


def test_published_recipes_are_resolved_with_their_own_keys():
    paths = (ROOT / "configs" / "spt").glob("*.yaml")
    recipes = {path.stem: train.read_flags(["--config", str(path)]) for path in paths}
    for name, args in recipes.items():
        assert args.exp_name == name and args.method == "spt"
    llama = recipes["llama2"]
    assert llama.w_sel == llama.w_ctr == 1.0 and llama.prompt_length == 1
    assert recipes["llama2_noise"].target_noise == 0.1
    assert recipes["opt_125m"].train_file.endswith("train_self_original_no_cands.txt")


# ---- runs ---------------------------------------------------------------------------------------


def test_a_checkpoint_holds_prompts_and_retriever_alone_and_loads_to_equal_logits(
        finished, tokenizer):  # noqa: F811
    """4 prompts of 8 rows of 32 numbers, a head of 32 x 33, a centre of 32: 8,448 bytes."""
    _, _, checkpoint = finished
    state = load_file(checkpoint / WEIGHTS)
    assert set(state) == {"prompts", "centre", "retriever.head.weight", "retriever.head.bias"}
    assert state["prompts"].shape == (4, 8, 32)
    size, numbers = (checkpoint / WEIGHTS).stat().st_size, 4 * (4 * 8 * 32 + 32 * 33 + 32)
    assert numbers < size < numbers + 1000, "beside the header, nothing else is in the file"
    (model, _, run), (again, _, _) = (load_checkpoint(str(checkpoint)) for _ in range(2))
    batch = packed(ROWS[:2], tokenizer, spt_args())
    assert run["method"] == "spt"
    assert torch.equal(trees.score(model, batch), trees.score(again, batch))
    fresh, _ = prepared(tokenizer)
    assert not torch.allclose(trees.score(fresh, batch), trees.score(model, batch), atol=1e-3)
    assert frozen_hash(model) == frozen_hash(fresh)


def test_the_saved_state_is_the_trained_one(tokenizer, tmp_path):
    model, args = prepared(tokenizer, "--heads", "separate")
    soft_prompts(model).prompts.data += 1
    training.save(model, tmp_path)
    loaded = softprompts.load(make_model(len(tokenizer)), tmp_path)
    batch = packed(ROWS[:2], tokenizer, args)
    assert torch.equal(trees.score(model, batch), trees.score(loaded, batch))
    scores = [soft_prompts(some).scores([[4, 5]]) for some in (model, loaded)]
    assert torch.equal(*scores)


def test_the_retriever_is_centred_on_all_rows_also_those_that_do_not_fit(
        finished, tokenizer, tmp_path):  # noqa: F811
    """With 100 tokens row 1, which is the longest, is dropped; the centre stays the mean of all."""
    _, flags, checkpoint = finished
    train.main([*flags, "--max_length", "100", "--max_steps", "1", "--output_dir", str(tmp_path)])
    run = json.loads((tmp_path / "spt" / "check_1" / "run.json").read_text())
    assert len(run["row_hashes"]) < len(ROWS)
    few = load_file(tmp_path / "spt" / "check_1" / WEIGHTS)
    assert torch.equal(few["centre"], load_file(checkpoint / WEIGHTS)["centre"])


def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(
        finished, tmp_path):  # noqa: F811
    _, flags, checkpoint = finished
    flags = [*flags, "--output_dir", str(tmp_path), "--exp_name", "a"]
    train.main([*flags, "--max_steps", "2"])
    train.main([*flags, "--resume"])
    resumed = tmp_path / "a" / "check_4" / WEIGHTS
    assert resumed.read_bytes() == (checkpoint / WEIGHTS).read_bytes()
    last = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"lm_loss", "sel_loss", "fuse_loss", "ctr_loss", "usage_entropy", "agreement",
            "use_4"} <= set(last)


def test_the_retriever_may_learn_at_a_rate_of_its_own(finished, tmp_path):  # noqa: F811
    """Adam's first step moves every entry by the learning rate.

    After one step at 1e-2 and at 1e-4 the same prompts stand beside retrievers 0.0099 apart.
    """
    _, flags, _ = finished
    states = []
    for name, rate in (("shared", []), ("own", ["--retriever_learning_rate", "1e-4"])):
        train.main([*flags, *rate, "--max_steps", "1", "--output_dir", str(tmp_path),
                    "--exp_name", name])
        states.append(load_file(tmp_path / name / "check_1" / WEIGHTS))
    shared, own = states
    assert torch.equal(shared["prompts"], own["prompts"])
    apart = (shared["retriever.head.weight"] - own["retriever.head.weight"]).abs().max().item()
    assert apart == pytest.approx(0.0099, rel=1e-3)


def test_two_processes_learn_what_one_learns_with_twice_the_accumulation(
        finished, tmp_path):  # noqa: F811
    """Batches of one row: two processes x accumulation 1 see the updates of one process x 2."""
    _, flags, _ = finished
    flags = [*flags, "--output_dir", str(tmp_path), "--batch_size", "1", "--target_noise", "0",
             "--num_epochs", "1", "--save_steps", "4"]
    train.main([*flags, "--exp_name", "alone", "--gradient_accumulation_steps", "2"])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
              "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", "0", str(ROOT / "train.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *flags, "--exp_name", "pair"], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = load_file(tmp_path / "alone" / "check_4" / WEIGHTS)
    pair = load_file(tmp_path / "pair" / "check_2" / WEIGHTS)
    for name, weight in alone.items():
        torch.testing.assert_close(pair[name], weight, rtol=1e-3, atol=1e-5, msg=name)
