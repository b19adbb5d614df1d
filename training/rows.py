"""Training rows from a file or a hub data set."""

from __future__ import annotations

import os
from pathlib import Path

from modeling.models import go_offline_if_unreachable
from utils import MISSING, USAGE, check_row, fail, read_jsonl

FILE_TYPES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".gz", ".parquet")


def load_rows(name: str) -> list[dict]:
    """Training rows from a JSONL file, or from the train split of a hub data set."""
    # owner/name is a hub data set. A mistyped file name must not be looked up there.
    is_file_name = Path(name).suffix in FILE_TYPES or name.count("/") != 1
    if Path(name).exists() or is_file_name:
        return read_jsonl(name, check_row)
    if not os.environ.get("HF_HUB_OFFLINE"):
        go_offline_if_unreachable()
    # Imported here, because it reads HF_HUB_OFFLINE when it is imported.
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train").to_list()
    except Exception as error:  # datasets, hub and network errors have no common base
        local = " ".join(sorted(map(str, Path("data").glob("*.jsonl"))))
        fail(MISSING, f'data set "{name}" is no file here and cannot be fetched '
                      f"({type(error).__name__})", f"local: {local}")
    for number, row in enumerate(rows, 1):
        if problem := check_row(row):
            fail(USAGE, f"{name}, row {number}: {problem}",
                 "rows need context or prompt, and candidates")
    return rows
