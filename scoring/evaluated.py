"""What an evaluation hands over, and the form of its figures.

Evaluations measure; they print nothing and write nothing. eval.py shows what they return, and
scoring/logs.py writes it.

A figure is {"mean", "low", "high"}: an estimate with its 95 % interval. low and high are None where
there is no interval (one person, a duration). A figure that is not defined is None, never 0 or nan,
and `reasons` beside it says why: {name of the figure: why}.
"""

from __future__ import annotations

from typing import NamedTuple

# A plain dict, since figures go into JSON and come back from it as they are.
Figure = dict[str, float | None]
DASH = "—"  # shown where there is no figure
# A part of the name and no field of its own: where only names are kept, as in comparisons and
# columns of tables, a control can still be told from a system.
CONTROL = "control: "  # how the names of degenerate controls begin
# The name of a row's own references where they are measured as if a system had written them. They
# stand among the systems and are no baseline, no control and not judged.
REFERENCES = "references"
# The "task" in the summary of rows whose right answers a program checks; others have none. Table
# and page choose their words by it.
VERIFIABLE = "verifiable"
# Under this name a summary's reasons say why nothing that hangs on a judge's verdicts is shown.
COHERENCE = "figures of coherence"


class Evaluated(NamedTuple):
    """The result of an evaluation of one or more files of responses.

    summary: what goes into X.json (a method's stands under its folder's name, persona's likewise).
    lines: dicts of a JSONL file: X.jsonl for the common figures, X.<folder>.jsonl for a method's.
    files: further files, {what follows X in the name: content}, such as {".csv": b"..."} or
    {"_plots/a.png": b"..."}.
    prompts: what the page shows of each prompt (report/page.py); of the common figures alone.
    """

    summary: dict
    lines: list[dict]
    # All results share these two defaults, so nobody may add to them in place.
    files: dict[str, bytes] = {}
    prompts: list[dict] = []


class Table(NamedTuple):
    """A table of finished texts, for the terminal and the page; notes are sentences below it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = []


def is_system(name: str) -> bool:
    """Whether a name is that of a file under evaluation, not of what is measured beside them."""
    return name != REFERENCES and not name.startswith(CONTROL)


def figure(mean: float, low: float | None = None, high: float | None = None) -> Figure:
    return {"mean": mean, "low": low, "high": high}


def rounded(value: Figure | None, digits: int = 4) -> Figure | None:
    """A figure as it is written: rounded, None stays None."""
    return value and {name: v if v is None else round(v, digits) for name, v in value.items()}


def with_interval(value: Figure | None, digits: int = 2, sign: str = "", scale: float = 1) -> str:
    """'0.50 [0.40, 0.62]', '0.50' without interval, a dash without figure.

    sign: "+" writes it before positive numbers. scale: 100 for per cent.
    """
    if value is None:
        return DASH
    mean, low, high = (None if v is None else f"{scale * v:{sign}.{digits}f}"
                       for v in (value["mean"], value["low"], value["high"]))
    return mean if low is None else f"{mean} [{low}, {high}]"


def with_half(value: Figure | None, digits: int = 2, sign: str = "") -> str:
    """'4.42 ±0.28', with the longer side of the interval; '4.42' without one, or a dash."""
    if value is None:
        return DASH
    mean = f"{round(value['mean'], digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no minus before a zero
    if value["low"] is None:
        return mean
    # Bootstrap intervals are lopsided; the longer side never promises too much.
    half = max(value["high"] - value["mean"], value["mean"] - value["low"])
    return f"{mean} ±{half:.{digits}f}"


def is_clear(difference: Figure | None) -> bool:
    """Whether a difference's interval leaves out zero."""
    return (difference is not None and difference["low"] is not None
            and not difference["low"] <= 0 <= difference["high"])
