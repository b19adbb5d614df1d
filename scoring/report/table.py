"""How an evaluation is shown: the table in the terminal, and one HTML page that needs nothing else.

Both read the summary that eval.py writes as eval_logs/X.json. The page also gets the rows, with every reply, its class
and its verdict. It holds its styles, its script and its drawings inline, asks no server for anything, and is whole
without JavaScript but for searching and sorting.
"""

from __future__ import annotations

METRICS = [  # key in the summary, name, unit or meaning, whether more is better (1), worse (-1) or neither (0), digits
    ("together", [
        ("yield@k", "yield@{k}", "different and coherent replies of {k}", 1, 2),
        ("utility_k", "utility@{k}", "rating of the first reply of each class, discounted by 0.8 a reply", 1, 2),
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
ARROWS = {1: " ↑", -1: " ↓", 0: ""}  # which way is better, if one is


def rows_of(summary: dict):
    """(section, key, name, meaning, better, digits) of every metric that some system has."""
    k = summary["k"]
    for section, group in METRICS:
        for key, name, meaning, better, digits in group:
            key = key.replace("@k", f"@{k}")
            if any(system.get(key) is not None for system in summary["systems"].values()):
                yield section, key, name.format(k=k), meaning.format(k=k), better, digits


def mean_of(figure) -> float | None:
    return figure[0] if isinstance(figure, list) else figure


def rewards_noise(summary: dict, key: str, better: int) -> bool:
    """Whether a degenerate control beats every system on a metric."""
    values = {c: [better * mean_of(s[key]) for s in summary["systems"].values() if s.get(key) is not None and s["control"] == c]
              for c in (True, False)}
    return bool(better and values[True] and values[False] and max(values[True]) > max(values[False]))


def short(figure, digits: int, sign: str = "") -> str:
    """'4.42 ±0.28' (the longer side of the interval), or a dash where there is no figure."""
    if figure is None:
        return "—"
    if not isinstance(figure, list):
        return f"{figure:{sign}.{digits}f}"
    return f"{round(figure[0], digits) + 0.0:{sign}.{digits}f} ±{max(figure[2] - figure[0], figure[0] - figure[1]):.{digits}f}"


def clear(figure) -> bool:
    """Whether a difference's interval leaves out zero."""
    return figure is not None and not figure[1] <= 0 <= figure[2]


def headline(summary: dict) -> list[str]:
    """One sentence a system: its yield, and the difference from the first with its interval."""
    k, names = summary["k"], [name for name, s in summary["systems"].items() if not s["control"]]
    said = []
    for name in names:
        figure = summary["systems"][name].get(f"yield@{k}")
        if figure is None:
            continue
        text = f"{name}: {figure[0]:.2f} of {k} replies are coherent and different"
        difference = summary["differences"].get(f"{name} - {names[0]}", {}).get(f"yield@{k}")
        if difference:
            text += f", {difference[0]:+.2f} [{difference[1]:+.2f}, {difference[2]:+.2f}] against {names[0]}"
        said.append(text)
    return said


def canary_text(result: dict) -> str:
    """How many replies that try to talk the judge round got more than the same reply without the attempt."""
    if not result["scored"]:
        return "; none of its canaries was scored"
    above = result["above_clean_twin"]
    return f"; {above} of {result['scored']} replies that try to talk it round were rated above their clean twins"


def print_table(summary: dict) -> None:
    """Metrics as rows and systems as columns, then the paired differences, the judge, and what was left out."""
    from rich.console import Console

    console = Console(highlight=False)
    width = max(60, console.width) if console.is_terminal else 100
    console = Console(width=width, highlight=False)
    systems = summary["systems"]
    metrics = list(rows_of(summary))
    noisy = {key for _, key, _, _, better, _ in metrics if rewards_noise(summary, key, better)}
    cells = [(section, name + ARROWS[better] + " †" * (key in noisy),
              {s: short(systems[s].get(key), digits) for s in systems}) for section, key, name, _, better, digits in metrics]
    print_blocks(console, f"{summary['rows']} prompts x {summary['k']} replies; mean ± 95 % interval", cells,
                 {name: name.replace(": ", ":\n") for name in systems})
    first = next(iter(systems))
    columns = {name: name.removesuffix(f" - {first}").replace(": ", ":\n") for name in summary["differences"]}
    digits_of = {key: (section, name, digits) for section, key, name, _, _, digits in metrics}
    cells = []
    for key, (section, name, digits) in digits_of.items():
        figures = {c: summary["differences"][c].get(key) for c in columns}
        if any(figures.values()):
            cells.append((section, name, {c: short(f, digits, "+") + "*" * clear(f) for c, f in figures.items()}))
    matched = summary["matched"]
    for key in digits_of:
        figures = {c: matched[c]["measures"].get(key) if c in matched else None for c in columns}
        if any(figures.values()):
            cells.append(("at equal coherence", f"{digits_of[key][1]}, eq. coh.", {c: short(f, digits_of[key][2], "+") + "*" * clear(f)
                                                             for c, f in figures.items()}))
    if cells:
        print_blocks(console, f"minus {first}, paired by prompt; * the interval leaves out 0", cells, columns)
    for text in [*headline(summary), *notes(summary)]:
        console.print(text, markup=False)
    if noisy:
        console.print("† a degenerate control beats every system: this figure rewards noise or repetition")


def print_blocks(console, title: str, rows: list[tuple[str, str, dict]], columns: dict[str, str]) -> None:
    """rows of (section, name, cells by column), in as many tables as the width asks for."""
    from rich import box
    from rich.markup import escape as plain
    from rich.table import Table

    names = list(columns)
    fits = max(1, (console.width - 22) // 15)
    for start in range(0, len(names), fits):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("", no_wrap=True)
        for name in names[start : start + fits]:
            table.add_column(plain(columns[name]), justify="right", max_width=13, overflow="fold",
                             style="dim" if name.startswith("control") else None)
        for i, (section, name, cells) in enumerate(rows):
            if i and section != rows[i - 1][0]:
                table.add_section()
            table.add_row(name, *(cells[c] for c in names[start : start + fits]))
        console.print(table)
        console.print()


def notes(summary: dict) -> list[str]:
    """The judge with its agreement, then per system what was empty or unscored, and further measurements."""
    said = [summary["judge"]["text"]]
    for name, system in summary["systems"].items():
        if system["control"]:
            continue
        text = f"{name}: {system['rows']} rows, {system['responses']} responses, {system['empty']} empty"
        if system.get("unscored") is not None:
            why = ", ".join(f"{count} {reason}" for reason, count in system["unscored"].items())
            text += f", {sum(system['unscored'].values())} unscored" + (f" ({why})" if why else "")
        if (rate := system.get("incoherence_rate")) is not None:
            text += f"; Incoherence rate: {100 * mean_of(rate):.1f}"
        said.append(text)
    for pair, matched in summary["matched"].items():
        if matched["left_out"] and "control" not in pair:
            said.append(f"{pair} at equal coherence: {matched['prompts']} prompts; {matched['left_out']} left out, "
                        "where one of the two has fewer than two coherent replies")
    for name, c in summary["controllability"].items():
        said.append(f"{name}: mutual information of number and class {c['excess']:.3f} nats above chance (p {c['p_value']:.3f}); "
                    f"a number keeps its class over seeds in {100 * c['stable']:.0f} %, two numbers coincide in {100 * c['coincide']:.0f} %")
    return said
