"""Drawing responses: shared prefill and batches against copied prompts, diverse beam search against beam search.

The baseline is what the published code does: one context at a time, its prompt copied for every response,
`generate` from nothing. Both sides sample, and no end token is known, so that both write equally many tokens.
"""

from __future__ import annotations

import sys

import torch
from measure import lengthen, peak_gb, reset_peak, seconds, table
from transformers import GenerationConfig

import utils
from decoding.beams import beam
from decoding.sampling import sample
from modeling.models import load_model, load_tokenizer, model_dir
from modeling.prompts import fit_prompts
from trees import Tree, branch_prompts, left_pad

ROWS, RESPONSES, CONTEXT, NEW = 8, 5, 300, 25  # rows a call, responses a row, tokens of a context and of a response
GROWTH_ROWS, GROWTH_NEW = 4, 8


def measure_decoding(model_name: str, train_file: str) -> dict:
    folder = model_dir(model_name)
    tokenizer, model = load_tokenizer(folder), load_model(folder).eval()
    rows = utils.read_jsonl(train_file)
    forest = make_forest(rows, tokenizer, ROWS, CONTEXT, RESPONSES)
    draw_shared(model, tokenizer, forest[:1], 2)  # warm up
    result = compare_sampling(model, tokenizer, forest) | compare_beams(model, tokenizer, forest)
    return result | {"growth": growth(model, tokenizer, rows)}


def make_forest(rows: list[dict], tokenizer, count: int, length: int, responses: int) -> list[Tree]:
    """Contexts of about `length` tokens, each under possibility numbers 1 .. responses."""
    forest = []
    for i in range(count):
        row = lengthen(rows, i, length, 1, tokenizer)
        prompts, _ = fit_prompts(row, list(range(1, responses + 1)), tokenizer, 10**6, 10**6)
        forest.append(Tree(branch_prompts(prompts, list(range(1, responses + 1)))))
    return forest


def draw_shared(model, tokenizer, forest: list[Tree], new: int) -> list:
    never = model.config.vocab_size  # an end token that no logits have
    return sample(model, forest, list(range(len(forest))), tokenizer.pad_token_id, never, new)


def copied_prompts(tree: Tree) -> list[list[int]]:
    return [tree.root.input_ids + child.input_ids for child in tree.root.children]


@torch.inference_mode()
def draw_copied(model, tokenizer, forest: list[Tree], new: int) -> None:
    """One context at a time, its prompts copied."""
    for tree in forest:
        ids, mask = left_pad(copied_prompts(tree), tokenizer.pad_token_id, model.device)
        model.generate(ids, attention_mask=mask, generation_config=GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=new, pad_token_id=tokenizer.pad_token_id))


def prompt_tokens(forest: list[Tree]) -> tuple[int, int]:
    """Prompt tokens computed with sharing, and without."""
    shared = sum(len(tree.root.input_ids) + sum(len(c.input_ids) for c in tree.root.children) for tree in forest)
    return shared, sum(len(prompt) for tree in forest for prompt in copied_prompts(tree))


def compare_sampling(model, tokenizer, forest: list[Tree]) -> dict:
    responses = sum(len(tree.root.children) for tree in forest)
    reset_peak()
    shared = seconds(lambda: draw_shared(model, tokenizer, forest, NEW))
    shared_gb = peak_gb()
    reset_peak()
    copied = seconds(lambda: draw_copied(model, tokenizer, forest, NEW))
    copied_gb = peak_gb()
    tokens = prompt_tokens(forest)
    table(f"sampling: {len(forest)} contexts of {CONTEXT} tokens, {RESPONSES} responses of {NEW} tokens",
          ["", "seconds", "responses/s", "prompt tokens", "peak memory GB"], [
              ["shared prefill, one call", f"{shared:.1f}", f"{responses / shared:.2f}", str(tokens[0]), f"{shared_gb:.2f}"],
              ["copied prompts, one context a call", f"{copied:.1f}", f"{responses / copied:.2f}", str(tokens[1]), f"{copied_gb:.2f}"],
              ["ratio", f"{copied / shared:.1f}", f"{copied / shared:.1f}", f"{tokens[1] / tokens[0]:.1f}", f"{copied_gb / shared_gb:.1f}"]])
    return {"shared_prefill_ratio": round(copied / shared, 2), "shared_responses_per_second": round(responses / shared, 2),
            "copied_responses_per_second": round(responses / copied, 2), "prompt_tokens": tokens[0],
            "prompt_tokens_without_sharing": tokens[1], "shared_peak_gb": round(shared_gb, 2), "copied_peak_gb": round(copied_gb, 2)}


def compare_beams(model, tokenizer, forest: list[Tree]) -> dict:
    """Both searches on the same shared prefill, so that only the search differs."""
    never = model.config.vocab_size
    forest = [Tree(branch_prompts([copied_prompts(tree)[0]], [1])) for tree in forest]
    common = dict(pad_id=tokenizer.pad_token_id, eos_id=never, max_new_tokens=NEW, num_beams=RESPONSES, num_responses=RESPONSES)
    plain, diverse = [], []
    for _ in range(2):  # in turns, so that a slow minute of the machine meets both
        plain.append(seconds(lambda: beam(model, forest, **common)))
        diverse.append(seconds(lambda: diverse(model, forest, num_groups=RESPONSES, **common)))
    table(f"{len(forest)} contexts, {RESPONSES} beams, {NEW} tokens", ["", "seconds", "ratio"], [
        ["beam search", f"{min(plain):.1f}", "1.00"],
        [f"diverse beam search, {RESPONSES} groups", f"{min(diverse):.1f}", f"{min(diverse) / min(plain):.2f}"]])
    return {"diverse_over_beam": round(min(diverse) / min(plain), 3), "beam_seconds": round(min(plain), 2),
            "diverse_seconds": round(min(diverse), 2)}


def growth(model, tokenizer, rows: list[dict]) -> list[dict]:
    """How drawing grows with responses, context length and rows a call, shared and copied."""
    cases = [("responses", n, GROWTH_ROWS, CONTEXT, n) for n in (2, 4, 8, 16)]
    cases += [("context tokens", n, GROWTH_ROWS, n, RESPONSES) for n in (100, 300, 600)]
    cases += [("rows a call", n, n, CONTEXT, RESPONSES) for n in (1, 2, 4, 8)]
    lines = []
    for what, value, count, length, responses in cases:
        forest = make_forest(rows, tokenizer, count, length, responses)
        reset_peak()
        shared = seconds(lambda forest=forest: draw_shared(model, tokenizer, forest, GROWTH_NEW))
        gb = peak_gb()
        copied = seconds(lambda forest=forest: draw_copied(model, tokenizer, forest, GROWTH_NEW))
        tokens = prompt_tokens(forest)
        lines.append({"what": what, "value": value, "prompt tokens": tokens[0], "copied tokens": tokens[1],
                      "s a row": round(shared / count, 2), "copied s a row": round(copied / count, 2),
                      "ratio": round(copied / shared, 1), "gb": round(gb, 2)})
        print(f"\r{what} {value}: done", end="", file=sys.stderr)
    print(file=sys.stderr)
    table(f"growth (otherwise {RESPONSES} responses of {GROWTH_NEW} tokens, {CONTEXT} context tokens, {GROWTH_ROWS} rows a call)",
          list(lines[0]), [[str(v) for v in line.values()] for line in lines])
    return lines
