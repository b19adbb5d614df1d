"""The figures of an evaluation: replies and their verdicts go in, the summary that is written and shown comes out.

systems: {name: rows with "preds"}; verdicts: per row {text: {"coherent": True, False or None, "rating": ...}};
measured: {name: per row the replies with their verdicts, embeddings and classes of equal meaning}.
Undefined is None with a reason, never 0.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np

import utils
from scoring import equivalence, metrics, statistics
from scoring.statistics import jackknife

CONTROL = "control: "
HANDLED = ("peft", "spt", "control")  # methods whose reply i is drawn under a handle i of its own


def add_controls(systems: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The systems and what any metric worth its name must not reward, made of the first system's replies."""
    rows = next(iter(systems.values()))
    groups = [row["preds"] for row in rows]
    controls = {"random words": metrics.random_words(groups), "shuffled": metrics.shuffled_replies(groups),
                "repeated": metrics.repeated_first(groups)}
    return systems | {CONTROL + name: [{**row, "preds": preds} for row, preds in zip(rows, made, strict=True)]
                      for name, made in controls.items() if made is not None}


def measure(rows: list[dict], verdicts: list[dict[str, dict]], embedder, classifier: dict) -> list[dict]:
    """Per row: the replies with their verdicts, classes and embeddings; a row with a text that has no verdict was not judged."""
    measured = []
    for row, known in zip(rows, verdicts, strict=True):
        preds, prompt = row["preds"], row.get("prompt") or row["context"]
        vectors = embedder.encode([prompt, *preds])
        same = equivalence.same_probabilities(prompt, preds, embedder, classifier)
        judged = all(text in known for text in preds)
        measured.append({
            "row": row, "preds": preds, "verdicts": [known[text] if judged else {"coherent": None} for text in preds],
            "embeddings": vectors[1:], "cosine": vectors[1:] @ vectors[0],
            "classes": metrics.partition(same, classifier["threshold"])})
        measured[-1]["yield"] = yield_of(measured[-1])
    return measured


def per_row(measured: list[dict]) -> dict[str, list[float | None]]:
    """The metrics that have a value per row, None where it is not defined."""
    coherent = [[v["coherent"] for v in m["verdicts"] if v["coherent"] is not None] for m in measured]
    ratings = [[v.get("rating") for v in m["verdicts"]] for m in measured]
    rated = [[r for r in row if r is not None] for row in ratings]
    mean = lambda items: sum(items) / len(items) if items else None  # noqa: E731
    lengths = [metrics.mean_length(m["preds"]) for m in measured]
    return {
        f"yield@{len(measured[0]['preds'])}": [m["yield"] for m in measured],
        "utility_k": [metrics.utility_k(m["classes"], r) if any(r) else None for m, r in zip(measured, ratings, strict=True)],
        "coherent": [mean(row) for row in coherent],
        "incoherence_rate": [None if not row else 1 - mean(row) for row in coherent],
        "rating": [mean(row) for row in rated],
        "cosine": [float(m["cosine"].mean()) for m in measured],
        "distinct_k": [metrics.distinct_k(m["classes"]) for m in measured],
        "effective_number": [metrics.effective_number(m["classes"]) for m in measured],
        "semantic_entropy": [metrics.semantic_entropy(m["classes"]) for m in measured],
        "sbert_diversity": [metrics.pairwise_diversity(m["embeddings"]) for m in measured],
        "vendi": [metrics.vendi_score(m["embeddings"]) for m in measured],
        "duplicates": [metrics.duplicates(m["preds"]) for m in measured],
        "self_bleu": [metrics.self_bleu(m["preds"]) for m in measured],
        "distinct-1 per prompt": [metrics.distinct_n(m["preds"], 1) for m in measured],
        "distinct-2 per prompt": [metrics.distinct_n(m["preds"], 2) for m in measured],
        "words": [words for words, _ in lengths],
        "characters": [characters for _, characters in lengths],
    }


def yield_of(m: dict) -> int | None:
    """Different and coherent replies of one row; None while one of them has no verdict."""
    coherent = [v["coherent"] for v in m["verdicts"]]
    return None if None in coherent else metrics.yield_of_classes(m["classes"], coherent)


def summarise(measured: dict[str, list[dict]], files: dict[str, str], judge: dict, embedder, classifier: dict) -> dict:
    """The summary; files: the file of each system that has one."""
    values = {name: per_row(rows) for name, rows in measured.items()}
    first = next(iter(measured.values()))
    vocabulary = len(embedder.tokenizer)
    differences, matched = compare(measured, values)
    k = len(first[0]["preds"])
    return {
        "k": k, "rows": len(first), "judge": judge,
        "systems": {name: summarise_one(name, rows, values[name], files.get(name), vocabulary, judge) for name, rows in measured.items()},
        "differences": differences, "matched": matched,
        "controllability": controllability(files, measured, embedder, classifier),
        "settings": {  # what the figures depend on
            "embedder": "all-MiniLM-L6-v2", "ead_vocabulary": vocabulary, "self_bleu": metrics.self_bleu_signature(k - 1) if k > 1 else None,
            "equivalence": {key: classifier[key] for key in ("threshold", "accuracy", "auc", "pairs") if key in classifier},
            "intervals": "95 %, 2000 bootstrap draws of prompts; corpus figures: delete-a-block jackknife",
            "versions": utils.versions()},
    }


def summarise_one(name: str, measured: list[dict], values: dict, file: str | None, vocabulary: int, judge: dict) -> dict:
    """All figures of one system as [mean, low, high], None with a reason where a figure is not defined, and counts."""
    rounded = lambda found: found and [round(v, 4) for v in found]  # noqa: E731
    figures = {}
    for key, of_rows in values.items():
        known = [v for v in of_rows if v is not None]
        figures[key] = rounded(statistics.interval(known)) if known else None
    groups = [m["preds"] for m in measured]
    for n in (1, 2):
        figures[f"distinct-{n}"] = rounded(jackknife(lambda texts, n=n: metrics.distinct_n(texts, n), groups))
        figures[f"ead-{n}"] = rounded(jackknife(lambda texts, n=n: metrics.ead(texts, n, vocabulary), groups))
    everything = [text for group in groups for text in group]
    figures |= {"control": name.startswith(CONTROL), "rows": len(measured), "responses": len(everything),
                "empty": sum(not text.strip() for text in everything), "seconds_per_row": None}
    if file:
        figures["seconds_per_row"] = made_by(file).get("seconds_per_row")
    if "unscored" in judge and not figures["control"]:
        reasons = [v["unscored"] for m in measured for v in m["verdicts"] if v["unscored"]]
        figures["unscored"] = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    figures["reasons"] = {key: why_none(key, measured, figures) for key, value in figures.items() if value is None}
    return figures


def why_none(key: str, measured: list[dict], figures: dict) -> str:
    """Why a figure is not defined."""
    if key == "seconds_per_row":
        return "infer.py left no speed beside the file"
    if key in ("rating", "utility_k") and all(v["coherent"] is not None for m in measured for v in m["verdicts"]):
        return "this judge gives no ratings"
    if key.startswith(("yield", "coherent", "incoherence", "rating", "utility")):
        return "controls are not sent to the judge (--judge_controls)" if figures["control"] else "no row is fully scored"
    if len(measured[0]["preds"]) == 1:
        return "one response a prompt has nothing to differ from"
    return "no response holds what it counts"


def compare(measured: dict[str, list[dict]], values: dict[str, dict]) -> tuple[dict, dict]:
    """Each system minus the first one, paired by row, then at equal coherence: {pair: {metric: [mean, low, high]}}."""
    names = list(measured)
    first, baseline = measured[names[0]], values[names[0]]
    differences, matched = {}, {}
    coherent = {name: [[v["coherent"] is True for v in m["verdicts"]] for m in measured[name]] for name in names}
    for name in names[1:]:
        pair, other = f"{name} - {names[0]}", measured[name]
        found = {key: statistics.paired_difference(of_rows, baseline[key]) for key, of_rows in values[name].items()}
        differences[pair] = {key: f and [round(v, 4) for v in f[:3]] for key, f in found.items()}
        if not any(map(any, coherent[name])) or not any(map(any, coherent[names[0]])):
            continue
        measures = {"distinct_k": lambda system, row, keep: len({system[row]["classes"][i] for i in keep}),
                    "sbert_diversity": lambda system, row, keep: metrics.pairwise_diversity(system[row]["embeddings"][keep])}
        results = {key: statistics.matched_difference(partial(f, other), partial(f, first), coherent[name], coherent[names[0]])
                   for key, f in measures.items()}
        counts = {key: results["distinct_k"][key] for key in ("prompts", "left_out", "responses")}
        matched[pair] = {"measures": {key: r["difference"] and [round(v, 4) for v in r["difference"]]
                                      for key, r in results.items()}, **counts}
    return differences, matched


def made_by(file: str) -> dict:
    """What infer.py left beside a file of responses: its settings and its speed."""
    path = Path(file).with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def controllability(files: dict[str, str], measured: dict[str, list[dict]], embedder, classifier: dict) -> dict:
    """Whether a handle (a possibility number) means something: over files that differ in their seed alone."""
    runs: dict[str, list[str]] = {}
    for name, file in files.items():
        settings = made_by(file).get("settings", {})
        if settings.get("method") in HANDLED:
            same = json.dumps({k: v for k, v in settings.items() if k not in ("seed", "save_file")}, sort_keys=True)
            runs.setdefault(same, []).append(name)
    found = {}
    for names in runs.values():
        if len(names) < 2:
            continue
        tables = []
        for of_row in zip(*(measured[name] for name in names), strict=True):
            row, texts = of_row[0]["row"], [text for m in of_row for text in m["preds"]]
            same = equivalence.same_probabilities(row.get("prompt") or row["context"], texts, embedder, classifier)
            classes = metrics.partition(same, classifier["threshold"])
            tables.append(np.array(classes).reshape(len(names), -1).T)  # (numbers, seeds)
        found[" + ".join(names)] = metrics.controllability(tables)
    return found
