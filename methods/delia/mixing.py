"""Task rows among the model's own samples."""

from __future__ import annotations

import json
import random
from pathlib import Path

import utils
from methods.delia.messages import read_messages
from modeling.models import base_fingerprint, model_dir
from utils import USAGE, fail


def read_cache(args) -> list[dict]:
    """The rows of --diverse_file; dies unless its manifest says that the model to be trained wrote them."""
    rows = read_messages(args.diverse_file, args.new_tokens, strict=False)
    if args.allow_foreign_cache or not args.diverse_ratio:
        return rows
    manifest = Path(args.diverse_file).with_suffix(".json")
    hint = "write it with infer.py --method delia --self_sample, or pass --allow_foreign_cache"
    if not manifest.is_file():
        fail(USAGE, f"{args.diverse_file}: no manifest {manifest.name} beside it, so nobody knows which model wrote it", hint)
    try:
        written_by = json.loads(manifest.read_text(encoding="utf-8"))["weights"]
    except (ValueError, KeyError, TypeError):
        fail(USAGE, f"{manifest} is not a manifest of infer.py --self_sample", hint)
    own = base_fingerprint(model_dir(args.model_name))
    if written_by != own:
        by = f"by model {written_by}" if written_by else "through a server, by a model without fingerprint"
        fail(USAGE, f"{args.diverse_file} was written {by}, {args.model_name} is {own}", hint)
    return rows


def is_held_out(row: dict) -> bool:
    """Whether a diverse row is kept for measuring what is forgotten: one query in ten, by its hash alone."""
    return int(utils.row_hash(row), 16) % 10 == 0


def mix_in(num_task: int, cache: list[dict], args) -> list[dict]:
    """diverse_ratio * num_task rows of the cache (to the nearest), each as often as any other but for the last round."""
    wanted = round(num_task * args.diverse_ratio)
    if wanted > len(cache) and not (args.oversample and cache):
        fail(USAGE, f"--diverse_ratio {args.diverse_ratio:g} wants {wanted} diverse rows for {num_task} task rows, "
                  f"{args.diverse_file} has {len(cache)} (without its held-out tenth)",
                  f"draw more, --diverse_ratio {len(cache) / num_task:.4g}, or --oversample")
    rng, chosen = random.Random(f"{args.seed}-diverse"), []
    while len(chosen) < wanted:
        chosen += rng.sample(cache, min(len(cache), wanted - len(chosen)))
    return chosen


def order_rows(rows: list[dict], args, rng: random.Random) -> list[int]:
    """The order of a pass over the rows: shuffled, and for --mix stratified with the task rows evenly spread.

    Then any n successive rows hold the task's share of n, give or take one row.
    """
    order = list(range(len(rows)))
    rng.shuffle(order)
    if args.mix == "shuffle":
        return order
    task = [i for i in order if rows[i]["source"] == "task"]
    diverse = [i for i in order if rows[i]["source"] != "task"]
    total, count = len(rows), len(task)
    return [task.pop() if (place + 1) * count // total > place * count // total else diverse.pop() for place in range(total)]
