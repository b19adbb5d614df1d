"""The common figures of an evaluation, for rows of any method: yield, coherence, diversity.

systems: {name: rows with "preds"}; verdicts: per row {text: {"coherent": True, False or None,
"rating": ...}}; measured: {name: per row the replies with their verdicts, embeddings and classes of
equal meaning}. Figures are as in scoring/evaluated.py; undefined is None with a reason, never 0.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

import utils
from scoring import diversity, equivalence, judging, logs, metrics, statistics
from scoring.evaluated import (
    COHERENCE,
    CONTROL,
    REFERENCES,
    Evaluated,
    figure,
    is_system,
    rounded,
)
from scoring.judge_local import references
from scoring.sources import Sources
from utils import text_of

# Methods whose i-th reply to every row is drawn under one handle (number, soft prompt, condition).
HANDLED = ("peft", "spt", "control")
# Replies of a row that are looked at. All their pairs are compared, for the classes and for
# Self-BLEU, and method diffuse draws a thousand a prompt, whose own figures read them all.
MAX_REPLIES = 100
# How the names of the figures begin that hang on a judge's verdicts.
JUDGED = ("yield", "coherent", "incoherence", "rating", "utility")
NOT_JUDGED = ("references are not judged, and controls are not sent to the judge "
              "(--judge_controls)")
NO_SPEED = "infer.py left no speed beside the file"


def measure(systems: dict[str, list[dict]], sources: Sources, args) -> Evaluated:
    """The common figures of all systems and of the degenerate controls, with their intervals."""
    if nothing := withheld(systems):
        return nothing
    drawn = len(next(iter(systems.values()))[0]["preds"])
    systems = looked_at(systems, args)
    human = {} if args.no_controls else references_as_system(systems)
    embedder, classifier = sources.embedder, equivalence.load_classifier()
    # all at once: batches of texts of one length are the fastest
    embedder.encode([text for rows in (systems | human).values() for row in rows
                     for text in (text_of(row), *row["preds"])])
    verdicts, judge = judging.judge(systems, sources, args, Path(args.save_file))
    measured = {name: measure_rows(rows, verdicts, embedder, classifier)
                for name, rows in systems.items()}
    # Without verdicts, also where a system gives a reference word for word.
    measured |= {name: measure_rows(rows, [{} for _ in rows], embedder, classifier)
                 for name, rows in human.items()}
    # Verdicts that are not shown are not in what is shown; X.jsonl and the pickle have them.
    shown = without_verdicts(measured) if untrusted(judge) else measured
    summary = summarise(shown, sources, judge, classifier)
    summary["drawn"] = drawn  # k is what was looked at
    published = args.save_file.endswith(".pkl")
    return Evaluated(summary, logs.response_lines(measured, judge["trusted"]),
                     {".pkl": logs.published_pickle(measured),
                      ".pkl.txt": logs.pickle_note(judge)} if published else {},
                     logs.page_prompts(shown))


def withheld(systems: dict[str, list[dict]]) -> Evaluated | None:
    """A summary without figures where the files have different numbers of replies a row, else None.

    What is counted among k replies grows with k.
    """
    # read_systems has padded the rows of a file to one length, so the first row is enough.
    counts = {name: len(rows[0]["preds"]) for name, rows in systems.items()}
    if len(set(counts.values())) == 1:
        return None
    why = "the files have different numbers of replies a row: " + ", ".join(
        f"{name} {count}" for name, count in counts.items())
    described = {name: count_replies([row["preds"] for row in rows]) | {
        "control": False, "seconds_per_row": None, "reasons": {"all common figures": why}}
        for name, rows in systems.items()}
    return Evaluated({
        "k": None, "drawn": None, "rows": len(next(iter(systems.values()))),
        "judge": {"name": None, "text": f"no common figures: {why}"}, "systems": described,
        "differences": {}, "matched": {}, "controllability": {}, "settings": {},
        "reasons": {"common figures": why}}, [])


def looked_at(systems: dict[str, list[dict]], args) -> dict[str, list[dict]]:
    """The systems with their first MAX_REPLIES replies, and the controls unless --no_controls."""
    shown = {name: [row | {"preds": row["preds"][:MAX_REPLIES]} for row in rows]
             for name, rows in systems.items()}
    return shown if args.no_controls else add_controls(shown)


def add_controls(systems: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The systems, and what no good metric rewards, made of the first system's replies."""
    rows = next(iter(systems.values()))
    groups = [row["preds"] for row in rows]
    # Made of replies, so that controls have the words and lengths of a real system.
    controls = {"random words": metrics.random_words(groups),
                "shuffled": metrics.shuffled_replies(groups),
                "repeated": metrics.repeated_first(groups)}
    return systems | {CONTROL + name: [{**row, "preds": preds}
                                       for row, preds in zip(rows, made, strict=True)]
                      for name, made in controls.items() if made is not None}


# ---- rows ---------------------------------------------------------------------------------------


def measure_rows(rows: list[dict], verdicts: list[dict[str, dict]], embedder,
                 classifier: dict) -> list[dict]:
    """Per row the replies with their verdicts, embeddings and classes, and the row's yield.

    A row counts as not judged if any of its texts lacks a verdict.
    """
    measured = []
    for row, known in zip(rows, verdicts, strict=True):
        preds, prompt = row["preds"], text_of(row)
        vectors = embedder.encode([prompt, *preds])
        same = equivalence.same_probabilities(prompt, preds, embedder, classifier)
        judged = all(text in known for text in preds)
        measured.append({
            "row": row, "preds": preds,
            "verdicts": [known[text] if judged else {"coherent": None} for text in preds],
            "embeddings": vectors[1:], "cosine": vectors[1:] @ vectors[0],
            "classes": metrics.partition(same, classifier["threshold"])})
        measured[-1]["yield"] = yield_of(measured[-1])
    return measured


def yield_of(of_row: dict) -> int | None:
    """Different and coherent replies of one row; None while one of them has no verdict."""
    coherent = [verdict["coherent"] for verdict in of_row["verdicts"]]
    return None if None in coherent else metrics.yield_of_classes(of_row["classes"], coherent)


def references_as_system(systems: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """{"references": as many references of every row as a system has replies}, or {}.

    How diverse people are in as many replies: the ceiling for a model that only imitates them.
    Drawn without replacement and by the row alone. Nothing where a row has too few, or where a file
    has this name.
    """
    rows = next(iter(systems.values()))
    k = len(rows[0]["preds"])
    known = [references(row) for row in rows]
    if k < 2 or min(map(len, known)) < k or REFERENCES in systems:
        return {}
    return {REFERENCES: [row | {"preds": random.Random(utils.row_seed(0, i)).sample(of_row, k)}
                         for i, (row, of_row) in enumerate(zip(rows, known, strict=True))]}


def untrusted(judge: dict) -> bool:
    """Whether figures of a judge's verdicts are withheld, for judge["reason"]."""
    return not judge["trusted"] and not judge["overridden"]


def without_verdicts(measured: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """What was measured as if nobody had judged it: the judge may not be believed."""
    hidden = {"coherent": None, "rating": None}
    return {name: [m | {"yield": None, "verdicts": [
        v | hidden | ({} if v["coherent"] is None else {"shown": "untrusted"})
        for v in m["verdicts"]]} for m in rows] for name, rows in measured.items()}


def per_row(measured: list[dict]) -> dict[str, list[float | None]]:
    """The metrics that have a value per row, None where it is not defined."""
    coherent = [[v["coherent"] for v in m["verdicts"] if v["coherent"] is not None]
                for m in measured]
    ratings = [[v.get("rating") for v in m["verdicts"]] for m in measured]
    return {
        f"yield@{len(measured[0]['preds'])}": [m["yield"] for m in measured],
        # a judge without ratings gives none to any reply
        "utility_k": [metrics.utility_k(m["classes"], of_row) if any(of_row) else None
                      for m, of_row in zip(measured, ratings, strict=True)],
        "coherent": [_mean(of_row) for of_row in coherent],
        "incoherence_rate": [None if not of_row else 1 - _mean(of_row) for of_row in coherent],
        "rating": [_mean([r for r in of_row if r is not None]) for of_row in ratings],
        "cosine": [float(m["cosine"].mean()) for m in measured],
        "distinct_k": [metrics.distinct_k(m["classes"]) for m in measured],
        "effective_number": [metrics.effective_number(m["classes"]) for m in measured],
        "semantic_entropy": [metrics.semantic_entropy(m["classes"]) for m in measured],
        **diversity.per_row([m["preds"] for m in measured], [m["embeddings"] for m in measured]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# ---- the summary --------------------------------------------------------------------------------


def summarise(measured: dict[str, list[dict]], sources: Sources, judge: dict,
              classifier: dict) -> dict:
    """The summary that is written as X.json and shown."""
    values = {name: per_row(rows) for name, rows in measured.items()}
    first = next(iter(measured.values()))
    vocabulary = len(sources.embedder.tokenizer)
    differences, matched = compare(measured, values)
    k = len(first[0]["preds"])
    return {
        "k": k, "rows": len(first), "judge": judge,
        # Shown all the same: tables and page mark these figures.
        "untrusted": [key for key in values[next(iter(values))] if key.startswith(JUDGED)]
                     if judge["overridden"] else [],
        "systems": {name: _summarise_one(name, rows, values[name], sources, vocabulary, judge)
                    for name, rows in measured.items()},
        "differences": differences, "matched": matched,
        "controllability": controllability(measured, sources, classifier),
        "settings": {  # what the figures depend on
            "embedder": "all-MiniLM-L6-v2", "ead_vocabulary": vocabulary,
            "self_bleu": metrics.self_bleu_signature(k - 1) if k > 1 else None,
            "equivalence": {key: classifier[key] for key in
                            ("threshold", "accuracy", "auc", "pairs") if key in classifier},
            "intervals": f"95 %, {statistics.ROUNDS} bootstrap draws of prompts; "
                         "corpus figures: delete-a-block jackknife",
            "versions": utils.versions()},
        "reasons": {COHERENCE: judge["reason"]} if untrusted(judge) else {}}


def _summarise_one(name: str, measured: list[dict], values: dict, sources: Sources,
                   vocabulary: int, judge: dict) -> dict:
    """All figures of one system, and counts; `reasons` for what is None."""
    control = not is_system(name)
    figures: dict = {key: rounded(statistics.interval(of_rows)) for key, of_rows in values.items()}
    groups = [m["preds"] for m in measured]
    figures |= diversity.of_corpus(groups, vocabulary)
    seconds = None if control else sources.summary(name).get("seconds_per_row")
    figures |= count_replies(groups) | {
        "control": control, "seconds_per_row": None if seconds is None else figure(seconds)}
    # Only a judge behind a server can fail to score a reply.
    if "unscored" in judge and not control:
        reasons = [v["unscored"] for m in measured for v in m["verdicts"] if v["unscored"]]
        figures["unscored"] = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    figures["reasons"] = {key: _why_none(key, measured, control, judge)
                          for key, value in figures.items() if value is None}
    return figures


def count_replies(groups: list[list[str]]) -> dict:
    texts = [text for group in groups for text in group]
    return {"rows": len(groups), "responses": len(texts),
            "empty": sum(not text.strip() for text in texts)}


def _why_none(key: str, measured: list[dict], control: bool, judge: dict) -> str:
    """Why a figure is not defined."""
    if key == "seconds_per_row":
        return NO_SPEED
    if key.startswith(JUDGED):
        if untrusted(judge):
            return judge["reason"]
        scored = all(v["coherent"] is not None for m in measured for v in m["verdicts"])
        if key in ("rating", "utility_k") and scored:
            return "this judge gives no ratings"
        if control:
            return NOT_JUDGED
        return "no row is fully scored"
    return diversity.why_none(len(measured[0]["preds"]))


def compare(measured: dict[str, list[dict]], values: dict[str, dict]) -> tuple[dict, dict]:
    """Each system minus the first one, paired by row, then at equal coherence.

    Two dicts by pair, "other - first": {metric: figure}, and {"measures": {metric: figure},
    "prompts", "left_out", "responses"}.
    """
    names = list(measured)
    first, baseline = measured[names[0]], values[names[0]]
    differences, matched = {}, {}
    # A reply without a verdict (None) counts as not coherent: it cannot be matched.
    coherent = {name: [[v["coherent"] is True for v in m["verdicts"]] for m in measured[name]]
                for name in names}
    for name in names[1:]:
        pair, other = f"{name} - {names[0]}", measured[name]
        differences[pair] = {
            key: rounded(statistics.paired_difference(of_rows, baseline[key]))
            for key, of_rows in values[name].items()}
        if not any(map(any, coherent[name])) or not any(map(any, coherent[names[0]])):
            continue  # not judged, or nothing coherent: there is nothing to match
        results = {key: statistics.matched_difference(
            partial(measure_kept, other), partial(measure_kept, first), coherent[name],
            coherent[names[0]]) for key, measure_kept in MATCHED.items()}
        matched[pair] = {
            "measures": {key: rounded(r["difference"]) for key, r in results.items()},
            # All measures are compared on the same prompts, so the counts of one hold for all.
            **{key: results["distinct_k"][key] for key in ("prompts", "left_out", "responses")}}
    return differences, matched


def _classes_among(system: list[dict], row: int, keep: list[int]) -> int:
    return len({system[row]["classes"][i] for i in keep})


def _diversity_among(system: list[dict], row: int, keep: list[int]) -> float | None:
    return metrics.pairwise_diversity(system[row]["embeddings"][keep])


# What is compared at equal coherence: measures of some of a row's replies.
MATCHED = {"distinct_k": _classes_among, "sbert_diversity": _diversity_among}


def controllability(measured: dict[str, list[dict]], sources: Sources, classifier: dict) -> dict:
    """Whether a handle (a possibility number) means something: over files that differ in seed."""
    runs: dict[str, list[str]] = {}
    for name in sources.files:
        settings = sources.settings(name) or {}
        if settings.get("method") in HANDLED:
            # Files whose settings differ in nothing but the seed are runs of one model.
            rest = {key: value for key, value in settings.items() if key != "seed"}
            runs.setdefault(json.dumps(rest, sort_keys=True), []).append(name)
    found = {}
    for names in (names for names in runs.values() if len(names) > 1):
        tables = []
        for of_row in zip(*(measured[name] for name in names), strict=True):
            texts = [text for m in of_row for text in m["preds"]]
            same = equivalence.same_probabilities(text_of(of_row[0]["row"]), texts,
                                                  sources.embedder, classifier)
            # classes over all seeds at once, so that one class has one number in all of them
            classes = metrics.partition(same, classifier["threshold"])
            tables.append(np.array(classes).reshape(len(names), -1).T)  # (numbers, seeds)
        found[" + ".join(names)] = metrics.controllability(tables)
    return found
