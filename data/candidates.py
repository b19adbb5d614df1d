"""One row of one-to-many data: how a model is asked for candidates, and which of them are kept.

data/make_candidates.py is the tool; here is what happens to one row, whoever is asked.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

import utils
from decoding import asking
from decoding.engines import Asked
from scoring import checks

# What a finished row depends on. Keys of rows hash it: a new flag here voids unfinished files.
SETTINGS = ("model", "num_candidates", "min_candidates", "max_rounds", "max_cosine", "min_words",
            "max_words", "temperature", "max_tokens", "max_input_length", "seed")
SPARE = 2  # further rounds ask for more than are missing, since they mostly repeat

Ask = Callable[[str, int], Asked]  # (message, seed) -> what became of it
Embed = Callable[[list[str]], np.ndarray]  # texts -> unit vectors (N, D)


def settings_of(args) -> dict:
    """The flags that a finished row depends on."""
    return {name: value for name, value in vars(args).items() if name in SETTINGS}


def row_key(row: dict, args) -> str:
    """Hash of a row and of all settings that its candidates depend on."""
    return utils.sha256(json.dumps([row, settings_of(args)], sort_keys=True))[:16]


def list_message(row: dict, number: int, taken: list[str], args) -> str:
    """The user message that asks for `number` answers to one row, unlike the `taken` ones."""
    turns = asking.shown_turns(row, args.max_input_length)
    length = "Keep each short."
    if turns is not None:
        length = f"Keep each between {args.min_words} and {args.max_words} words."
    return asking.list_request(row, turns, number, taken, length)


def check_item(text: str, row: dict, message: str, args) -> str | None:
    """Why a text cannot be a candidate of this row, asked for by this message, or None."""
    if checks.SPEAKER_LABEL.search(text):
        return "speaker label"
    # weak models copy lines of the context, or sentences of the instruction
    request = [*checks.turns_of(row), *re.split(r"\n+|(?<=[.!?])\s+", message)]
    if utils.normalise(text) in map(utils.normalise, request):
        return "repeats the request"
    if not re.search(r"\w", text):
        return "no words"
    num_words = len(text.split())
    if "context" in row and not args.min_words <= num_words <= args.max_words:
        return "too short" if num_words < args.min_words else "too long"
    return None


def add_different(candidates: list[str], vectors: list[np.ndarray], items: list[str],
                  embed: Embed, args) -> Iterator[str]:
    """Append the items that differ from all candidates before; yield why the others do not.

    vectors: of the candidates, which grow with them.
    """
    for text, vector in zip(items, embed(items), strict=True):
        if utils.normalise(text) in map(utils.normalise, candidates):
            yield "equal"
        elif any(float(vector @ other) > args.max_cosine for other in vectors):
            yield "nearly equal"
        elif len(candidates) == args.num_candidates:
            yield "not needed"
        else:
            candidates.append(text)
            vectors.append(vector)


def make_row(row: dict, key: str, ask: Ask, embed: Embed, args) -> dict:
    """The row with its candidates, and under `made` what that took.

    made["problem"] says what ended the rounds early or why the row is rejected; made["failed"] is
    there if that was a failed call, a "passing" failure or a "lasting" one.
    """
    candidates = list(row.get("candidates", []))
    vectors = list(embed(candidates)) if candidates else []
    dropped: Counter = Counter()
    made: dict = {"key": key, "model": args.model, "rounds": 0, "tokens": 0}
    while len(candidates) < args.num_candidates and made["rounds"] < args.max_rounds:
        missing = args.num_candidates - len(candidates)
        number = missing + (SPARE if made["rounds"] else 0)
        message = list_message(row, number, candidates, args)
        asked = ask(message, _seed_of(key, made["rounds"]))
        if asked.failure:
            made["problem"] = asked.failure.what
            made["failed"] = "passing" if asked.failure.transient else "lasting"
            break
        [reply] = asked.replies
        made["model"] = reply.served_model or args.model
        made["rounds"] += 1
        made["tokens"] += reply.total_tokens
        dropped.update(["cut at --max_tokens"] * reply.cut)
        items = []
        for text in asking.parse_list(reply.text, reply.cut):
            if why := check_item(text, row, message, args):
                dropped[why] += 1
            else:
                items.append(text)
        if items:
            dropped.update(add_different(candidates, vectors, items, embed, args))
    # a failed call has said already what went wrong
    if len(candidates) < args.min_candidates:
        made.setdefault("problem", f"fewer than {args.min_candidates} candidates after "
                                   f"{made['rounds']} rounds")
    return {**row, "candidates": candidates, "made": {**made, "dropped": dict(dropped)}}


def _seed_of(key: str, round_number: int) -> int:
    """The seed of one round of one row; only a local model takes it."""
    return int(utils.sha256(f"{key}-{round_number}")[:15], 16)
