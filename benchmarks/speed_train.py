"""A training step: prompt trees against padded rows, in seconds and peak memory.

The baseline is what the published code does: every (number, reply) pair is a row with its own copy
of the context, padded to the longest, with the logits of all positions. Model, rows, loss and
adapter are the same on both sides. flop_share is the step's floating point operations per second
over the rate at which the machine multiplies matrices of this model's shapes, measured in the same
run.
"""

from __future__ import annotations

import random
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import trees
import utils
from benchmarks.measure import lengthen, peak_gb, reset_peak, seconds, table
from flags import Args
from methods.possibility import training
from modeling.adapters import add_lora
from modeling.models import load_model, load_tokenizer, model_dir
from modeling.prompts import count_words
from trees import Tree

PUBLISHED_CONTEXT_WORDS = 75  # mean of the published training contexts
MAX_PADDED_TOKENS = 8000  # beyond, the logits of all positions alone need over 6 GB


def measure_training(model_name: str, train_file: str, num_contexts: int) -> dict:
    """The main comparison on num_contexts rows, then the growth table."""
    folder = model_dir(model_name)
    tokenizer = load_tokenizer(folder)
    args = _training_args(num_replies=4)
    model = add_lora(load_model(folder), args).train()
    rows = sorted(utils.read_jsonl(train_file),
                  key=lambda row: abs(count_words(row["context"]) - PUBLISHED_CONTEXT_WORDS))
    result = _compare(model, tokenizer, rows[:num_contexts], args)
    return result | {"growth": _growth(model, tokenizer, rows)}


def _training_args(num_replies: int) -> Args:
    """The published peft recipe, with the adapter that Mistral gets, on query, key and value."""
    return Args(
        method="peft", num_response_per_input=num_replies, replies="first", max_pos_number=9,
        max_num_negatives_per_sample=60, ul_weight=0.5, ul_words="content", no_ul=False,
        numbered_prompts=True, max_length=4000, max_input_length=4000, load_in_4bit=False,
        gradient_checkpointing=False, lora_r=16, lora_alpha=32, lora_dropout=0.0,
        lora_target_modules=["q_proj", "k_proj", "v_proj"])


def _build_tree(row: dict, tokenizer, args, index: int) -> Tree:
    return training.build_tree(row, tokenizer, args, random.Random(index))


def _step(model, forest: list[Tree], args, padded: bool) -> float:
    """One forward and backward pass; returns the loss."""
    batch = trees.to_device(trees.pack(forest), model.device)
    logps = trees.score_rows(model, forest) if padded else trees.score(model, batch)
    loss, _ = training.possibility_loss(logps, batch, args.ul_weight)
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.item()


def _timed(
    model, forests: list[list[Tree]], args, padded: bool, warm_up: bool = True
) -> tuple[float, float, list[float]]:
    """Seconds per step, peak memory in GB and losses; to warm up, the first step is done twice."""
    if warm_up:
        _step(model, forests[0], args, padded)
    reset_peak()
    losses: list[float] = []
    total = seconds(lambda: losses.extend(_step(model, forest, args, padded)
                                          for forest in forests))
    return total / len(forests), peak_gb(), losses


def _compare(model, tokenizer, rows: list[dict], args) -> dict:
    """The main comparison: 4 replies + 12 negatives, one context a step."""
    forests = [[_build_tree(row, tokenizer, args, i)] for i, row in enumerate(rows)]
    rate = _matrix_rate(model, _num_tokens(forests[0]))
    tree_seconds, tree_gb, tree_losses = _timed(model, forests, args, padded=False)
    padded_seconds, padded_gb, padded_losses = _timed(model, forests, args, padded=True)
    worst = max(abs(tree - padded) / padded
                for tree, padded in zip(tree_losses, padded_losses, strict=True))
    flops = sum(_count_flops(model, forest, args) for forest in forests) / len(forests)
    tokens = sum(map(_num_tokens, forests)) / len(forests)
    padded_tokens = sum(map(_num_padded, forests)) / len(forests)
    flop_share = flops / tree_seconds / rate
    table("4 replies + 12 negatives, one context a step",
          ["", "seconds a step", "tokens", "peak memory GB"], [
              ["prompt tree", f"{tree_seconds:.2f}", f"{tokens:.0f}", f"{tree_gb:.2f}"],
              ["padded rows", f"{padded_seconds:.2f}", f"{padded_tokens:.0f}", f"{padded_gb:.2f}"],
              ["ratio", f"{padded_seconds / tree_seconds:.1f}", f"{padded_tokens / tokens:.1f}",
               f"{padded_gb / tree_gb:.1f}"]])
    print(f"the tree reaches {flops / tree_seconds / 1e9:.0f} GFLOP/s, {flop_share:.0%} of the "
          f"{rate / 1e9:.0f} that products of this model's shapes reach alone; losses agree to "
          f"{worst:.0e}")
    return {
        "ratio": round(padded_seconds / tree_seconds, 2), "flop_share": round(flop_share, 3),
        "tree_seconds": round(tree_seconds, 3), "padded_seconds": round(padded_seconds, 3),
        "tree_tokens": round(tokens), "padded_tokens": round(padded_tokens),
        "tree_peak_gb": round(tree_gb, 2), "padded_peak_gb": round(padded_gb, 2),
        "matrix_gflops": round(rate / 1e9), "loss_difference": worst,
    }


def _growth(model, tokenizer, rows: list[dict]) -> list[dict]:
    """How a step grows with replies, context length and contexts per step, tree and padded."""
    cases = [("replies", n, n, 150, 1) for n in (2, 4, 8)]
    cases += [("context tokens", length, 4, length, 1) for length in (100, 200, 400, 800)]
    cases += [("contexts a step", count, 4, 150, count) for count in (1, 2, 4)]
    lines = []
    for what, value, replies, length, count in cases:
        args = _training_args(replies)
        forest = [_build_tree(lengthen(rows, i, length, replies, tokenizer), tokenizer, args, i)
                  for i in range(count)]
        tree_seconds, gb, _ = _timed(model, [forest], args, padded=False)
        line = {"what": what, "value": value, "tokens": _num_tokens(forest),
                "padded_tokens": _num_padded(forest), "seconds": round(tree_seconds, 2),
                "gb": round(gb, 2)}
        if line["padded_tokens"] <= MAX_PADDED_TOKENS:
            # not warmed up: beside steps of many seconds a slow start hardly counts
            padded_seconds, padded_gb, _ = _timed(model, [forest], args, padded=True, warm_up=False)
            line |= {"padded_seconds": round(padded_seconds, 2), "padded_gb": round(padded_gb, 2),
                     "ratio": round(padded_seconds / tree_seconds, 1)}
        lines.append(line)
        print(f"\r{what} {value}: done", end="", file=sys.stderr)
    print(file=sys.stderr)
    columns = ["what", "value", "tokens", "padded_tokens", "seconds", "padded_seconds", "ratio",
               "gb", "padded_gb"]
    table("growth (otherwise 4 replies, 150 context tokens, 1 context a step)", columns,
          [[str(line.get(name, "too large")) for name in columns] for line in lines])
    return lines


def _matrix_rate(model, tokens: int) -> float:
    """Floating point operations per second of one product with every weight matrix of the layers.

    The best of five rounds: what the machine can do, not what it did on average.
    """
    weights = [module.weight for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear) and "lora_" not in name]
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1], device=w.device, dtype=w.dtype)
              for w in weights}

    def multiply() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    with torch.inference_mode():
        best = min(seconds(multiply) for _ in range(5))
    return sum(2 * tokens * weight.numel() for weight in weights) / best


def _count_flops(model, forest: list[Tree], args) -> float:
    """Operations of the products and of attention over all T x T pairs, which kernels compute."""
    # torch has no formula for its CPU attention kernel, so it gets those of the GPU kernels
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        _step(model, forest, args, padded=False)
    return counter.get_total_flops()


def _num_tokens(forest: list[Tree]) -> int:
    return sum(map(trees.num_tokens, forest))


def _num_padded(forest: list[Tree]) -> int:
    """Tokens of the same rows, padded to the longest."""
    lengths = [len(row["input_ids"]) for tree in forest for row in trees.ordinary_rows(tree)]
    return max(lengths) * len(lengths)
