"""Do replies fit the person and the dialogue, and does the retriever choose well? Figures for rows with a persona.

eval.py calls `evaluate` for such rows (infer.py --method spt writes them). One reply of a row is compared with what the person
really said: the one under the chosen prompt, or the first. Diversity is that of all replies of a row.

| figure                       | meaning                                                                               |
| nll                          | nats per token of the true reply, end token included, under the chosen prompt         |
| random, oracle               | the same under a prompt drawn blindly (the mean over prompts), and under the best one |
| regret, agreement            | nll - oracle; share of rows where the choice is the best prompt                       |
| distinct-1, distinct-2       | of a row's replies, the mean over rows                                                |
| sbert_diversity              | 1 - mean cosine of a row's replies                                                    |
| embedding                    | cosine of reply and true reply                                                        |
| persona_overlap              | share of the reply's content words that the persona has                               |

Intervals are 95 %, over persons: rows of one person are drawn together. The published table's columns (x 100) go to X.csv.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from importlib.util import find_spec
from pathlib import Path

import trees
import utils
from methods.spt import training
from methods.spt.losses import by_prompt, mean_nll
from modeling.checkpoints import load_checkpoint
from modeling.embedder import load_embedder
from modeling.softprompts import soft_prompts
from scoring import metrics, statistics
from scoring.logs import write_figures
from utils import USAGE, fail

COLUMNS = ("F1", "BLEU", "R-1", "R-2", "R-L", "BERT-F1", "BERT-P", "BERT-R", "DIST-1", "DIST-2", "AVG gain")  # one header
FIGURES = ("nll", "random", "oracle", "regret", "agreement", "distinct-1", "distinct-2", "sbert_diversity", "embedding", "persona_overlap")
BERT_MODEL = "microsoft/deberta-xlarge-mnli"


def reply_of(row: dict) -> str:
    """The reply under the chosen prompt, or the first where prompts are unknown."""
    prompts = row.get("prompts", [])
    return row["preds"][prompts.index(row["chosen"])] if row.get("chosen") in prompts else row["preds"][0]


def row_figures(row: dict, nll: list[float] | None, embedder) -> dict:
    """All figures of a row; nll: of the true reply under every prompt, or None."""
    from rouge_score.rouge_scorer import RougeScorer

    reply, preds = reply_of(row), row["preds"]
    vectors = embedder.encode([row["response"], reply, *preds], normalize_embeddings=True, show_progress_bar=False)
    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(row["response"], reply)
    own = {
        "F1": metrics.token_f1(reply, row["response"]), "R-1": rouge["rouge1"].fmeasure, "R-2": rouge["rouge2"].fmeasure,
        "R-L": rouge["rougeL"].fmeasure, "distinct-1": metrics.distinct_n(preds, 1), "distinct-2": metrics.distinct_n(preds, 2),
        "sbert_diversity": metrics.pairwise_diversity(vectors[2:]), "embedding": float(vectors[0] @ vectors[1]),
        "persona_overlap": metrics.persona_overlap(reply, row["persona"])}
    if nll:
        chosen = nll[row["chosen"] - 1]
        own |= {"nll": chosen, "random": sum(nll) / len(nll), "oracle": min(nll), "regret": chosen - min(nll),
                "agreement": float(chosen == min(nll)), "nll_by_prompt": nll}
    return own


def exact_nlls(rows: list[dict], summary: Path) -> tuple[list[list[float] | None], str | None]:
    """Per row the nll of the true reply under every prompt of the model that drew the replies; or why there are none."""
    nothing: list = [None] * len(rows)
    if not summary.is_file():
        return nothing, f"{summary} is not there, so the model is unknown"
    saved = json.loads(summary.read_text(encoding="utf-8"))
    settings = saved["settings"]
    if "chosen" not in rows[0] or settings["method"] != "spt":
        return nothing, f"method {settings['method']} has no soft prompts"
    model, tokenizer, run = load_checkpoint(settings["model_name_or_path"])
    if run["weights"] != settings["weights"]:
        return nothing, f"{settings['model_name_or_path']} has changed since the replies were drawn"
    args = argparse.Namespace(max_length=settings["max_length"], max_input_length=settings["max_input_length"])
    found = [prompt_nlls(model, tokenizer, row, args) for row in rows]
    if None in found:
        return nothing, f"row {found.index(None) + 1} does not fit into {args.max_length} tokens"
    return found, None


def prompt_nlls(model, tokenizer, row: dict, args) -> list[float] | None:
    """Mean nll per token of a row's true reply under each soft prompt (K,), in nats; None if the row does not fit."""
    import torch


    config = soft_prompts(model).config
    vars(args).update({name: config[name] for name in ("num_prompts", "prompt_length", "max_context_turns")})
    tree = training.build_tree(row, tokenizer, args, None)
    if tree is None:
        return None
    batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in trees.pack([tree]).items()}
    with torch.no_grad():
        logps, own = by_prompt(trees.score(model, batch), batch)
    return [round(float(v), 6) for v in mean_nll(logps, own, 1)[0]]


def bert_scores(replies: list[str], references: list[str]) -> dict | str:
    """BERTScore's three means as published (no idf, no rescaling); or why it is left out: nothing is downloaded for it."""
    if find_spec("bert_score") is None:
        return "bert-score is not installed"
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(BERT_MODEL, local_files_only=True)
    except LocalEntryNotFoundError:
        return f"{BERT_MODEL} is not on this machine"
    import bert_score

    precision, recall, f1 = bert_score.score(replies, references, model_type=folder, num_layers=40)
    return {"BERT-F1": float(f1.mean()), "BERT-P": float(precision.mean()), "BERT-R": float(recall.mean())}


def evaluate(systems: dict[str, list[dict]], files: list[str], save_file: Path) -> dict:
    """Score outs/*.jsonl of rows with a persona: X.json, X.jsonl (a line per system and row), X.csv and two tables.

    systems: {name: rows with persona, context, response and preds}; the first is the baseline.
    """
    bare = next((i for rows in systems.values() for i, row in enumerate(rows, 1) if "response" not in row), None)
    if bare:
        fail(USAGE, f"{files[0]}: row {bare} has a persona but no response", "replies are compared with what the person said")
    embedder = load_embedder()
    result, lines, first = {"kind": "grounding", "systems": {}, "differences": {}}, [], None
    for (name, rows), file in zip(systems.items(), files, strict=True):
        nlls, reason = exact_nlls(rows, Path(file).with_suffix(".json"))
        figures = [row_figures(row, nll, embedder) for row, nll in zip(rows, nlls, strict=True)]
        people = [row.get("person") or " ".join(row["persona"]) for row in rows]
        result["systems"][name] = summarise(rows, figures, people) | {"no_nll": reason}
        if first is None:
            first = figures
        else:
            result["differences"][name] = {c: mean_of([own[c] - base[c] if own.get(c) is not None and base.get(c) is not None else None
                                                       for own, base in zip(figures, first, strict=True)], people) for c in FIGURES}
        lines += [{"system": name, "persona": row["persona"], "context": row["context"], "response": row["response"],
                   "preds": row["preds"], **{k: row[k] for k in ("person", "chosen", "prompts", "scores") if k in row}, **own}
                  for row, own in zip(rows, figures, strict=True)]
    baseline = next(iter(result["systems"].values()))["published"]
    for own in result["systems"].values():
        own["published"]["AVG gain"] = mean_gain(own["published"], baseline)
    write_figures(save_file, result, lines)
    utils.atomic_write(save_file.with_suffix(".csv"), table_csv(result))
    print_figures(result)
    print(f"a line per row: {save_file.with_suffix('.jsonl')}; summary: {save_file.with_suffix('.json')}; "
          f"published columns: {save_file.with_suffix('.csv')}")
    return result


def mean_of(values: list[float | None], people: list[str]) -> list[float] | None:
    """Mean and interval over persons of the values that are defined; the mean alone where there is one person."""
    kept = [(v, p) for v, p in zip(values, people, strict=True) if v is not None]
    if not kept:
        return None
    found = statistics.cluster_interval(*zip(*kept, strict=True))
    return list(found) if len({p for _, p in kept}) > 1 else [found[0]]


def summarise(rows: list[dict], figures: list[dict], people: list[str]) -> dict:
    """A system's figures over all rows; `published` holds the columns of the paper's table, x 100."""
    replies, references = [reply_of(row) for row in rows], [row["response"] for row in rows]
    bleu, signature = metrics.corpus_bleu(replies, references)
    bert = bert_scores(replies, references)
    means = {c: sum(own[c] for own in figures) / len(figures) for c in ("F1", "R-1", "R-2", "R-L")}
    means |= {"DIST-1": metrics.plain_distinct(replies, 1), "DIST-2": metrics.plain_distinct(replies, 2)}
    means |= {} if isinstance(bert, str) else bert
    published = {c: None if means.get(c) is None else 100 * means[c] for c in COLUMNS} | {"BLEU": bleu}
    usage = {str(k): sum(row["chosen"] == k for row in rows) / len(rows) for k in range(1, len(rows[0]["scores"]) + 1)} \
        if "scores" in rows[0] else None
    return {"rows": len(rows), "persons": len(set(people)), "responses": sum(len(row["preds"]) for row in rows),
            "empty": sum(not text.strip() for row in rows for text in row["preds"]),
            "figures": {c: mean_of([own.get(c) for own in figures], people) for c in FIGURES},
            "choice_gain": mean_of([own["random"] - own["nll"] if "nll" in own else None for own in figures], people),
            "usage": usage, "bleu_signature": signature, "no_bert_score": bert if isinstance(bert, str) else None, "published": published}


def mean_gain(own: dict, baseline: dict) -> float | None:
    """Mean over the published columns of the gain over the baseline, in per cent."""
    gains = [100 * (own[c] / baseline[c] - 1) for c in COLUMNS[:-1] if own[c] is not None and baseline[c]]
    return sum(gains) / len(gains) if gains else None


def table_csv(result: dict) -> str:
    """The published table: one header, one list of values a system."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["system", *COLUMNS])
    for name, own in result["systems"].items():
        writer.writerow([name, *("" if own["published"][c] is None else f"{own['published'][c]:.2f}" for c in COLUMNS)])
    return out.getvalue()


def print_figures(result: dict) -> None:
    """One table of figures with intervals, one of the published columns, and how often every prompt is chosen."""
    from rich.console import Console
    from rich.table import Table

    def figure(value) -> str:
        if value is None:
            return "—"
        return f"{value[0]:.3f}" + (f" [{value[1]:.3f}, {value[2]:.3f}]" if len(value) == 3 else "")

    console = Console(width=max(150, Console().width))
    table = Table(title="95 % intervals over persons")
    for column in ("figure", *result["systems"], *(f"{name} - {next(iter(result['systems']))}" for name in result["differences"])):
        table.add_column(column)
    for c in FIGURES:
        table.add_row(c.replace("_", " "), *(figure(own["figures"][c]) for own in result["systems"].values()),
                      *(figure(own[c]) for own in result["differences"].values()))
    table.add_row("random - chosen", *(figure(own["choice_gain"]) for own in result["systems"].values()), *[""] * len(result["differences"]))
    console.print(table)
    table = Table(title="published columns, x 100")
    for column in ("system", *COLUMNS):
        table.add_column(column)
    for name, own in result["systems"].items():
        table.add_row(name, *("—" if own["published"][c] is None else f"{own['published'][c]:.2f}" for c in COLUMNS))
    console.print(table)
    for name, own in result["systems"].items():
        use = "" if own["usage"] is None else "; chosen: " + ", ".join(f"prompt {k} {100 * v:.0f} %" for k, v in own["usage"].items())
        console.print(f"{name}: {own['rows']} rows of {own['persons']} persons, {own['responses']} replies, {own['empty']} empty{use}", highlight=False)
        if own["no_nll"]:
            console.print(f"{name}: no nll: {own['no_nll']}", highlight=False)
    first = next(iter(result["systems"].values()))
    console.print(f"BLEU: {first['bleu_signature']}; BERTScore: {first['no_bert_score'] or BERT_MODEL}", highlight=False)
