"""Bars of what a model says beside what it should say: one picture per request."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no global state, no display

MAX_LABELS = 60  # targets that get a label each; more would overlap
MAX_UPRIGHT = 12  # labels that fit side by side


def plot(lines: list[dict]) -> bytes:
    """A PNG of the wanted weights against every system's probability of each target.

    lines: one per system, all of one request, with targets, weights, counts, replies and, where the
    model's probabilities are known, logps and kl. Else bars are the targets' shares of the replies.
    """
    targets, weights = lines[0]["targets"], lines[0]["weights"]
    # bars fill 0.8 of a target's place, so that neighbouring targets stand apart
    x, width = np.arange(len(targets)), 0.8 / len(lines)
    size = (min(16, max(5, len(targets) * 0.35)), 4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for i, line in enumerate(lines):
        heights, source = _bars(line)
        place = x - 0.4 + (i + 0.5) * width
        axes.bar(place, heights, width, label=f"{line['system']} ({source})")
    # "pre" draws each height to the left of its edge; that of the first edge is never seen
    edges = [-0.5, *(x + 0.5)]
    axes.step(edges, [weights[0], *weights], where="pre", color="black", label="target")
    if len(targets) <= MAX_LABELS:
        # the first line is enough to name a target of several lines
        labels = [_escape(target.strip("{}").split("\n")[0][:24]) for target in targets]
        axes.set_xticks(x, labels, rotation=90 if len(targets) > MAX_UPRIGHT else 0)
    axes.set_ylabel("probability")
    axes.set_title(_escape(lines[0]["prompt"].split("\n")[0][:90]), fontsize=9)
    axes.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    return file.getvalue()


def _bars(line: dict) -> tuple[list[float] | np.ndarray, str]:
    """A system's height of every target, and where the heights come from."""
    if line["logps"] is not None:
        return np.exp(line["logps"]), f"exact, KL {line['kl']:.3f} nats"
    shares = [line["counts"].get(target, 0) / line["replies"] for target in line["targets"]]
    return shares, f"of {line['replies']} replies"


def _escape(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib reads $...$ as a formula
