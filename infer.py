"""Draw N different responses per row from a checkpoint, a base model or a server.

    python infer.py --model_name_or_path checkpoints/my_peft/check_1000/ --num_response_per_input 5 \\
        --decoding sampling --temperature 0.75 --test_file data/test_dialogs.jsonl --save_file outs/my_peft.jsonl

rows -> prompt trees -> shared prefill -> responses -> cleaned -> maybe the N most different of M -> appended
row by row to --save_file. A killed run goes on with --resume and ends with the same file.

`python infer.py --interview` holds interviews for the demographic bias test instead; its flags: --interview --help.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import utils
from decoding import asking, selection
from decoding.engines import Local, Server
from decoding.replies import clean_reply
from decoding.selection import FLOOR
from flags import FlagParser, parse_flags
from methods import METHODS, OWN_INFERENCE, OWN_PLAN, load_method
from modeling.checkpoints import load_checkpoint
from modeling.embedder import load_embedder
from modeling.prompts import refuse_special_tokens
from persona import interview
from utils import TRY_LATER, UNSCORED, USAGE, fail, info, warn

FILTERS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0, "top_n_sigma": 0.0}  # off
BY_TREE = ("sampling", "greedy", "beam", "diverse")
BY_ASKING = ("list", "iterative", "verbalized")
OWN_FLAGS = {  # flag: its default, and the decodings that know it
    **{name: (off, ("sampling", *BY_ASKING)) for name, off in FILTERS.items()},
    "num_beams": (None, ("beam", "diverse")),
    "length_penalty": (1.0, ("beam", "diverse")),
    "num_beam_groups": (None, ("diverse",)),
    "diversity_penalty": (5.0, ("diverse",)),
    "numbers": ("first", ("diverse",)),
    "max_retries": (3, BY_ASKING),
}
SETTINGS = ("model_name_or_path", "method", "engine", "base_url", "served_model", "decoding", "num_response_per_input",
            "temperature", *OWN_FLAGS, "overgenerate", "select", "floor", "max_new_tokens", "max_input_length",
            "max_length", "batch_size", "seed", "limit", "chat_template", "mode", "n_batch_size", "prompts", "prompt_id",
            "selection_noise")


def build_parser(method: str | None) -> FlagParser:
    """All flags of inference."""
    parser = FlagParser(prog="infer.py", description=__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--model_name_or_path", default=utils.EMBEDDED, help="check_N folder, model folder, hub id, or smollm2 (default)")
    group.add_argument("--method", choices=list(METHODS), help="must agree with the checkpoint (default: what it says)")
    group.add_argument("--test_file", required=True, help="JSONL with context or prompt")
    group.add_argument("--save_file", required=True, help="JSONL: the rows + preds")
    group.add_argument("--limit", type=int, help="use the first N rows only (default: all)")
    group = parser.add_argument_group("decoding")
    group.add_argument("--num_response_per_input", type=int, default=5, help="responses per row (default: 5)")
    group.add_argument("--decoding", choices=[*BY_TREE, *BY_ASKING], default="sampling", help="how responses are drawn (default: sampling)")
    group.add_argument("--max_new_tokens", type=int, default=64, help="tokens per response at most (default: 64)")
    group.add_argument("--seed", type=int, default=42, help="each row draws from a seed of its own (default: 42)")
    group = parser.add_argument_group("sampling (also of list, iterative, verbalized)")
    group.add_argument("--temperature", type=float, help="softmax temperature (default: 1)")
    group.add_argument("--top_p", type=float, help="nucleus mass, 1 is off (default)")
    group.add_argument("--top_k", type=int, help="keep the k best tokens, 0 is off (default)")
    group.add_argument("--min_p", type=float, help="drop tokens below this share of the best one, 0 is off (default)")
    group.add_argument("--typical_p", type=float, help="mass of locally typical tokens, 1 is off (default)")
    group.add_argument("--top_n_sigma", type=float, help="keep logits within n deviations of the best, 0 is off (default)")
    group = parser.add_argument_group("beams")
    group.add_argument("--num_beams", type=int, help="beams per row (default: the number of responses)")
    group.add_argument("--length_penalty", type=float, help="scores are divided by length to this power (default: 1)")
    group.add_argument("--num_beam_groups", type=int, help="diverse: groups that avoid each other (default: one per beam)")
    group.add_argument("--diversity_penalty", type=float, help="diverse: nats per token that an earlier group took (default: 5)")
    group.add_argument("--numbers", choices=["first", "per_group"],
                       help="diverse, peft: all groups under possibility number 1, as published (default), or each under its own")
    group = parser.add_argument_group("list, iterative, verbalized")
    group.add_argument("--max_retries", type=int, help="further rounds where replies are missing (default: 3)")
    group = parser.add_argument_group("choosing")
    group.add_argument("--overgenerate", type=int, metavar="M", help="draw M responses and keep the most different ones")
    group.add_argument("--select", choices=["mmr", "dpp", "medoids"], help="how they are chosen (default: dpp)")
    group.add_argument("--floor", type=float, help="least cosine of row and response to be chosen (default: 0.25)")
    group = parser.add_argument_group("server")
    group.add_argument("--engine", choices=["hf", "openai"], default="hf", help="this machine (default), or an OpenAI-compatible server")
    group.add_argument("--base_url", help="the server's address, such as http://127.0.0.1:8000/v1")
    group.add_argument("--served_model", help="the model's name at the server")
    group.add_argument("--max_connections", type=int, default=8, help="calls at a time (default: 8)")
    group.add_argument("--timeout", type=float, default=120, help="seconds without a byte until a call is tried again (default: 120)")
    group.add_argument("--timeout_total", type=float, default=600, help="seconds of tries until the run stops (default: 600)")
    group = parser.add_argument_group("running")
    group.add_argument("--batch_size", type=int, default=8, help="rows decoded together (default: 8)")
    group.add_argument("--max_input_length", type=int, help="words of the context (default: as in training, else 1000)")
    group.add_argument("--max_length", type=int, help="tokens in all (default: as in training, else the model's limit)")
    group.add_argument("--chat_template", metavar="FILE", help="for base models: Jinja chat template, or none")
    group.add_argument("--resume", action="store_true", help="go on with a --save_file that was interrupted")
    group.add_argument("--force_base", action="store_true", help="use an adapter on another base than its own")
    group.add_argument("--strict_split", action="store_true", help="refuse test rows that were trained on")
    parser.set_defaults(mode=None, n_batch_size=None, self_sample=False, prompts=None, prompt_id=None, selection_noise=None)
    if method in OWN_INFERENCE:
        load_method(method).add_infer_args(parser)
    return parser


def check_flags(args) -> None:
    """Die over flags that cannot work, before anything is loaded, and fill in the defaults of the rest."""
    for name in ("num_response_per_input", "max_new_tokens", "batch_size", "limit", "max_length", "max_input_length",
                 "num_beams", "num_beam_groups", "overgenerate", "max_connections", "timeout", "timeout_total"):
        value = getattr(args, name)
        if value is not None and value < 1:
            fail(USAGE, f"--{name} {value} must be at least 1")
    for name, (default, decodings) in OWN_FLAGS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.decoding not in decodings:
            fail(USAGE, f"--{name} does nothing with --decoding {args.decoding}", f"drop it, or use {' or '.join(decodings)}")
    if args.temperature is not None and args.decoding in ("greedy", "beam", "diverse"):
        info(f"--decoding {args.decoding} does not sample, so --temperature has no effect")
    args.temperature = 1.0 if args.temperature is None else args.temperature
    if not 0 < args.temperature < math.inf:
        fail(USAGE, f"--temperature {args.temperature} with --decoding {args.decoding} must be above 0",
                  "0.75 is the published value; --decoding greedy takes the most probable token")
    if not (0 < args.top_p <= 1 and 0 < args.typical_p <= 1 and 0 <= args.min_p < 1 and args.top_k >= 0 and args.top_n_sigma >= 0):
        fail(USAGE, " ".join(f"--{name} {getattr(args, name)}" for name in FILTERS) + ": out of range",
                  "0 < top_p <= 1, 0 < typical_p <= 1, 0 <= min_p < 1, top_k >= 0, top_n_sigma >= 0")
    if args.max_retries < 0:
        fail(USAGE, f"--max_retries {args.max_retries} must be at least 0")
    check_choice(args)
    check_beams(args)
    check_engine(args)


def check_choice(args) -> None:
    """--overgenerate and what goes with it; settles num_drawn, the responses drawn per row."""
    args.num_drawn = args.overgenerate or args.num_response_per_input
    if args.overgenerate is None and (args.select or args.floor is not None):
        fail(USAGE, "--select and --floor choose among responses drawn beyond need", "add --overgenerate M")
    if args.num_drawn < args.num_response_per_input:
        fail(USAGE, f"--overgenerate {args.overgenerate} is less than --num_response_per_input {args.num_response_per_input}",
                  f"draw more, such as {4 * args.num_response_per_input}")
    if args.overgenerate:

        args.select, args.floor = args.select or "dpp", FLOOR if args.floor is None else args.floor
        if not -1 <= args.floor <= 1:
            fail(USAGE, f"--floor {args.floor} is no cosine", "-1 lets everything pass")


def check_beams(args) -> None:
    """Numbers of beams, groups and responses that fit together; settles num_branches, the prompts of a row's tree."""
    args.num_branches = args.num_drawn
    if args.decoding not in ("beam", "diverse"):
        return
    args.num_beams = args.num_beams or args.num_drawn
    args.num_branches = 1
    if args.num_drawn > args.num_beams:
        fail(USAGE, f"{args.num_drawn} responses from --num_beams {args.num_beams}", f"--num_beams {args.num_drawn} or more")
    if args.decoding == "beam":
        return
    args.num_beam_groups = args.num_beam_groups or args.num_beams
    if args.num_beams % args.num_beam_groups:
        fail(USAGE, f"--num_beams {args.num_beams} is no multiple of --num_beam_groups {args.num_beam_groups}",
                  f"{args.num_beam_groups * -(-args.num_beams // args.num_beam_groups)} beams would do")
    if not 0 < args.diversity_penalty < math.inf:
        fail(USAGE, f"--diversity_penalty {args.diversity_penalty} must be above 0", "5 is the published value; --decoding beam has none")
    if args.numbers == "per_group":
        args.num_branches = args.num_beam_groups


def check_engine(args) -> None:
    if args.engine == "hf":
        if args.base_url or args.served_model:
            fail(USAGE, "--base_url and --served_model are for a server", "add --engine openai")
        return
    if not args.base_url or not args.served_model:
        fail(USAGE, "--engine openai needs --base_url and --served_model", "such as http://127.0.0.1:8000/v1 and the name it serves")
    if args.decoding in ("beam", "diverse"):
        fail(USAGE, f"--decoding {args.decoding} does not work through a server", "--engine hf, or another --decoding")
    for name in ("typical_p", "top_n_sigma"):
        if getattr(args, name) != FILTERS[name]:
            fail(USAGE, f"--{name} does not work through a server", "--engine hf, or --top_p, --top_k, --min_p")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "--interview" in argv:

        return interview.main([word for word in argv if word != "--interview"])
    args = parse_flags(build_parser, argv)
    if args.self_sample:
        load_method(args.method).self_sampling_defaults(args)
    check_flags(args)
    if args.method in OWN_INFERENCE:
        rows = load_method(args.method).inference_rows(args)
    else:
        rows = utils.read_jsonl(args.test_file, lambda row: utils.check_row(row, candidates=False))[: args.limit]
    save_file, summary_file = Path(args.save_file), Path(args.save_file).with_suffix(".json")
    if save_file.suffix != ".jsonl":
        fail(USAGE, f"--save_file {save_file} must end in .jsonl", f"{save_file.with_suffix('.jsonl')}")
    if save_file.exists() and not args.resume:
        fail(USAGE, f"{save_file} is already there", "--resume goes on with it; or give another --save_file")
    save_file.parent.mkdir(parents=True, exist_ok=True)

    engine, run = load_engine(args)
    warn_of_overlap(rows, run, args)
    answer, truncated = plan(engine, rows, args)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"data_sha256": utils.sha256(json.dumps(rows, sort_keys=True))[:16], "weights": run["weights"]}
    done = rows_done(save_file, summary_file, settings)
    if not done:
        utils.atomic_write(summary_file, json.dumps({"settings": settings, "run": brief(run)}, indent=1))
    speed = answer_rows(rows, answer, args, done, save_file)
    summary = summarise(save_file, summary_file, settings, run, speed, engine, truncated)
    print_summary(summary, save_file, args)
    if args.self_sample:
        load_method(args.method).write_cache(save_file, summary, run, args)
    if summary["failed"]:
        fail(UNSCORED, f"{summary['failed']} responses are missing: the server refused {dict(engine.failed)}",
                  f"the other {summary['responses']} are in {save_file}")


# ---- what answers -------------------------------------------------------------------------------


def load_engine(args):
    """The engine and the run.json of what it serves; settles method and lengths."""

    filters = {name: getattr(args, name) for name in FILTERS}
    if args.engine == "openai":
        run = {"method": args.method or "base", "base_model": args.served_model, "weights": None, "args": {}}
        settle_settings(args, run, None)
        return Server(args.base_url, args.served_model, args.max_connections, args.timeout, args.timeout_total, filters), run
    model, tokenizer, run = load_checkpoint(args.model_name_or_path, args.force_base, args.chat_template)
    if args.mode == "untuned":
        run["method"] = args.method
    settle_settings(args, run, model.config.get_text_config().max_position_embeddings)
    return Local(model, tokenizer, filters, args.batch_size), run


def settle_settings(args, run: dict, limit: int | None) -> None:
    """Method and lengths come from the checkpoint; a flag that contradicts its method is refused."""
    if args.method and args.method != run["method"]:
        fail(USAGE, f"--method {args.method}, but {args.model_name_or_path} is a {run['method']} model",
                  f"drop --method, or pass --method {run['method']}")
    args.method = run["method"]
    if args.max_input_length is None:
        args.max_input_length = run["args"].get("max_input_length", 1000)
    if args.max_length is None and limit:
        args.max_length = min(limit, run["args"].get("max_length", limit))
    args.max_pos_number = run["args"].get("max_pos_number", 9)
    args.new_tokens = run["args"].get("new_tokens", [])


def warn_of_overlap(rows: list[dict], run: dict, args) -> None:
    """Tell how many test rows the checkpoint was trained on."""
    trained = set(run.get("row_hashes", []))
    overlap = [i for i, row in enumerate(rows, 1) if utils.row_hash(row) in trained]
    if overlap:
        what = f"{args.test_file}: {len(overlap)} of {len(rows)} rows were trained on (first: row {overlap[0]})"
        if args.strict_split:
            fail(USAGE, what, "remove them, or drop --strict_split")
        warn(f"{what}")


def brief(run: dict) -> dict:
    """run.json without the long list of row hashes."""
    return {key: value for key, value in run.items() if key != "row_hashes"}


# ---- how a block of rows is answered ------------------------------------------------------------


def plan(engine, rows: list[dict], args):
    """(answer, truncated): how many contexts lost turns, and the function that answers a block of row numbers.

    answer(block) gives for each of its rows a dict: texts, tokens, cut and failed; asked and parsed for answers in words.
    """
    if args.method in OWN_PLAN:
        return load_method(args.method).plan(engine, rows, args)
    if args.engine == "hf":
        refuse_special_tokens([{k: row[k] for k in ("context", "prompt", "messages") if k in row} for row in rows],
                                    engine.tokenizer, args.test_file, args.new_tokens)
    if args.decoding in BY_ASKING:

        requests = [asking.fit_request(engine, row, [], args) for row in rows]
        refuse_long_rows([i for i, (text, _) in enumerate(requests) if text is None], args)
        return lambda block: asking.answer(engine, rows, block, args), sum(lost > 0 for _, lost in requests)
    method = load_method(args.method)
    if args.engine == "openai":
        return lambda block: answer_by_messages(engine, method, rows, block, args), 0
    trees = [method.decode_tree(row, engine.tokenizer, args) for row in rows]
    refuse_long_rows([i for i, tree in enumerate(trees) if tree is None], args)
    different = len({tuple(child.input_ids) for child in trees[0].root.children})
    if args.numbers == "per_group" and different == 1 < args.num_branches:
        fail(USAGE, f"--numbers per_group, but method {args.method} has one prompt for all groups", "drop it")
    if 1 < different < args.num_branches:
        info(f"{args.num_branches} responses under {different} different prompts, which are used in turn")
    truncated = sum(tree.dropped_turns > 0 for tree in trees)
    return lambda block: answer_by_tree(engine, [trees[i] for i in block], block, args), truncated


def refuse_long_rows(long: list[int], args) -> None:
    if long:
        fail(USAGE, f"{args.test_file}: row {long[0] + 1} and {len(long) - 1} more do not fit into "
                  f"{args.max_length} tokens with {args.max_new_tokens} new ones", "shorten them, or raise --max_length")


def answer_by_tree(engine, trees: list, block: list[int], args) -> list[dict]:
    """All responses of a row at once, under one shared prefill."""
    if args.decoding == "sampling":
        filters = {name: getattr(args, name) for name in FILTERS}
        turns = [engine.draw("sample", trees, [utils.row_seed(args.seed, i, turn) for i in block], args.max_new_tokens,
                             temperature=args.temperature, **filters)
                 for turn in range(math.ceil(args.num_drawn / args.num_branches))]
        drawn = [sum(own, [])[: args.num_drawn] for own in zip(*turns, strict=True)]
    elif args.decoding == "greedy":
        drawn = engine.draw("greedy", trees, None, args.max_new_tokens)
    else:
        options = {"num_beams": args.num_beams, "num_responses": args.num_drawn, "length_penalty": args.length_penalty}
        if args.decoding == "diverse":
            options |= {"num_groups": args.num_beam_groups, "diversity_penalty": args.diversity_penalty}
        drawn = engine.draw(args.decoding, trees, None, args.max_new_tokens, **options)
    return [clean_row(replies, args) for replies in drawn]


def answer_by_messages(engine, method, rows: list[dict], block: list[int], args) -> list[dict]:
    """The same prompts through a server: equal ones in one call, others one by one."""
    temperature = args.temperature if args.decoding == "sampling" else 0.0
    messages = [method.decode_messages(rows[i], args) for i in block]
    if all(message == messages[0][0] for message in messages[0]):
        drawn = engine.ask([own[0] for own in messages], [utils.row_seed(args.seed, i) for i in block], args.num_drawn,
                           args.max_new_tokens, temperature)
    else:
        seeds = [utils.row_seed(args.seed, i) + k for i in block for k in range(args.num_drawn)]
        flat = engine.ask([message for own in messages for message in own], seeds, 1, args.max_new_tokens, temperature)
        drawn = [[reply for replies in flat[k : k + args.num_drawn] for reply in replies]
                 for k in range(0, len(flat), args.num_drawn)]
    return [clean_row(replies, args) for replies in drawn]


def clean_row(replies: list, args) -> dict:

    clean = str.strip if args.method in OWN_INFERENCE else clean_reply
    return {"texts": [clean(reply.text) for reply in replies], "tokens": sum(r.tokens for r in replies),
            "cut": sum(r.cut for r in replies), "cut_at": [i for i, r in enumerate(replies) if r.cut], "failed": args.num_drawn - len(replies)}


# ---- rows ---------------------------------------------------------------------------------------


def rows_done(save_file: Path, summary_file: Path, settings: dict) -> int:
    """How many rows an interrupted run has written; dies if it ran with other settings."""
    if not save_file.exists():
        return 0
    before = json.loads(summary_file.read_text(encoding="utf-8"))["settings"] if summary_file.exists() else {}
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        name = changed[0]
        fail(USAGE, f"--resume: {save_file} was made with {name} {before.get(name)}, now it is {settings[name]}",
                  "use the same flags, or another --save_file")
    utils.repair_tail(save_file)
    return sum(1 for line in save_file.read_bytes().split(b"\n") if line.strip())


def answer_rows(rows: list[dict], answer, args, done: int, save_file: Path) -> dict:
    """Answer the rows after the first `done` and append each; returns seconds per row and tokens.

    Rows are batched by their index, so a resumed run decodes the very batches of an uninterrupted one.
    """
    from tqdm import tqdm

    embedder = load_embedder() if args.overgenerate and done < len(rows) else None
    size = args.batch_size if args.engine == "hf" else max(args.batch_size, args.max_connections)
    speed = {"seconds": [], "tokens": 0, "responses": 0}
    first = len(rows) if done >= len(rows) else done // size * size
    with tqdm(total=len(rows), initial=done, unit="row", desc=save_file.stem) as bar:
        for start in range(first, len(rows), size):
            block = list(range(start, min(start + size, len(rows))))
            began = time.time()
            try:
                answers = answer(block)
            except Exception as error:
                if not utils.is_out_of_memory(error):
                    raise
                fail(TRY_LATER, f"out of memory in rows {start + 1} to {block[-1] + 1}, even one at a time",
                          "--resume with fewer responses, or --max_new_tokens, on a machine with more memory")
            finished = [finish_row(rows[i], found, embedder, args) for i, found in zip(block, answers, strict=True)]
            speed["seconds"] += [(time.time() - began) / len(block)] * len(block)
            speed["tokens"] += sum(found["tokens"] for found in answers)
            speed["responses"] += sum(len(found["texts"]) for found in answers)
            utils.append_jsonl(save_file, [row for i, row in zip(block, finished, strict=True) if i >= done])
            bar.update(sum(i >= done for i in block))
    return speed


def finish_row(row: dict, found: dict, embedder, args) -> dict:
    """The row with its responses, chosen if more were drawn, and what was empty, cut, missing or unread."""
    preds = found["texts"]
    done = {k: v for k, v in row.items() if k != "warnings"}
    problems = Counter()
    if embedder:

        full = [text for text in preds if text]
        vectors = embedder.encode([row.get("prompt") or row["context"], *full], normalize_embeddings=True, show_progress_bar=False)
        relevance = vectors[1:] @ vectors[0]
        chosen = selection.choose(args.select, vectors[1:], relevance, min(args.num_response_per_input, len(full)), args.floor)
        done["drawn"] = preds
        problems["below_floor"] = sum(bool(relevance[i] < args.floor) for i in chosen)
        preds = [full[i] for i in chosen]
    done["preds"] = preds
    problems["empty"] = sum(not text for text in preds)
    problems |= {"cut": found["cut"], "failed": found["failed"], "missing": args.num_response_per_input - len(preds)}
    if any(problems.values()):
        done["warnings"] = {k: v for k, v in problems.items() if v}
    if args.self_sample:
        done["cut_at"] = found["cut_at"]
    if "asked" in found:
        done["asked"], done["parsed"] = found["asked"], found["parsed"]
    return done


# ---- the summary --------------------------------------------------------------------------------


def summarise(save_file: Path, summary_file: Path, settings: dict, run: dict, speed: dict, engine, truncated: int) -> dict:
    """Write outs/X.json: what produced the file, what went wrong in it, and how fast it went."""
    import numpy as np

    rows = [json.loads(line) for line in save_file.read_bytes().split(b"\n") if line.strip()]
    summary = {"rows": len(rows), "responses": sum(len(row["preds"]) for row in rows), "truncated": truncated}
    for problem in ("empty", "cut", "missing", "failed", "below_floor"):
        summary[problem] = sum(row.get("warnings", {}).get(problem, 0) for row in rows)
    if any("asked" in row for row in rows):
        summary["parse_rate"] = round(sum(row["parsed"] for row in rows) / max(1, sum(row["asked"] for row in rows)), 4)
    if speed["seconds"]:
        seconds = sum(speed["seconds"])
        summary |= {"seconds_per_row": round(float(np.mean(speed["seconds"])), 3),
                    "seconds_per_row_median": round(float(np.median(speed["seconds"])), 3),
                    "seconds_per_row_p95": round(float(np.percentile(speed["seconds"], 95)), 3),
                    "responses_per_second": round(speed["responses"] / seconds, 2),
                    "tokens_per_second": round(speed["tokens"] / seconds, 1)}
        if settings["engine"] == "hf":
            summary |= {"prefill_tokens": engine.prefilled["shared"], "prefill_tokens_without_sharing": engine.prefilled["copied"]}
        else:
            summary |= {"served_models": sorted(engine.served), "retries": dict(engine.retries)}
    elif summary_file.exists():  # nothing was left to do: keep the speed that was measured
        before = json.loads(summary_file.read_text(encoding="utf-8"))
        summary |= {k: v for k, v in before.items() if k not in ("settings", "run", "versions") and k not in summary}
    utils.atomic_write(summary_file, json.dumps({"settings": settings, "run": brief(run), **summary,
                                                 "versions": utils.versions()}, indent=1))
    return summary


def print_summary(summary: dict, save_file: Path, args) -> None:
    print(f"{summary['responses']} responses to {summary['rows']} rows in {save_file}: "
          f"{summary['empty']} empty, {summary['cut']} cut at {args.max_new_tokens} tokens, {summary['missing']} missing, "
          f"{summary['truncated']} contexts shortened")
    if "parse_rate" in summary:
        print(f"{100 * summary['parse_rate']:.0f} % of the replies asked for could be read from the answers")
    if args.overgenerate:
        print(f"chosen by {args.select} from {args.overgenerate} a row; {summary['below_floor']} stay below the floor of "
              f"{args.floor} for want of others")
    if "seconds_per_row" in summary:
        print(f"{summary['seconds_per_row_median']} s a row (p95 {summary['seconds_per_row_p95']}), "
              f"{summary['responses_per_second']} responses/s, {summary['tokens_per_second']} tokens/s")
    if "prefill_tokens" in summary:
        shared, copied = summary["prefill_tokens"], summary["prefill_tokens_without_sharing"]
        print(f"{shared} prompt tokens computed, {copied} without sharing ({copied / shared:.1f} times)")
    if not args.self_sample:
        print(f"next: python eval.py --eval_file {save_file} --save_file eval_logs/{save_file.stem}.json")


if __name__ == "__main__":
    utils.run(main)
