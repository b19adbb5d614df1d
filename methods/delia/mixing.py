"""Task rows among the model's own samples."""

from __future__ import annotations

import json
import random
from pathlib import Path

import utils
from methods.delia.messages import read_messages
from modeling.models import base_fingerprint, model_dir
from utils import USAGE, fail


def read_cache(path: str, new_tokens: list[str]) -> list[dict]:
    """The diverse rows that may be trained on: all but the held-out tenth."""
    return [row for row in read_messages(path, new_tokens, strict=False) if not is_held_out(row)]


def check_author(path: str, model_name: str) -> None:
    """Exit unless the manifest of a cache says that the model to be trained wrote it."""
    manifest = Path(path).with_suffix(".json")
    hint = "write it with infer.py --method delia --self_sample, or pass --allow_foreign_cache"
    if not manifest.is_file():
        fail(USAGE, f"{path}: no manifest {manifest.name} beside it, so nobody knows which model "
                    "wrote it", hint)
    try:
        author = json.loads(manifest.read_text(encoding="utf-8"))["weights"]
    except (ValueError, KeyError, TypeError):
        fail(USAGE, f"{manifest} is not a manifest of infer.py --self_sample", hint)
    # another model's samples would pull towards that model instead of holding this one in place
    weights = base_fingerprint(model_dir(model_name))
    # two unknown models are not the same one
    if author is None or author != weights:
        by = f"by model {author}" if author else "through a server, by a model without fingerprint"
        itself = weights or "a model without fingerprint (no *.safetensors)"
        fail(USAGE, f"{path} was written {by}, {model_name} is {itself}", hint)


def is_held_out(row: dict) -> bool:
    """Whether a diverse row is kept for measuring what is forgotten: one query in ten.

    The query's hash alone decides, so a query is held out at any ratio, seed and order of the file.
    """
    # the hash is of the query alone, so all answers to a query are held out together
    return int(utils.row_hash(row), 16) % 10 == 0


def draw_diverse(cache: list[dict], count: int, seed: int) -> list[dict]:
    """Some rows of the cache in random order.

    Where count exceeds the cache, every row stands there equally often, give or take once.
    """
    # a stream of its own, so that the rows drawn do not depend on what else is random
    rng, chosen = random.Random(f"{seed}-diverse"), []
    while len(chosen) < count:
        chosen += rng.sample(cache, min(len(cache), count - len(chosen)))
    return chosen


def spread(order: list[int], is_task: list[bool]) -> list[int]:
    """An order of rows with its task rows evenly spread; within each source, the last come first.

    Then any n successive rows hold the task's share of n, give or take one row.
    """
    task = [i for i in order if is_task[i]]
    diverse = [i for i in order if not is_task[i]]
    # a task row wherever the share of task rows reaches the next whole number
    total, count = len(order), len(task)
    return [task.pop() if (place + 1) * count // total > place * count // total else diverse.pop()
            for place in range(total)]
