"""Drawing responses: shared prefill against copied prompts, diverse beams against beams.

The baseline is what the published code does: one context at a time, its prompt copied for every
response, `generate` from nothing. Both sides sample, and both do without an end token, so that they
write equally many tokens.
"""

from __future__ import annotations

import sys

import torch
from transformers import GenerationConfig

import utils
from benchmarks.measure import lengthen, peak_gb, reset_peak, seconds, table
from decoding.beams import beam, diverse
from decoding.sampling import sample
from modeling.models import load_model, load_tokenizer, model_dir
from modeling.prompts import fit_prompts
from trees import Tree, branch_prompts, left_pad

# rows a call, responses a row, tokens of a context, tokens of a response
ROWS, RESPONSES, CONTEXT, NEW = 8, 5, 300, 25
# the growth table has eleven cases: fewer rows and shorter responses keep it to minutes
GROWTH_ROWS, GROWTH_NEW = 4, 8
UNLIMITED = 10**6  # words and tokens of a prompt: nothing is cut


def measure_decoding(model_name: str, train_file: str) -> dict:
    """Sampling, beam search, and how sampling grows."""
    folder = model_dir(model_name)
    tokenizer, model = load_tokenizer(folder), load_model(folder).eval()
    rows = utils.read_jsonl(train_file)
    forest = _make_forest(rows, tokenizer, ROWS, CONTEXT, RESPONSES)
    _draw_shared(model, tokenizer, forest[:1], 2)  # warm up
    result = _compare_sampling(model, tokenizer, forest)
    result |= _compare_beams(model, tokenizer, forest)
    return result | {"growth": _growth(model, tokenizer, rows)}


def _make_forest(rows: list[dict], tokenizer, count: int, length: int, responses: int
                 ) -> list[Tree]:
    """Contexts of about `length` tokens, each under possibility numbers 1 .. responses."""
    forest, numbers = [], list(range(1, responses + 1))
    for i in range(count):
        row = lengthen(rows, i, length, 1, tokenizer)
        prompts, _ = fit_prompts(row, numbers, tokenizer, UNLIMITED, UNLIMITED)
        forest.append(Tree(branch_prompts(prompts, numbers)))
    return forest


def _draw_shared(model, tokenizer, forest: list[Tree], num_tokens: int) -> list:
    no_end = model.config.vocab_size  # an end token that no logits have
    seeds = list(range(len(forest)))
    return sample(model, forest, seeds, tokenizer.pad_token_id, no_end, num_tokens)


def _copied_prompts(tree: Tree) -> list[list[int]]:
    return [tree.root.input_ids + child.input_ids for child in tree.root.children]


@torch.inference_mode()
def _draw_copied(model, tokenizer, forest: list[Tree], num_tokens: int) -> None:
    """One context at a time, its prompts copied."""
    for tree in forest:
        ids, mask = left_pad(_copied_prompts(tree), tokenizer.pad_token_id, model.device)
        # a whole configuration, so that the model's own cannot bring an end token or a top_k
        model.generate(ids, attention_mask=mask, generation_config=GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=num_tokens,
            pad_token_id=tokenizer.pad_token_id))


def _prompt_tokens(forest: list[Tree]) -> tuple[int, int]:
    """Prompt tokens computed with sharing, and without."""
    shared = sum(len(tree.root.input_ids) + sum(len(c.input_ids) for c in tree.root.children)
                 for tree in forest)
    return shared, sum(len(prompt) for tree in forest for prompt in _copied_prompts(tree))


def _compare_sampling(model, tokenizer, forest: list[Tree]) -> dict:
    responses = sum(len(tree.root.children) for tree in forest)
    reset_peak()
    shared = seconds(lambda: _draw_shared(model, tokenizer, forest, NEW))
    shared_gb = peak_gb()
    reset_peak()
    copied = seconds(lambda: _draw_copied(model, tokenizer, forest, NEW))
    copied_gb = peak_gb()
    tokens, copied_tokens = _prompt_tokens(forest)
    ratio = f"{copied / shared:.1f}"
    table(f"sampling: {len(forest)} contexts of {CONTEXT} tokens, {RESPONSES} responses of {NEW} "
          "tokens", ["", "seconds", "responses/s", "prompt tokens", "peak memory GB"], [
              ["shared prefill, one call", f"{shared:.1f}", f"{responses / shared:.2f}",
               str(tokens), f"{shared_gb:.2f}"],
              ["copied prompts, one context a call", f"{copied:.1f}", f"{responses / copied:.2f}",
               str(copied_tokens), f"{copied_gb:.2f}"],
              ["ratio", ratio, ratio, f"{copied_tokens / tokens:.1f}",
               f"{copied_gb / shared_gb:.1f}"]])
    return {"shared_prefill_ratio": round(copied / shared, 2),
            "shared_responses_per_second": round(responses / shared, 2),
            "copied_responses_per_second": round(responses / copied, 2),
            "prompt_tokens": tokens, "prompt_tokens_without_sharing": copied_tokens,
            "shared_peak_gb": round(shared_gb, 2), "copied_peak_gb": round(copied_gb, 2)}


def _compare_beams(model, tokenizer, forest: list[Tree]) -> dict:
    """Both searches on the same shared prefill, so that only the search differs."""
    forest = [Tree(branch_prompts([_copied_prompts(tree)[0]], [1])) for tree in forest]
    options = {"pad_id": tokenizer.pad_token_id, "eos_id": model.config.vocab_size,
               "max_new_tokens": NEW, "num_beams": RESPONSES, "num_responses": RESPONSES}
    plain_times, diverse_times = [], []
    for _ in range(2):  # in turns, so that a slow minute of the machine meets both
        plain_times.append(seconds(lambda: beam(model, forest, **options)))
        diverse_times.append(
            seconds(lambda: diverse(model, forest, num_groups=RESPONSES, **options)))
    plain, grouped = min(plain_times), min(diverse_times)
    table(f"{len(forest)} contexts, {RESPONSES} beams, {NEW} tokens", ["", "seconds", "ratio"], [
        ["beam search", f"{plain:.1f}", "1.00"],
        [f"diverse beam search, {RESPONSES} groups", f"{grouped:.1f}", f"{grouped / plain:.2f}"]])
    return {"diverse_over_beam": round(grouped / plain, 3), "beam_seconds": round(plain, 2),
            "diverse_seconds": round(grouped, 2)}


def _growth(model, tokenizer, rows: list[dict]) -> list[dict]:
    """How drawing grows with responses, context length and rows a call, shared and copied."""
    cases = [("responses", n, GROWTH_ROWS, CONTEXT, n) for n in (2, 4, 8, 16)]
    cases += [("context tokens", n, GROWTH_ROWS, n, RESPONSES) for n in (100, 300, 600)]
    cases += [("rows a call", n, n, CONTEXT, RESPONSES) for n in (1, 2, 4, 8)]
    lines = []
    for what, value, count, length, responses in cases:
        forest = _make_forest(rows, tokenizer, count, length, responses)
        reset_peak()
        shared = seconds(lambda forest=forest: _draw_shared(model, tokenizer, forest, GROWTH_NEW))
        gb = peak_gb()
        copied = seconds(lambda forest=forest: _draw_copied(model, tokenizer, forest, GROWTH_NEW))
        tokens, copied_tokens = _prompt_tokens(forest)
        lines.append({"what": what, "value": value, "prompt tokens": tokens,
                      "copied tokens": copied_tokens, "s a row": round(shared / count, 2),
                      "copied s a row": round(copied / count, 2),
                      "ratio": round(copied / shared, 1), "gb": round(gb, 2)})
        print(f"\r{what} {value}: done", end="", file=sys.stderr)
    print(file=sys.stderr)
    table(f"growth (otherwise {RESPONSES} responses of {GROWTH_NEW} tokens, {CONTEXT} context "
          f"tokens, {GROWTH_ROWS} rows a call)", list(lines[0]),
          [[str(value) for value in line.values()] for line in lines])
    return lines
