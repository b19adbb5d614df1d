"""Does a model's distribution over targets fit the wanted one? Exactly by teacher forcing, and from samples.

eval.py calls `evaluate` for rows that carry `targets` (method diffuse). Per system and prompt:

| figure            | from     | meaning                                                                              |
| kl, tv, outside   | model    | KL(w || p) in nats, total variation, probability of any text but a target             |
| entropy           | samples  | of the answers, Miller-Madow, in nats, with a 95 % interval; entropy_plugin without correction |
| coverage          | samples  | distinct answers among N replies                                                     |
| covered           | samples  | distinct targets among them                                                           |
| parsed, valid     | samples  | share of replies with an answer; share whose answer is a target                      |
| chi_square        | samples  | fit of the valid answers to the targets' weights, with a simulated p-value            |
| unseen_valid      | samples  | share of replies whose answer is a target that no training prompt had                |
| new               | samples  | share of replies with an answer that is no target (for open lists, maybe a good one)  |

An answer is the first {...} of a reply (the first four where targets have four lines of them; then `fields` has coverage and
entropy line by line). Replies without an answer count in N and are left out of entropy and coverage.
p counts a target's usual tokens only; the same text in other tokens is part of `outside`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import trees
from methods.diffuse import training
from modeling.checkpoints import load_checkpoint
from scoring import metrics, statistics
from scoring.logs import write_figures

BRACES = re.compile(r"\{[^{}]*\}")
COLUMNS = ("kl", "tv", "outside", "entropy", "coverage", "covered", "parsed", "valid", "p_value", "unseen_valid", "new")
MAX_BARS = 60  # targets of a plot that get a label each


def target_logps(model, tokenizer, row: dict):
    """log p(target | request) of every target (K,), summed over response prefixes, as float64 numpy."""
    import torch


    count, prefixes = len(row["targets"]), len(row["response"])
    batch = trees.pack([training.distribution_tree(row, tokenizer, [1.0] * count)])
    batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in batch.items()}
    with torch.no_grad():
        logps = trees.score_in_parts(model, batch, len(batch["last"]), 4096)
    branch, sums = trees.leaf_sums(logps.double(), batch)
    ordered = torch.empty(count * prefixes, dtype=torch.float64, device=sums.device).index_copy(0, branch, sums)
    return ordered.view(count, prefixes).logsumexp(1).cpu().numpy()


def find_answer(reply: str, targets: list[str], eos: bool = True) -> str | None:
    """The answer in a reply, or None.

    Targets in braces, a group or several ones line by line: the reply's first groups, as many (all of them where there
    are no targets). Other targets: the whole reply, or with eos false the target that it starts with, if any.
    """
    reply = reply.strip()
    if all("\n".join(BRACES.findall(target)) == target for target in targets):
        groups = BRACES.findall(reply)
        count = len(BRACES.findall(targets[0])) if targets else len(groups)
        return "\n".join(groups[:count]) if groups and len(groups) >= count else None
    if not eos:
        return next((target for target in targets if reply.startswith(target)), reply or None)
    return reply or None


def sample_figures(row: dict, seen: set[str]) -> dict:
    """The figures that the replies of a row give; seen: the targets of the prompts that were trained on."""
    wanted = {t: w for t, w in zip(row["targets"], row["weights"], strict=True) if w > 0}
    found = [find_answer(reply, list(wanted), row["eos"]) for reply in row["preds"]]
    answers = Counter(answer for answer in found if answer is not None)
    total, counts = len(row["preds"]), list(answers.values())
    interval = statistics.entropy_interval(counts)
    fields = list(zip(*(answer.split("\n") for answer in answers.elements()), strict=False))
    figures = {
        "replies": total, "parsed": statistics.share_interval(sum(counts), total), "coverage": len(answers),
        "entropy": interval and [statistics.miller_madow(counts), *interval], "entropy_plugin": statistics.entropy(counts)}
    if len(fields) > 1:
        figures["fields"] = [{"coverage": len(set(values)), "entropy": statistics.miller_madow(list(Counter(values).values()))}
                             for values in fields]
    if not wanted:
        return figures | {"counts": dict(answers.most_common())}
    valid = [answers[t] for t in wanted]
    unseen = sum(answers[t] for t in wanted if t not in seen)
    return figures | {
        "valid": statistics.share_interval(sum(valid), total), "covered": sum(v > 0 for v in valid),
        "new": statistics.share_interval(sum(counts) - sum(valid), total), "new_distinct": sum(t not in wanted for t in answers),
        "unseen_valid": statistics.share_interval(unseen, total),
        **(statistics.chi_square(valid, list(wanted.values())) or {"chi_square": None, "p_value": None}),
        "counts": dict(answers.most_common())}


def evaluate(systems: dict[str, list[dict]], files: list[str], save_file: Path) -> dict:
    """Score outs/*.jsonl of method diffuse: X.json, X.jsonl (a line per system and prompt), X_plots/*.png and tables.

    systems: {name: rows with targets and preds}. The model of a file is the one its outs/X.json names.
    """
    result = {"kind": "distributions", "systems": {}}
    lines = []
    for (name, rows), file in zip(systems.items(), files, strict=True):
        exact, reason = exact_figures(rows, Path(file).with_suffix(".json"))
        seen = {t for row in rows if row.get("split") == "train" for t in row["targets"]}
        figures = [{**sample_figures(row, seen), **(own or {})} for row, own in zip(rows, exact, strict=True)]
        result["systems"][name] = {
            "mode": rows[0].get("mode"), "no_exact_figures": reason,
            "prompts": {label: {k: v for k, v in own.items() if k not in ("counts", "logps")}
                        for label, own in zip(labels(rows), figures, strict=True)},
            "tasks": by_task(rows, figures)}
        lines += [{"system": name, "file": row.get("file"), "prompt": row["prompt"], "targets": row["targets"],
                   "weights": row["weights"], **own} for row, own in zip(rows, figures, strict=True)]
    write_figures(save_file, result, lines)
    plots = save_file.parent / f"{save_file.stem}_plots"
    first = next(iter(systems.values()))
    for label, row in zip(labels(first), first, strict=True):
        own = [line for line in lines if line["prompt"] == row["prompt"] and line["file"] == row.get("file")]
        if row["targets"]:
            plot(own, plots / f"{label.replace('/', '_')}.png")
    print_figures(result)
    print(f"a line per prompt: {save_file.with_suffix('.jsonl')}; summary: {save_file.with_suffix('.json')}; plots: {plots}")
    return result


def labels(rows: list[dict]) -> list[str]:
    """A short name of every row: task and file name, or its number."""
    return [f"{row['task']}/{Path(row['file']).stem}" if "file" in row else f"row {i}" for i, row in enumerate(rows, 1)]


def exact_figures(rows: list[dict], summary: Path) -> tuple[list[dict | None], str | None]:
    """Per row kl, tv, outside, floor and the targets' logps, under the model that drew the replies; or why there are none."""
    if not summary.is_file():
        return [None] * len(rows), f"{summary} is not there, so the model is unknown"
    settings = json.loads(summary.read_text(encoding="utf-8"))["settings"]
    if settings["engine"] != "hf":
        return [None] * len(rows), "the replies come from a server, which does not give the targets' probabilities"
    model, tokenizer, run = load_checkpoint(settings["model_name_or_path"], chat_template=settings["chat_template"])
    if run["weights"] != settings["weights"]:
        return [None] * len(rows), f"{settings['model_name_or_path']} has changed since the replies were drawn"
    found: list[dict | None] = []
    for row in rows:
        logps = target_logps(model, tokenizer, row) if row["targets"] else None
        found.append(None if logps is None else
                     metrics.exact_fit(row["weights"], logps) | {"logps": [round(float(v), 6) for v in logps]})
    return found, None


def by_task(rows: list[dict], figures: list[dict]) -> dict:
    """Means over the prompts of every task and split, as published, with the number of prompts."""
    groups: dict[str, list[dict]] = {}
    for row, own in zip(rows, figures, strict=True):
        groups.setdefault(f"{row.get('task', 'all')} ({row.get('split', 'all')})", []).append(own)
    means = {}
    for name, group in groups.items():
        means[name] = {"prompts": len(group)}
        for column in COLUMNS:
            values = [v[0] if isinstance(v, (list, tuple)) else v for own in group if (v := own.get(column)) is not None]
            if len(values) == len(group):
                means[name][column] = sum(values) / len(values)
    return means


def print_figures(result: dict) -> None:
    """A table over prompts, and one of the means over tasks where there are several prompts."""
    from rich.console import Console
    from rich.table import Table

    def figure(value) -> str:
        if value is None:
            return "—"
        if isinstance(value, (list, tuple)):
            return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"
        return str(value) if isinstance(value, int) else f"{value:.3f}"

    console = Console(width=max(200, Console().width))
    several = any(len(system["prompts"]) > 1 for system in result["systems"].values())
    for kind, title in (("prompts", "per prompt; nats; 95 % intervals over replies"), ("tasks", "means over the prompts of a task")):
        if kind == "tasks" and not several:
            continue
        table = Table(title=title)
        for column in (kind[:-1], "system", *COLUMNS):
            table.add_column(column.replace("_", " "), no_wrap=True)
        for name in next(iter(result["systems"].values()))[kind]:
            for system, own in result["systems"].items():
                table.add_row(name, system, *(figure(own[kind][name].get(column)) for column in COLUMNS))
        console.print(table)
    for system, own in result["systems"].items():
        if own["no_exact_figures"]:
            console.print(f"{system}: no exact figures: {own['no_exact_figures']}", highlight=False)


def plot(lines: list[dict], file: Path) -> None:
    """Wanted weights against every system's probability of each target (its share of the samples where that is unknown)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    targets, weights = lines[0]["targets"], lines[0]["weights"]
    x, width = np.arange(len(targets)), 0.8 / len(lines)
    figure, axes = plt.subplots(figsize=(min(16, max(5, len(targets) * 0.35)), 4), layout="constrained")
    for i, line in enumerate(lines):
        if "logps" in line:
            heights, said = np.exp(line["logps"]), f"exact, KL {line['kl']:.3f} nats"
        else:
            heights, said = [line["counts"].get(t, 0) / line["replies"] for t in targets], f"of {line['replies']} replies"
        axes.bar(x - 0.4 + (i + 0.5) * width, heights, width, label=f"{line['system']} ({said})")
    axes.step([-0.5, *(x + 0.5)], [weights[0], *weights], where="pre", color="black", label="target")
    if len(targets) <= MAX_BARS:
        axes.set_xticks(x, [t.strip("{}").split("\n")[0][:24] for t in targets], rotation=90 if len(targets) > 12 else 0)
    axes.set_ylabel("probability")
    axes.set_title(lines[0]["prompt"].split("\n")[0][:90].replace("$", r"\$"), fontsize=9)
    axes.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
