"""The model's own answers: queries in, the cache of diverse rows out."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import utils

SYSTEM = "You are a helpful AI assistant."
REFUSAL = re.compile(r"(?:i['’]?m|i am|we are) (?:very |so )?sorry\b|sorry, (?:but )?i\b|i apologi[sz]e\b|unfortunately, i\b|as an? (?:ai|artificial)\b"
                     r"|i (?:can['’]?t|cannot|can not|won['’]?t|am unable|['’]?m unable|am not able|don['’]?t have|do not have)\b", re.IGNORECASE)


def check_query(row: dict) -> str | None:
    for name in ("query", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f'field "{name}" must be a string with text, got {json.dumps(row.get(name))[:60]}'
    return None


def reanswer_messages(query: str, answer: str) -> list[dict]:
    """The query with its reference answer as an example, then the same query again: the model answers in its own words."""
    turns = [("system", SYSTEM), ("user", query), ("assistant", answer), ("user", query)]
    return [{"role": role, "content": content} for role, content in turns]


def write_cache(draws_file: Path, summary: dict, run: dict, args) -> None:
    """From X.draws.jsonl the cache X.jsonl, messages of the answers that are kept, and X.json, its manifest."""
    cache = draws_file.with_name(draws_file.name.removesuffix(".draws.jsonl") + ".jsonl")
    rows, counts = keep_answers(utils.read_jsonl(draws_file))
    utils.atomic_write(cache, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    keep = ("method", "base_model", "base_sha256", "weights")
    manifest = {"kind": "self-samples", **{name: run.get(name) for name in keep}, "queries": args.test_file,
                "settings": {name: getattr(args, name) for name in ("engine", "temperature", "top_p", "max_new_tokens",
                                                                    "num_response_per_input", "seed")},
                "counts": counts, "versions": utils.versions()}
    utils.atomic_write(cache.with_suffix(".json"), json.dumps(manifest, indent=1))
    said = ", ".join(f"{number} {name}" for name, number in counts.items())
    print(f"{cache}: {said}; manifest {cache.with_suffix('.json')}\n"
          f"next: python train.py --method delia --train_file data/delia/train.jsonl --new_tokens \"<sep>\" --diverse_file {cache}")


def keep_answers(draws: list[dict]) -> tuple[list[dict], dict]:
    """The message rows of answers that are whole, not empty, no refusal and new, and the counts of all others.

    copied: answers that are kept although they say no more than the reference, word for word.
    """
    rows, seen = [], set()
    counts = Counter(dict.fromkeys(("drawn", "missing", "truncated", "empty", "refused", "duplicate", "kept", "copied"), 0))
    for draw in draws:
        counts["missing"] += draw.get("warnings", {}).get("missing", 0)
        for place, answer in enumerate(draw["preds"]):
            counts["drawn"] += 1
            plain = utils.normalise(answer)
            fault = ("truncated" if place in draw["cut_at"] else "empty" if not plain else
                     "refused" if REFUSAL.match(answer) else "duplicate" if plain in seen else None)
            counts[fault or "kept"] += 1
            if fault:
                continue
            seen.add(plain)
            counts["copied"] += plain == utils.normalise(draw["answer"])
            rows.append({"messages": [{"role": "user", "content": draw["prompt"]}, {"role": "assistant", "content": answer}]})
    return rows, dict(counts)
