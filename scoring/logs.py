"""The one writer of evaluations: eval_logs/X.json, X.jsonl, X.html and what methods add to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from scoring.evaluated import Evaluated
from utils import atomic_write


def write(save_file: Path, result: Evaluated, page: str,
          parts: Mapping[str, Evaluated] | None = None) -> None:
    """Write an evaluation beside save_file, whose suffix does not matter; ValueError over nan.

    result: summary X.json, lines X.jsonl. page: X.html. parts: what methods measured, by their
    folder's name; lines X.<folder>.jsonl, their summary is in result's already. Further files of
    both go beside them. X.json comes last: where it is there, the rest is.
    """
    base = save_file.with_suffix("")
    for name, part in {"": result, **(parts or {})}.items():
        if part.lines:
            atomic_write(_beside(base, f".{name}.jsonl" if name else ".jsonl"), _jsonl(part.lines))
        for suffix, content in part.files.items():
            path = _beside(base, suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    atomic_write(_beside(base, ".html"), page)
    atomic_write(_beside(base, ".json"),
                 json.dumps(result.summary, indent=1, ensure_ascii=False, allow_nan=False))


def _beside(base: Path, suffix: str) -> Path:
    return Path(f"{base}{suffix}")  # a suffix may hold a folder, _plots/a.png


def _jsonl(lines: list[dict]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
