"""Do replies fit the person and the dialogue, and does the retriever choose well?

Figures of each system, for rows with `response`, what the person really said (infer.py --method spt
writes them). One reply of a row is compared with it: the one under the selected prompt, or the
first where replies belong to all prompts (fused) or to unknown ones. Diversity is that of all
replies of a row.

| figure                 | meaning                                                                 |
| nll                    | nats per token of the true reply, end included, under the selected      |
|                        | prompt                                                                  |
| random, oracle         | the same under a prompt drawn blindly (the mean over prompts), and      |
|                        | under the best one                                                      |
| regret, agreement      | nll - oracle; share of rows where the selected prompt is the best one   |
| distinct-1, distinct-2 | of a row's replies, the mean over rows                                  |
| sbert_diversity        | 1 - mean cosine of a row's replies                                      |
| embedding              | cosine of reply and true reply                                          |
| persona_overlap        | share of the reply's content words that the persona has                 |

Intervals are 95 %, over persons: rows of one person are drawn together. The columns of the paper's
table (methods/spt/published.py) go to X.csv.
"""

from __future__ import annotations

import trees
from flags import Args
from methods import missing
from methods.spt import published
from methods.spt.training import build_tree
from modeling.softprompts import soft_prompts
from scoring import metrics, statistics
from scoring.evaluated import DASH, Evaluated, Figure, Table, with_interval
from scoring.sources import NoModel

OF_PROMPTS = ("nll", "random", "oracle", "regret", "agreement")  # need the model
FIGURES = (*OF_PROMPTS, "distinct-1", "distinct-2", "sbert_diversity", "embedding",
           "persona_overlap")
COPIED = ("person", "selected", "soft_prompts", "scores")  # from a row to its line


def measure(systems: dict[str, list[dict]], sources, args) -> Evaluated:
    """The figures of every system, a line of every row, and X.csv.

    systems: {name: rows with persona, context, response and preds}; the first is the baseline.
    """
    for name, rows in systems.items():
        bare = [number for number, row in enumerate(rows, 1) if "response" not in row]
        if bare:
            return missing.not_the_methods(
                f"row {bare[0]} of {name} has no response to compare replies with")
    summary, lines, first = {"systems": {}, "differences": {}}, [], None
    for name, rows in systems.items():
        rows = _prompts_of_replies(rows, sources.settings(name) or {})
        nlls, no_nll = _nlls_of_rows(rows, sources, name)
        figures = [row_figures(row, nll, sources.embedder)
                   for row, nll in zip(rows, nlls, strict=True)]
        # where no person is named, rows with the same persona count as one person
        people = [row.get("person") or " ".join(row.get("persona", [])) for row in rows]
        summary["systems"][name] = _summarise(rows, figures, people, no_nll)
        if first is None:
            first = figures
        else:
            summary["differences"][name] = _differences(figures, first, people)
        lines += [{"system": name, "persona": row.get("persona", []), "context": row["context"],
                   "response": row["response"], "preds": row["preds"],
                   **{key: row[key] for key in COPIED if key in row}, **of_row}
                  for row, of_row in zip(rows, figures, strict=True)]
    # the gain needs the first system's columns, so it is filled in when all are known
    columns = {name: system["published"] for name, system in summary["systems"].items()}
    baseline = dict(next(iter(columns.values())))
    for of_system in columns.values():
        of_system["AVG gain"] = published.mean_gain(of_system, baseline)
    return Evaluated(summary, lines, {".csv": published.as_csv(columns)})


# ---- the true reply under every prompt ----------------------------------------------------------


def prompt_nlls(model, tokenizer, row: dict, max_length: int,
                max_input_length: int) -> list[float] | None:
    """Mean nll per token of a row's true reply under each soft prompt (K,), in nats.

    None if the row does not fit into max_length tokens; max_input_length words of the dialogue are
    kept.
    """
    config = soft_prompts(model).config
    # eval.py has no flags for these, so they are taken from the checkpoint
    settled = {name: config[name] for name in ("num_prompts", "prompt_length", "max_context_turns")}
    limits = Args(max_length=max_length, max_input_length=max_input_length, **settled)
    tree = build_tree(row, tokenizer, limits, None)  # the very tree that is trained on
    if tree is None:
        return None
    scored, = trees.score_forest(model, [tree])
    sums = scored.branch_sums(config["num_prompts"])
    # the reply stands once under every prompt
    num_tokens = len(scored.logps) // config["num_prompts"]
    return [round(float(-total) / num_tokens, 6) for total in sums]


def _nlls_of_rows(rows: list[dict], sources, name: str
                  ) -> tuple[list[list[float] | None], str | None]:
    """prompt_nlls of every row; or None for all of them, and the reason."""
    unknown: list[list[float] | None] = [None] * len(rows)
    settings = sources.settings(name) or {"method": "spt"}  # without any, sources.model says so
    if "selected" not in rows[0] or settings["method"] != "spt":
        return unknown, f"method {settings['method']} has no soft prompts"
    try:
        model, tokenizer, _ = sources.model(name)
    except NoModel as error:
        return unknown, str(error)
    # with the limits of drawing, the true reply follows the dialogue that was answered
    limits = settings["max_length"], settings["max_input_length"]
    nlls = [prompt_nlls(model, tokenizer, row, *limits) for row in rows]
    if None in nlls:  # means over the other rows would not compare with other files
        long = nlls.index(None) + 1
        return unknown, f"row {long} with its true reply does not fit into {limits[0]} tokens"
    return nlls, None


# ---- figures ------------------------------------------------------------------------------------


def _prompts_of_replies(rows: list[dict], settings: dict) -> list[dict]:
    """The rows with the prompt of every reply in soft_prompts, none where replies were fused.

    Earlier files name there all prompts of the mixture.
    """
    if settings.get("soft_prompt") != "fused":
        return rows
    return [row | {"soft_prompts": []} for row in rows]


def reply_of(row: dict) -> str:
    """The reply under the selected prompt, or the first where replies have no prompt of their own.
    """
    prompts = row.get("soft_prompts", [])
    # with more prompts than replies, an earlier file of fused replies that says nothing else
    if row.get("selected") in prompts and len(prompts) <= len(row["preds"]):
        return row["preds"][prompts.index(row["selected"])]
    return row["preds"][0]


def row_figures(row: dict, nll: list[float] | None, embedder) -> dict:
    """All figures of a row; nll: of the true reply under every prompt, or None."""
    reply, preds = reply_of(row), row["preds"]
    # 0 is the true reply, 1 the reply compared with it, and the rest are all replies of the row
    vectors = embedder.encode([row["response"], reply, *preds])
    figures = {
        **published.overlap(reply, row["response"]),
        "distinct-1": metrics.distinct_n(preds, 1), "distinct-2": metrics.distinct_n(preds, 2),
        "sbert_diversity": metrics.pairwise_diversity(vectors[2:]),
        "embedding": float(vectors[0] @ vectors[1]),
        "persona_overlap": metrics.persona_overlap(reply, row.get("persona", []))}
    if nll is None:
        # undefined figures stay as None, so that the lines of all files have the same keys
        return figures | dict.fromkeys((*OF_PROMPTS, "nll_by_prompt"))
    selected, best = nll[row["selected"] - 1], min(nll)
    return figures | {
        "nll": selected, "random": sum(nll) / len(nll), "oracle": best, "regret": selected - best,
        # the values are compared, not the numbers: of prompts with equal nll, each is the best
        "agreement": float(selected == best), "nll_by_prompt": nll}


def _summarise(rows: list[dict], figures: list[dict], people: list[str],
               no_nll: str | None) -> dict:
    """A system's figures over all rows; `published` holds the columns of the paper's table.

    choice_gain: random - nll. usage: the share of rows for which each prompt is selected.
    """
    columns, signature, reasons = published.columns_of(
        [reply_of(row) for row in rows], [row["response"] for row in rows], figures)
    means = {name: statistics.cluster_interval([of_row[name] for of_row in figures], people)
             for name in FIGURES}
    # a gain is positive where the selected prompt beats one that is drawn blindly
    gains = [_minus(of_row["random"], of_row["nll"]) for of_row in figures]
    reasons |= {name: no_nll if name in OF_PROMPTS and no_nll else _why_missing(name)
                for name, mean in means.items() if mean is None}
    usage = None
    if "scores" in rows[0]:
        prompts = range(1, len(rows[0]["scores"]) + 1)
        # shares are of the retriever's choice, even where replies were drawn under every prompt
        usage = {str(k): sum(row["selected"] == k for row in rows) / len(rows) for k in prompts}
    else:
        reasons["usage"] = "the rows have no scores of prompts"
    if no_nll:
        reasons["choice_gain"] = no_nll
    return {
        "rows": len(rows), "persons": len(set(people)),
        "responses": sum(len(row["preds"]) for row in rows),
        "empty": sum(not text.strip() for row in rows for text in row["preds"]),
        "figures": means, "choice_gain": statistics.cluster_interval(gains, people),
        "usage": usage, "bleu_signature": signature, "published": columns, "reasons": reasons}


def _why_missing(name: str) -> str:
    """Why no row has a figure that does not need the model."""
    return {"persona_overlap": "no row has content words in both persona and reply",
            "sbert_diversity": "one response a row has nothing to differ from",
            }.get(name, "no response is long enough")


def _differences(figures: list[dict], first: list[dict], people: list[str]
                 ) -> dict[str, Figure | None]:
    """Each figure minus that of the first system, paired by row; None where one of them is."""
    # eval.py has made sure that all files hold the same rows in the same order
    pairs = list(zip(figures, first, strict=True))
    return {name: statistics.cluster_interval(
        [_minus(of_row[name], base[name]) for of_row, base in pairs], people) for name in FIGURES}


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


# ---- tables -------------------------------------------------------------------------------------


def tables(summary: dict) -> list[Table]:
    """One table of figures with intervals, and one of the published columns."""
    title = "95 % intervals over persons"
    systems = summary["systems"]
    if not systems:
        return missing.empty_tables(title, summary)
    first, differences = next(iter(systems)), summary["differences"].values()
    rows = [[name.replace("_", " "),
             *(with_interval(system["figures"][name], 3) for system in systems.values()),
             *(with_interval(of_pair[name], 3) for of_pair in differences)] for name in FIGURES]
    # this line compares two choices of one system, so its columns of differences are empty
    rows.append(["random - selected",
                 *(with_interval(system["choice_gain"], 3) for system in systems.values()),
                 *[""] * len(differences)])
    columns = ["figure", *systems, *(f"{name} - {first}" for name in summary["differences"])]
    return [Table(title, columns, rows),
            Table("published columns, x 100", ["system", *published.COLUMNS], [
                [name, *(_percent(system["published"][c]) for c in published.COLUMNS)]
                for name, system in systems.items()], _notes(systems))]


def _notes(systems: dict[str, dict]) -> list[str]:
    """What the figures are of, how often every prompt is selected, and what is missing."""
    notes = []
    for name, system in systems.items():
        usage = "" if system["usage"] is None else "; selected: " + ", ".join(
            f"prompt {k} {100 * share:.0f} %" for k, share in system["usage"].items())
        notes.append(f"{name}: {system['rows']} rows of {system['persons']} persons, "
                     f"{system['responses']} replies, {system['empty']} empty{usage}")
        # BERTScore lacks the same thing in every system, so that is said once, below
        notes += missing.notes(name, {figure: why for figure, why in system["reasons"].items()
                                      if figure not in published.BERT_COLUMNS})
    system = next(iter(systems.values()))
    bert = system["reasons"].get("BERT-F1", published.BERT_MODEL)  # the same for every system
    return [*notes, f"BLEU: {system['bleu_signature']}; BERTScore: {bert}"]


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"
