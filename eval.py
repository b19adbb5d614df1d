"""Score files of responses: coherence, diversity and their joint yield, side by side.

    python eval.py --eval_file outs/base.jsonl outs/my_peft.jsonl --save_file eval_logs/compare.json
    python eval.py --eval_file outs/out.jsonl --save_file eval_logs/out.pkl \\
        --judge1 together:meta-llama/Llama-3-70b-chat-hf --judge2 openai:gpt-4o
    python eval.py --show eval_logs/compare.json

outs/*.jsonl -> coherence judge + diversity metrics -> eval_logs/X.jsonl (a line per response), X.json (the summary),
X.html (a page of figures and replies) and a table. Intervals are 95 % over prompts, differences are paired by prompt.
Degenerate controls (random words, replies moved to other prompts, one reply repeated) are scored with the systems,
so that a metric that rewards noise is seen to do so.

`python eval.py --persona` scores interviews (demographic bias test) instead; its flags: --persona --help.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pickle
import sys
from pathlib import Path

import utils
from flags import FlagParser, parse_flags
from methods import own_evaluation
from modeling.checkpoints import load_checkpoint
from modeling.embedder import Embedder, load_embedder
from modeling.prompts import label_turns
from persona import figures
from scoring import equivalence, judge_api, judge_local, judge_prompt
from scoring.common import add_controls, measure, summarise
from scoring.judge_local import LocalProxy
from scoring.judge_prompt import INCOHERENT
from scoring.report import page, table
from utils import UNSCORED, USAGE, fail, info

JUDGED_CONTROLS = 10  # rows; their diversity is measured in all


def build_parser(method: str | None) -> FlagParser:
    """All flags of evaluation."""
    parser = FlagParser(prog="eval.py", description=__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--eval_file", nargs="+", help="outs/*.jsonl with the same rows; the first is the baseline")
    group.add_argument("--save_file", help="eval_logs/X.json; a name in .pkl also writes the published pickle")
    group.add_argument("--limit", type=int, help="judge the first N rows only (default: all)")
    group.add_argument("--no_controls", action="store_true", help="leave out the degenerate controls")
    group.add_argument("--show", metavar="FILE", help="only print the table of an eval_logs/X.json")
    group.add_argument("--json", action="store_true", help="print the summary as JSON and nothing else")
    group = parser.add_argument_group("judge")
    group.add_argument("--judge", help="local: the offline proxy (default); api: one or two models behind servers; "
                                       "hf:MODEL: the expected rating under a chat model on this machine")
    group.add_argument("--judge_model", default=utils.EMBEDDED, help="base model of the local judge (default: smollm2)")
    group.add_argument("--no_canaries", action="store_true", help="do not ask the judge about 10 replies that try to talk it round")
    group.add_argument("--fail_on_error", type=float, default=0.05, metavar="SHARE",
                       help="exit with 4 if a larger share of replies is unscored (default: 0.05)")
    group = parser.add_argument_group("judge behind a server (keys: TOGETHER_API_KEY, OPENAI_API_KEY)")
    for stage, published in ((1, "together:meta-llama/Llama-3-70b-chat-hf, 0.1, 512"), (2, "openai:gpt-4o, 0, 1024")):
        group.add_argument(f"--judge{stage}", metavar="PROVIDER:MODEL", help=f"with --temperature{stage} and --max_tokens{stage}, as published: {published}")
        group.add_argument(f"--base_url{stage}", metavar="URL", help="any OpenAI-compatible server (default: the provider's)")
        group.add_argument(f"--temperature{stage}", type=float, help=argparse.SUPPRESS)
        group.add_argument(f"--max_tokens{stage}", type=int, help=argparse.SUPPRESS)
    group.add_argument("--policy", choices=["published", "first", "second", "both", "mean"],
                       help="published: judge 2 is asked where judge 1 rates below 6 (default; first where only --judge1 is given)")
    group.add_argument("--max_connections", type=int, default=16, help="calls at a time (default: 16)")
    group.add_argument("--timeout", type=float, help="seconds without a byte (default: 50 and 100, as published)")
    group.add_argument("--timeout_total", type=float, default=600, help="seconds for a call with its repeats (default: 600)")
    group.add_argument("--key_file", metavar="FILE", help="lines NAME=KEY, mode 600")
    group.add_argument("--judge_controls", action="store_true", help="send the controls to the server, too")
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "--persona" in argv:

        return figures.main([word for word in argv if word != "--persona"])
    args = parse_flags(build_parser, argv)
    if args.show:
        show(args.show, args.json)
        return
    save_file = check_flags(args)

    asked = connect(args, save_file) if args.judge == "api" else None  # a missing key shows before any row is read
    systems = read_systems(args.eval_file, args.limit)
    kind = own_evaluation(systems)
    if kind:
        importlib.import_module(kind).evaluate(systems, args.eval_file, save_file)
        return
    given = systems if args.no_controls else add_controls(systems)
    embedder, classifier = Embedder(load_embedder()), equivalence.load_classifier()
    embedder.encode([text for rows in given.values() for row in rows for text in (row.get("prompt") or row["context"], *row["preds"])])
    if asked:
        verdicts, judge = judge_by_api(asked, given if args.judge_controls else systems, args)
    elif args.judge == "local":
        verdicts, judge = judge_locally(args.judge_model, given, embedder)
    else:
        verdicts, judge = judge_by_model(args.judge.removeprefix("hf:"), given, args)

    measured = {name: measure(rows, verdicts, embedder, classifier) for name, rows in given.items()}
    summary = summarise(measured, dict(zip(systems, args.eval_file, strict=True)), judge, embedder, classifier)
    write_logs(save_file, summary, measured)
    if args.json:
        print(json.dumps(summary, allow_nan=False))
    else:
        table.print_table(summary)
        page = save_file.with_suffix(".html")
        print(f"figures and replies: {page} (open it in a browser); one line per response: {save_file.with_suffix('.jsonl')}; "
              f"summary: {save_file.with_suffix('.json')}")
        print(f"next: python eval.py --show {save_file.with_suffix('.json')}")
    stop_if_unscored(summary, args.fail_on_error)


def check_flags(args) -> Path:
    """The file to save to; dies over flags that cannot work, before anything is loaded."""
    if not args.eval_file or not args.save_file:
        fail(USAGE, "--eval_file and --save_file are required", "or --show FILE for the table of a finished evaluation")
    save_file = Path(args.save_file)
    if save_file.suffix not in (".json", ".pkl"):
        fail(USAGE, f"--save_file {save_file} must end in .json or .pkl", f"{save_file.with_suffix('.json')}")
    for name in ("limit", "max_connections", "timeout", "timeout_total", "max_tokens1", "max_tokens2"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            fail(USAGE, f"--{name} {getattr(args, name)} must be above 0")
    if not 0 <= args.fail_on_error <= 1:
        fail(USAGE, f"--fail_on_error {args.fail_on_error} is a share, 0 to 1")
    named = [f"--{name}" for name in ("judge1", "judge2", "base_url1", "base_url2", "policy") if getattr(args, name)]
    args.judge = args.judge or ("api" if named else "local")
    if args.judge not in ("local", "api") and not args.judge.startswith("hf:"):
        fail(USAGE, f"--judge {args.judge} is none of local, api, hf:MODEL", "a model behind a server: --judge1 PROVIDER:MODEL")
    if named and args.judge != "api":
        fail(USAGE, f"{named[0]} does nothing with --judge {args.judge}", "drop one of the two")
    lone = (args.judge1 or args.base_url1) and not (args.judge2 or args.base_url2)
    args.policy = args.policy or ("first" if lone else "published")
    return save_file


def read_systems(files: list[str], limit: int | None) -> dict[str, list[dict]]:
    """The rows of every file by its stem; all files must hold the same rows with equally many preds.

    Responses that a row lacks, since a list could not be read or a server refused, are empty ones: no answer is no good answer.
    """

    def check(row):
        preds = row.get("preds")
        if not isinstance(preds, list) or not all(isinstance(p, str) for p in preds):
            return 'needs "preds", a list of strings; infer.py writes them'
        if row.get("prompt") == "" and own_evaluation({file: [row]}):
            return None  # replies to no prompt
        return utils.check_row(row, candidates=False)

    systems: dict[str, list[dict]] = {}
    for file in files:
        rows = utils.read_jsonl(file, check)[:limit]
        name = Path(file).stem
        if name in systems:
            fail(USAGE, f"--eval_file: two files are called {name}", "rename one")
        first = next(iter(systems.values()), rows)
        if [utils.row_hash(r) for r in rows] != [utils.row_hash(r) for r in first]:
            fail(USAGE, f"{file} holds other rows than {files[0]} ({len(rows)} and {len(first)})",
                      "compare files made from one --test_file")
        k = max(len(row["preds"]) for row in rows)
        missing = sum(k - len(row["preds"]) for row in rows)
        if not k:
            fail(USAGE, f"{file} holds no responses at all", "look into its warnings, and draw again")
        if rows is not first and k != len(first[0]["preds"]) and not own_evaluation({name: rows}):
            fail(USAGE, f"{file} has {k} preds a row, {files[0]} has {len(first[0]['preds'])}", "compare files with equally many")
        if missing:
            info(f"{file}: {missing} of {k * len(rows)} responses are missing; they count as empty")
        systems[name] = [row | {"preds": row["preds"] + [""] * (k - len(row["preds"]))} for row in rows]
    return systems


# ---- judges -------------------------------------------------------------------------------------
# Each returns, per row, the verdict on each text (a reply that several systems give is judged once),
# and what the summary says of the judge.


def replies_of(systems: dict[str, list[dict]]) -> list[tuple[dict, list[str]]]:
    """Per row the different replies of all systems; of controls in the first rows alone, to see what they score."""
    return [(of_row[0], list(dict.fromkeys(text for name, row in zip(systems, of_row, strict=True) for text in row["preds"]
                                           if i < JUDGED_CONTROLS or not name.startswith("control: "))))
            for i, of_row in enumerate(zip(*systems.values(), strict=True))]


def judge_locally(name: str, systems: dict[str, list[dict]], embedder) -> tuple[list[dict[str, dict]], dict]:
    """By the local proxy; all systems' replies to a row are branches of one prompt tree."""
    from tqdm import tqdm


    model, tokenizer, _ = load_checkpoint(name)
    judge, rows = LocalProxy(model, tokenizer, embedder), replies_of(systems)
    judge.calibrate([row for row, _ in rows], progress=lambda items: tqdm(items, desc="calibrate judge", unit="row"))
    verdicts = []
    for row, texts in tqdm(rows, desc="judge", unit="row"):
        probability, features = judge.score(row, texts)
        verdicts.append({
            text: {"coherent": bool(p >= judge.threshold), "coherence": round(float(p), 4), "pmi": round(float(f[0]), 4),
                   "words": f"{p:.2f}" if text.strip() else "empty"}
            for text, p, f in zip(texts, probability, features, strict=True)})
    return verdicts, {
        "name": "local proxy (pmi + cosine)", "model": name, "auc": round(judge.auc, 4),
        "feature_auc": [round(a, 4) for a in judge.feature_auc], "pairs": judge.num_pairs, "threshold": round(judge.threshold, 4),
        "text": f"coherent: local proxy (pmi + cosine), a proxy; it tells true from mismatched reference replies with AUC "
                f"{judge.auc:.3f} (held-out, {judge.num_pairs} pairs)"}


def judge_by_model(name: str, systems: dict[str, list[dict]], args) -> tuple[list[dict[str, dict]], dict]:
    """By the expected rating under a chat model on this machine."""
    from tqdm import tqdm


    judge = judge_local.HFJudge(*load_checkpoint(name)[:2])
    verdicts, masses = [], []
    for row, texts in tqdm(replies_of(systems), desc="judge", unit="row"):
        full = [text for text in texts if text.strip()]
        ratings, mass = judge.score(row, full)
        masses += mass.tolist()
        verdicts.append(dict.fromkeys(texts, rated(None)) | {text: rated(float(r)) for text, r in zip(full, ratings, strict=True)})
    mass = sum(masses) / max(1, len(masses))
    described = {"name": "expected rating of a local model", "model": name, "mass": round(mass, 4)}
    text = f"coherent: expected rating above {judge_prompt.INCOHERENT} of 10 under {name}, which gives ratings {100 * mass:.0f} % of its probability"
    if not args.no_canaries:
        scores = [float(judge.score(row, [reply])[0][0]) for row, reply in judge_prompt.canary_items()]
        described["canaries"] = judge_prompt.canary_result(scores)
        text += table.canary_text(described["canaries"])
    return verdicts, described | {"text": text}


def connect(args, save_file: Path):
    """The judge behind servers; its answers go into X.judgements.jsonl, where a rerun finds them."""

    stages = [judge_api.parse_stage(n, getattr(args, f"judge{n}"), getattr(args, f"base_url{n}"), getattr(args, f"temperature{n}"),
                                 getattr(args, f"max_tokens{n}"), args.timeout) for n in (1, 2)]
    return judge_api.APIJudge(stages, args.policy, save_file.with_suffix(".judgements.jsonl"), args.max_connections,
                           args.timeout_total, args.key_file)


def judge_by_api(judge, systems: dict[str, list[dict]], args) -> tuple[list[dict[str, dict]], dict]:
    """By one or two models behind servers; empty replies are not sent, they are incoherent."""
    from tqdm import tqdm


    rows = replies_of(systems)
    items = [(row, text) for row, texts in rows for text in texts if text.strip()]
    canaries = [] if args.no_canaries else judge_prompt.canary_items()
    found = judge.judge(items + canaries, progress=tqdm)
    answers = iter(found)
    verdicts = []
    for row, texts in rows:
        verdicts.append({text: rated(None) for text in texts})
        for text in filter(str.strip, texts):
            verdict = next(answers)
            stages = {f"judge{n}": stage and stage._asdict() for n, stage in ((1, verdict.stage1), (2, verdict.stage2))}
            prompt = judge_api.plan_call(judge.stages[0], row, text).message
            verdicts[-1][text] = rated(verdict.score, verdict.reason) | stages | {"prompt": prompt}
    described = judge.describe() | {"unscored": True}
    text = f"coherent: rated above {judge_prompt.INCOHERENT} of 10 by {', '.join(described['stages'])} (policy {described['policy']})"
    if canaries:
        described["canaries"] = judge_prompt.canary_result([verdict.score for verdict in answers])
        text += table.canary_text(described["canaries"])
    return verdicts, described | {"text": text}


def rated(score: float | None, reason: str | None = None) -> dict:
    """The verdict of a rating; without rating and reason the reply is empty, hence incoherent."""

    coherent = score > INCOHERENT if score is not None else None if reason else False
    words = f"{score:.3g}/10" if score is not None else f"unscored: {reason}" if reason else "empty"
    return {"coherent": coherent, "rating": score, "unscored": reason, "words": words}


# ---- what is written ----------------------------------------------------------------------------


HIDDEN = ("prompt", "words", "judge1", "judge2")  # of a verdict, in X.jsonl; judgements stand in X.judgements.jsonl


def write_logs(save_file: Path, summary: dict, measured: dict[str, list[dict]]) -> None:
    """eval_logs/X.jsonl, X.json, X.html, and X.pkl (plain dicts with the published keys) if that name was asked for."""
    lines, published = [], []
    for name, rows in measured.items():
        for number, m in enumerate(rows if not summary["systems"][name]["control"] else [], 1):
            context = m["row"].get("context", m["row"].get("prompt"))
            for i, (text, verdict) in enumerate(zip(m["preds"], m["verdicts"], strict=True)):
                lines.append({"system": name, "row": number, "context": context, "response": text, "class": m["classes"][i],
                              "cosine": round(float(m["cosine"][i]), 4), **{k: v for k, v in verdict.items() if k not in HIDDEN}})
                first, second = verdict.get("judge1"), verdict.get("judge2")
                published.append({
                    "context": context, "response": text, "prompt": verdict.get("prompt"),
                    "chat_out": first and first["text"], "chat_score": {"Coherence rating:": first and first["score"]},
                    "gpt4_out": second and second["text"], "gpt4_score": second and {"Coherence rating:": second["score"]}})
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    utils.atomic_write(save_file.with_suffix(".jsonl"), text)
    utils.atomic_write(save_file.with_suffix(".html"), page.render(summary, page_rows(measured)))
    if save_file.suffix == ".pkl":
        save_file.write_bytes(pickle.dumps(published))
    utils.atomic_write(save_file.with_suffix(".json"), json.dumps(summary, indent=1, allow_nan=False))


def page_rows(measured: dict[str, list[dict]]) -> list[dict]:
    """What page.render shows of every prompt."""
    pages = []
    for i, first in enumerate(next(iter(measured.values()))):
        row, systems = first["row"], {}
        for name, rows in measured.items():
            m = rows[i]
            replies = [{"text": text, "class": c, "coherent": v["coherent"], "verdict": v.get("words", ""), "why": why(v)}
                       for text, c, v in zip(m["preds"], m["classes"], m["verdicts"], strict=True)]
            systems[name] = {"replies": replies, "yield": m["yield"], "similarity": (m["embeddings"] @ m["embeddings"].T).tolist()}
        turns = label_turns(row["context"]) if "context" in row else None
        pages.append({"text": row.get("prompt") or row["context"], "turns": turns, "systems": systems})
    return pages


def why(verdict: dict) -> str | None:
    """What the judges said."""
    said = [stage["text"] for stage in (verdict.get("judge1"), verdict.get("judge2")) if stage]
    return "\n\n".join(said) or None


def show(file: str, as_json: bool) -> None:
    """Print the table of a summary that was written before."""
    try:
        summary = json.loads(Path(file).read_text(encoding="utf-8"))
        printer = importlib.import_module(summary["kind"]).print_figures if "kind" in summary else table.print_table
        print(json.dumps(summary)) if as_json else printer(summary)
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(USAGE, f"--show {file}: not a summary of eval.py ({type(error).__name__}: {error})", "give an eval_logs/X.json")


def stop_if_unscored(summary: dict, allowed: float) -> None:
    """Leave with 4 where more replies went unscored than allowed."""
    real = [s for s in summary["systems"].values() if s.get("unscored") is not None]
    unscored, asked = sum(sum(s["unscored"].values()) for s in real), sum(s["responses"] for s in real)
    if unscored > allowed * asked:
        fail(UNSCORED, f"{unscored} of {asked} replies are unscored, --fail_on_error allows {allowed:.0%}",
                  "the same command asks again about those that met a timeout or an HTTP error")


if __name__ == "__main__":
    utils.run(main)
