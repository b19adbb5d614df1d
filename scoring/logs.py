"""What an evaluation writes."""

from __future__ import annotations

import json
from pathlib import Path

from utils import atomic_write


def write_figures(save_file: Path, summary: dict, lines: list[dict]) -> None:
    """An evaluation's X.json and X.jsonl, whatever the suffix of save_file; raises ValueError over nan."""
    atomic_write(save_file.with_suffix(".json"), json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False))
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    atomic_write(save_file.with_suffix(".jsonl"), text)
