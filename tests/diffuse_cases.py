"""Prompt files, a model that can learn them, and runs of method diffuse that tests share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model

import infer
import train

PROMPT = {"request": "Pick a number.", "response": "", "targets": ["{1}", "{2}", "{12}"]}


def write_prompt(path: Path, **changes) -> Path:
    """A prompt file; a change to ... leaves the field out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prompt = {key: value for key, value in (PROMPT | changes).items() if value is not ...}
    path.write_text(json.dumps(prompt), encoding="utf-8")
    return path


def number_row(count: int) -> dict:
    """A request for a random number, each of `count` equally likely."""
    return {"prompt": f"Pick a whole number from 1 to {count} at random.", "response": [""],
            "targets": [f"{{{i}}}" for i in range(1, count + 1)], "weights": [1 / count] * count,
            "eos": True, "file": "numbers.json"}


def padded_loss(model, prompt: list[int], sequences: list[list[int]], weights: list[float]):
    """-sum_y w(y) log p(y | prompt) in nats over right-padded rows, a row per target sequence."""
    length = max(map(len, sequences))
    input_ids = torch.tensor([prompt + ids + [0] * (length - len(ids)) for ids in sequences])
    logits = model(input_ids=input_ids, use_cache=False).logits[:, len(prompt) - 1 : -1]
    targets = input_ids[:, len(prompt) :, None]
    logps = logits.log_softmax(-1).gather(-1, targets)[..., 0]  # (targets, length)
    is_token = torch.arange(length) < torch.tensor([[len(ids)] for ids in sequences])
    return -(torch.tensor(weights, dtype=logps.dtype) * (logps * is_token).sum(1)).sum()


@pytest.fixture(scope="session")
def prompt_dir(tmp_path_factory) -> Path:
    """A task of two requests with the same weights: 1/2, 1/4, 1/4."""
    folder = tmp_path_factory.mktemp("prompts") / "numbers"
    answers = {"targets": ["{1}", "{2}", "{3}"], "weights": [2, 1, 1]}
    write_prompt(folder / "a.json", request="A number from 1 to 3?", **answers)
    write_prompt(folder / "b.json", request="One, two or three?", **answers)
    return folder


@pytest.fixture(scope="session")
def able_dir(tokenizer, tmp_path_factory) -> Path:
    """The tiny model, made able to fit a distribution.

    Its end token gets an embedding (that of padding starts at zero), and logits may be large.
    """
    folder, model = tmp_path_factory.mktemp("able"), make_model(len(tokenizer))
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight[0] = weight[1:].std() * torch.randn(32)
        model.model.norm.weight *= 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def diffuse_config(prompt_dir, able_dir, tmp_path_factory) -> Path:
    """A config with the published keys."""
    out = tmp_path_factory.mktemp("diffuse")
    path = out / "run.yaml"
    path.write_text(f"""method: diffuse
model: {able_dir}
train_prompts: [{prompt_dir}]
test_prompts: []
alg_config:
  n_iters: 150
  batch_size: 2
  early_stop: true
  gamma: 0.05
output_dir: {out}
exp_name: run
load_model: false
generate: false
learning_rate: 1e-2
lora_r: 16
lora_alpha: 32
loss_steps: 1
save_steps: 100
""")
    return path


@pytest.fixture(scope="session")
def trained(diffuse_config) -> Path:
    """The folder of a run that stopped early, since all prompts fit."""
    train.main(["--config", str(diffuse_config)])
    return diffuse_config.parent / "run"


@pytest.fixture(scope="session")
def sampled(trained, diffuse_config) -> list[Path]:
    """The outs files of both modes, untuned and lora, 150 replies a prompt."""
    files = []
    for mode in ("untuned", "lora"):
        files.append(diffuse_config.parent / f"{mode}.jsonl")
        infer.main(["--method", "diffuse", "--config", str(diffuse_config), "--mode", mode,
                    "--n_generations", "150", "--n_batch_size", "40", "--max_new_tokens", "6",
                    "--save_file", str(files[-1])])
    return files
