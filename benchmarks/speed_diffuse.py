"""A training step on a distribution over targets: one token trie against a padded row per target.

The baseline is what the published code does: every target is a row with its own copy of the request, padded to the
longest of its chunk of 32, with the logits of all positions; chunks are computed and differentiated one after
another. Model, adapter, targets, weights and loss are the same on both sides.
"""

from __future__ import annotations

import argparse
import sys

import torch
from measure import peak_gb, reset_peak, seconds, table

import trees
from methods.diffuse import flags, training
from modeling.adapters import add_lora
from modeling.models import load_model, load_tokenizer, model_dir

CHUNK = 32  # targets computed at a time by the published code
NUM_TARGETS = 100


def measure_diffuse(model_name: str) -> dict:
    """The comparison on the numbers from 1 to 100, then with fewer and more targets."""
    folder = model_dir(model_name)
    tokenizer, args = load_tokenizer(folder), training_args()
    model = add_lora(load_model(folder), tokenizer, args).train()
    lines = []
    for count in (NUM_TARGETS, 10, 50, 200):
        lines.append(compare(model, tokenizer, number_row(count), args))
        print(f"\r{count} targets: done", end="", file=sys.stderr)
    print(file=sys.stderr)
    table("a step on one request", list(lines[0]), [[str(value) for value in line.values()] for line in lines])
    main, *growth = lines
    return main | {"growth": growth}


def training_args() -> argparse.Namespace:
    """The published adapter; all targets at a time."""
    return argparse.Namespace(
        method="diffuse", batch_size=None, max_batch_tokens=10**6, load_in_4bit=False,
        gradient_checkpointing=False, lora_r=4, lora_alpha=8, lora_dropout=0.0,
        lora_target_modules=flags.DEFAULTS["lora_target_modules"])


def number_row(count: int) -> dict:
    """A request for a random number, each of `count` equally likely."""
    request = f"Pick a whole number from 1 to {count} at random. Reply with nothing but the number in curly braces: {{number}}"
    return {"prompt": request, "response": [""], "targets": [f"{{{i}}}" for i in range(1, count + 1)],
            "weights": [1 / count] * count, "eos": True, "file": "benchmark"}


def trie_step(model, tree: trees.Tree, args) -> float:
    """One forward and backward pass over the trie; returns the loss in nats."""
    batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in trees.pack([tree]).items()}
    loss, _ = training.compute_loss(model, batch, args)
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.item()


def padded_step(model, prompt: list[int], sequences: list[list[int]], weights: list[float]) -> float:
    """The same with a row per target, in chunks; returns the loss in nats."""
    total = 0.0
    for start in range(0, len(sequences), CHUNK):
        loss = padded_loss(model, prompt, sequences[start : start + CHUNK], weights[start : start + CHUNK])
        loss.backward()
        total += loss.item()
    model.zero_grad(set_to_none=True)
    return total


def padded_loss(model, prompt: list[int], sequences: list[list[int]], weights: list[float]):
    """-sum_y w(y) log p(y | prompt) over right-padded rows, one per target sequence, with all logits."""
    length = max(map(len, sequences))
    rows = [prompt + ids + [0] * (length - len(ids)) for ids in sequences]
    real = torch.tensor([[1.0] * len(ids) + [0.0] * (length - len(ids)) for ids in sequences], device=model.device)
    input_ids = torch.tensor(rows, device=model.device)
    logits = model(input_ids=input_ids, use_cache=False).logits[:, len(prompt) - 1 : -1].float()
    logps = logits.log_softmax(-1).gather(-1, input_ids[:, len(prompt) :, None])[..., 0]  # (targets, length)
    return -(torch.tensor(weights, device=model.device) * (logps * real).sum(1)).sum()


def compare(model, tokenizer, row: dict, args) -> dict:
    tree = training.distribution_tree(row, tokenizer, row["weights"])
    prompt, sequences = tree.root.input_ids, training.target_sequences(row, tokenizer)
    repeats = 3
    trie_step(model, tree, args)  # warm up
    reset_peak()
    trie_losses: list[float] = []
    trie_seconds = seconds(lambda: trie_losses.append(trie_step(model, tree, args)), repeats)
    trie_gb = peak_gb()
    reset_peak()
    padded_losses: list[float] = []
    padded_seconds = seconds(lambda: padded_losses.append(padded_step(model, prompt, sequences, row["weights"])))
    return {
        "targets": len(sequences), "ratio": round(padded_seconds / trie_seconds, 1),
        "tokens": trees.num_tokens(tree) - len(sequences), "padded_tokens": sum(
            len(chunk) * (len(prompt) + max(map(len, chunk))) for chunk in
            (sequences[start : start + CHUNK] for start in range(0, len(sequences), CHUNK))),
        "seconds": round(trie_seconds, 3), "padded_seconds": round(padded_seconds, 2),
        "gb": round(trie_gb, 2), "padded_gb": round(peak_gb(), 2),
        "loss_difference": float(f"{abs(trie_losses[0] - padded_losses[0]) / padded_losses[0]:.1e}")}
