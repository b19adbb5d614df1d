"""Does a new token ask for a format, and only where it should? From replies, and from the model's own probabilities.

eval.py calls `evaluate` for rows that carry `asks_format` (method delia). Rows also have `label` (error or correct),
`negated`, `messages` and maybe `seen_phrasing` (the same question under an instruction sentence of the training set).

| figure              | rows           | meaning                                                                           |
| follow              | asking         | share of replies that are the wanted line of JSON (the parse rate)                |
| leak                | others         | the same share where the format is forbidden, or not mentioned                    |
| follow_minus_leak   | both           | their difference; a model that always, or never, uses the format has 0            |
| accuracy            | asking         | share of replies in the format with the right label; no format is a wrong answer  |
| balanced_accuracy   | asking         | mean of the two labels' accuracies; macro_f1 likewise; majority: what one label scores |
| verdict_*           | all            | the same for all rows; where prose is asked for, the verdict is read from the prose |
| transfer            | pairs          | follow_minus_leak, and accuracy, of unseen phrasings minus those of seen ones, same questions |
| token_nll           | mentions       | -log p(new token | before) in nats, a pass over unmasked prompts; before training in brackets |
| reply_nll           | asking         | nats per token of the reference reply                                             |
| retention           | held-out cache | nats per token of the untuned model's own answers that no run trains on; change against the untuned model |
| neighbours          | embedding      | cosine of the token's embedding with that of the written-out format, and the nearest tokens |

Intervals are 95 %: Wilson for shares, else bootstrap over rows (for differences and balanced figures within groups).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import trees
from methods.delia import messages, mixing
from methods.delia.reading import LABELS, read_format, read_prose
from modeling.adapters import add_tokens, grow_embeddings
from modeling.checkpoints import load_checkpoint
from modeling.prompts import end_of_turn
from scoring import statistics
from scoring.logs import write_figures
from utils import USAGE, fail, info

MAX_TOKENS = 2000  # packed at a time in the passes below; bounds memory
ROUNDS = 2000


def macro_f1(truth: np.ndarray, found: np.ndarray) -> float:
    """Mean F1 of both labels; an unread answer (None) is found as neither."""
    scores = []
    for label in LABELS:
        hits = ((truth == label) & (found == label)).sum()
        scores.append(2 * hits / max(1, (truth == label).sum() + (found == label).sum()))
    return float(np.mean(scores))


def balanced_accuracy(truth: np.ndarray, found: np.ndarray) -> float:
    """Mean of the accuracies within each label that occurs; 0.5 by chance and for one label always."""
    return float(np.mean([(found[truth == label] == label).mean() for label in LABELS if (truth == label).any()]))


def resample(groups: list[np.ndarray], figure, seed: int = 0) -> list[float]:
    """[figure(groups), low, high]: bootstrap in which each group of row numbers is resampled within itself."""
    rng = np.random.default_rng(seed)
    draws = [figure([group[rng.integers(0, len(group), len(group))] for group in groups]) for _ in range(ROUNDS)]
    return [float(figure(groups)), *(float(v) for v in np.percentile(draws, [2.5, 97.5]))]


def verdicts(rows: list[dict]) -> dict[str, np.ndarray]:
    """Per row: truth, parsed (the label in the format, or None), read (parsed, or the verdict in prose), asks, negated."""
    parsed = [read_format(row["preds"][0]) for row in rows]
    read = [label or (None if row["asks_format"] else read_prose(row["preds"][0])) for row, label in zip(rows, parsed, strict=True)]
    return {"truth": np.array([row["label"] for row in rows], dtype=object), "parsed": np.array(parsed, dtype=object),
            "read": np.array(read, dtype=object), "asks": np.array([row["asks_format"] for row in rows]),
            "negated": np.array([row["negated"] for row in rows])}


def label_figures(truth: np.ndarray, found: np.ndarray) -> dict:
    """accuracy, balanced_accuracy, macro_f1, each with interval, and the scores of the more frequent label as `majority`."""
    own = [np.flatnonzero(truth == label) for label in LABELS if (truth == label).any()]
    most = max(LABELS, key=lambda label: (truth == label).sum())
    always = np.full(len(truth), most, dtype=object)

    def over(figure):
        return resample(own, lambda groups: figure(truth[np.concatenate(groups)], found[np.concatenate(groups)]))

    return {"accuracy": list(statistics.share_interval(int((truth == found).sum()), len(truth))),
            "balanced_accuracy": over(balanced_accuracy), "macro_f1": over(macro_f1),
            "majority": {"label": most, "accuracy": float((truth == most).mean()),
                         "balanced_accuracy": balanced_accuracy(truth, always), "macro_f1": macro_f1(truth, always)}}


def follow_minus_leak(parsed: np.ndarray, groups: list[np.ndarray]) -> float:
    """Share of replies in the format among the rows groups[0], minus that among groups[1]."""
    formatted = parsed != None  # noqa: E711  (element by element)
    return float(formatted[groups[0]].mean() - formatted[groups[1]].mean())


def reply_figures(rows: list[dict]) -> dict:
    """The figures of the first part of the table above, for rows with at least one that asks and one that does not."""
    v = verdicts(rows)
    asks, rest = np.flatnonzero(v["asks"]), np.flatnonzero(~v["asks"])
    formatted = v["parsed"] != None  # noqa: E711

    def share(where):
        return list(statistics.share_interval(int(formatted[where].sum()), len(where)) or [None] * 3)

    return {
        "rows": len(rows), "follow": share(asks), "leak": share(rest),
        "leak_negated": share(np.flatnonzero(v["negated"])), "leak_silent": share(np.flatnonzero(~v["asks"] & ~v["negated"])),
        "follow_minus_leak": resample([asks, rest], lambda groups: follow_minus_leak(v["parsed"], groups)),
        **label_figures(v["truth"][asks], v["parsed"][asks]),
        **{f"verdict_{name}": value for name, value in label_figures(v["truth"], v["read"]).items()},
        "unread": int((v["read"] == None).sum()),  # noqa: E711
        "cut": sum(row.get("warnings", {}).get("cut", 0) for row in rows)}


def transfer(unseen: list[dict], seen: list[dict]) -> dict:
    """Unseen minus seen phrasings, question by question: follow_minus_leak and accuracy, with paired intervals."""
    by_question = {question_of(row): row for row in seen}
    pairs = [(row, by_question[question_of(row)]) for row in unseen if question_of(row) in by_question]
    a, b = verdicts([row for row, _ in pairs]), verdicts([row for _, row in pairs])
    groups = [np.flatnonzero(a["asks"]), np.flatnonzero(~a["asks"])]
    right = [(x["truth"] == x["parsed"]).astype(float) for x in (a, b)]
    return {"pairs": len(pairs),
            "follow_minus_leak": resample(groups, lambda g: follow_minus_leak(a["parsed"], g) - follow_minus_leak(b["parsed"], g)),
            "accuracy": resample(groups[:1], lambda g: float((right[0][g[0]] - right[1][g[0]]).mean()))}


def question_of(row: dict) -> tuple[str, bool, bool]:
    """What two rows with different instruction sentences share: the text before the sentence, and the kind of sentence."""
    return row["prompt"].rpartition("\n\n")[0], row["asks_format"], row["negated"]


def difference(rows: list[dict], baseline: list[dict]) -> dict:
    """This system minus the baseline on the same rows, with paired intervals."""
    a, b = verdicts(rows), verdicts(baseline)
    asks, rest = np.flatnonzero(a["asks"]), np.flatnonzero(~a["asks"])
    own = [asks[a["truth"][asks] == label] for label in LABELS if (a["truth"][asks] == label).any()]

    def balanced(groups):
        return float(np.mean([(a["parsed"][g] == a["truth"][g]).mean() - (b["parsed"][g] == b["truth"][g]).mean() for g in groups]))

    return {"follow_minus_leak": resample([asks, rest], lambda g: follow_minus_leak(a["parsed"], g) - follow_minus_leak(b["parsed"], g)),
            "balanced_accuracy": resample(own, balanced)}


def sequence_logps(model, sequences: list[tuple[list[int], list[bool]]]) -> list[np.ndarray]:
    """log p of the chosen tokens of each (ids, chosen), given all tokens before, in nats; nothing is masked but the first."""
    import torch

    import trees

    found: list[np.ndarray] = []
    block: list[trees.Tree] = []

    def run() -> None:
        batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in trees.pack(block).items()}
        with torch.no_grad():
            logps = trees.score(model, batch).double().cpu().numpy()
        row = batch["row"].cpu().numpy()
        found.extend(logps[row == i] for i in range(len(block)))
        block.clear()

    for ids, chosen in sequences:
        if block and sum(map(trees.num_tokens, block)) + len(ids) > MAX_TOKENS:
            run()
        rest = trees.Segment(ids[1:], trees.LIKELIHOOD, [float(c) for c in chosen[1:]])
        block.append(trees.Tree(trees.Segment(ids[:1], children=[rest])))
    if block:
        run()
    return found


def token_sequences(rows: list[dict], tokenizer, new_tokens: list[str]) -> list[tuple[list[int], list[bool]]]:
    """The prompts that mention a new token, with its places chosen."""

    wanted = set(tokenizer.convert_tokens_to_ids(new_tokens))
    prompts = [messages.encode(tokenizer, messages.context_of(row)) for row in rows]
    return [(ids, [i in wanted for i in ids]) for ids in prompts if wanted & set(ids)]


def reply_sequences(rows: list[dict], tokenizer) -> list[tuple[list[int], list[bool]]]:
    """Prompt and reference reply of every row, with the reply's tokens and its end token chosen."""

    sequences = []
    for row in rows:
        prompt = messages.encode(tokenizer, row["messages"][:-1])
        reply = [*tokenizer(row["messages"][-1]["content"], add_special_tokens=False)["input_ids"], end_of_turn(tokenizer)]
        sequences.append((prompt + reply, [False] * len(prompt) + [True] * len(reply)))
    return sequences


def mean_nll(model, sequences: list[tuple[list[int], list[bool]]]) -> list[float]:
    """Mean -log p of the chosen tokens of every sequence."""
    return [float(-logps.mean()) for logps in sequence_logps(model, sequences)]


def embedding_figures(model, tokenizer, token: str, description: str) -> dict:
    """Cosine of a token's input embedding with the mean embedding of a description's tokens, the share of the vocabulary
    that is less like the description than the token is, its nearest tokens, and its length over the mean length."""
    import torch

    table = model.get_input_embeddings()
    with torch.no_grad():
        matrix = table(torch.arange(len(tokenizer), device=model.device)).float()
    own = tokenizer.convert_tokens_to_ids(token)
    described = matrix[tokenizer(description, add_special_tokens=False)["input_ids"]].mean(0)
    cosine = torch.nn.functional.cosine_similarity
    to_token, to_text = cosine(matrix, matrix[own][None]), cosine(matrix, described[None])
    to_token[own] = -1
    nearest = to_token.topk(10)
    norms = matrix.norm(dim=1)
    return {"description": float(to_text[own]), "less_like_description": float((to_text < to_text[own]).float().mean()),
            "norm_ratio": float(norms[own] / norms.mean()),
            "nearest": [[tokenizer.decode([i]), round(c, 4)] for c, i in zip(nearest.values.tolist(), nearest.indices.tolist(), strict=True)]}


def model_figures(rows: list[dict], settings: dict, held_out: list[dict] | None, untuned: dict) -> dict:
    """token_nll, reply_nll, retention and neighbours of the model of an outs file.

    held_out: diverse rows that no run trains on. untuned: what was measured before training so far; filled here.
    """
    model, tokenizer, run = load_checkpoint(settings["model_name_or_path"], chat_template=settings["chat_template"])
    if run["weights"] != settings["weights"]:
        return {"no_model_figures": f"{settings['model_name_or_path']} has changed since the replies were drawn"}
    new, base = run["args"].get("new_tokens", []), run["base_model"]
    asking = [row for row in rows if row["asks_format"]]
    figures = {"ratio": run["args"].get("diverse_ratio"), "reply_nll": list(statistics.interval(mean_nll(model, reply_sequences(asking, tokenizer))))}
    if new:
        sequences = token_sequences(rows, tokenizer, new)
        figures["token_nll"] = list(statistics.interval(mean_nll(model, sequences)))
        descriptions = run["args"]["token_description"]
        figures["neighbours"] = {token: embedding_figures(model, tokenizer, token, descriptions[min(i, len(descriptions) - 1)])
                                 for i, token in enumerate(new)}
    own = mean_nll(model, reply_sequences(held_out, tokenizer)) if held_out else None
    del model
    start = {name: run["args"].get(name) for name in ("new_tokens", "token_init", "token_description", "seed")}
    known = f"{base}: {json.dumps(start)}"  # runs that start alike are measured before training once
    if not run["args"]:
        untuned[base] = {"retention": own}
    elif not {base, known} <= untuned.keys():
        before, plain, _ = load_checkpoint(base)
        untuned.setdefault(base, {"retention": mean_nll(before, reply_sequences(held_out, plain)) if held_out else None})
        if new:
            add_tokens(plain, new)
            grow_embeddings(before, plain, run["args"])
        untuned[known] = {"token_nll": mean_nll(before, token_sequences(rows, plain, new)) if new else None}
    if new:
        figures["token_nll_before"] = list(statistics.interval(untuned[known]["token_nll"]))
    if own:
        figures["retention"] = {"rows": len(own), "nll": list(statistics.interval(own)),
                                "change": list(statistics.interval(np.subtract(own, untuned[base]["retention"])))}
    return figures


def held_out_rows(files: list[str]) -> tuple[list[dict] | None, str | None]:
    """The held-out rows of the cache that the systems' training runs name, or None and why there are none."""

    caches = []
    for file in files:
        summary = Path(file).with_suffix(".json")
        run = json.loads(summary.read_text(encoding="utf-8"))["run"] if summary.is_file() else {"args": {}}
        caches += [name for name in [run["args"].get("diverse_file")] if name and name not in caches]
    if not caches:
        return None, "no run names a --diverse_file"
    if not Path(caches[0]).is_file():
        return None, f"{caches[0]} is not there"
    rows = [row for row in messages.read_messages(caches[0], [], strict=False) if mixing.is_held_out(row)]
    if len(caches) > 1:
        info(f"runs with different caches; retention is measured on {caches[0]}")
    return rows or None, None if rows else f"{caches[0]} has no held-out row"


def evaluate(systems: dict[str, list[dict]], files: list[str], save_file: Path) -> dict:
    """Score outs/*.jsonl of method delia: X.json, X.jsonl (a line per system and row) and tables.

    systems: {name: rows with one pred each}; the first is the baseline of the differences.
    """
    for name, rows in systems.items():
        if len(rows[0]["preds"]) != 1:
            fail(USAGE, f"{name} has {len(rows[0]['preds'])} replies a row, this evaluation reads one", "infer.py --num_response_per_input 1")
        kinds = {row["asks_format"] for row in rows if not row.get("seen_phrasing")}
        if kinds != {True, False}:
            fail(USAGE, f"{name} needs rows that ask for the format and rows that do not, under unseen phrasings", "data/delia/test.jsonl has both")
    held_out, reason = held_out_rows(files)
    result = {"kind": "instructions", "no_retention": reason, "systems": {}}
    untuned: dict[str, dict] = {}
    first = None
    lines = []
    for (name, rows), file in zip(systems.items(), files, strict=True):
        unseen, seen = ([row for row in rows if bool(row.get("seen_phrasing")) == is_seen] for is_seen in (False, True))
        own = reply_figures(unseen)
        if seen:
            own["transfer"] = transfer(unseen, seen)
        if first is not None:
            own["difference"] = difference(unseen, first)
        first = unseen if first is None else first
        summary = Path(file).with_suffix(".json")
        if not summary.is_file():
            own["no_model_figures"] = f"{summary} is not there, so the model is unknown"
        else:
            settings = json.loads(summary.read_text(encoding="utf-8"))["settings"]
            own |= {"no_model_figures": "the replies come from a server"} if settings["engine"] != "hf" else \
                model_figures(unseen, settings, held_out, untuned)
        result["systems"][name] = own
        v = verdicts(rows)
        lines += [{"system": name, "prompt": row["prompt"], "phrasing": row.get("phrasing"), "label": row["label"],
                   "asks_format": row["asks_format"], "negated": row["negated"], "reply": row["preds"][0],
                   "parsed": parsed, "read": read} for row, parsed, read in zip(rows, v["parsed"], v["read"], strict=True)]
    write_figures(save_file, result, lines)
    print_figures(result)
    print(f"a line per reply: {save_file.with_suffix('.jsonl')}; summary: {save_file.with_suffix('.json')}")
    return result


def print_figures(result: dict) -> None:
    """A table with a system a column, and what does not fit into it."""
    from rich.console import Console
    from rich.table import Table

    def shown(value) -> str:
        if value is None or value == [None] * 3:
            return "—"
        return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]" if isinstance(value, list) else f"{value:g}"

    systems = result["systems"]
    first = next(iter(systems))
    console, table = Console(width=max(120, Console().width)), Table(title="95 % intervals over rows; nll in nats")
    for column in ("figure", *systems):
        table.add_column(column)
    parts = [(name, (name,)) for name in ("ratio", "follow", "leak", "leak_negated", "leak_silent", "follow_minus_leak", "accuracy",
                                          "balanced_accuracy", "macro_f1", "verdict_accuracy", "verdict_balanced_accuracy",
                                          "verdict_macro_f1", "unread", "cut", "token_nll", "token_nll_before", "reply_nll")]
    parts += [("retention: nll", ("retention", "nll")), ("retention: change", ("retention", "change")),
              ("transfer: follow_minus_leak", ("transfer", "follow_minus_leak")), ("transfer: accuracy", ("transfer", "accuracy")),
              (f"minus {first}: follow_minus_leak", ("difference", "follow_minus_leak")),
              (f"minus {first}: balanced_accuracy", ("difference", "balanced_accuracy"))]
    for label, path in parts:
        values = []
        for own in systems.values():
            for key in path:
                own = own.get(key) if own else None
            values.append(own)
        if any(value is not None for value in values):
            table.add_row(label.replace("_", " "), *map(shown, values))
    console.print(table)
    majority, every = systems[first]["majority"], systems[first]["verdict_majority"]
    console.print(f"always saying \"{majority['label']}\" in the format: accuracy {majority['accuracy']:.2f}, balanced "
                  f"{majority['balanced_accuracy']:.2f}, macro-F1 {majority['macro_f1']:.2f} (all rows: accuracy {every['accuracy']:.2f})", highlight=False)
    for name, own in systems.items():
        for token, near in own.get("neighbours", {}).items():
            words = ", ".join(json.dumps(text, ensure_ascii=False) for text, _ in near["nearest"][:6])
            console.print(f"{name}: {token} has cosine {near['description']:.3f} with the written-out format (more than "
                          f"{100 * near['less_like_description']:.1f} % of all tokens), length {near['norm_ratio']:.2f} of the mean; nearest: {words}",
                          highlight=False, markup=False)
        if "no_model_figures" in own:
            console.print(f"{name}: no figures of the model: {own['no_model_figures']}", highlight=False, markup=False)
    if result["no_retention"]:
        console.print(f"no retention: {result['no_retention']}", highlight=False, markup=False)
