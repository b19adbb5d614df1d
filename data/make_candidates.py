"""Make one-to-many data from your own prompts, with a model of this machine or behind a server.

    python -m data.make_candidates --input_file prompts.jsonl --save_file data/mine.jsonl \\
        --base_url http://127.0.0.1:8000/v1 --model openai:NAME
    python -m data.make_candidates --input_file prompts.jsonl --save_file data/mine.jsonl \\
        --model hf:smollm2

Rows of the input have `context` or `prompt`; candidates that a row already has are kept and
counted. One request asks for all the answers that are missing (list prompting); what comes back is
parsed, checked and compared, and further rounds show what is there and ask for different ones. A
row that stays below --min_candidates goes to SAVE.rejected.jsonl and is never padded.

Every finished row is appended at once, in the order in which rows finish; the end of a run puts
both files into the order of the input. A killed run goes on with --resume. SAVE.json says how the
file was made. A provider's key comes from OPENAI_API_KEY or TOGETHER_API_KEY; a local server needs
none. (`transformers serve` decodes greedily, and so gives less variety, unless the model's
generation_config.json says "do_sample": true.)
"""

from __future__ import annotations

import json
import shlex
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

import utils
from data.candidates import Ask, Embed, list_message, make_row, row_key, settings_of
from decoding import api, asking, outputs, providers
from decoding.engines import Asked, Local, Server
from flags import FlagParser, add_server_flags, number, parse_flags, positive, positive_int, share
from modeling.checkpoints import load_checkpoint
from modeling.embedder import load_embedder
from modeling.models import quiet
from modeling.prompts import label_turns, refuse_special_tokens
from utils import REFUSED, UNSCORED, USAGE, fail, info

MAX_FAILED_IN_A_ROW = 5  # calls; one row is a call or a few, so it shows soon
CHARACTERS_PER_TOKEN, TOKENS_PER_CANDIDATE = 4, 30  # rules of thumb, for the estimate of --dry_run


# ---- flags --------------------------------------------------------------------------------------


def build_parser() -> FlagParser:
    parser = FlagParser(prog="-m data.make_candidates", description=__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--input_file", required=True, help="JSONL with context or prompt")
    group.add_argument("--save_file", required=True, help="JSONL: the rows + candidates")
    group.add_argument("--model", required=True, metavar="PROVIDER:MODEL",
                       help="hf:MODEL on this machine, openai:MODEL (any compatible server) or "
                            "together:MODEL; a bare name is openai's with --base_url, else hf's")
    group.add_argument("--limit", type=positive_int,
                       help="use the first N rows only (default: all)")
    group.add_argument("--resume", action="store_true",
                       help="go on with a --save_file that was interrupted")
    group.add_argument("--dry_run", action="store_true",
                       help="print counts and one request, and call nothing")
    group = parser.add_argument_group("candidates")
    group.add_argument("--num_candidates", type=positive_int, default=6,
                       help="candidates a row (default: 6)")
    group.add_argument("--min_candidates", type=positive_int,
                       help="a row with fewer is rejected (default: 4, or --num_candidates if that "
                            "is less)")
    group.add_argument("--max_rounds", type=positive_int, default=4,
                       help="requests a row at most (default: 4)")
    group.add_argument("--max_cosine", default=0.9,
                       type=number(float, lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
                       help="MiniLM cosine above which two candidates are one; 1 allows all "
                            "(default: 0.9)")
    group.add_argument("--min_words", type=positive_int, default=4,
                       help="words of a candidate, for context rows (default: 4)")
    group.add_argument("--max_words", type=positive_int, default=40,
                       help="words of a candidate, for context rows (default: 40)")
    group.add_argument("--max_input_length", type=positive_int, default=300,
                       help="words of the context shown; the oldest turns go (default: 300)")
    group = parser.add_argument_group("requests")
    group.add_argument("--temperature", type=positive, default=0.7,
                       help="softmax temperature (default: 0.7)")
    group.add_argument("--max_tokens", type=positive_int, default=1024,
                       help="tokens of one answer (default: 1024)")
    group.add_argument("--seed", type=int, default=42,
                       help="of a local model; servers are sent none (default: 42)")
    group.add_argument("--max_backoff", type=positive, default=60.0,
                       help="seconds between two repeats at most (default: 60)")
    group.add_argument("--fail_on_error", type=share, default=0.5, metavar="SHARE",
                       help="exit with 4 when a larger share of rows is rejected (default: 0.5)")
    add_server_flags(parser.add_argument_group("a model behind a server"), max_connections=4)
    parser.derive(lambda args: {"min_candidates": args.min_candidates
                                or min(4, args.num_candidates)})
    parser.derive(resolve_engine)
    return parser


def resolve_engine(args) -> dict:
    """Who is asked, as PROVIDER:MODEL. --model stays as it is given: keys of rows hash it."""
    engine = args.model
    if engine.partition(":")[0] not in (providers.LOCAL, *providers.PROVIDERS):
        engine = f"{'openai' if args.base_url else providers.LOCAL}:{engine}"
    spec = providers.parse_spec(engine)
    if args.base_url and spec.provider == providers.LOCAL:
        fail(USAGE, f"--base_url does nothing with --model {args.model}",
             f"drop it, or --model openai:{spec.model}")
    return {"engine": engine}


def read_flags(argv: list[str] | None):
    """The flags, or the end over some that cannot work together, before anything is loaded."""
    args = parse_flags(build_parser(), argv)
    if args.min_candidates > args.num_candidates:
        fail(USAGE, f"--min_candidates {args.min_candidates} is above --num_candidates "
                    f"{args.num_candidates}")
    if args.min_words > args.max_words:
        fail(USAGE, f"--min_words {args.min_words} is above --max_words {args.max_words}")
    return args


# ---- who is asked -------------------------------------------------------------------------------


def load_engine(args, rows: list[dict]) -> Local | Server:
    """The engine that --model names; a local model refuses rows that spell its special tokens."""
    spec = providers.parse_spec(args.engine)
    if spec.provider != providers.LOCAL:
        return Server(spec, args.base_url, args.key_file, args.max_connections, args.timeout,
                      args.timeout_total, tolerant=True, max_backoff=args.max_backoff,
                      max_failed=MAX_FAILED_IN_A_ROW)
    # rows are asked one at a time: each further request depends on the answers before
    engine = Local(*load_checkpoint(spec.model), batch_size=1, name=spec.name)
    texts = [{key: row[key] for key in ("context", "prompt") if key in row} for row in rows]
    refuse_special_tokens(texts, engine.tokenizer, args.input_file)
    if args.max_tokens >= engine.limit:
        fail(USAGE, f"--max_tokens {args.max_tokens} leaves {args.model} no room for a prompt",
             f"lower it: the model has {engine.limit} positions")
    return engine


def asker(engine: Local | Server, args) -> Ask:
    """A function that asks for one reply and waits for it."""

    def ask(message: str, seed: int) -> Asked:
        seeds = [seed] if isinstance(engine, Local) else None  # not every server knows a seed
        [asked] = engine.ask([message], seeds, 1, args.max_tokens, args.temperature)
        return asked

    return ask


def load_embed() -> Embed:
    """Sentence embeddings of unit length, one thread at a time."""
    quiet()
    embedder, lock = load_embedder(), threading.Lock()  # its memory of texts is a plain dict

    def embed(texts: list[str]):
        with lock:
            return embedder.encode(texts)

    return embed


# ---- the run ------------------------------------------------------------------------------------


def open_files(args, rows: dict[str, dict]) -> tuple[tuple[Path, Path], dict, dict, dict]:
    """(save file, rejected file), made and rejected rows by key, and the summary's beginning."""
    save_file = Path(args.save_file)
    files = save_file, save_file.with_suffix(".rejected.jsonl")
    summary_file = save_file.with_suffix(".json")
    if Path(args.input_file).resolve() in [path.resolve() for path in (*files, summary_file)]:
        fail(USAGE, f"--save_file {save_file} would overwrite {args.input_file}",
             "give another --save_file")
    for path in files:
        outputs.claim(str(path), args.resume)
    settings = settings_of(args)
    before = utils.made_by(save_file) if any(path.exists() for path in files) else {}
    for name, old in before.get("settings", settings).items():
        if name in settings and old != settings[name]:
            fail(USAGE, f"--resume: {save_file} was made with --{name} {old}, now it is "
                        f"{settings[name]}", "use the same flags, or another --save_file")
    made, rejected = (read_finished(path, rows) for path in files)
    # what failed in a run that came to its end is tried again
    rejected = {key: row for key, row in rejected.items()
                if key not in made and "failed" not in row["made"]}
    # written now: a run that is killed before its end must know its settings when it goes on
    summary = {"settings": settings, "input_file": args.input_file, "base_url": args.base_url,
               "retries": before.get("retries", {})}
    utils.atomic_write(summary_file, json.dumps(summary, indent=1, ensure_ascii=False))
    return files, made, rejected, summary


def read_finished(path: Path, rows: dict[str, dict]) -> dict[str, dict]:
    """The rows of an interrupted run's file by key; refuses rows that are none of this run."""
    if not path.exists():
        return {}
    utils.repair_tail(path)
    finished = {}
    for line_number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = utils.parse_line(line.decode("utf-8"))
            key = row["made"]["key"]
        except (ValueError, KeyError, TypeError):
            key = None
        if key not in rows:
            fail(USAGE, f"{path}:{line_number}: this row is not made from --input_file with these "
                        "flags", "use the same input and flags, or another --save_file")
        finished[key] = row
    return finished


def make_all(rows: dict[str, dict], made: dict, rejected: dict, files: tuple[Path, Path],
             make: Callable[[str], dict], min_candidates: int, num_threads: int) -> None:
    """Make the rows that are not finished yet, each written at once, into made or rejected.

    make: key -> row. A row whose call failed is not written: a later run tries it again.
    """
    todo = [key for key in rows if key not in made and key not in rejected]
    with tqdm(total=len(rows), initial=len(rows) - len(todo), unit="row",
              desc=files[0].stem) as bar:
        for row in api.work(make, todo, num_threads):
            accepted = len(row["candidates"]) >= min_candidates
            if accepted or "failed" not in row["made"]:
                utils.append_jsonl(files[0] if accepted else files[1], [row])
            (made if accepted else rejected)[row["made"]["key"]] = row
            bar.update()


def finish(rows: dict, made: dict, rejected: dict, files: tuple[Path, Path],
           summary: dict) -> None:
    """Put both files into the order of the input, write SAVE.json, and tell how it went."""
    for path, part in zip(files, (made, rejected), strict=True):
        lines = [json.dumps(part[key], ensure_ascii=False, allow_nan=False) + "\n"
                 for key in rows if key in part]
        if lines:
            utils.atomic_write(path, "".join(lines))
        else:
            path.unlink(missing_ok=True)  # rows that failed before and are made now
    everything = [*made.values(), *rejected.values()]
    problems = Counter(row["made"]["problem"] for row in rejected.values())
    dropped = sum((Counter(row["made"]["dropped"]) for row in everything), Counter())
    num_candidates = sum(len(row["candidates"]) for row in made.values())
    summary = summary | {
        "rows": len(rows), "made": len(made), "rejected": len(rejected),
        "candidates": num_candidates,
        "rounds": sum(row["made"]["rounds"] for row in everything),
        "tokens": sum(row["made"]["tokens"] for row in everything),
        "served_models": Counter(row["made"]["model"] for row in made.values()),
        "problems": problems, "dropped": dropped, "versions": utils.versions(),
    }
    utils.atomic_write(files[0].with_suffix(".json"),
                       json.dumps(summary, indent=1, ensure_ascii=False))
    print(f"{len(made)} of {len(rows)} rows made, {num_candidates / max(1, len(made)):.1f} "
          f"candidates a row, {summary['rounds']} requests answered, "
          f"{summary['tokens']:,} tokens")
    for name, counts in (("answers left out", dropped),
                         ("repeated requests", Counter(summary["retries"]))):
        if counts:
            print(f"{name}: {_counted(counts)}")
    if summary["shortened"]:
        print(f"{summary['shortened']} contexts were shown without their oldest turns "
              "(--max_input_length)")
    if rejected:
        print(f"{len(rejected)} rows rejected, in {files[1]}: {_counted(problems)}")
    if made:
        print(f"next: python -m data.check {files[0]}")


def _counted(counts: Counter) -> str:
    return "; ".join(f"{count} x {what}" for what, count in counts.most_common(8))


def print_dry_run(rows: list[dict], args) -> None:
    """What a run would take at least and at most, and the first request."""
    messages = [list_message(row, args.num_candidates, [], args) for row in rows]
    asked = sum(map(len, messages)) / CHARACTERS_PER_TOKEN
    answered = len(rows) * args.num_candidates * TOKENS_PER_CANDIDATE
    most = len(rows) * args.max_rounds
    print(f"{len(rows)} rows, {len(rows):,} to {most:,} calls")
    print(f"about {asked:,.0f} to {asked * args.max_rounds:,.0f} tokens asked and {answered:,.0f} "
          f"to {answered * args.max_rounds:,.0f} answered, at most {most * args.max_tokens:,}")
    print(f"\nthe first request:\n\n{messages[0]}")


def is_shortened(row: dict, max_words: int) -> bool:
    """Whether a row is shown without its oldest turns."""
    return "context" in row and asking.shown_turns(row, max_words) != label_turns(row["context"])


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    listed = utils.read_jsonl(args.input_file, lambda row: utils.check_row(row, candidates=False))
    listed = listed[: args.limit]
    if args.dry_run:
        return print_dry_run(listed, args)
    rows = {row_key(row, args): row for row in listed}
    if len(rows) < len(listed):
        info(f"{len(listed) - len(rows)} rows of {args.input_file} repeat an earlier one and are "
             "made once")
    files, made, rejected, summary = open_files(args, rows)
    shortened = sum(is_shortened(row, args.max_input_length) for row in rows.values())
    engine = load_engine(args, listed)
    ask, embed = asker(engine, args), load_embed()
    # torch uses all cores for one request already
    num_threads = 1 if isinstance(engine, Local) else args.max_connections
    try:
        make_all(rows, made, rejected, files,
                 lambda key: make_row(rows[key], key, ask, embed, args), args.min_candidates,
                 num_threads)
    except api.RunStopped as stop:
        words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
        key_name = providers.PROVIDERS[providers.parse_spec(args.engine).provider][1]
        look = f"check {key_name}, --model and --base_url; " if stop.code == REFUSED else ""
        fail(stop.code, f"{stop.what}; {len(made)} of {len(rows)} rows are made",
             f"{look}go on with: python -m data.make_candidates "
             f"{shlex.join([*words, '--resume'])}")
    retries = Counter(summary["retries"]) + Counter(engine.figures().get("retries", {}))
    finish(rows, made, rejected, files, summary | {"retries": retries, "shortened": shortened})
    if len(rejected) > args.fail_on_error * len(rows):
        fail(UNSCORED, f"{len(rejected)} of {len(rows)} rows are rejected, --fail_on_error is "
                       f"{args.fail_on_error:g}",
             f"{files[1]} says why; a stronger model, more --max_rounds or a lower "
             "--min_candidates may help")


if __name__ == "__main__":
    utils.run(main)
