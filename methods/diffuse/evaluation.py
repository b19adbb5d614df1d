"""Does a model's distribution over targets fit the wanted one? Exactly, and from samples.

Figures of each system and request (rows with `targets`; infer.py --method diffuse writes them):

| figure          | from    | meaning                                                            |
| kl, tv, outside | model   | KL(w || p) in nats, total variation, probability of any text but   |
|                 |         | a target                                                           |
| entropy         | samples | of the answers in nats, Miller-Madow; entropy_plugin: uncorrected  |
| coverage        | samples | distinct answers among N replies                                   |
| covered         | samples | distinct targets among them                                        |
| parsed, valid   | samples | share of replies with an answer; whose answer is a target          |
| p_value         | samples | of chi_square, the fit of the valid answers to the targets'        |
|                 |         | weights; simulated                                                 |
| unseen_valid    | samples | share of replies whose answer is a target of no training request   |
| new             | samples | share of replies with an answer that is no target (for open lists, |
|                 |         | maybe a good one)                                                  |

The model's figures are computed by teacher forcing, of the model that drew the replies. p counts a
target's usual tokens only; the same text in other tokens is part of `outside`.

An answer is the first {...} of a reply (the first four where targets have four lines of them; then
`fields` has coverage and entropy line by line). Replies without an answer count in N and are left
out of entropy and coverage. Intervals are 95 %, over replies.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import trees
from methods import missing
from methods.diffuse.plot import plot
from methods.diffuse.training import distribution_tree
from scoring import metrics, statistics
from scoring.evaluated import DASH, Evaluated, Table, with_interval
from scoring.sources import NoModel

BRACES = re.compile(r"\{[^{}]*\}")
EXACT = ("kl", "tv", "outside")
COLUMNS = (*EXACT, "entropy", "coverage", "covered", "parsed", "valid", "p_value", "unseen_valid",
           "new")
MAX_TOKENS = 4096  # of a request's tree scored at once; bounds memory


def measure(systems: dict[str, list[dict]], sources, args) -> Evaluated:
    """The figures of every system and request, a line of each, and a plot of each request.

    systems: {name: rows with prompt, targets, weights, eos and preds}.
    """
    # read_systems has made sure that all files hold the same rows
    first_rows = next(iter(systems.values()))
    if "targets" not in first_rows[0]:
        return missing.not_the_methods("the rows have no targets")
    labels = _labels(first_rows)
    summary, lines = {"systems": {}}, []
    for name, rows in systems.items():
        exact, no_model = _exact_figures(rows, sources, name)
        seen = _seen_targets(rows)
        figures = [sample_figures(row, seen) | of_model
                   for row, of_model in zip(rows, exact, strict=True)]
        reasons = [{column: _why_missing(column, row, no_model) for column in COLUMNS
                    if of_row[column] is None} for row, of_row in zip(rows, figures, strict=True)]
        # lists with an entry for every target are too long for the summary; the lines have them
        shown = [{key: value for key, value in of_row.items() if key not in ("counts", "logps")}
                 | {"reasons": why} for of_row, why in zip(figures, reasons, strict=True)]
        summary["systems"][name] = {
            "mode": rows[0].get("mode"), "prompts": dict(zip(labels, shown, strict=True)),
            "tasks": _by_task(rows, figures),
            "reasons": dict.fromkeys(EXACT, no_model) if no_model else {}}
        lines += [{"system": name, "file": row.get("file"), "prompt": row["prompt"],
                   "targets": row["targets"], "weights": row["weights"], **of_row}
                  for row, of_row in zip(rows, figures, strict=True)]
    return Evaluated(summary, lines, _plots(labels, lines))


def _plots(labels: list[str], lines: list[dict]) -> dict[str, bytes]:
    """A plot of every request with targets, by file name; lines: those of all systems."""
    # every system has the same rows, and lines stand system by system, so a step of one system's
    # number of rows stays with one request
    step = len(labels)
    return {_plot_name(label): plot(lines[i::step]) for i, label in enumerate(labels)
            if lines[i]["targets"]}


def _plot_name(label: str) -> str:
    return f"_plots/{label.replace('/', '_')}.png"


def _labels(rows: list[dict]) -> list[str]:
    """A short name of every row: task and file name, or its number.

    Names that would be alike, as such or as those of plots, also have the number of the row.
    """
    labels = [f"{row['task']}/{Path(row['file']).stem}" if "file" in row else f"row {i}"
              for i, row in enumerate(rows, 1)]
    # two folders may have one name, and two files differ in what follows the dot
    times = Counter(map(_plot_name, labels))
    return [label if times[_plot_name(label)] == 1 else f"{label} (row {i})"
            for i, label in enumerate(labels, 1)]


def _seen_targets(rows: list[dict]) -> set[str] | None:
    """The targets of the training requests; None where the file holds no such request.

    Files of infer.py --split all (default) or train hold them.
    """
    training = [row for row in rows if row.get("split") == "train"]
    return {target for row in training for target in row["targets"]} if training else None


# ---- figures of the model -----------------------------------------------------------------------


def target_logps(model, tokenizer, row: dict) -> np.ndarray:
    """log p(target | request) of every target (K,), summed over response prefixes, in nats."""
    count, prefixes = len(row["targets"]), len(row["response"])
    # equal weights, whatever the row's are: targets of weight 0 would be left out of the tree
    tree = distribution_tree(row, tokenizer, [1.0] * count)
    scored, = trees.score_forest(model, [tree], MAX_TOKENS)
    branch, sums = scored.leaf_sums()  # leaves come in the order of the trie
    # different prefixes make different texts, so their probabilities add up
    return sums[branch.argsort()].view(count, prefixes).logsumexp(1).numpy()


def _exact_figures(rows: list[dict], sources, name: str) -> tuple[list[dict], str | None]:
    """Per row kl, tv, outside and the targets' logps; without a model all None, and the reason."""
    unknown = dict.fromkeys((*EXACT, "logps"))
    try:
        model, tokenizer, _ = sources.model(name)
    except NoModel as error:
        return [unknown] * len(rows), str(error)
    figures = []
    for row in rows:
        if not row["targets"]:
            figures.append(unknown)
            continue
        logps = target_logps(model, tokenizer, row)
        figures.append(metrics.exact_fit(row["weights"], logps)
                       | {"logps": [round(float(logp), 6) for logp in logps]})
    return figures, None


# ---- figures of the samples ---------------------------------------------------------------------


def find_answer(reply: str, targets: list[str], eos: bool = True,
                unwanted: Sequence[str] = ()) -> str | None:
    """The answer in a reply, or None.

    Targets in braces, one group or several line by line: the reply's first groups, as many (all
    where there are no targets). Other targets: the whole reply, or with eos false the longest
    target or unwanted text that it starts with, if any.
    """
    reply = reply.strip()
    # this holds without targets, too: requests of open lists also ask for braces
    if all("\n".join(BRACES.findall(target)) == target for target in targets):
        groups = BRACES.findall(reply)
        # a model that goes on after its answer has still given it
        count = len(BRACES.findall(targets[0])) if targets else len(groups)
        return "\n".join(groups[:count]) if groups and len(groups) >= count else None
    if not eos:
        # where no end was learnt, the model goes on writing after its answer
        starts = [text for text in (*targets, *unwanted) if reply.startswith(text)]
        # the longest one: "10 is it" starts with "10" and with "1"
        return max(starts, key=len, default=reply or None)
    return reply or None


def sample_figures(row: dict, seen: set[str] | None) -> dict:
    """The figures of a row's replies; seen: the targets of the requests that were trained on.

    None for seen: they are unknown.
    """
    pairs = zip(row["targets"], row["weights"], strict=True)
    # a target of weight 0 should never be said, so it counts as no target
    wanted = {target: weight for target, weight in pairs if weight > 0}
    unwanted = [target for target in row["targets"] if target not in wanted]
    read = [find_answer(reply, list(wanted), row["eos"], unwanted) for reply in row["preds"]]
    answers = Counter(answer for answer in read if answer is not None)
    total, counts = len(row["preds"]), list(answers.values())
    figures = {"replies": total, "parsed": statistics.share_interval(sum(counts), total),
               "coverage": len(answers), "entropy": statistics.entropy_interval(counts),
               "entropy_plugin": statistics.entropy(counts)}
    fields = list(zip(*(answer.split("\n") for answer in answers.elements()), strict=False))
    if len(fields) > 1:
        figures["fields"] = [_field_figures(values) for values in fields]
    return figures | _target_figures(answers, wanted, seen, total) | {
        "counts": dict(answers.most_common())}


def _field_figures(values: tuple[str, ...]) -> dict:
    counts = list(Counter(values).values())
    return {"coverage": len(counts), "entropy": statistics.miller_madow(counts)}


def _target_figures(answers: Counter, wanted: dict[str, float], seen: set[str] | None,
                    total: int) -> dict:
    """The figures that compare answers with targets, all None where there are no targets."""
    if not wanted:
        return dict.fromkeys(("valid", "covered", "new", "new_distinct", "unseen_valid",
                              "chi_square", "p_value"))
    valid = [answers[target] for target in wanted]
    # with nothing known of the training, every target would pass for unseen
    unseen = None if seen is None else statistics.share_interval(
        sum(answers[target] for target in wanted if target not in seen), total)
    # of the valid answers alone: the rest is counted by valid and new
    fit = statistics.chi_square(valid, list(wanted.values()))
    return {
        "valid": statistics.share_interval(sum(valid), total),
        "covered": sum(count > 0 for count in valid),
        "new": statistics.share_interval(answers.total() - sum(valid), total),
        "new_distinct": sum(answer not in wanted for answer in answers),
        "unseen_valid": unseen,
        **(fit or {"chi_square": None, "p_value": None})}


def _why_missing(column: str, row: dict, no_model: str | None) -> str:
    """Why a row lacks a figure."""
    if column in EXACT and no_model:
        return no_model
    if column == "entropy":
        return "no reply holds an answer"
    if not row["targets"]:
        return "the request has no targets"
    if column == "unseen_valid":
        return "the file holds no training request, so what was seen is unknown (--split all)"
    return "no answer is a target"


def _by_task(rows: list[dict], figures: list[dict]) -> dict:
    """Means over the prompts of every task and split, as published, with the number of prompts."""
    groups: dict[str, list[dict]] = {}
    for row, of_row in zip(rows, figures, strict=True):
        name = f"{row.get('task', 'all')} ({row.get('split', 'all')})"
        groups.setdefault(name, []).append(of_row)
    means = {}
    for name, group in groups.items():
        means[name] = {"prompts": len(group), "reasons": {}}
        for column in COLUMNS:
            values = [_value(of_row[column]) for of_row in group]
            means[name][column] = None if None in values else sum(values) / len(values)
            if None in values:  # a mean over the others would compare unlike sets of prompts
                means[name]["reasons"][column] = f"{values.count(None)} prompts lack it"
    return means


def _value(figure: dict | float | None) -> float | None:
    """A figure without its interval."""
    return figure["mean"] if isinstance(figure, dict) else figure


# ---- tables -------------------------------------------------------------------------------------


def tables(summary: dict) -> list[Table]:
    """A table over prompts, and one of the means over tasks where there are several prompts."""
    systems = summary["systems"]
    title = "per prompt; nats; 95 % intervals over replies"
    if not systems:
        return missing.empty_tables(title, summary)
    notes = [note for name, system in systems.items()
             for note in missing.notes(name, system["reasons"])]
    shown = [_table(title, "prompts", systems)]
    if any(len(system["prompts"]) > 1 for system in systems.values()):
        # with a single prompt the means would repeat the table above
        shown.append(_table("means over the prompts of a task", "tasks", systems))
    # the notes are about both tables, so they stand below the last one
    return [*shown[:-1], shown[-1]._replace(notes=notes)]


def _table(title: str, kind: str, systems: dict[str, dict]) -> Table:
    """A line per prompt or task and system."""
    columns = [column.replace("_", " ") for column in COLUMNS]
    rows = [[name, system, *(_text(figures[kind][name][column]) for column in COLUMNS)]
            for name in next(iter(systems.values()))[kind] for system, figures in systems.items()]
    return Table(title, [kind.removesuffix("s"), "system", *columns], rows)


def _text(figure: dict | float | None) -> str:
    if figure is None:
        return DASH
    if isinstance(figure, dict):
        return with_interval(figure)
    return str(figure) if isinstance(figure, int) else f"{figure:.3f}"
