"""The table of an evaluation in the terminal: the common figures, and any tables of a method.

It reads the summary that eval.py writes as eval_logs/X.json; the page shows the same figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from scoring.evaluated import (
    REFERENCES,
    VERIFIABLE,
    Figure,
    Table,
    is_clear,
    with_half,
    with_interval,
)
from scoring.report.examples import LEGEND, print_examples

# key in the summary, name, unit or meaning, whether more is better (1), worse (-1) or neither (0),
# digits
METRICS = [
    ("together", [
        ("yield@k", "yield@{k}", "different and coherent replies of {k}", 1, 2),
        ("utility_k", "utility@{k}",
         "rating of the first reply of each class, discounted by 0.8 a reply", 1, 2),
    ]),
    ("coherence", [
        ("coherent", "coherent", "share of the judged replies", 1, 2),
        ("rating", "rating", "mean of the judge's ratings, 1 to 10", 1, 2),
        ("cosine", "cosine", "embeddings of context and reply", 1, 2),
    ]),
    ("diversity of meaning", [
        ("distinct_k", "distinct_{k}", "classes of equivalent replies of {k}", 1, 2),
        ("effective_number", "effective number", "exp of the semantic entropy", 1, 2),
        ("semantic_entropy", "semantic entropy", "nats over the classes", 1, 2),
        ("sbert_diversity", "SBERT diversity", "1 - mean cosine of the pairs", 1, 2),
        ("vendi", "Vendi", "effective number by embedding eigenvalues", 1, 2),
        ("duplicates", "duplicates", "share of replies equal to an earlier one", -1, 2),
    ]),
    ("diversity of words", [
        ("self_bleu", "Self-BLEU", "each reply against the others, 0 to 100", -1, 1),
        ("distinct-1 per prompt", "distinct-1 a prompt", "different words / words", 1, 2),
        ("distinct-2 per prompt", "distinct-2 a prompt", "different word pairs / word pairs", 1, 2),
        ("distinct-1", "distinct-1 corpus", "over all replies; falls with their number", 1, 3),
        ("distinct-2", "distinct-2 corpus", "over all replies; falls with their number", 1, 3),
        ("ead-1", "EAD-1 corpus", "distinct words / expected distinct words", 1, 3),
        ("ead-2", "EAD-2 corpus", "distinct pairs / expected distinct pairs", 1, 3),
    ]),
    ("size", [
        ("words", "words", "a reply", 0, 1),
        ("characters", "characters", "a reply", 0, 1),
        ("seconds_per_row", "seconds a row", "as infer.py measured it", -1, 2),
    ]),
]
# The first block where a program checks the replies; the keys below do not come again.
VERIFIABLE_METRICS = ("verifiable", [
    ("valid", "valid", "right replies / replies", 1, 2),
    ("yield@k", "yield@{k}", "different right answers of {k} replies; exact", 1, 2),
    ("distinct", "distinct@{k}", "different replies of {k}, right or not", 1, 2),
    ("coverage", "coverage", "yield / number of right answers", 1, 2),
    ("collision", "collision", "share of pairs that are the same right answer", -1, 2),
    ("collision_ratio", "collision ratio", "collision / that of uniform draws from all right "
                                           "answers", -1, 2),
])
ARROWS = {1: " ↑", -1: " ↓", 0: ""}  # which way is better, if one is
WIDTH = 100  # columns where the terminal does not say: README and log files


# ---- what both the table and the page show ------------------------------------------------------


class Terms(NamedTuple):
    """What a good reply is called, which depends on who says that it is one."""

    share: str  # key and name of the share of good replies
    good: str
    quality: str
    replies: str
    at_equal: str  # after the name of a figure at equal quality
    units: str  # what intervals are over
    legend: str  # of the page's replies


BY_JUDGE = Terms("coherent", "coherent", "coherence", "replies", "eq. coh.", "prompts",
                 "Replies of one colour and letter count as one answer.")
BY_PROGRAM = Terms("valid", "right", "validity", "answers", "eq. valid", "categories",
                   f"✓ right, {LEGEND}.")


def terms_of(summary: dict) -> Terms:
    """The words for a summary; those of old have no task."""
    return BY_PROGRAM if summary.get("task") == VERIFIABLE else BY_JUDGE


def rows_of(summary: dict) -> Iterator[tuple[str, str, str, str, int, int]]:
    """(section, key, name, meaning, better, digits) of every metric that some system has."""
    k, seen = summary["k"], set()
    first = [VERIFIABLE_METRICS] if terms_of(summary) is BY_PROGRAM else []
    for section, group in first + METRICS:
        for key, name, meaning, better, digits in group:
            if key in seen:
                continue  # yield@k, whose meaning is another one there
            seen.add(key)
            key = key.replace("@k", f"@{k}")
            # Which figures there are depends on the judge and on k, so the summary decides.
            if any(system.get(key) is not None for system in summary["systems"].values()):
                yield (section, key, name.format(k=k) + mark_untrusted(summary, key),
                       meaning.format(k=k), better, digits)


def mark_untrusted(summary: dict, key: str = "coherent") -> str:
    """What follows the name of a figure by a judge that failed its checks (--trust_judge)."""
    return " ‡" * (key in summary.get("untrusted", []))  # summaries of old have no such list


def rewards_noise(summary: dict, key: str, better: int) -> bool:
    """Whether a degenerate control beats every system on a metric."""
    values: dict[bool, list[float]] = {True: [], False: []}  # of controls, of systems
    for name, system in summary["systems"].items():
        # People who are more diverse than a system say nothing against the figure.
        if system.get(key) is not None and name != REFERENCES:
            # With its sign turned, a metric where less is better also has its best at the maximum.
            values[system["control"]].append(better * system[key]["mean"])
    both = values[True] and values[False]
    # The best control beats the best system; beating a poor one would say little of the metric.
    return bool(better and both and max(values[True]) > max(values[False]))


def headline(summary: dict) -> list[str]:
    """One sentence a system: its yield, and the difference from the first with its interval."""
    k, names = summary["k"], [name for name, s in summary["systems"].items() if not s["control"]]
    terms = terms_of(summary)
    sentences = []
    for name in names:
        figure = summary["systems"][name].get(f"yield@{k}")
        if figure is None:
            continue
        text = (f"{name}: {figure['mean']:.2f} of {k} {terms.replies} are {terms.good} and "
                "different")
        difference = summary["differences"].get(f"{name} - {names[0]}", {}).get(f"yield@{k}")
        if difference:
            text += f", {with_interval(difference, sign='+')} against {names[0]}"
        sentences.append(text + mark_untrusted(summary))
    return sentences


def notes(summary: dict) -> list[str]:
    """The judge with its agreement, what was left out, empty or unscored, and further figures."""
    terms = terms_of(summary)
    sentences = [summary["judge"]["text"]]
    # k is None for files without common figures; older summaries have no drawn.
    k, drawn = summary["k"], summary.get("drawn")
    if k and drawn and drawn > k:
        sentences.append(f"the first {k} of {drawn} replies a prompt are looked at, since all "
                         "their pairs are compared")
    for name, system in summary["systems"].items():
        if system["control"]:
            continue
        text = (f"{name}: {system['rows']} rows, {system['responses']} responses, "
                f"{system['empty']} empty")
        if system.get("unscored") is not None:
            why = ", ".join(f"{count} {reason}" for reason, count in system["unscored"].items())
            text += f", {sum(system['unscored'].values())} unscored" + (f" ({why})" if why else "")
        if (rate := system.get("incoherence_rate")) is not None:
            text += f"; Incoherence rate: {100 * rate['mean']:.1f}{mark_untrusted(summary)}"
        sentences.append(text)
    for pair, matched in summary["matched"].items():
        # What a control lacks in coherent replies says nothing about a system.
        if matched["left_out"] and "control" not in pair:
            sentences.append(
                f"{pair} at equal {terms.quality}: {matched['prompts']} prompts; "
                f"{matched['left_out']} left out, where one of the two has fewer than two "
                f"{terms.good} replies")
    for name, c in summary["controllability"].items():
        sentences.append(
            f"{name}: mutual information of number and class {c['excess']:.3f} nats above chance "
            f"(p {c['p_value']:.3f}); a number keeps its class over seeds in "
            f"{100 * c['stable']:.0f} %, two numbers coincide in {100 * c['coincide']:.0f} %")
    return sentences


# ---- the terminal -------------------------------------------------------------------------------


def print_common(summary: dict) -> None:
    """Metrics as rows and systems as columns, then the paired differences, and the notes."""
    console = _console(WIDTH)
    shown = list(rows_of(summary))
    noisy = {key for _, key, _, _, better, _ in shown if rewards_noise(summary, key, better)}
    if shown:
        systems = summary["systems"]
        cells = [(section, name + ARROWS[better] + " †" * (key in noisy),
                  {s: with_half(systems[s].get(key), digits) for s in systems})
                 for section, key, name, _, better, digits in shown]
        _print_blocks(
            console, f"{summary['rows']} prompts x {summary['k']} replies; mean ± 95 % interval"
            + " over categories" * (terms_of(summary) is BY_PROGRAM),
            cells, {name: name.replace(": ", ":\n") for name in systems})
    _print_differences(console, summary, shown)
    print_examples(console, summary.get("examples", []))
    for text in [*headline(summary), *notes(summary)]:
        console.print(text, markup=False)
    if noisy:
        console.print("† a degenerate control beats every system: this figure rewards noise or "
                      "repetition")


def print_tables(tables: list[Table]) -> None:
    """Tables of texts, each with its notes; as wide as their cells ask for where no one looks."""
    for table in tables:
        console = _console(max(WIDTH, _natural_width(table)))
        shown = RichTable(title=escape(table.title), title_justify="left", box=box.SIMPLE_HEAD,
                          show_edge=False, pad_edge=False)
        # Names and texts come from files, so they are escaped: rich would read [x] as a style.
        for i, column in enumerate(table.columns):
            shown.add_column(escape(column), justify="right" if i else "left")
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print()
        if table.rows:
            console.print(shown)
        for note in table.notes:
            console.print(note, markup=False)


def _console(width: int) -> Console:
    """A console as wide as the terminal, or of a set width where the output is no terminal."""
    console = Console(highlight=False)
    return Console(width=max(60, console.width) if console.is_terminal else width, highlight=False)


def _natural_width(table: Table) -> int:
    """Columns that a table needs so that no cell is folded."""
    widths = [max(map(len, cells)) for cells in zip(table.columns, *table.rows, strict=True)]
    return sum(widths) + 2 * len(widths)


def _print_differences(console: Console, summary: dict, shown: list[tuple]) -> None:
    """Each system minus the first, paired by prompt, then at equal coherence."""
    first = next(iter(summary["systems"]))
    columns = {name: name.removesuffix(f" - {first}").replace(": ", ":\n")
               for name in summary["differences"]}
    matched, terms, cells = summary["matched"], terms_of(summary), []

    def add(section: str, name: str, digits: int, figures: dict[str, Figure | None]) -> None:
        # A metric that is defined for no pair would be a line of dashes.
        if any(figures.values()):
            cells.append((section, name, {column: with_half(f, digits, "+") + "*" * is_clear(f)
                                          for column, f in figures.items()}))

    for section, key, name, _, _, digits in shown:
        add(section, name, digits, {c: summary["differences"][c].get(key) for c in columns})
    for _, key, name, _, _, digits in shown:
        add(f"at equal {terms.quality}",
            f"{name}, {terms.at_equal}{mark_untrusted(summary)}", digits,
            {c: matched[c]["measures"].get(key) if c in matched else None for c in columns})
    if cells:
        _print_blocks(console, f"minus {first}, paired by prompt; * the interval leaves out 0",
                      cells, columns)


def _print_blocks(console: Console, title: str, rows: list[tuple[str, str, dict]],
                  columns: dict[str, str]) -> None:
    """rows of (section, name, cells by column), in as many tables as the width asks for."""
    names = list(columns)
    # 22 columns for a metric's name; 15 for a figure with its interval and the gap beside it.
    fits = max(1, (console.width - 22) // 15)
    for start in range(0, len(names), fits):  # a figure cut in the middle would mislead
        table = RichTable(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD,
                          show_edge=False, pad_edge=False)
        table.add_column("", no_wrap=True)
        for name in names[start : start + fits]:
            table.add_column(escape(columns[name]), justify="right", max_width=13, overflow="fold",
                             style="dim" if name.startswith("control") else None)
        for i, (section, name, cells) in enumerate(rows):
            if i and section != rows[i - 1][0]:
                table.add_section()
            table.add_row(name, *(cells[c] for c in names[start : start + fits]))
        console.print(table)
        console.print()
