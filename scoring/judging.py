"""Which judge rates the replies of an evaluation, and what it says of each.

    verdicts, description = judge(systems, sources, args, save_file)

verdicts: per row {text: verdict}; a reply that several systems give is judged once. A verdict is a
dict with coherent (True, False, or None where there is no verdict) and shown (a word or two for
people); also, by judge, rating and unscored (a reason or None), judge1, judge2 and prompt (the
published judge), coherence and pmi (the local proxy).
description: what the summary says of the judge: name (None: nothing was judged), text (a sentence),
its figures, and how it did on its controls (scoring/controls.py): {"controls": {name: {"accepted":
share, "asked": n}}, "failed": [names], "trusted": bool}. Where it is not trusted reason says why,
and overridden whether --trust_judge asks for its figures all the same.
"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from decoding import providers
from modeling.checkpoints import load_checkpoint
from scoring import controls, judge_api, judge_local, judge_prompt
from scoring.evaluated import CONTROL
from utils import info, text_of

JUDGED_CONTROLS = 10  # rows; enough to see what a judge gives to nonsense
PROXY_PROMPTS = 100  # whose controls the local proxy is asked about: no more than calibrate it
Verdicts = list[dict[str, dict]]
Replies = list[tuple[dict, list[str]]]  # rows with the texts that are judged


def judge(systems: dict[str, list[dict]], sources, args,
          save_file: Path) -> tuple[Verdicts, dict]:
    """Judge the replies ("preds") of all systems with the judge that --judge names, and check it.

    Degenerate systems go to a server only with --judge_controls; their texts have no verdict
    otherwise. The controls of the judge itself are always asked about.
    """
    if args.judge == "api" and not args.judge_controls:  # calls cost money
        systems = {name: rows for name, rows in systems.items() if not name.startswith(CONTROL)}
    replies = _replies_of(systems)
    rows = [row for row, _ in replies]
    # before any model is loaded; diversity needs no judge, so the evaluation goes on
    if args.judge == "local" and (reason := judge_local.why_not_calibrated(rows)):
        return _not_judged(replies, reason)
    probes = controls.make(rows, PROXY_PROMPTS if args.judge == "local" else args.control_prompts)
    checks = [(row, list(dict.fromkeys(texts.values()))) for row, texts in probes]
    if args.judge == "local":
        verdicts, description = _by_proxy(args.judge_model, replies, checks, sources.embedder)
    elif args.judge == "api":
        verdicts, description = _by_api(connect(args, save_file), replies, checks,
                                        args.no_canaries)
    else:
        spec = providers.parse_spec(args.judge, "--judge", (providers.LOCAL,))
        verdicts, description = _by_model(spec.model, replies, checks, args.no_canaries)
    counted = controls.count(probes, verdicts[len(replies):])
    return verdicts[:len(replies)], _checked(description, counted, args.trust_judge)


def _not_judged(replies: Replies, reason: str) -> tuple[Verdicts, dict]:
    unjudged = {"coherent": None, "shown": "not judged"}
    return ([{text: dict(unjudged) for text in texts} for _, texts in replies],
            {"name": None, "reason": reason, "text": f"coherent: not judged, {reason}",
             "controls": {}, "failed": [], "trusted": False, "overridden": False})


def _checked(description: dict, counted: dict[str, dict], trust: bool) -> dict:
    """A judge's description with what its controls say, also at the end of its sentence."""
    description = description | controls.describe(counted)
    description["overridden"] = trust and not description["trusted"]
    shares = ", ".join(f"{name} {controls.percent(of_control['accepted'])} of "
                       f"{of_control['asked']}" for name, of_control in counted.items())
    text = f"{description['text']}; accepted in its checks: {shares or 'nothing was asked'}"
    if not description["trusted"]:
        text += (f". NOT TRUSTED: {description['reason']}; a judge passes with at most "
                 f"{controls.percent(controls.MAX_ACCEPTED)} of each control and at least "
                 f"{controls.percent(controls.MIN_ACCEPTED)} of the references. ")
        text += ("Its figures are shown all the same, marked ‡ (--trust_judge)"
                 if description["overridden"] else
                 "What hangs on its verdicts is withheld; --trust_judge shows it, marked")
    return description | {"text": text}


def _announce(name: str, replies: Replies, checks: Replies, canaries: list) -> None:
    """Say how much a judge will be asked whose calls cost money or minutes.

    A second stage is asked no more than that, depending on the policy.
    """
    texts = [{(text_of(row), text) for row, texts in part for text in texts if text.strip()}
             for part in (replies, checks)]
    # Texts that systems give, too, such as references, are asked about once.
    info(f"{name} is asked about {len(texts[0])} replies, {len(texts[1] - texts[0])} texts that "
         f"check it (controls and references of {len(checks)} prompts, --control_prompts) and "
         f"{len(canaries)} canaries: {len(texts[0] | texts[1]) + len(canaries)} questions")


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


def _replies_of(systems: dict[str, list[dict]]) -> Replies:
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


def _by_proxy(model_name: str, replies: Replies, checks: Replies,
              embedder) -> tuple[Verdicts, dict]:
    """By the local proxy; all systems' replies to a row are branches of one prompt tree."""
    model, tokenizer, _ = load_checkpoint(model_name)
    proxy = judge_local.LocalProxy(model, tokenizer, embedder)
    # The rows as they are: what checks the proxy takes no part in its calibration.
    proxy.calibrate([row for row, _ in replies],
                    progress=lambda items: tqdm(items, desc="calibrate judge", unit="row"))
    verdicts = []
    for row, texts in tqdm(replies + checks, desc="judge", unit="row"):
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


def _by_model(model_name: str, replies: Replies, checks: Replies,
              no_canaries: bool) -> tuple[Verdicts, dict]:
    """By the expected rating under a chat model on this machine."""
    canaries = [] if no_canaries else judge_prompt.canary_items()
    _announce(model_name, replies, checks, canaries)
    chat_model = judge_local.HFJudge(*load_checkpoint(model_name)[:2])
    verdicts, masses = [], []
    for number, (row, texts) in enumerate(tqdm(replies + checks, desc="judge", unit="row")):
        # a model may well rate an empty reply high, by its context alone
        full = [text for text in texts if text.strip()]
        ratings, of_ratings = chat_model.score(row, full)
        # The mean over all replies says whether the model would have answered with a rating at all.
        masses += of_ratings.tolist() if number < len(replies) else []
        verdicts.append({text: rated(None) for text in texts} | {
            text: rated(float(rating)) for text, rating in zip(full, ratings, strict=True)})
    rating_mass = sum(masses) / max(1, len(masses))
    description = {"name": "expected rating of a local model", "model": model_name,
                   "rating_mass": round(rating_mass, 4)}
    text = (f"coherent: expected rating above {judge_prompt.INCOHERENT} of 10 under {model_name}, "
            f"which gives ratings {100 * rating_mass:.0f} % of its probability")
    if canaries:
        scores = [float(chat_model.score(row, [reply])[0][0]) for row, reply in canaries]
        description["canaries"] = judge_prompt.canary_result(scores)
        text += judge_prompt.canary_text(description["canaries"])
    return verdicts, description | {"text": text}


def _by_api(api_judge: judge_api.APIJudge, replies: Replies, checks: Replies,
            no_canaries: bool) -> tuple[Verdicts, dict]:
    """By one or two models behind servers; empty replies are not sent, they are incoherent."""
    rows, description = replies + checks, api_judge.describe() | {"unscored": True}
    items = [(row, text) for row, texts in rows for text in texts if text.strip()]
    canaries = [] if no_canaries else judge_prompt.canary_items()
    _announce(f"{', '.join(description['stages'])} (policy {description['policy']})", replies,
              checks, canaries)
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
