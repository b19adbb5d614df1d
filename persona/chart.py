"""Bar charts of who the model says it is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from persona.rules import ATTRIBUTES, values_of

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito, told apart by the colour-blind
HATCHES = ("", "//", "..", "xx", "--", "\\\\")  # and in print
MAX_BARS = 7  # values of a chart; the rest is one bar


def bars(summary: dict, attribute: str) -> tuple[list[str], dict[str, list[float]]]:
    """Labels of a chart, and per system the shares of its values: the commonest over all systems, then all the others as one."""
    counts = {name: own["attributes"][attribute]["counts"] for name, own in summary["systems"].items()}
    shares = {name: {v: c / sum(of.values()) for v, c in of.items()} for name, of in counts.items()}
    total = Counter()
    for own in shares.values():
        total.update(own)
    if attribute == "age":
        kept = [value for value in values_of("age") if value in total]
    else:
        kept = [value for value, _ in total.most_common(MAX_BARS)]
    rest = len(total) - len(kept)
    heights = {name: [own.get(v, 0.0) for v in kept] + ([max(0.0, 1 - sum(own.get(v, 0.0) for v in kept)) if own else 0.0] if rest else [])
               for name, own in shares.items()}
    return [*kept, *([f"{rest} other{'s' * (rest > 1)}"] if rest else [])], heights


def plot(summary: dict, file: str | Path) -> None:
    """Bar charts of all attributes with the systems side by side, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    file = Path(file)
    figure, axes = plt.subplots(1, len(ATTRIBUTES), figsize=(4 * len(ATTRIBUTES), 4.2), layout="constrained")
    for axis, attribute in zip(axes, ATTRIBUTES, strict=True):
        labels, heights = bars(summary, attribute)
        y, width = np.arange(len(labels)), 0.8 / len(heights)
        for i, (name, shares) in enumerate(heights.items()):
            f = summary["systems"][name]["attributes"][attribute]
            said = "no value" if f["entropy"] is None else f"{f['entropy'][0]:.2f} bits, n {f['n']}"
            axis.barh(y - 0.4 + (i + 0.5) * width, shares, width, color=COLOURS[i % len(COLOURS)], hatch=HATCHES[i % len(HATCHES)],
                      edgecolor="white", label=f"{name}: {said}")
        axis.set_yticks(y, [label if len(label) < 24 else label[:22] + "…" for label in labels])
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_xlabel("share of interviews that tell it")
        axis.set_title(attribute)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.15), frameon=False)  # below, where no bar is
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)
    plt.close(figure)
