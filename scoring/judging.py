"""Which judge rates the replies of an evaluation, and what it says of each.

    verdicts, description = judge(systems, sources, args, save_file)

verdicts: per row {text: verdict}; a reply that several systems give is judged once. A verdict is a
dict with coherent (True, False, or None where there is no verdict) and shown (a word or two for
people); also, by judge, rating and unscored (a reason or None), judge1, judge2 and prompt (the
published judge), coherence and pmi (the local proxy).
description: what the summary says of the judge: name (None: nothing was judged, and reason says
why), text (a sentence), and its figures.
"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from decoding import providers
from modeling.checkpoints import load_checkpoint
from scoring import judge_api, judge_local, judge_prompt
from scoring.evaluated import CONTROL

JUDGED_CONTROLS = 10  # rows; enough to see what a judge gives to nonsense
Verdicts = list[dict[str, dict]]


def judge(systems: dict[str, list[dict]], sources, args,
          save_file: Path) -> tuple[Verdicts, dict]:
    """Judge the replies ("preds") of all systems with the judge that --judge names.

    Controls go to a server only with --judge_controls; their texts have no verdict otherwise.
    """
    if args.judge == "api":
        if not args.judge_controls:  # calls cost money
            systems = {name: rows for name, rows in systems.items()
                       if not name.startswith(CONTROL)}
        return _by_api(connect(args, save_file), _replies_of(systems), args.no_canaries)
    rows = _replies_of(systems)
    if args.judge == "local":
        return _by_proxy(args.judge_model, rows, sources.embedder)
    spec = providers.parse_spec(args.judge, "--judge", (providers.LOCAL,))
    return _by_model(spec.model, rows, args.no_canaries)


def connect(args, save_file: Path) -> judge_api.APIJudge:
    """The judge behind servers. It fails at once without a key, so call it before any other work.

    Its answers go into X.judgements.jsonl, where a rerun finds them.
    """
    stages = [
        judge_api.parse_stage(1, args.judge1, args.base_url1, args.temperature1, args.max_tokens1,
                              args.timeout),
        judge_api.parse_stage(2, args.judge2, args.base_url2, args.temperature2, args.max_tokens2,
                              args.timeout)]
    return judge_api.APIJudge(stages, args.policy, save_file.with_suffix(".judgements.jsonl"),
                              args.max_connections, args.timeout_total, args.key_file)


def _replies_of(systems: dict[str, list[dict]]) -> list[tuple[dict, list[str]]]:
    """Each row with the different replies of all systems; of controls in the first rows alone."""
    rows = []
    for i, of_row in enumerate(zip(*systems.values(), strict=True)):
        texts: dict[str, None] = {}  # an ordered set: the log then has the order of the files
        for name, row in zip(systems, of_row, strict=True):
            if i < JUDGED_CONTROLS or not name.startswith(CONTROL):
                texts |= dict.fromkeys(row["preds"])
        # Any system's row would do: apart from preds they are the same.
        rows.append((of_row[0], list(texts)))
    return rows


def _by_proxy(model_name: str, rows: list[tuple[dict, list[str]]],
              embedder) -> tuple[Verdicts, dict]:
    """By the local proxy; all systems' replies to a row are branches of one prompt tree."""
    # before the model is loaded; diversity needs no judge, so the evaluation goes on
    if reason := judge_local.why_not_calibrated([row for row, _ in rows]):
        unjudged = {"coherent": None, "shown": "not judged"}
        return ([{text: dict(unjudged) for text in texts} for _, texts in rows],
                {"name": None, "reason": reason, "text": f"coherent: not judged, {reason}"})
    model, tokenizer, _ = load_checkpoint(model_name)
    proxy = judge_local.LocalProxy(model, tokenizer, embedder)
    proxy.calibrate([row for row, _ in rows],
                    progress=lambda items: tqdm(items, desc="calibrate judge", unit="row"))
    verdicts = []
    for row, texts in tqdm(rows, desc="judge", unit="row"):
        probability, features = proxy.score(row, texts)
        verdicts.append({
            # numpy's bools and floats are no JSON, hence bool() and float().
            text: {"coherent": bool(p >= proxy.threshold), "coherence": round(float(p), 4),
                   "pmi": round(float(pmi), 4), "shown": f"{p:.2f}" if text.strip() else "empty"}
            for text, p, (pmi, _) in zip(texts, probability, features, strict=True)})
    return verdicts, {
        "name": "local proxy (pmi + cosine)", "model": model_name, "auc": round(proxy.auc, 4),
        "feature_auc": [round(auc, 4) for auc in proxy.feature_auc], "pairs": proxy.num_pairs,
        "threshold": round(proxy.threshold, 4),
        "text": "coherent: local proxy (pmi + cosine), a proxy; it tells true from mismatched "
                f"reference replies with AUC {proxy.auc:.3f} (held-out, {proxy.num_pairs} pairs)"}


def _by_model(model_name: str, rows: list[tuple[dict, list[str]]],
              no_canaries: bool) -> tuple[Verdicts, dict]:
    """By the expected rating under a chat model on this machine."""
    chat_model = judge_local.HFJudge(*load_checkpoint(model_name)[:2])
    verdicts, masses = [], []
    for row, texts in tqdm(rows, desc="judge", unit="row"):
        # a model may well rate an empty reply high, by its context alone
        full = [text for text in texts if text.strip()]
        ratings, of_ratings = chat_model.score(row, full)
        # The mean over all replies says whether the model would have answered with a rating at all.
        masses += of_ratings.tolist()
        verdicts.append({text: rated(None) for text in texts} | {
            text: rated(float(rating)) for text, rating in zip(full, ratings, strict=True)})
    rating_mass = sum(masses) / max(1, len(masses))
    description = {"name": "expected rating of a local model", "model": model_name,
                   "rating_mass": round(rating_mass, 4)}
    text = (f"coherent: expected rating above {judge_prompt.INCOHERENT} of 10 under {model_name}, "
            f"which gives ratings {100 * rating_mass:.0f} % of its probability")
    if not no_canaries:
        scores = [float(chat_model.score(row, [reply])[0][0])
                  for row, reply in judge_prompt.canary_items()]
        description["canaries"] = judge_prompt.canary_result(scores)
        text += judge_prompt.canary_text(description["canaries"])
    return verdicts, description | {"text": text}


def _by_api(api_judge: judge_api.APIJudge, rows: list[tuple[dict, list[str]]],
            no_canaries: bool) -> tuple[Verdicts, dict]:
    """By one or two models behind servers; empty replies are not sent, they are incoherent."""
    items = [(row, text) for row, texts in rows for text in texts if text.strip()]
    canaries = [] if no_canaries else judge_prompt.canary_items()
    # one call for all, so that no connection runs idle between rows; the canaries come last
    answers = iter(api_judge.judge(items + canaries, progress=tqdm))
    verdicts = []
    for row, texts in rows:
        of_row = {text: rated(None) for text in texts}
        for text in filter(str.strip, texts):
            # The answers are in the order of `items`, so these loops must walk in the same order.
            verdict = next(answers)
            of_row[text] = rated(verdict.score, verdict.reason) | {
                "judge1": verdict.stage1 and verdict.stage1._asdict(),
                "judge2": verdict.stage2 and verdict.stage2._asdict(),
                # Stage 2 was asked the same but for the nonce.
                "prompt": judge_api.plan_call(api_judge.stages[0], row, text).message}
        verdicts.append(of_row)
    description = api_judge.describe() | {"unscored": True}
    text = (f"coherent: rated above {judge_prompt.INCOHERENT} of 10 by "
            f"{', '.join(description['stages'])} (policy {description['policy']})")
    if canaries:
        # The loops above have taken the answers about replies, so the canaries' are left.
        scores = [verdict.score for verdict in answers]
        description["canaries"] = judge_prompt.canary_result(scores)
        text += judge_prompt.canary_text(description["canaries"])
    return verdicts, description | {"text": text}


def rated(score: float | None, reason: str | None = None) -> dict:
    """The verdict of a rating; without rating and reason the reply is empty, hence incoherent."""
    if score is not None:
        coherent, shown = score > judge_prompt.INCOHERENT, f"{score:.3g}/10"
    elif reason:
        coherent, shown = None, f"unscored: {reason}"
    else:
        coherent, shown = False, "empty"
    return {"coherent": coherent, "rating": score, "unscored": reason, "shown": shown}
