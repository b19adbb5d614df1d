"""What data/check.py knows of a file: its rows, their lines, what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import utils

KINDS = {  # the kinds of violation, as the table names them
    "num_candidates": "too few candidates",
    "turns": "turns outside limits",
    "length": "candidate length outside limits",
    "speaker_label": "speaker labels",
    "language": "not English (heuristic)",
    "personal_data": "personal data",
    "profanity": "profanity",
    "duplicate": "equal candidates in a row",
    "near_duplicate": "near-equal candidates in a row",
    "duplicate_context": "equal contexts",
    "near_duplicate_context": "near-equal contexts",
    "opening": "openings used too often",
}


@dataclass
class Report:
    """One file: its rows, the line of each (from 1), what was found, and what was not checked."""

    path: str
    rows: list[dict]
    lines: list[int]
    violations: list[tuple[int, str, str]] = field(default_factory=list)  # line, kind, what
    figures: dict = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # a check, and why it was left out
    context_vectors: np.ndarray | None = None  # (rows, D), unit length
    # per row (candidates, D), unit length
    candidate_vectors: list[np.ndarray] = field(default_factory=list)

    def add(self, index: int, kind: str, what: str) -> None:
        self.violations.append((self.lines[index], kind, what))

    @property
    def candidates(self) -> list[str]:
        return [c for row in self.rows for c in row["candidates"]]


def read_report(path: str) -> Report:
    """Read a file with its line numbers; broken rows end the run here, with file:line:column."""
    rows = utils.read_jsonl(path, utils.check_row)
    data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    lines = [number for number, raw in enumerate(data.split(b"\n"), 1) if raw.strip()]
    if utils.one_array(data) is not None:
        lines = list(range(1, len(rows) + 1))  # as read_jsonl counts the items of an array
    return Report(path, rows, lines)


def spread(values: Sequence[int]) -> dict[str, float]:
    """Least, median, mean and largest of some numbers."""
    return {"min": min(values), "median": float(np.median(values)),
            "mean": round(float(np.mean(values)), 2), "max": max(values)}
