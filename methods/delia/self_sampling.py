"""The model's own answers: queries in, the cache of diverse rows out."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import utils

SYSTEM = "You are a helpful AI assistant."
REFUSAL = re.compile(  # at the start of an answer: an apology later on is no refusal
    r"(?:i['’]?m|i am|we are) (?:very |so )?sorry\b|sorry, (?:but )?i\b|i apologi[sz]e\b"
    r"|unfortunately, i\b|as an? (?:ai|artificial)\b"
    r"|i (?:can['’]?t|cannot|can not|won['’]?t|am unable|['’]?m unable|am not able|don['’]?t have"
    r"|do not have)\b", re.IGNORECASE)


def check_query(row: dict) -> str | None:
    """What is wrong with a row of query and reference answer, or None."""
    for name in ("query", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            shown = json.dumps(row.get(name))[:60]
            return f'field "{name}" must be a string with text, got {shown}'
    return None


def reanswer_messages(query: str, answer: str) -> list[dict]:
    """The turns that ask for an answer in the model's own words, as published.

    They show the query with its reference answer as an example, and then ask the query again.
    """
    # a good answer is shown first, so that the model puts a right one into its own words
    turns = [("system", SYSTEM), ("user", query), ("assistant", answer), ("user", query)]
    return [{"role": role, "content": content} for role, content in turns]


def write_cache(draws_file: Path, summary: dict, run: dict, args) -> None:
    """From X.draws.jsonl write the cache X.jsonl, the answers kept as messages, and X.json.

    X.json is the cache's manifest. run: the run.json of the model that answered.
    """
    cache = draws_file.with_name(draws_file.name.removesuffix(".draws.jsonl") + ".jsonl")
    # from the file, which also holds what an interrupted run has drawn
    rows, counts = keep_answers(utils.read_jsonl(draws_file))
    utils.atomic_write(cache, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    settings = {
        "engine": args.engine, "temperature": args.temperature, "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "num_response_per_input": args.num_response_per_input, "seed": args.seed}
    # weights is what training compares with its own base (mixing.check_author)
    model = {name: run.get(name) for name in ("method", "base_model", "base_sha256", "weights")}
    manifest = {"kind": "self-samples", **model, "queries": args.test_file, "settings": settings,
                "counts": counts, "versions": utils.versions()}
    # the manifest comes last: without one, training refuses a cache of which the rest is there
    utils.atomic_write(cache.with_suffix(".json"), json.dumps(manifest, indent=1))
    counted = ", ".join(f"{number} {name}" for name, number in counts.items())
    print(f"{cache}: {counted}; manifest {cache.with_suffix('.json')}\n"
          "next: python train.py --method delia --train_file data/delia/train.jsonl "
          f'--new_tokens "<sep>" --diverse_file {cache}')


def keep_answers(draws: list[dict]) -> tuple[list[dict], dict]:
    """The message rows of answers that are complete, not empty, no refusal and new; and the counts.

    copied: answers that are kept although they repeat the reference word for word.
    """
    names = ("drawn", "missing", "truncated", "empty", "refused", "duplicate", "kept", "copied")
    rows, seen, counts = [], set(), Counter(dict.fromkeys(names, 0))
    for draw in draws:
        counts["missing"] += draw.get("warnings", {}).get("missing", 0)
        for place, answer in enumerate(draw["preds"]):
            counts["drawn"] += 1
            plain = utils.normalise(answer)
            # the first fault counts; repeats are looked for among the answers to all queries, since
            # a stock answer would be learnt as often as it stands in the cache
            fault = ("truncated" if place in draw.get("cut_at", []) else "empty" if not plain else
                     "refused" if REFUSAL.match(answer) else "duplicate" if plain in seen else None)
            counts[fault or "kept"] += 1
            if fault:
                continue
            seen.add(plain)
            counts["copied"] += plain == utils.normalise(draw["answer"])
            rows.append({"messages": [{"role": "user", "content": draw["prompt"]},
                                      {"role": "assistant", "content": answer}]})
    return rows, dict(counts)
