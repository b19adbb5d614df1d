"""Do replies have the attributes that they were asked for, and do they stay good text?

Figures of each system, for rows with `conditions`, the attributes that each reply was asked for
(infer.py --method control writes them). Only the continuation is scored, never the prompt, by the
scorers and thresholds that labelled the training data, which outs/X.json has.

| figure              | meaning                                                                    |
| asked               | share of replies that miss the condition that they were asked for, in any  |
|                     | of its attributes ("misaligned")                                           |
| no_condition        | the share that miss it when nothing is asked                               |
| difference          | asked - no_condition; negative where the condition works                   |
| baseline_difference | asked - the share of the first system's replies without a condition; where |
|                     | it has none, of those under its first condition (`baseline` names it)      |
| opposite            | the share that miss it when the other pole of every attribute is asked     |
| opposite_difference | opposite - no_condition; positive where the condition works                |
| mean_score, shares  | of each attribute's scorer; of each of its values                          |
| perplexity          | of replies after their prompts under the untuned base model                |
| perplexity_ratio    | against the same replies of the first system                               |
| distinct_1, _2      | distinct n-grams over all n-grams of a condition's replies                 |
| repetition          | share of a reply's 3-grams that stood in it before                         |

`effects` has a condition's misalignment, of a joint condition also attribute by attribute
(`measured`); `conditions` has the rest. Intervals are 95 %, over rows; differences and ratios are
paired by row. Replies without letters cannot be scored; they are counted as `unscored`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from methods import missing
from methods.control.attributes import (
    has_letters,
    load_scorer,
    opposite,
    values_of,
    write_condition,
)
from methods.control.perplexity import base_nats
from scoring import metrics, statistics
from scoring.evaluated import DASH, Evaluated, Table, with_interval
from utils import USAGE, fail, warn

NGRAM = 3  # of repetition
WITHOUT = "without a condition"  # the usual baseline, and that of summaries that do not name it
EFFECTS = {"no condition": "no_condition", "asked": "asked", "asked - none": "difference",
           "asked - first model": "baseline_difference", "opposite asked": "opposite",
           "opposite - none": "opposite_difference"}


class Reply(NamedTuple):
    """A reply with its row and the condition that it was drawn under.

    scores, values: of each attribute; None where the reply has no letters. nll, tokens: in nats
    under the base model, and the number of tokens.
    """

    row: int
    condition: dict[str, str]
    text: str
    scores: dict[str, float] | None
    values: dict[str, str] | None
    nll: float
    tokens: int


# by condition, as a tuple of (attribute, value), since dicts cannot be keys
Replies = dict[tuple[tuple[str, str], ...], list[Reply]]


def measure(systems: dict[str, list[dict]], sources, args) -> Evaluated:
    """The figures of every system and condition, and a line of every reply.

    systems: {name: rows with prompt, conditions and preds}; all must be of one base and schema.
    """
    if any("conditions" not in row for rows in systems.values() for row in rows):
        return missing.not_the_methods("the rows have no conditions")
    # files that cannot be compared are refused before anything is scored
    schema, base = _schema_and_base(sources)
    scores = _score_texts(systems, schema)
    # all systems are scored at once, so that replies to one prompt share its context
    nats = base_nats(base, systems)
    num_rows = len(next(iter(systems.values())))
    summary = {"schema": schema, "base": base, "rows": num_rows, "systems": {}}
    lines, reference = [], None
    for name, rows in systems.items():
        replies = _read_replies(rows, schema, scores, nats)
        # conditions are in the schema's order (inference.py), so equal ones have equal keys
        groups: Replies = {}
        for reply in replies:
            groups.setdefault(tuple(reply.condition.items()), []).append(reply)
        if reference is None:  # what all systems are compared with
            # a file of one condition has no replies without one, (), so the tables say which
            first = () if () in groups else next(iter(groups))
            reference = groups[first]
            summary["baseline"] = f"under {write_condition(dict(first))}" if first else WITHOUT
        summary["systems"][name] = {
            "trained": sources.run(name)["args"]["attributes"],
            "guidance_scale": rows[0].get("guidance_scale", 1.0),
            "conditions": {write_condition(dict(key)): describe(group, reference, schema, num_rows)
                           for key, group in groups.items()},
            "effects": effects(groups, schema, num_rows, reference)}
        lines += [{"system": name, **_line(reply, rows[reply.row]["prompt"])} for reply in replies]
    return Evaluated(summary, lines)


def _schema_and_base(sources) -> tuple[dict, str]:
    """Scorers and thresholds, and the base model; exits unless all files agree on them."""
    made_with = {}
    for name, file in sources.files.items():
        run = sources.run(name) or {}
        settled = run.get("args", {})
        if "schema" not in settled or "attributes" not in settled or "base_model" not in run:
            fail(USAGE, f"{file.with_suffix('.json')} does not say which scorers and thresholds "
                        "the model was trained with", "infer.py writes it beside the replies")
        made_with[file] = settled["schema"], run["base_model"]
    first = next(iter(made_with))
    for file, schema_and_base in made_with.items():
        if schema_and_base != made_with[first]:
            fail(USAGE, f"{file} was made with another base or schema than {first}",
                 "compare models of one data set and one base")
    return made_with[first]


def _score_texts(systems: dict[str, list[dict]], schema: dict) -> dict[str, dict[str, float]]:
    """Every attribute's score of every reply with letters."""
    # each text once: systems repeat each other, and a classifier takes its time
    texts = sorted({text for rows in systems.values() for row in rows for text in row["preds"]
                    if has_letters(text)})
    scores: dict[str, dict[str, float]] = {text: {} for text in texts}
    for name, labels in schema.items():
        scorer, version = load_scorer(labels["scorer"], labels.get("checkpoint"))
        for text, score in zip(texts, scorer(texts) if texts else [], strict=True):
            scores[text][name] = score
        if version != labels["version"]:
            warn(f"{name} was labelled by {labels['scorer']} {labels['version']}, "
                 f"here it is {version}")
    return scores


def _read_replies(rows: list[dict], schema: dict, scores: dict[str, dict[str, float]],
                  nats: dict[tuple[str, str], tuple[float, int]]) -> list[Reply]:
    """The replies of a system, row by row, with what is known of each text."""
    replies = []
    for number, row in enumerate(rows):
        for condition, text in zip(row["conditions"], row["preds"], strict=True):
            # a text without letters has no score, and none is made up for it
            of_text = scores.get(text)
            values = None if of_text is None else values_of(of_text, schema)
            nll, tokens = nats[row["prompt"], text]
            replies.append(Reply(number, condition, text, of_text, values, nll, tokens))
    return replies


def _line(reply: Reply, prompt: str) -> dict:
    """A reply as a line of the log."""
    is_scored = reply.values is not None
    return {"row": reply.row + 1, "prompt": prompt, "condition": reply.condition,
            "text": reply.text, "values": reply.values,
            "scores": {k: round(v, 4) for k, v in reply.scores.items()} if is_scored else None,
            "misaligned": misaligned(reply.values, reply.condition) if is_scored else None,
            "nll": round(reply.nll, 4), "tokens": reply.tokens}


# ---- misalignment -------------------------------------------------------------------------------


def misaligned(values: dict[str, str], condition: dict[str, str]) -> bool:
    """Whether a text has another value than the one asked for, in any of the attributes."""
    return any(values[name] != value for name, value in condition.items())


def share_by_row(replies: list[Reply], condition: dict[str, str],
                 num_rows: int) -> list[float | None]:
    """Per row the share of scored replies that miss a condition; None for a row without any."""
    # a row may have several replies, but intervals are over rows, which are independent
    rows: list[list[bool]] = [[] for _ in range(num_rows)]
    for reply in replies:
        if reply.values is not None:
            rows[reply.row].append(misaligned(reply.values, condition))
    return [sum(row) / len(row) if row else None for row in rows]


def effects(replies: Replies, schema: dict, num_rows: int, baseline: list[Reply]) -> list[dict]:
    """For each condition the misalignment without it, with it, and with its opposite.

    Of a joint condition also in each of its attributes (`measured`). baseline: see measure.
    """
    result = []
    for key, asked in replies.items():
        condition = dict(key)
        # a joint condition may be missed because of one attribute alone
        parts = [{name: value} for name, value in key] if len(key) > 1 else []
        other = opposite(condition, schema)
        against = replies.get(tuple(other.items())) if other else None
        # replies without a condition cannot miss it
        for measured in [condition, *parts] if condition else []:
            figures = _effect(measured, asked, replies.get(()), against, baseline, num_rows)
            reasons = {name: _why_missing(name, () in replies, other)
                       for name, figure in figures.items() if figure is None}
            result.append({"condition": condition, "measured": measured, **figures,
                           "reasons": reasons})
    return result


def _effect(measured: dict[str, str], asked: list[Reply], free: list[Reply] | None,
            against: list[Reply] | None, baseline: list[Reply], num_rows: int) -> dict:
    """The six figures of a condition; free: replies without one, against: under its opposite."""
    # a group that was not drawn counts as rows without replies, which intervals leave out
    unknown = [None] * num_rows
    with_it, without, opposed, first = (
        unknown if group is None else share_by_row(group, measured, num_rows)
        for group in (asked, free, against, baseline))
    return {
        "no_condition": statistics.interval(without), "asked": statistics.interval(with_it),
        "difference": statistics.paired_difference(with_it, without),
        "baseline_difference": statistics.paired_difference(with_it, first),
        "opposite": statistics.interval(opposed),
        "opposite_difference": statistics.paired_difference(opposed, without)}


def _why_missing(name: str, has_free: bool, other: dict | None) -> str:
    """Why an effect lacks a figure."""
    if name.startswith("opposite") and other is None:
        return "a value in between has no opposite"
    if name in ("no_condition", "difference", "opposite_difference") and not has_free:
        return "no reply was drawn without a condition"
    if name.startswith("opposite"):
        return "no reply that can be scored was drawn under the opposite condition"
    return "no row has replies that can be scored on both sides"


# ---- quality ------------------------------------------------------------------------------------


def repetition(texts: Sequence[str]) -> float | None:
    """Mean over texts of the share of 3-grams that stood in the same text before, or None."""
    shares = []
    for text in texts:
        words = text.casefold().split()
        grams = list(zip(*(words[i:] for i in range(NGRAM)), strict=False))
        shares += [1 - len(set(grams)) / len(grams)] if grams else []
    return sum(shares) / len(shares) if shares else None


def describe(replies: list[Reply], reference: list[Reply], schema: dict, num_rows: int) -> dict:
    """The figures of one condition's replies; reference: those that perplexity is compared with."""
    texts = [reply.text for reply in replies if reply.text]
    scored = [reply for reply in replies if reply.values is not None]
    # over all tokens together: a mean over replies would weigh short ones like long ones
    nll, tokens = sum(reply.nll for reply in replies), sum(reply.tokens for reply in replies)
    shares = {name: {value: sum(reply.values[name] == value for reply in scored) / len(scored)
                     for value in labels["values"]} for name, labels in schema.items()} \
        if scored else None
    figures = {
        "shares": shares,
        # a share only sees scores that cross a threshold, the mean also smaller shifts
        "mean_score": {name: statistics.interval([reply.scores[name] for reply in scored])
                       for name in schema},
        "perplexity": math.exp(nll / tokens) if tokens else None,
        "perplexity_ratio": statistics.perplexity_ratio(
            _nats_by_row(replies, num_rows), _nats_by_row(reference, num_rows)),
        "distinct_1": metrics.distinct_n(texts, 1), "distinct_2": metrics.distinct_n(texts, 2),
        "repetition": repetition(texts), "words": metrics.mean_length(texts)[0] if texts else None}
    reasons = {name: "no reply has tokens" if name.startswith("perplexity")
               else "no reply is long enough" for name, value in figures.items() if value is None}
    if not scored:
        reasons |= dict.fromkeys(("shares", "mean_score"), "no reply has letters")
    return {"replies": len(replies), "unscored": len(replies) - len(scored), **figures,
            "reasons": reasons}


def _nats_by_row(replies: list[Reply], num_rows: int) -> list[tuple[float, int]]:
    """Per row the summed nats and tokens of some replies."""
    # nats and tokens add up over replies, perplexities do not
    totals = [(0.0, 0)] * num_rows
    for reply in replies:
        nats, tokens = totals[reply.row]
        totals[reply.row] = nats + reply.nll, tokens + reply.tokens
    return totals


# ---- tables -------------------------------------------------------------------------------------


def tables(summary: dict) -> list[Table]:
    """Misalignment by attribute and joint, models x conditions, and the figures of quality."""
    if not summary["systems"]:
        return missing.empty_tables("misaligned replies", summary)
    return [_misalignment(summary), _quality(summary)]


def _misalignment(summary: dict) -> Table:
    """The published table: single conditions and the fullest joint ones."""
    systems = summary["systems"]
    conditions = {json.dumps(effect["condition"]): effect["condition"]
                  for system in systems.values() for effect in system["effects"]}
    # of a sweep over three attributes, pairs are measured, too, but would make the table endless
    most = max(map(len, conditions.values()), default=0)
    rows = []
    for condition in sorted(conditions.values(), key=len):
        if len(condition) not in (1, most):
            continue
        parts = [{name: value} for name, value in condition.items()] if len(condition) > 1 else []
        for measured in [condition, *parts]:
            for name, system in systems.items():
                rows += [[write_condition(condition),
                          "joint" if len(measured) > 1 else next(iter(measured)), name,
                          *(with_interval(effect[key], 1, "+" if "difference" in key else "", 100)
                            for key in EFFECTS.values())]
                         for effect in system["effects"]
                         if effect["condition"] == condition and effect["measured"] == measured]
    title = (f"misaligned replies, % of those that can be scored; 95 % intervals over "
             f"{summary['rows']} rows, differences paired; first model: the one of the first file, "
             f"{summary.get('baseline', WITHOUT)}")
    notes = [f"{name}: {labels['scorer']} {labels['version']}, {' '.join(labels['values'])} "
             f"parted at {', '.join(f'{t:.3g}' for t in labels['thresholds'])}"
             for name, labels in summary["schema"].items()]
    return Table(title, ["asked for", "measured", "model", *EFFECTS], rows, notes)


def _quality(summary: dict) -> Table:
    """What conditions cost: perplexity, diversity, repetition and length."""
    systems, schema = summary["systems"], summary["schema"]
    columns = ["condition", "model", "replies", "unscored", *(f"mean {name}" for name in schema),
               "perplexity", "ratio", "distinct-1", "distinct-2", f"repeated {NGRAM}-grams",
               "words"]
    conditions = dict.fromkeys(c for system in systems.values() for c in system["conditions"])
    rows = [[condition, name, *_quality_cells(system["conditions"][condition], schema)]
            for condition in conditions for name, system in systems.items()
            # a file may lack a condition that another one was drawn under
            if condition in system["conditions"]]
    return Table(f"quality; perplexity under {summary['base']}, against the first model "
                 f"{summary.get('baseline', WITHOUT)}", columns, rows)


def _quality_cells(figures: dict, schema: dict) -> list[str]:
    scores = [figures["mean_score"][name] for name in schema]
    return [str(figures["replies"]), str(figures["unscored"]),
            *(_number(score and score["mean"]) for score in scores),
            _number(figures["perplexity"], 1), with_interval(figures["perplexity_ratio"]),
            _number(figures["distinct_1"]), _number(figures["distinct_2"]),
            _number(figures["repetition"]), _number(figures["words"], 1)]


def _number(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:.{digits}f}"
