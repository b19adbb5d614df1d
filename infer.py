"""Draw N different responses per row from a checkpoint, a base model or a server.

    python infer.py --model_name_or_path checkpoints/my_peft/check_1000/ \\
        --num_response_per_input 5 --decoding sampling --temperature 0.75 \\
        --test_file data/test_dialogs.jsonl --save_file outs/my_peft.jsonl

rows -> prompt trees -> shared prefill -> responses -> cleaned -> maybe the N most different of M
-> appended row by row to --save_file. A killed run goes on with --resume to the same file.

`python infer.py --interview` holds interviews for the demographic bias test instead; its own flags
are shown by --interview --help.
"""

from __future__ import annotations

from pathlib import Path

import methods
import utils
from decoding import outputs, selection, table
from flags import FlagParser, add_server_flags, first_pass, parse_flags, positive_int
from utils import UNSCORED, USAGE, fail, warn

# Written into outs/X.json, so that eval.py --show can say what it is given instead of a summary.
KIND = "outs/responses"


def build_parser(method: str) -> FlagParser:
    """All flags of inference with a method."""
    parser = FlagParser(prog="infer.py", description=__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--model_name_or_path", default=utils.EMBEDDED,
                       help="check_N folder, model folder, hub id, or smollm2 (default)")
    group.add_argument("--method", choices=list(methods.METHODS), default=method,
                       help="must agree with the checkpoint (default: what it says)")
    group.add_argument("--test_file", required=True, help="JSONL with context or prompt")
    group.add_argument("--save_file", required=True, help="JSONL: the rows + preds")
    group.add_argument("--limit", type=positive_int,
                       help="use the first N rows only (default: all)")
    group.add_argument("--interview", action="store_true",
                       help="hold interviews instead, with flags of their own: --interview --help")
    group = parser.add_argument_group("decoding")
    group.add_argument("--num_response_per_input", type=positive_int, default=5,
                       help="responses per row (default: %(default)s)")
    group.add_argument("--decoding", choices=list(table.DECODERS), default="sampling",
                       help="how responses are drawn (default: sampling)")
    group.add_argument("--temperature", type=float, help="softmax temperature (default: 1)")
    group.add_argument("--max_new_tokens", type=positive_int, default=64,
                       help="tokens per response at most (default: %(default)s)")
    group.add_argument("--seed", type=int, default=42,
                       help="each row draws from a seed of its own (default: 42)")
    table.add_decoding_flags(parser)
    group = parser.add_argument_group("choosing")
    group.add_argument("--overgenerate", type=positive_int, metavar="M",
                       help="draw M responses and keep the most different ones")
    group.add_argument("--select", choices=["mmr", "dpp", "medoids"],
                       help="how they are chosen (default: dpp)")
    group.add_argument("--min_relevance", "--floor", dest="min_relevance", type=float,
                       help=f"least cosine with the row (default: {selection.MIN_RELEVANCE})")
    group = parser.add_argument_group("server")
    group.add_argument("--engine", default="hf", metavar="WHO",
                       help="hf, this machine (default); openai:MODEL or together:MODEL, a server")
    group.add_argument("--served_model", help="MODEL of --engine openai (as openai:MODEL)")
    add_server_flags(group)
    group = parser.add_argument_group("running")
    group.add_argument("--batch_size", type=positive_int, default=8,
                       help="rows decoded together (default: %(default)s)")
    group.add_argument("--max_input_length", type=positive_int,
                       help="words of the context (default: as in training, else 1000)")
    group.add_argument("--max_length", type=positive_int,
                       help="tokens in all (default: as in training, else the model's limit)")
    group.add_argument("--chat_template", metavar="FILE",
                       help="for base models: Jinja chat template, or none")
    group.add_argument("--resume", action="store_true",
                       help="go on with a --save_file that was interrupted")
    group.add_argument("--interactive", action="store_true",
                       help="talk to the model in the terminal (method spt)")
    group.add_argument("--force_base", action="store_true",
                       help="use an adapter on another base than its own")
    group.add_argument("--strict_split", action="store_true",
                       help="refuse test rows that were trained on")
    # A method's own defaults come first: the general ones below are for what is still open.
    methods.load(method, "flags").add_infer_args(parser)
    # The order matters: beams are counted by num_drawn, which resolve_choice settles.
    for function in (resolve_engine, resolve_choice, table.resolve_decoding, table.resolve_beams):
        parser.derive(function)
    return parser


def resolve_choice(args) -> dict:
    """--overgenerate and what goes with it; num_drawn is the number of responses drawn per row."""
    num_drawn = args.overgenerate or args.num_response_per_input
    if args.overgenerate is None:
        # Without a surplus to choose from these flags would silently do nothing.
        if args.select or args.min_relevance is not None:
            fail(USAGE, "--select and --min_relevance choose among responses drawn beyond need",
                 "add --overgenerate M")
        return {"num_drawn": num_drawn}
    if num_drawn < args.num_response_per_input:
        fail(USAGE, f"--overgenerate {args.overgenerate} is less than --num_response_per_input "
                    f"{args.num_response_per_input}",
             f"draw more, such as {4 * args.num_response_per_input}")
    least = selection.MIN_RELEVANCE if args.min_relevance is None else args.min_relevance
    # Below 0 is possible: unrelated texts have cosines around 0, on both sides of it.
    if not -1 <= least <= 1:
        fail(USAGE, f"--min_relevance {least} is not a cosine", "-1 lets everything pass")
    return {"num_drawn": num_drawn, "select": args.select or "dpp", "min_relevance": least}


def resolve_engine(args) -> dict:
    """Who answers, as hf or PROVIDER:MODEL."""
    engine = args.engine
    if args.served_model and engine in ("openai", "together"):
        engine = f"{engine}:{args.served_model}"
    elif args.served_model:
        fail(USAGE, "--base_url and --served_model are for a server", "add --engine openai")
    if engine == "hf" and args.base_url:
        fail(USAGE, "--base_url and --served_model are for a server", "add --engine openai:MODEL")
    if engine != "hf" and not engine.partition(":")[2]:
        fail(USAGE, f"--engine {engine} does not say which model",
             "hf, openai:MODEL or together:MODEL, with --base_url for a server of your own")
    return {"engine": engine}


def read_flags(argv: list[str] | None):
    """The flags of infer.py. The method, with flags of its own, is what the checkpoint says."""
    first = first_pass(argv, "method", "model_name_or_path")
    # run.json is read first, because it says the method, and the method which flags there are.
    run = utils.read_run(first["model_name_or_path"] or utils.EMBEDDED)
    method = first["method"] or run["method"]
    if method not in methods.METHODS:
        fail(USAGE, f"--method {method} is unknown", f"one of {', '.join(methods.METHODS)}")
    args = parse_flags(build_parser(method), argv)
    methods.load(args.method, "flags").check_infer(args)
    if args.engine != "hf":
        table.check_server(args)
    return args


def main(argv: list[str] | None = None) -> None:
    # Another command with flags of its own, so nothing else may be parsed before.
    if first_pass(argv, "interview")["interview"]:
        from persona import interview

        return interview.main(argv)
    args = read_flags(argv)
    method = methods.load(args.method, "inference")
    # What the checkpoint settles stands in its run.json, which costs nothing to read: bad rows are
    # found before any weights are loaded.
    run = trained_run(args)
    drawing = settle(args, method, run)
    rows = [] if args.interactive else method.load_rows(drawing, run)
    save_file = None if args.interactive else outputs.claim(drawing.save_file, args.resume)

    from decoding import drawing as draws  # torch, only now that the flags are good

    engine = load_engine(drawing)
    drawing = drawing.with_values(max_length=fit_length(args, run, engine.limit))
    if args.interactive:
        return method.talk(engine, drawing)
    warn_of_overlap(rows, run, drawing)
    # Before prepare_rows, which adds what the model says: --resume compares rows as they were read.
    settings = outputs.settings_of(drawing, rows, engine.run["weights"])
    rows = method.prepare_rows(engine, rows, drawing)
    job = draws.prepare(engine, rows, drawing, method.decode_tree, method.messages)
    # A base model may draw for another method, and the summary names the one that was asked for.
    run = engine.run | {"method": args.method}
    done = outputs.begin(save_file, KIND, settings, run)
    speed = draws.answer_rows(rows, job, method.clean, drawing, done, save_file)
    figures = outputs.speed_figures(speed, engine.figures(), save_file)
    figures |= outputs.count_problems(save_file) | {"truncated": job.truncated}
    outputs.write_summary(save_file, KIND, settings, run, figures)
    print_summary(figures, save_file, drawing)
    method.finish(save_file, figures | {"run": run}, drawing)
    # Last, because the file and its summary are good as far as they go.
    if figures["failed"]:
        fail(UNSCORED, f"{figures['failed']} responses are missing: the server refused "
                       f"{dict(engine.failed)}",
             f"the other {figures['responses']} are in {save_file}")


def trained_run(args) -> dict:
    """run.json of the model; of a base model or a server, only the name is known."""
    if args.engine == "hf":
        return utils.read_run(args.model_name_or_path)
    # A server does not tell how its model was made, so nothing of it can contradict --method.
    return {"method": args.method, "base_model": args.engine.partition(":")[2], "args": {}}


def settle(args, method, run: dict):
    """The flags and all that the checkpoint settles, read-only: what the method's hooks see."""
    return args.with_values(
        max_input_length=args.max_input_length or run["args"].get("max_input_length", 1000),
        new_tokens=run["args"].get("new_tokens", []), **method.resolve(args, run))


def fit_length(args, run: dict, limit: int | None) -> int | None:
    """Tokens in all: as asked; else as in training, but no more than the model has positions."""
    if args.max_length or not limit:
        return args.max_length
    return min(limit, run["args"].get("max_length", limit))


def load_engine(args):
    """Who answers: the model of --model_name_or_path on this machine, or a server."""
    from decoding import engines

    spec = f"hf:{args.model_name_or_path}" if args.engine == "hf" else args.engine
    return engines.load_engine(
        spec, base_url=args.base_url, key_file=args.key_file, max_connections=args.max_connections,
        timeout=args.timeout, timeout_total=args.timeout_total, sampling=table.filters_of(args),
        batch_size=args.batch_size, force_base=args.force_base, chat_template=args.chat_template)


def warn_of_overlap(rows: list[dict], run: dict, args) -> None:
    """Tell how many test rows the checkpoint was trained on."""
    # Hashes of the normalised context alone: the same dialogue with other replies counts, too.
    trained = set(run.get("row_hashes", []))
    overlap = [number for number, row in enumerate(rows, 1) if utils.row_hash(row) in trained]
    if overlap:
        what = (f"{args.test_file}: {len(overlap)} of {len(rows)} rows were trained on "
                f"(first: row {overlap[0]})")
        if args.strict_split:
            fail(USAGE, what, "remove them, or drop --strict_split")
        warn(what)


def print_summary(figures: dict, save_file: Path, args) -> None:
    print(f"{figures['responses']} responses to {figures['rows']} rows in {save_file}: "
          f"{figures['empty']} empty, {figures['cut']} cut at {args.max_new_tokens} tokens, "
          f"{figures['missing']} missing, {figures['truncated']} contexts shortened")
    if "parse_rate" in figures:
        print(f"{100 * figures['parse_rate']:.0f} % of the replies asked for could be read from "
              "the answers")
    if args.overgenerate:
        print(f"chosen by {args.select} from {args.overgenerate} a row; {figures['below_floor']} "
              f"are less relevant than {args.min_relevance}, since too few others were left")
    if "seconds_per_row" in figures:
        print(f"{figures['seconds_per_row_median']} s a row (p95 "
              f"{figures['seconds_per_row_p95']}), {figures['responses_per_second']} responses/s, "
              f"{figures['tokens_per_second']} tokens/s")
    if figures.get("prefill_tokens"):
        shared, copied = figures["prefill_tokens"], figures["prefill_tokens_without_sharing"]
        print(f"{shared} prompt tokens computed, {copied} without sharing "
              f"({copied / shared:.1f} times)")


if __name__ == "__main__":
    utils.run(main)
