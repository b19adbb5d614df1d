"""A training step on a distribution over targets: one token trie against a padded row per target.

The baseline is what the published code does: every target is a row with its own copy of the
request, padded to the longest of its chunk of 32, with the logits of all positions; chunks are
computed and differentiated one after another. Model, adapter, targets, weights and loss are the
same on both sides.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import trees
from benchmarks.measure import peak_gb, reset_peak, seconds, table
from flags import Args
from methods.diffuse import flags, training
from modeling.adapters import add_lora
from modeling.models import load_model, load_tokenizer, model_dir

CHUNK = 32  # targets computed at a time by the published code
NUM_TARGETS = 100
REPEATS = 3  # of the trie, whose step is too short to be timed once


def measure_diffuse(model_name: str) -> dict:
    """The comparison on the numbers from 1 to 100, then with fewer and more targets."""
    folder = model_dir(model_name)
    tokenizer, args = load_tokenizer(folder), _training_args()
    model = add_lora(load_model(folder), args).train()
    lines = []
    for count in (NUM_TARGETS, 10, 50, 200):
        lines.append(_compare(model, tokenizer, _number_row(count), args))
        print(f"\r{count} targets: done", end="", file=sys.stderr)
    print(file=sys.stderr)
    table("a step on one request", list(lines[0]),
          [[str(value) for value in line.values()] for line in lines])
    main, *growth = lines
    return main | {"growth": growth}


def _training_args() -> Args:
    """The published adapter; all targets at a time."""
    return Args(
        method="diffuse", batch_size=None, max_batch_tokens=10**6, load_in_4bit=False,
        gradient_checkpointing=False, lora_r=4, lora_alpha=8, lora_dropout=0.0,
        lora_target_modules=flags.PUBLISHED["lora_target_modules"])


def _number_row(count: int) -> dict:
    """A request for a random number, each of `count` equally likely."""
    request = (f"Pick a whole number from 1 to {count} at random. Reply with nothing but the "
               "number in curly braces: {number}")
    return {"prompt": request, "response": [""],
            "targets": [f"{{{i}}}" for i in range(1, count + 1)], "weights": [1 / count] * count,
            "eos": True, "file": "benchmark"}


def _trie_step(model, tree: trees.Tree, args) -> float:
    """One forward and backward pass over the trie; returns the loss in nats."""
    batch = trees.to_device(trees.pack([tree]), model.device)
    loss, _ = training.compute_loss(model, batch, args, step=0)
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.item()


def _chunks(sequences: list, weights: list[float]) -> list[tuple[list, list[float]]]:
    """Targets and weights as the published code computes them, CHUNK at a time."""
    return [(sequences[start : start + CHUNK], weights[start : start + CHUNK])
            for start in range(0, len(sequences), CHUNK)]


def _padded_step(
    model, prompt: list[int], sequences: list[list[int]], weights: list[float]
) -> float:
    """The same with a row per target, in chunks; returns the loss in nats."""
    total = 0.0
    for some, their_weights in _chunks(sequences, weights):
        loss = _padded_loss(model, prompt, some, their_weights)
        loss.backward()
        total += loss.item()
    model.zero_grad(set_to_none=True)
    return total


def _padded_loss(
    model, prompt: list[int], sequences: list[list[int]], weights: list[float]
) -> Tensor:
    """-sum_y w(y) log p(y | prompt) over right-padded rows, one per target, with all logits."""
    length, device = max(map(len, sequences)), model.device
    padding = [length - len(ids) for ids in sequences]
    rows = [prompt + ids + [0] * pads for ids, pads in zip(sequences, padding, strict=True)]
    real = torch.tensor([[1.0] * (length - pads) + [0.0] * pads for pads in padding],
                        device=device)  # (targets, length)
    input_ids = torch.tensor(rows, device=device)
    # no attention mask: the pads are on the right, where no real token sees them
    logits = model(input_ids=input_ids, use_cache=False).logits[:, len(prompt) - 1 : -1].float()
    targets = input_ids[:, len(prompt) :, None]
    logps = logits.log_softmax(-1).gather(-1, targets)[..., 0]  # (targets, length)
    return -(torch.tensor(weights, device=device) * (logps * real).sum(1)).sum()


def _compare(model, tokenizer, row: dict, args) -> dict:
    """Seconds, tokens and peak memory of both ways, and how far their losses are apart."""
    tree = training.distribution_tree(row, tokenizer, row["weights"])
    prompt, sequences = tree.root.input_ids, training.target_sequences(row, tokenizer)
    _trie_step(model, tree, args)  # warm up
    reset_peak()
    losses: list[float] = []
    trie_seconds = seconds(lambda: losses.append(_trie_step(model, tree, args)), REPEATS)
    trie_gb = peak_gb()
    reset_peak()
    padded_losses: list[float] = []
    padded_seconds = seconds(lambda: padded_losses.append(
        _padded_step(model, prompt, sequences, row["weights"])))
    padded_tokens = sum(len(some) * (len(prompt) + max(map(len, some)))
                        for some, _ in _chunks(sequences, row["weights"]))
    difference = abs(losses[0] - padded_losses[0]) / padded_losses[0]
    return {
        "targets": len(sequences), "ratio": round(padded_seconds / trie_seconds, 1),
        # the last token of every target is only predicted, never computed
        "tokens": trees.num_tokens(tree) - len(sequences), "padded_tokens": padded_tokens,
        "seconds": round(trie_seconds, 3), "padded_seconds": round(padded_seconds, 2),
        "gb": round(trie_gb, 2), "padded_gb": round(peak_gb(), 2),
        "loss_difference": float(f"{difference:.1e}")}
