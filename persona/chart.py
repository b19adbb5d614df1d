"""Bar charts of who the model says it is."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
from matplotlib.figure import Figure

from persona.rules import ATTRIBUTES, values_of

# Okabe and Ito's colours, which the colour-blind tell apart, and hatches for print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
HATCHES = ("", "//", "..", "xx", "--", "\\\\")
MAX_BARS = 7  # values of a chart; the rest is one bar


def bars(systems: dict, attribute: str) -> tuple[list[str], dict[str, list[float]]]:
    """Labels of a chart, and per system the share of each, in 0..1.

    The commonest values over all systems stand alone (ages all, in their order), the others are one
    bar at the end.
    """
    shares = {}
    for name, system in systems.items():
        counts = system["attributes"][attribute]["counts"]
        shares[name] = {value: count / sum(counts.values()) for value, count in counts.items()}
    # Shares and not counts, so that a system with more interviews does not choose the bars.
    total = Counter()
    for of_system in shares.values():
        total.update(of_system)
    if attribute == "age":
        kept = [value for value in values_of("age") if value in total]
    else:
        kept = [value for value, _ in total.most_common(MAX_BARS)]
    heights = {name: [of_system.get(value, 0.0) for value in kept]
               for name, of_system in shares.items()}
    others = len(total) - len(kept)
    if not others:
        return kept, heights
    for name, of_system in shares.items():
        # a system that told nothing has no others either
        heights[name].append(max(0.0, 1 - sum(heights[name])) if of_system else 0.0)
    return [*kept, f"{others} other{'s' * (others > 1)}"], heights


def draw_chart(systems: dict) -> bytes:
    """A PNG: bar charts of all attributes, with the systems side by side."""
    # Not through pyplot, which keeps every figure in memory and may look for a display.
    figure = Figure(figsize=(4 * len(ATTRIBUTES), 4.2), layout="constrained")
    axes = figure.subplots(1, len(ATTRIBUTES))
    for axis, attribute in zip(axes, ATTRIBUTES, strict=True):
        _draw_attribute(axis, attribute, systems)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=80)
    return png.getvalue()


def _draw_attribute(axis, attribute: str, systems: dict) -> None:
    labels, heights = bars(systems, attribute)
    y, width = np.arange(len(labels)), 0.8 / len(heights)
    for i, (name, shares) in enumerate(heights.items()):
        figures = systems[name]["attributes"][attribute]
        entropy = figures["entropy"]
        told = f"{entropy['mean']:.2f} bits, n {figures['n']}" if entropy else "no value"
        axis.barh(y - 0.4 + (i + 0.5) * width, shares, width, color=COLOURS[i % len(COLOURS)],
                  hatch=HATCHES[i % len(HATCHES)], edgecolor="white", label=f"{name}: {told}")
    axis.set_yticks(y, [label if len(label) < 24 else label[:22] + "…" for label in labels])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of interviews that tell it")
    axis.set_title(attribute)
    axis.spines[["top", "right"]].set_visible(False)
    # below the plot, where no bar is
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.15), frameon=False)
