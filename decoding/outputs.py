"""Files of responses: outs/X.jsonl, a line per row, and outs/X.json, what produced it.

Rows are appended as they are finished, so a killed run loses nothing; --resume goes on with the
file if it was made with the same settings, and ends with the bytes of an uninterrupted run.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import utils
from utils import USAGE, fail

# Flags that change how a run goes, not what it writes: --resume does not compare them.
RUN_FLAGS = frozenset((
    "resume", "save_file", "test_file", "config", "print_config", "key_file", "max_connections",
    "timeout", "timeout_total", "force_base", "strict_split", "interview", "interactive",
    "output_dir", "exp_name", "run_name", "cache_file"))

HEADER = ("kind", "settings", "run", "versions")  # of outs/X.json; all else are figures
SPEED = {  # figures of outs/X.json, and the digits that they are rounded to
    "seconds_per_row": 3, "seconds_per_row_median": 3, "seconds_per_row_p95": 3,
    "responses_per_second": 2, "tokens_per_second": 1}


def claim(save_file: str, resume: bool) -> Path:
    """The file to write, in a folder that exists; dies if it exists and the run is not resumed."""
    path = Path(save_file)
    if path.suffix != ".jsonl":
        fail(USAGE, f"--save_file {path} must end in .jsonl", f"{path.with_suffix('.jsonl')}")
    if path.exists() and not resume:
        fail(USAGE, f"{path} is already there",
             "--resume goes on with it; or give another --save_file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def settings_of(args, rows: list[dict], weights: str | None) -> dict:
    """Everything that the written rows depend on: flags, a hash of the data, the weights."""
    flags = dict(vars(args))
    compared = {name: flags[name] for name in flags if name not in RUN_FLAGS}
    # Through JSON and back, because the settings are compared with those in a file, where a tuple
    # is a list and every key a string.
    return json.loads(json.dumps(compared | {
        "data_sha256": utils.sha256(json.dumps(rows, sort_keys=True))[:16], "weights": weights}))


def begin(save_file: Path, kind: str, settings: dict, run: dict) -> int:
    """How many rows an interrupted run has written; dies if it ran with other settings.

    Where there is nothing yet, X.json is written at once, so that a run that is killed in its first
    row can be resumed, too. Settings that an older version did not know are not compared.
    """
    summary_file = save_file.with_suffix(".json")
    if not save_file.exists():
        header = {"kind": kind, "settings": settings, "run": brief(run)}
        utils.atomic_write(summary_file, json.dumps(header, indent=1))
        return 0
    before = utils.made_by(save_file).get("settings", {})
    for name, value in settings.items():
        if name in before and before[name] != value:
            fail(USAGE, f"--resume: {save_file} was made with {name} {before[name]}, "
                        f"now it is {value}",
                 "use the same flags, or another --save_file")
    if not before:
        fail(USAGE, f"--resume: {summary_file} does not say what {save_file} was made with",
             "give another --save_file")
    # A kill may have torn the last line; that row is drawn again, with the same result.
    utils.repair_tail(save_file)
    return len(read(save_file))


def read(save_file: Path) -> list[dict]:
    """The rows that are written."""
    # Bytes, because str.splitlines also splits at characters that may stand inside a JSON string.
    return [json.loads(line) for line in save_file.read_bytes().split(b"\n") if line.strip()]


def count_problems(save_file: Path) -> dict:
    """How many rows and responses a file holds, and what went wrong in it."""
    rows = read(save_file)
    figures = {"rows": len(rows), "responses": sum(len(row["preds"]) for row in rows)}
    for problem in ("empty", "cut", "missing", "failed", "below_floor"):
        figures[problem] = sum(row.get("warnings", {}).get(problem, 0) for row in rows)
    if asked := sum(row.get("asked", 0) for row in rows):
        # Over all rows together: a mean of rates would weigh one request of a row like ten.
        figures["parse_rate"] = round(sum(row["parsed"] for row in rows) / asked, 4)
    return figures


def speed_figures(speed: dict, of_engine: dict, save_file: Path) -> dict:
    """Seconds a row, responses and tokens a second, and what the engine says of itself.

    speed: seconds (a number per row), tokens and responses of this run. Where nothing was left to
    do, nothing was measured: the figures of the run that did the work stay.
    """
    if not speed["seconds"]:
        before = utils.made_by(save_file)
        return {name: value for name, value in before.items() if name not in HEADER}
    total = sum(speed["seconds"])
    # The median and the 95th percentile as well: single slow rows hide in a mean.
    values = (np.mean(speed["seconds"]), np.median(speed["seconds"]),
              np.percentile(speed["seconds"], 95), speed["responses"] / total,
              speed["tokens"] / total)
    measured = {name: round(float(value), digits) for (name, digits), value in
                zip(SPEED.items(), values, strict=True)}
    return measured | of_engine


def write_summary(save_file: Path, kind: str, settings: dict, run: dict, figures: dict) -> None:
    """outs/X.json of a finished run."""
    summary = {"kind": kind, "settings": settings, "run": brief(run), **figures,
               "versions": utils.versions()}
    utils.atomic_write(save_file.with_suffix(".json"), json.dumps(summary, indent=1))


def brief(run: dict) -> dict:
    """run.json without the long list of row hashes."""
    return {key: value for key, value in run.items() if key != "row_hashes"}
