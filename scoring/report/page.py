"""The page of an evaluation: one HTML file that needs nothing else.

It holds its styles, its script and its drawings inline, asks no server for anything, and is whole
without JavaScript but for searching and sorting. page.html.jinja is what it looks like; here the
summary becomes what the template shows: texts, colours, and coordinates by plot.py. Everything is
escaped where it is put in, so no text of a reply becomes markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scoring.evaluated import COHERENCE, REFERENCES, Figure, Table, is_clear, with_interval
from scoring.report import plot
from scoring.report.examples import sign_of
from scoring.report.table import (
    ARROWS,
    BY_PROGRAM,
    mark_untrusted,
    notes,
    rewards_noise,
    rows_of,
    terms_of,
)

COLOURS, CLASS_COLOURS = 6, 9  # of systems and of classes in page.css, taken in turn
# diversities to plot
SCATTERED = ("distinct", "distinct_k", "sbert_diversity", "vendi", "effective_number")
MARKS = {True: ("yes", "✓", "coherent"), False: ("no", "✗", "not coherent"),
         None: ("none", "–", "no verdict")}

# autoescape for all templates: Jinja's default would escape nothing in a name ending in .jinja
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True)


class System(NamedTuple):
    """A column of the page; switches and the classes of its elements are numbered by index."""

    index: int
    name: str
    colour: str
    control: bool


class Cell(NamedTuple):
    """A figure in a table: its texts, and its bar in per cent. mean is None for a reason."""

    system: System
    mean: str | None
    interval: str = ""
    bar: Figure | None = None
    vague: bool = False
    reason: str = ""


class Row(NamedTuple):
    """A metric in a table, a cell for every column."""

    name: str
    meaning: str
    cells: list[Cell]
    arrow: str = ""
    noisy: bool = False


def render(summary: dict, prompts: list[dict], tables: Sequence[Table] = ()) -> str:
    """The page as one string of HTML.

    summary: X.json; its k is None where the common figures are withheld, for its reasons. prompts:
    {"text", "turns": labelled turns or None, "systems": {name: {"replies": [{"text", "class",
    "coherent", "verdict", "why"}], "similarity": rows of cosines or None, "yield": a number or
    None}}}, in the order of the file; replies that a program checked are {"text", "answer",
    "repeated"}. tables: the method's own.
    """
    systems = [System(i, name, "var(--quiet)" if figures["control"] else f"var(--s{i % COLOURS})",
                      figures["control"])
               for i, (name, figures) in enumerate(summary["systems"].items())]
    real = [system for system in systems if not system.control]
    # where the common figures are withheld, the judge's note only repeats the reason
    sentences = notes(summary) if summary["k"] else notes(summary)[1:]
    withheld = COHERENCE in summary["reasons"]
    return _TEMPLATES.get_template("page.html.jinja").render(
        summary=summary, terms=terms_of(summary), plot=plot, systems=systems, real=real,
        notes=sentences, tables=tables,
        # Cards and sorting compare with real[0], the baseline, which is the first file.
        cards=[_card(system, real[0], summary) for system in real]
        if summary["k"] and not withheld else [],
        scatters=_scatters(summary, systems), figures=_figures(summary, systems),
        compared=list(_pairs(summary, systems)), differences=_differences(summary, systems),
        # Without yields there is nothing else to sort by.
        orders=_orders([] if withheld else real), withheld=withheld,
        prompts=[
            _prompt(number, prompt, systems, real, summary["k"], terms_of(summary) is BY_PROGRAM)
            for number, prompt in enumerate(prompts, 1)])


# ---- figures ------------------------------------------------------------------------------------


def _card(system: System, first: System, summary: dict) -> dict:
    """A system's yield, and what it gains on the first system."""
    key = f"yield@{summary['k']}"
    figure = summary["systems"][system.name].get(key)
    gain = summary["differences"].get(f"{system.name} - {first.name}", {}).get(key)
    return {"system": system, "first": first, "figure": figure, "gain": gain,
            "mark": mark_untrusted(summary, key),
            "bar": None if figure is None or figure["low"] is None
            else plot.bar(figure, 0, summary["k"])}


def _scatters(summary: dict, systems: list[System]) -> list[dict]:
    """Diversity over the share of good replies, in the measures that some system has both of."""
    scatters, share = [], terms_of(summary).share
    for _, key, name, meaning, _, _ in rows_of(summary):
        points = {}
        for system in systems:
            figures = summary["systems"][system.name]
            if figures.get(share) and figures.get(key):
                points[system] = plot.Point(system.name, *(
                    {end: _end(figures[name], end) for end in ("mean", "low", "high")}
                    for name in (share, key)))
        # A measure that no judged system has would be an empty plot.
        if key in SCATTERED and points:
            human = summary["systems"].get(REFERENCES, {}).get(key)
            places = plot.scatter(list(points.values()), human and human["mean"])
            titles = [f"{point.label}: {share} {with_interval(point.x)}, "
                      f"{name} {with_interval(point.y)}" for point in points.values()]
            scatters.append({"name": name, "meaning": meaning, "places": places,
                             "marks": list(zip(points, titles, places.marks, strict=True))})
    return scatters


def _figures(summary: dict, systems: list[System]) -> list[tuple[str, list[Row]]]:
    """Every metric of every system by section, each with a bar on the metric's own scale."""
    parts: dict[str, list[Row]] = {}
    for part, key, name, meaning, better, digits in rows_of(summary):
        figures = [summary["systems"][system.name].get(key) for system in systems]
        known = [figure for figure in figures if figure is not None]
        high = max(_end(figure, "high") for figure in known)
        # 0 stands on every scale: a bar that starts elsewhere makes small differences look large
        low = min([0.0, *(_end(figure, "low") for figure in known if figure["low"] is not None)])
        # 1e-9: a scale on which all figures are 0 still has a width to divide by.
        cells = [_cell(system, figure, (low, max(high, 1e-9)), digits,
                       summary["systems"][system.name]["reasons"].get(key, ""))
                 for system, figure in zip(systems, figures, strict=True)]
        parts.setdefault(part, []).append(Row(name, meaning, cells, ARROWS[better],
                                              rewards_noise(summary, key, better)))
    return list(parts.items())


def _differences(summary: dict, systems: list[System]) -> list[tuple[str, list[Row]]]:
    """Each system minus the first, paired by prompt, then the same at equal coherence."""
    pairs, terms = _pairs(summary, systems), terms_of(summary)

    def row(name: str, meaning: str, digits: int, figures: dict[str, dict]) -> list[Row]:
        columns = [(system, figures.get(pair)) for system, pair in pairs.items()]
        # One scale for all pairs of a row, as wide to the left as to the right.
        ends = [abs(_end(figure, end)) for _, figure in columns if figure
                for end in ("low", "high")]
        if not ends:
            return []
        far = max(ends) or 1.0  # zero stands in the middle
        return [Row(name, meaning, [_cell(system, figure, (-far, far), digits,
                                          "not defined for both", "+")
                                    for system, figure in columns])]

    plain, matched = [], []
    for _, key, name, _, _, digits in rows_of(summary):
        differences = {pair: summary["differences"][pair].get(key) for pair in pairs.values()}
        equal = {pair: of_pair["measures"].get(key)
                 for pair, of_pair in summary["matched"].items()}
        plain += row(name, "", digits, differences)
        matched += row(name + mark_untrusted(summary), f"of the {terms.good} replies alone",
                       digits, equal)
    title = f"at equal {terms.quality}: equally many {terms.good} replies a prompt"
    return [(name, rows) for name, rows in (("", plain), (title, matched)) if rows]


def _pairs(summary: dict, systems: list[System]) -> dict[System, str]:
    """The names under which the summary compares systems with the first one."""
    pairs = {system: f"{system.name} - {systems[0].name}" for system in systems[1:]}
    return {system: pair for system, pair in pairs.items() if pair in summary["differences"]}


def _end(figure: Figure, name: str) -> float:
    """An end of a figure's interval, the figure itself where it has none (a duration)."""
    return figure["mean"] if figure[name] is None else figure[name]


def _cell(system: System, figure: Figure | None, scale: tuple[float, float], digits: int,
          reason: str, sign: str = "") -> Cell:
    """A figure's texts, and its bar on a line from scale[0] to scale[1]."""
    if figure is None:
        return Cell(system, None, reason=reason)
    if figure["low"] is None:
        # Figures without an interval, such as seconds, have no bar: it would look exact.
        return Cell(system, f"{figure['mean']:{sign}.{digits}f}")
    figure = {name: round(v, digits) + 0.0 for name, v in figure.items()}  # no minus before a zero
    mean, low, high = (f"{figure[name]:{sign}.{digits}f}" for name in ("mean", "low", "high"))
    return Cell(system, mean, f"[{low}, {high}]", plot.bar(figure, *scale),
                bool(sign) and not is_clear(figure))


# ---- replies ------------------------------------------------------------------------------------


def _orders(real: list[System]) -> list[tuple[str, str]]:
    """What prompts can be sorted by: the name of their data- attribute, and a text."""
    return [("n", "order of the file"),
            *((f"y{system.index}", f"yield of {system.name}") for system in real),
            *((f"d{system.index}", f"yield of {system.name} minus {real[0].name}")
              for system in real[1:])]


def _prompt(number: int, prompt: dict, systems: list[System], real: list[System], k: int,
            by_program: bool) -> dict:
    """A prompt that opens: its turns, and a column of replies for each system."""
    column = _column_of_answers if by_program else _column
    yields = {system: prompt["systems"][system.name]["yield"] for system in systems}
    first = yields[real[0]]
    # Prompts without a yield have no such key; page.js ranks them below all others.
    order = {f"y{system.index}": yields[system] for system in real if yields[system] is not None}
    order |= {f"d{system.index}": yields[system] - first for system in real[1:]
              if yields[system] is not None and first is not None}
    turns = [("task", prompt["text"])]  # the class of its element, and its text
    if prompt["turns"]:
        turns = [("person-a" if turn.startswith("Person A") else "person-b", turn)
                 for turn in prompt["turns"]]
    return {"number": number, "order": order, "turns": turns,
            "pips": [(system, count, f"{count / k:.3f}") for system, count in yields.items()
                     if count is not None],
            "columns": [column(system, prompt["systems"][system.name], k) for system in systems]}


def _column(system: System, answers: dict, k: int) -> dict:
    """One system's replies to one prompt, each with its class and verdict."""
    replies = []
    for reply in answers["replies"]:
        verdict, mark, words = MARKS[reply["coherent"]]
        replies.append({"text": reply["text"], "why": reply["why"], "verdict": verdict,
                        "shown": f"{mark} {reply['verdict']}", "words": words,
                        "letter": letter(reply["class"]),
                        "colour": f"var(--k{reply['class'] % CLASS_COLOURS})"})
    count = f"{len({reply['class'] for reply in answers['replies']})} different of {k}"
    if answers["yield"] is not None:
        count += f", {answers['yield']} of them coherent"
    similarity = answers["similarity"]
    heat = plot.heat(similarity) if similarity and len(similarity) > 1 else None
    return {"system": system, "count": count, "heat": heat, "replies": replies, "answers": []}


def _column_of_answers(system: System, answers: dict, k: int) -> dict:
    """One system's replies to one prompt, as a program has checked them."""
    chips = []
    for reply in answers["replies"]:
        kind = "right" if reply["answer"] is not None else "wrong"
        title = f"right: {reply['answer']}" if kind == "right" else kind
        # A right reply has a sign, too, so that colour alone says nothing.
        chips.append({"text": reply["text"], "sign": sign_of(reply) or MARKS[True][1],
                      "kind": kind + " repeated" * reply["repeated"],
                      "title": title + ", repeated" * reply["repeated"]})
    right = sum(reply["answer"] is not None for reply in answers["replies"])
    count = f"{right} right of {k}, {answers['yield']} of them different"
    return {"system": system, "count": count, "heat": None, "replies": [], "answers": chips}


def letter(number: int) -> str:
    """A, B, ... Z, then A2, B2 ..."""
    # The first round has no number, so that classes of up to 26 replies are single letters.
    return chr(ord("A") + number % 26) + (str(number // 26 + 1) if number > 25 else "")
