"""The one writer of evaluations: eval_logs/X.json, X.jsonl, X.html and what methods add to them."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

from modeling.prompts import label_turns
from scoring.evaluated import Evaluated, is_system
from utils import atomic_write, text_of

HIDDEN = ("prompt", "shown", "judge1", "judge2")  # of a verdict; X.judgements.jsonl has them
MAX_HEAT = 30  # replies whose cosines a page draws; a square of more cells cannot be read


def write(save_file: Path, result: Evaluated, page: str | None = None,
          parts: Mapping[str, Evaluated] | None = None) -> None:
    """Write an evaluation beside save_file, whose suffix does not matter; ValueError over nan.

    result: summary X.json, lines X.jsonl. page: X.html, if any. parts: what methods measured, by
    their folder's name; lines X.<folder>.jsonl, their summary is in result's already. Further files
    of both go beside them. X.json comes last: where it is there, the rest is.
    """
    base = save_file.with_suffix("")
    for name, part in {"": result, **(parts or {})}.items():
        if part.lines:
            atomic_write(_beside(base, f".{name}.jsonl" if name else ".jsonl"), _jsonl(part.lines))
        for suffix, content in part.files.items():
            _write_bytes(_beside(base, suffix), content)
    if page is not None:
        atomic_write(_beside(base, ".html"), page)
    atomic_write(_beside(base, ".json"),
                 json.dumps(result.summary, indent=1, ensure_ascii=False, allow_nan=False))


def _write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or none, as utils.atomic_write does with text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # rename needs one file system
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _beside(base: Path, suffix: str) -> Path:
    return Path(f"{base}{suffix}")  # a suffix may hold a folder, _plots/a.png


def _jsonl(lines: list[dict]) -> str:
    # allow_nan: Python would write NaN, which is no JSON, and which browsers and jq refuse.
    return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)


# ---- what stands in the files of the common figures ---------------------------------------------
# measured: as scoring/common.py has it, per system and row the replies with verdicts and classes.


def response_lines(measured: dict[str, list[dict]], trusted: bool) -> list[dict]:
    """A line per response of the systems, none about a control.

    trusted: whether the judge passed its checks; its verdicts stand here either way.
    """
    return [{"system": name, "row": number, "context": text_of(m["row"]), "response": text,
             "meaning_class": m["classes"][i], "cosine": round(float(m["cosine"][i]), 4),
             **{key: value for key, value in verdict.items() if key not in HIDDEN},
             "trusted": trusted}
            for name, number, m in _rows_of_systems(measured)
            for i, (text, verdict) in enumerate(zip(m["preds"], m["verdicts"], strict=True))]


def published_pickle(measured: dict[str, list[dict]]) -> bytes:
    """The same as a pickle of plain dicts with the published keys."""
    lines = []
    for _, _, m in _rows_of_systems(measured):
        for text, verdict in zip(m["preds"], m["verdicts"], strict=True):
            # A judge that was not asked is None, and so are its answer and its score.
            first, second = verdict.get("judge1"), verdict.get("judge2")
            # Keys as the published script has them, with their colon.
            lines.append({
                "context": text_of(m["row"]), "response": text, "prompt": verdict.get("prompt"),
                "chat_out": first and first["text"],
                "chat_score": {"Coherence rating:": first and first["score"]},
                "gpt4_out": second and second["text"],
                "gpt4_score": second and {"Coherence rating:": second["score"]}})
    # Plain dicts, lists and texts: reading this pickle needs no code of this project.
    return pickle.dumps(lines)


def pickle_note(judge: dict) -> bytes:
    """What the pickle cannot say, since its keys are published ones: whether to believe it."""
    # Written for every pickle, so that an earlier run's note does not stay beside a later one's.
    verdict = ("The judge passed its checks." if judge["trusted"] else
               f"UNTRUSTED: {judge['reason']}. The pickle holds the raw judgements.")
    return f"{verdict}\n{judge['text']}\n".encode()


def page_prompts(measured: dict[str, list[dict]]) -> list[dict]:
    """What the page shows of every prompt, see report/page.py."""
    prompts = []
    for i, first in enumerate(next(iter(measured.values()))):
        row, systems = first["row"], {}
        for name, rows in measured.items():
            m = rows[i]
            systems[name] = {
                "replies": [{"text": text, "class": c, "coherent": verdict["coherent"],
                             "verdict": verdict.get("shown", ""), "why": _answers_of(verdict)}
                            for text, c, verdict in zip(m["preds"], m["classes"], m["verdicts"],
                                                        strict=True)],
                "yield": m["yield"],
                # Embeddings are unit vectors, so their products are cosines.
                "similarity": None if len(m["preds"]) > MAX_HEAT
                else (m["embeddings"] @ m["embeddings"].T).tolist()}
        turns = label_turns(row["context"]) if "context" in row else None
        prompts.append({"text": text_of(row), "turns": turns, "systems": systems})
    return prompts


def _rows_of_systems(measured: dict[str, list[dict]]):
    """(system, number of the row from 1, row) of all systems but the controls."""
    for name, rows in measured.items():
        if is_system(name):
            yield from ((name, number, m) for number, m in enumerate(rows, 1))


def _answers_of(verdict: dict) -> str | None:
    """What the judges wrote about a reply."""
    answers = [stage["text"] for stage in (verdict.get("judge1"), verdict.get("judge2")) if stage]
    return "\n\n".join(answers) or None
