"""Training rows from a file or a hub data set."""

from __future__ import annotations

import os
from pathlib import Path

from modeling.models import go_offline_if_unreachable
from utils import MISSING, USAGE, check_row, fail, read_jsonl


def load_rows(name: str) -> list[dict]:
    """Training rows from a JSONL file, or from the train split of a hub data set."""
    is_file_name = Path(name).suffix in (".jsonl", ".json", ".txt", ".csv", ".tsv", ".gz", ".parquet")
    if Path(name).exists() or is_file_name or name.count("/") != 1:
        return read_jsonl(name, check_row)
    if not os.environ.get("HF_HUB_OFFLINE"):
        go_offline_if_unreachable()
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train").to_list()
    except Exception as error:  # datasets, hub and network errors have no common base
        fail(MISSING, f'data set "{name}" is no file here and cannot be fetched ({type(error).__name__})',
            "local: " + " ".join(sorted(map(str, Path("data").glob("*.jsonl")))))
    for number, row in enumerate(rows, 1):
        if problem := check_row(row):
            fail(USAGE, f"{name}, row {number}: {problem}", "rows need context or prompt, and candidates")
    return rows
