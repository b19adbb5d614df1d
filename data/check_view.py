"""What data/check.py shows: a table with a column per file, and two plots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.check_report import KINDS, Report
from scoring.checks import SUSPECT_PROFANITY


def _column_names(reports: list[Report]) -> list[str]:
    """File names, or whole paths where two files have one name."""
    names = [Path(report.path).name for report in reports]
    return names if len(set(names)) == len(names) else [report.path for report in reports]


def _cells(report: Report, max_profanity: float) -> dict[str, str]:
    """The table's column of one file, by the name of the line; violations come last."""
    figures = report.figures

    def show(name: str) -> str:
        value = figures.get(name)
        if name in report.skipped or value is None:
            return report.skipped.get(name, "-")
        if isinstance(value, dict):
            return (f"{value['mean']:.1f}  ({value['min']} to {value['max']}, "
                    f"median {value['median']:g})")
        return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"

    def openings(name: str) -> str:
        return "\n".join(f"{share:.1%} {words}" for words, share in figures[name][:3])

    lines = {
        "rows": show("rows"), "candidates": show("candidates"),
        "candidates per row": show("candidates_per_row"),
        "turns": show("turns"), "words of a context": show("context_words"),
        "words of a candidate": show("candidate_words"),
        "share with a question": show("question_share"),
        "share of common English words": show("english_word_share"),
        "distinct-1, first 5 candidates": show("distinct_1"),
        "distinct-2, first 5 candidates": show("distinct_2"),
        "SBERT diversity, first 4": show("sbert_diversity"),
        "coherence proxy AUC": show("proxy_auc"),
        f"profanity {SUSPECT_PROFANITY} to {max_profanity:g}, to read": show("profanity_suspects"),
        "context openings": openings("context_openings"),
        "candidate openings": openings("candidate_openings"),
    }
    return lines | {name: report.skipped.get(kind, str(figures["violations"][kind]))
                    for kind, name in KINDS.items()}


def print_table(reports: list[Report], max_profanity: float) -> None:
    """One column per file; counts of violations are marked where they are not 0."""
    console = Console(width=max(120, Console().width))
    table = Table(title="One-to-many data: figures, then violations", title_justify="left")
    for name in ["", *_column_names(reports)]:
        table.add_column(name, overflow="fold")
    columns = [_cells(report, max_profanity) for report in reports]
    for name in columns[0]:
        if name == next(iter(KINDS.values())):
            table.add_section()
        cells = [column[name] for column in columns]
        bad = [name in KINDS.values() and cell.isdigit() and cell != "0" for cell in cells]
        table.add_row(name, *(Text(f"{cell} !", "bold red") if marked else Text(cell)
                              for cell, marked in zip(cells, bad, strict=True)))
    console.print(table)
    console.print("profanity: a score for offensive words, biased against identity terms; read a "
                  "hit before you delete it.\n"
                  "language and personal data: heuristics. coherence proxy: true against "
                  "mismatched replies, 0.5 is chance.", highlight=False)


# Okabe and Ito, who chose them for the colour-blind; without yellow, which is too pale for lines
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"]
DASHES = ["-", "--", ":"]  # a second sign beside colour, and for more than seven files


def plot_distributions(reports: list[Report], file: Path) -> None:
    """Histograms of candidate lengths and of the cosines between the candidates of a row."""
    from matplotlib.figure import Figure

    lengths = [[len(c.split()) for c in report.candidates] for report in reports]
    cosines = [np.concatenate([(v @ v.T)[np.triu_indices(len(v), 1)]
                               for v in report.candidate_vectors]).clip(-0.2, 1)
               for report in reports]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    longest = max(max(values) for values in lengths)
    step = max(1, longest // 40)
    bins = [np.arange(0.5, longest + step + 0.5, step), np.linspace(-0.2, 1, 49)]
    for panel, values, edges, label in zip(panels, (lengths, cosines), bins, (
            "words of a candidate", "cosine of two candidates of a row (MiniLM)"), strict=True):
        for i, (one, name) in enumerate(zip(values, _column_names(reports), strict=True)):
            if len(one):  # no pairs where rows have one candidate
                weights = np.full(len(one), 1 / len(one))
                panel.hist(one, edges, weights=weights, histtype="step", linewidth=1.8, label=name,
                           color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i % len(DASHES)])
        panel.set(xlabel=label, ylabel="share")
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  frameon=False)
    figure.savefig(file, dpi=150)


def plot_openings(reports: list[Report], args, file: Path) -> None:
    """Bars: the shares of each file's most common openings, beside the limit."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 1.2 + 1.3 * len(reports)), layout="constrained")
    panels = figure.subplots(1, 2)
    limits = (args.max_context_opening, args.max_opening)
    for panel, name, limit in zip(panels, ("context", "candidate"), limits, strict=True):
        bars = [(words, share, i) for i, report in enumerate(reports)
                for words, share in report.figures[f"{name}_openings"]][::-1]
        panel.barh(range(len(bars)), [100 * share for _, share, _ in bars],
                   color=[COLOURS[i % len(COLOURS)] for _, _, i in bars])
        # matplotlib reads text between dollar signs as a formula
        labels = [words.replace("$", r"\$")[:40] for words, _, _ in bars]
        panel.set_yticks(range(len(bars)), labels, fontsize=8)
        panel.axvline(100 * limit, color="#555555", linestyle="--", linewidth=1)
        panel.set(xlabel=f"% of the {name}s (dashed: limit)",
                  title=f"most common openings of {name}s")
        panel.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=COLOURS[i % len(COLOURS)], label=name)
               for i, name in enumerate(_column_names(reports))]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=150)
