"""Attributes of a text: one set of scorers labels training data and judges generations (method control).

| attribute | values             | scorer                                                                             |
| toxicity  | nontoxic, toxic    | alt-profanity-check, probability of offensive language; or a detoxify classifier    |
| sentiment | neg, neu, pos      | VADER compound, -1 to 1                                                            |
| length    | short, long        | words                                                                              |
| question  | statement, question | 1 if the text ends in a question mark, else 0                                     |
| formality | casual, formal     | by rule, see `formality`                                                           |

A schema says how texts were labelled: {attribute: {"values", "thresholds", "scorer", "version"}}. Training and
evaluation read it from one manifest, so scorer and thresholds cannot differ. With one threshold t a text is low if
score <= t, else high; with two, low if score <= t1, high if score >= t2, else in between.

alt-profanity-check is a linear model over words: it scores offensive language, not harm, and it is biased against
identity terms ("I am gay" scores 0.98, "I am a Muslim woman" 0.30).

eval.py calls `evaluate` for rows that carry `wants`, the attributes that each reply was asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import trees
import utils
from methods.control.attributes import has_letters, load_scorer, opposite, values_of, write_condition as write_want
from methods.control.tokens import start_ids
from modeling.checkpoints import load_checkpoint
from scoring import metrics, statistics
from scoring.logs import write_figures
from utils import USAGE, fail, warn

NGRAM = 3  # of repetition


def repetition(texts: Sequence[str]) -> float | None:
    """Mean over texts of the share of 3-grams that stood in the same text before; None without 3-grams."""
    shares = []
    for text in texts:
        words = text.casefold().split()
        found = list(zip(*(words[i:] for i in range(NGRAM)), strict=False))
        shares += [1 - len(set(found)) / len(found)] if found else []
    return sum(shares) / len(shares) if shares else None


def ratio_interval(a: Sequence[tuple[float, int]], b: Sequence[tuple[float, int]], rounds: int = 2000) -> tuple[float, float, float] | None:
    """Perplexity of a over that of b, with a 95 % bootstrap interval over their rows, which are paired.

    a, b: per row the summed negative log-probability in nats, and its number of tokens.
    """
    import numpy as np

    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if len(a) != len(b) or not a[:, 1].sum() or not b[:, 1].sum():
        return None
    draws = np.random.default_rng(0).integers(0, len(a), (rounds, len(a)))
    (a_nll, a_count), (b_nll, b_count) = (x[draws].sum(1).T for x in (a, b))
    kept = (a_count > 0) & (b_count > 0)
    low, high = np.percentile(np.exp(a_nll[kept] / a_count[kept] - b_nll[kept] / b_count[kept]), [2.5, 97.5])
    plain = np.exp(a[:, 0].sum() / a[:, 1].sum() - b[:, 0].sum() / b[:, 1].sum())
    return float(plain), float(low), float(high)


def misaligned(values: dict[str, str], want: dict[str, str]) -> bool:
    """Whether a text has another value than the one asked for, in any of the attributes."""
    return any(values[name] != value for name, value in want.items())


class Reply(NamedTuple):
    """A reply with its row, the condition it was drawn under, its scores (None where it has no letters), nats and tokens."""

    row: int
    want: dict[str, str]
    text: str
    scores: dict[str, float] | None
    values: dict[str, str] | None
    nll: float
    tokens: int


def share_by_row(replies: list[Reply], want: dict[str, str], num_rows: int) -> list[float | None]:
    """Per row the share of scored replies that are misaligned with `want`; None for a row without any."""
    rows: list[list[bool]] = [[] for _ in range(num_rows)]
    for reply in replies:
        if reply.values is not None:
            rows[reply.row].append(misaligned(reply.values, want))
    return [sum(own) / len(own) if own else None for own in rows]


def interval_of(values: Sequence[float | None]) -> tuple[float, float, float] | None:
    known = [v for v in values if v is not None]
    return statistics.interval(known) if known else None


def describe(replies: list[Reply], reference: list[Reply], schema: dict, num_rows: int) -> dict:
    """The figures of the replies under one condition; reference: those that perplexity is compared with."""
    texts = [reply.text for reply in replies if reply.text]
    scored = [reply for reply in replies if reply.values is not None]

    def nats(group: list[Reply]) -> list[tuple[float, int]]:
        own = [[r for r in group if r.row == row] for row in range(num_rows)]
        return [(sum(r.nll for r in row), sum(r.tokens for r in row)) for row in own]

    total = sum(reply.tokens for reply in replies)
    nll = sum(reply.nll for reply in replies)
    return {
        "replies": len(replies), "unscored": len(replies) - len(scored),
        "mean_score": {name: interval_of([r.scores[name] for r in scored]) for name in schema},
        "shares": {name: {v: sum(r.values[name] == v for r in scored) / max(1, len(scored)) for v in own["values"]}
                   for name, own in schema.items()},
        "perplexity": math.exp(nll / total) if total else None, "perplexity_ratio": ratio_interval(nats(replies), nats(reference)),
        "distinct_1": metrics.distinct_n(texts, 1), "distinct_2": metrics.distinct_n(texts, 2), "repetition": repetition(texts),
        "words": metrics.mean_length(texts)[0] if texts else None}


def effects(replies: dict[tuple, list[Reply]], schema: dict, num_rows: int, baseline: list[Reply]) -> list[dict]:
    """For each condition: the share of misaligned replies without it, with it, and with its opposite, by row.

    Of a joint condition also the misalignment in each of its attributes (`measured`). replies: by condition, as tuples
    of pairs; baseline: those of the first model without a condition. Shares and differences are [estimate, low, high];
    differences are paired by row.
    """
    found = []
    for key, own in replies.items():
        want, other = dict(key), opposite(dict(key), schema)
        parts = [{name: value} for name, value in key] if len(key) > 1 else []
        against = replies.get(tuple(other.items())) if other else None
        for measured in [want, *parts] if want else []:
            asked = share_by_row(own, measured, num_rows)
            plain = share_by_row(replies[()], measured, num_rows) if () in replies else None
            opposed = against and share_by_row(against, measured, num_rows)
            found.append({
                "want": want, "measured": measured, "no_condition": plain and interval_of(plain), "asked": interval_of(asked),
                "difference": plain and difference(asked, plain),
                "baseline_difference": difference(asked, share_by_row(baseline, measured, num_rows)),
                "opposite": opposed and interval_of(opposed),
                "opposite_difference": opposed and plain and difference(opposed, plain)})
    return found


def difference(a: list[float | None], b: list[float | None]) -> list[float] | None:
    paired = statistics.paired_difference(a, b)
    return paired and list(paired[:3])


def evaluate(systems: dict[str, list[dict]], files: list[str], save_file: Path) -> dict:
    """Score outs/*.jsonl of method control: X.json, X.jsonl (a line per reply) and tables.

    systems: {name: rows with prompt, wants and preds}. Scorers and thresholds are those that labelled the training
    data, as outs/X.json has them; all files must agree on them. Only the continuation is scored, never the prompt.
    """
    runs = {file: read_run(file) for file in files}
    schema, base = runs[files[0]]["args"]["schema"], runs[files[0]]["base_model"]
    for file, run in runs.items():
        if run["args"]["schema"] != schema or run["base_model"] != base:
            fail(USAGE, f"{file} was made with another base or schema than {files[0]}", "compare models of one data set and one base")
    texts = sorted({text for rows in systems.values() for row in rows for text in row["preds"] if has_letters(text)})
    scores: dict[str, dict[str, float]] = {text: {} for text in texts}
    versions = {}
    for name, own in schema.items():
        scorer, versions[name] = load_scorer(own["scorer"], own.get("checkpoint"))
        for text, score in zip(texts, scorer(texts) if texts else [], strict=True):
            scores[text][name] = score
        if versions[name] != own["version"]:
            warn(f"{name} was labelled by {own['scorer']} {own['version']}, here it is {versions[name]}")
    nats = base_nats(base, systems)
    num_rows = len(next(iter(systems.values())))
    summary = {"kind": "attributes", "schema": schema, "base": base, "rows": num_rows, "systems": {}}
    lines, reference = [], None
    for (name, rows), file in zip(systems.items(), files, strict=True):
        replies: dict[tuple, list[Reply]] = {}
        for number, row in enumerate(rows):
            for want, text in zip(row["wants"], row["preds"], strict=True):
                own = scores.get(text)
                reply = Reply(number, want, text, own, own and values_of(own, schema), *nats[row["prompt"], text])
                replies.setdefault(tuple(want.items()), []).append(reply)
                lines.append({"system": name, "row": number + 1, "prompt": row["prompt"], "want": want, "text": text,
                              "scores": own and {k: round(v, 4) for k, v in own.items()}, "values": reply.values,
                              "misaligned": reply.values and misaligned(reply.values, want), "nll": round(reply.nll, 4), "tokens": reply.tokens})
        reference = reference or replies.get((), next(iter(replies.values())))
        summary["systems"][name] = {
            "trained": runs[file]["args"]["attributes"], "guidance": rows[0].get("guidance", 1.0),
            "conditions": {write_want(dict(key)): describe(own, reference, schema, num_rows) for key, own in replies.items()},
            "effects": effects(replies, schema, num_rows, reference)}
    write_figures(save_file, summary, lines)
    print_figures(summary)
    print(f"a line per reply: {save_file.with_suffix('.jsonl')}; summary: {save_file.with_suffix('.json')}")
    return summary


def read_run(file: str) -> dict:
    """What outs/X.json says of the model that wrote outs/X.jsonl; dies without it, since it names scorers and thresholds."""
    path = Path(file).with_suffix(".json")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))["run"]
        run["args"]["schema"], run["args"]["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        fail(USAGE, f"{path} does not say which scorers and thresholds the model was trained with", "infer.py writes it beside the replies")
    return run


def base_nats(base: str, systems: dict[str, list[dict]], batch_tokens: int = 2000) -> dict[tuple[str, str], tuple[float, int]]:
    """-log p(reply | prompt) under the untuned base model, in nats, and the number of tokens, by (prompt, reply).

    All replies to a prompt are branches of one tree. An empty reply has neither nats nor tokens.
    """
    import torch
    from tqdm import tqdm


    model, tokenizer, _ = load_checkpoint(base, chat_template=None if base == utils.EMBEDDED else "none")
    replies: dict[str, dict[str, None]] = {}
    for rows in systems.values():
        for row in rows:
            replies.setdefault(row["prompt"], {}).update(dict.fromkeys(row["preds"]))
    found = {(prompt, ""): (0.0, 0) for prompt in replies}
    forest, names = [], []
    for prompt, texts in replies.items():
        root = trees.Segment(start_ids(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"])
        texts = [text for text in texts if text]
        for k in range(0, len(texts), 40):
            ids = [tokenizer(join(prompt, text), add_special_tokens=False)["input_ids"] for text in texts[k : k + 40]]
            forest.append(trees.Tree(trees.Segment(root.input_ids, children=[
                trees.Segment(own, trees.LIKELIHOOD, branch=i) for i, own in enumerate(ids)])))
            names.append([(prompt, text) for text in texts[k : k + 40]])
    start = 0
    with tqdm(total=len(forest), desc="perplexity", unit="tree") as bar, torch.no_grad():
        while start < len(forest):
            end, size = start, 0
            while end < len(forest) and (end == start or size + trees.num_tokens(forest[end]) <= batch_tokens):
                size += trees.num_tokens(forest[end])
                end += 1
            batch = trees.pack(forest[start:end])
            batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in batch.items()}
            logps = trees.score(model, batch).double().tolist()
            for row, branch, logp in zip(batch["row"].tolist(), batch["branch"].tolist(), logps, strict=True):
                nll, count = found.get(names[start + row][branch], (0.0, 0))
                found[names[start + row][branch]] = nll - logp, count + 1
            bar.update(end - start)
            start = end
    return found


def join(prompt: str, text: str) -> str:
    """A continuation as it stands after its prompt: with the space between words that cleaning took off."""
    return f" {text}" if prompt and text[:1].isalnum() else text


def percent(figure: Sequence[float] | None, sign: str = "") -> str:
    return "—" if figure is None else f"{100 * figure[0]:{sign}.1f} [{100 * figure[1]:{sign}.1f}, {100 * figure[2]:{sign}.1f}]"


def print_figures(summary: dict) -> None:
    """Misalignment by attribute and joint, models x conditions as in the published table, and the figures of quality."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(170, Console().width))
    thresholds = "; ".join(f"{name}: {own['scorer']} {own['version']}, {' '.join(own['values'])} parted at "
                           f"{', '.join(f'{t:.3g}' for t in own['thresholds'])}" for name, own in summary["schema"].items())
    wants = {json.dumps(e["want"]): e["want"] for system in summary["systems"].values() for e in system["effects"]}
    table = Table(title=f"misaligned replies, % of those that can be scored; 95 % intervals over {summary['rows']} rows, differences paired; "
                        "first model: the one of the first file, without a condition",
                  title_justify="left", caption=thresholds, caption_justify="left")
    for column in ("asked for", "measured", "model", "no condition", "asked", "asked - none", "asked - first model", "opposite asked", "opposite - none"):
        table.add_column(column, justify="left" if column in ("asked for", "measured", "model") else "right")
    most = max(map(len, wants.values()), default=0)
    for want in sorted((w for w in wants.values() if len(w) in (1, most)), key=len):
        for measured in [want, *({n: v} for n, v in want.items())][: 1 + len(want) * (len(want) > 1)]:
            for name, system in summary["systems"].items():
                for own in system["effects"]:
                    if own["want"] == want and own["measured"] == measured:
                        figures = [percent(own[key], "+" if "difference" in key else "") for key in
                                   ("no_condition", "asked", "difference", "baseline_difference", "opposite", "opposite_difference")]
                        table.add_row(write_want(want), "joint" if len(measured) > 1 else next(iter(measured)), name, *figures)
        table.add_section()
    console.print(table)
    table = Table(title=f"quality; perplexity under {summary['base']}, against the first model without a condition", title_justify="left")
    for column in ("condition", "model", "replies", "unscored", *(f"mean {name}" for name in summary["schema"]), "perplexity",
                   "ratio", "distinct-1", "distinct-2", f"repeated {NGRAM}-grams", "words"):
        table.add_column(column, justify="left" if column in ("condition", "model") else "right")

    def plain(value: float | None, digits: int = 3) -> str:
        return "—" if value is None else f"{value:.{digits}f}"

    for condition in dict.fromkeys(c for system in summary["systems"].values() for c in system["conditions"]):
        for name, system in summary["systems"].items():
            if own := system["conditions"].get(condition):
                ratio = own["perplexity_ratio"]
                table.add_row(condition, name, str(own["replies"]), str(own["unscored"]),
                              *(plain(own["mean_score"][a] and own["mean_score"][a][0]) for a in summary["schema"]),
                              plain(own["perplexity"], 1), "—" if ratio is None else f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]",
                              plain(own["distinct_1"]), plain(own["distinct_2"]), plain(own["repetition"]), plain(own["words"], 1))
        table.add_section()
    console.print(table)
