"""Figures of verifiable tasks: how many of k replies are right, and how many different right ones.

Two requests of one category are not independent: all intervals are over categories, which are
resampled whole. Figures are as in scoring/evaluated.py; undefined is None with a reason, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from scoring import answers, statistics
from scoring.answers import Answer
from scoring.evaluated import Evaluated, Figure, Table, rounded, with_interval

FIGURES = ("valid", "yield", "distinct", "coverage", "collision")
WHY_NONE = {"coverage": "the requests have rules, not lists of all right answers",
            "collision": "one reply a request has nothing to be the same as"}


def measure(systems: Mapping[str, list[dict]]) -> Evaluated:
    """The figures of systems, {name: rows with "preds"}, on the same rows in the same order.

    Summary: k, rows, categories; systems: {name: {figure: ...}}; differences, of each system and
    the first one, paired by row; matched, the same at equal validity; reasons. `yield` is yield@k.
    Lines: one per reply, with the right answer that it gives, or None. With different numbers of
    replies a row all figures are withheld, since what is counted among k replies grows with k.
    """
    counts = {name: sorted({len(row["preds"]) for row in rows}) for name, rows in systems.items()}
    first = next(iter(systems.values()))
    if len({k for ks in counts.values() for k in ks}) > 1:
        why = "rows have different numbers of replies: " + ", ".join(
            f"{name} {' and '.join(map(str, ks))}" for name, ks in counts.items())
        return Evaluated({"k": None, "rows": len(first), "reasons": {"all figures": why}}, [])
    categories = [row["category"] for row in first]  # paired: the same in all files
    found = {name: find_all(rows) for name, rows in systems.items()}
    values = {name: _per_row(rows, found[name]) for name, rows in systems.items()}
    baseline, *others = systems
    return Evaluated({
        "k": len(first[0]["preds"]), "rows": len(first), "categories": len(set(categories)),
        "systems": {name: _summarise(of_rows, categories) for name, of_rows in values.items()},
        "differences": {f"{name} - {baseline}": _differences(
            values[name], values[baseline], categories) for name in others},
        "matched": {f"{name} - {baseline}": matched_yield(
            found[name], found[baseline], categories) for name in others},
        "reasons": {}}, _lines(systems, found))


def find_all(rows: list[dict]) -> list[list[Answer | None]]:
    """Per row, per reply: the right answer that it gives, or None."""
    return [[find_answer(reply) for reply in row["preds"]]
            for row in rows for find_answer in [answers.finder(row)]]


def _per_row(rows: list[dict], found: list[list[Answer | None]]) -> dict[str, list]:
    """Every figure as a list over rows."""
    per_row = [answers.figures(of_row, row["preds"], answers.num_answers(row))
               for row, of_row in zip(rows, found, strict=True)]
    return {name: [figures[name] for figures in per_row] for name in FIGURES}


def _summarise(values: dict[str, list], categories: Sequence[str]) -> dict:
    figures: dict = {name: rounded(statistics.cluster_interval(of_rows, categories))
                     for name, of_rows in values.items()}
    figures["reasons"] = {name: WHY_NONE[name] for name, figure in figures.items()
                          if figure is None}
    return figures


def _differences(ours: dict[str, list], theirs: dict[str, list],
                 categories: Sequence[str]) -> dict[str, Figure | None]:
    """Means of the differences by row."""
    # by row before the mean: how hard a request is falls out of the difference
    return {name: rounded(statistics.cluster_interval(
        [None if a is None or b is None else a - b
         for a, b in zip(ours[name], theirs[name], strict=True)], categories)) for name in FIGURES}


def matched_yield(ours: list[list[Answer | None]], theirs: list[list[Answer | None]],
                  categories: Sequence[str]) -> dict:
    """The difference in yield at equal validity, as statistics.matched_difference has it.

    Per row, of both systems as many right replies as the poorer one has are compared; a row counts
    where both have two. Returns difference, prompts, left_out, and responses per system.
    """
    results = []
    # the row's number seeds its draws, so that they do not depend on the rows before it;
    # row by row, since the interval of matched_difference takes rows to be independent
    for number, pair in enumerate(zip(ours, theirs, strict=True)):
        measures = [partial(_yield_among, of_row) for of_row in pair]
        valid = [[[answer is not None for answer in of_row]] for of_row in pair]
        results.append(statistics.matched_difference(*measures, *valid, seed=number))
    differences = [result["difference"] and result["difference"]["mean"] for result in results]
    return {"difference": rounded(statistics.cluster_interval(differences, categories)),
            **{key: sum(result[key] for result in results)
               for key in ("prompts", "left_out", "responses")}}


def _yield_among(of_row: list[Answer | None], _: int, keep: list[int]) -> int:
    return len({of_row[i] for i in keep})


def _lines(systems: Mapping[str, list[dict]], found: dict[str, list]) -> list[dict]:
    return [{"system": name, "row": number, "category": row["category"], "prompt": row["prompt"],
             "response": reply, "answer": name_of(row, answer)}
            for name, rows in systems.items()
            for number, (row, of_row) in enumerate(zip(rows, found[name], strict=True), 1)
            for reply, answer in zip(row["preds"], of_row, strict=True)]


def name_of(row: dict, answer: Answer | None) -> str | None:
    """The canonical form of an answer."""
    # an integer by a rule is found as a string, so that numbers are list positions alone
    return row["answers"][answer][0] if isinstance(answer, int) else answer


# ---- tables -------------------------------------------------------------------------------------


def tables(summary: dict) -> list[Table]:
    """The figures of all systems, and their differences, as finished texts."""
    if summary["k"] is None:
        return [Table("Verifiable tasks", [], [], [summary["reasons"]["all figures"]])]
    k = summary["k"]
    names = ["valid", f"yield@{k}", f"distinct@{k}", "coverage", "collision"]
    systems = [[name, *(with_interval(figures[key]) for key in FIGURES)]
               for name, figures in summary["systems"].items()]
    reasons = {f"{name}: {why}" for figures in summary["systems"].values()
               for name, why in figures["reasons"].items()}
    found = [Table(
        f"Verifiable tasks: {summary['rows']} requests of {summary['categories']} categories, "
        f"{k} replies each", ["system", *names], systems,
        ["A program checks every reply; intervals are 95 % over categories.", *sorted(reasons)])]
    if summary["differences"]:
        rows, notes = [], []
        for pair, figures in summary["differences"].items():
            matched = summary["matched"][pair]
            rows.append([pair, *(with_interval(figures[key], sign="+") for key in FIGURES),
                         with_interval(matched["difference"], sign="+")])
            notes.append(f"{pair}: eq. valid is the difference in yield of {matched['responses']} "
                         f"right replies each, on {matched['prompts']} requests; "
                         f"{matched['left_out']} are left out, where one of both has fewer than "
                         "two.")
        found.append(Table("Differences, paired by request", ["pair", *names, "eq. valid"], rows,
                           notes))
    return found
