"""Make one-to-many data from your own prompts, with any OpenAI-compatible server or a local model.

    python data/make_candidates.py --input_file prompts.jsonl --save_file data/mine.jsonl \\
        --base_url http://127.0.0.1:8000/v1 --model NAME
    python data/make_candidates.py --input_file prompts.jsonl --save_file data/mine.jsonl --model smollm2

Rows of the input have `context` or `prompt`; candidates that a row already has are kept and counted. One
request asks for all the answers that are missing (list prompting); what comes back is parsed, checked and
compared, and further rounds show what is there and ask for different ones. A row that stays below
--min_candidates goes to SAVE.rejected.jsonl and is never padded.

Every finished row is appended at once, in the order in which rows finish; the end of a run puts both files
into the order of the input. A killed run goes on with --resume. SAVE.json says how the file was made. A
server's key comes from OPENAI_API_KEY; a local server needs none. (`transformers serve` decodes greedily, and
so gives less variety, unless the model's generation_config.json says "do_sample": true.)
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from decoding import api, asking
from decoding.sampling import sample
from modeling.checkpoints import load_checkpoint
from modeling.embedder import load_embedder
from modeling.models import quiet
from modeling.prompts import encode_prompt, end_of_turn, label_turns, refuse_special_tokens
from utils import UNSCORED, USAGE, fail, info

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script in a subfolder does not see utils.py

import utils
from data import check
from flags import FlagParser, parse_flags

SETTINGS = ("model", "num_candidates", "min_candidates", "max_rounds", "max_cosine", "min_words", "max_words",
            "temperature", "max_tokens", "max_input_length", "seed")  # what a finished row depends on
SPARE = 2  # further rounds ask for more than are missing, since they mostly repeat
MAX_FAILED_IN_A_ROW = 5  # then it is the server, not the rows
CHARACTERS_PER_TOKEN, TOKENS_PER_CANDIDATE = 4, 30  # rules of thumb, for the estimate of --dry_run
Ask = Callable[[str, int], api.Answer]  # (message, seed) -> answer

# ---- asking and parsing -------------------------------------------------------------------------


def list_message(row: dict, number: int, taken: list[str], args) -> str:
    """The user message that asks for `number` answers to one row, unlike the `taken` ones."""
    turns = asking.shown_turns(row, args.max_input_length)
    length = "Keep each short." if turns is None else f"Keep each between {args.min_words} and {args.max_words} words."
    return asking.list_request(row, turns, number, taken, length)


# ---- one row ------------------------------------------------------------------------------------


def check_item(text: str, row: dict, message: str, args) -> str | None:
    """Why a text cannot be a candidate of this row, asked for by this message, or None."""
    if check.SPEAKER_LABEL.search(text):
        return "speaker label"
    said = [*check.turns_of(row), *re.split(r"\n+|(?<=[.!?])\s+", message)]
    if utils.normalise(text) in map(utils.normalise, said):
        return "repeats the request"
    if not re.search(r"\w", text):
        return "no words"
    if "context" in row and not args.min_words <= len(text.split()) <= args.max_words:
        return "too short" if len(text.split()) < args.min_words else "too long"
    return None


def add_new(found: list[str], vectors: list, items: list[str], embed: Callable, args) -> Iterator[str]:
    """Append to found (and their vectors) the items that differ from all before; yield why the others do not."""
    for text, vector in zip(items, embed(items), strict=True):
        if utils.normalise(text) in map(utils.normalise, found):
            yield "equal"
        elif any(float(vector @ other) > args.max_cosine for other in vectors):
            yield "nearly equal"
        elif len(found) == args.num_candidates:
            yield "not needed"
        else:
            found.append(text)
            vectors.append(vector)


def make_row(row: dict, key: str, ask: Ask, embed: Callable, args) -> dict:
    """The row with its candidates, and under `made` what that took.

    made["problem"] says what ended the rounds early or why the row is rejected; made["failed"] is there if
    that was a failed call, a "passing" failure or a "lasting" one.
    """
    found = list(row.get("candidates", []))
    vectors = list(embed(found)) if found else []
    dropped: Counter = Counter()
    made: dict = {"key": key, "model": args.model, "rounds": 0, "tokens": 0}
    while len(found) < args.num_candidates and made["rounds"] < args.max_rounds:
        number = args.num_candidates - len(found) + (SPARE if made["rounds"] else 0)
        message = list_message(row, number, found, args)
        try:
            answer = ask(message, seed_of(key, made["rounds"]))
        except api.Failed as error:
            what, passing = error.args
            made |= {"problem": what, "failed": "passing" if passing else "lasting"}
            break
        made |= {"model": answer.served_model, "rounds": made["rounds"] + 1, "tokens": made["tokens"] + answer.tokens}
        cut = answer.finish_reason == "length"
        dropped.update(["cut at --max_tokens"] * cut)
        items = []
        for text in asking.parse_list(answer.text, cut):
            if why := check_item(text, row, message, args):
                dropped[why] += 1
            else:
                items.append(text)
        if items:
            dropped.update(add_new(found, vectors, items, embed, args))
    if len(found) < args.min_candidates:
        made.setdefault("problem", f"fewer than {args.min_candidates} candidates after {made['rounds']} rounds")
    return {**row, "candidates": found, "made": {**made, "dropped": dict(dropped)}}


def seed_of(key: str, round_number: int) -> int:
    """The seed of one round of one row; only a local model takes it."""
    return int(utils.sha256(f"{key}-{round_number}")[:15], 16)


def row_key(row: dict, args) -> str:
    """Hash of a row and of all settings that its candidates depend on."""
    return utils.sha256(json.dumps([row, {name: getattr(args, name) for name in SETTINGS}], sort_keys=True))[:16]


# ---- who is asked -------------------------------------------------------------------------------


def ask_server(args, retries: Counter) -> Ask:
    """Ask over the network; waits and repeats are api.retrying's, and counted by what went wrong."""
    from tqdm import tqdm

    client = api.connect(args.base_url, args.timeout)

    def on_retry(what: str, wait: float) -> None:
        kind = what.split(":")[0]
        if not retries[kind]:  # each kind once; the end of the run has the counts
            tqdm.write(f"note: {what}; trying again in {wait:.1f} s", file=sys.stderr)
        retries[kind] += 1

    def ask(message: str, seed: int) -> api.Answer:  # not every server knows a seed, so none is sent
        return api.retrying(
            lambda: api.chat(client, args.model, [{"role": "user", "content": message}], args.max_tokens,
                             temperature=args.temperature),
            time.monotonic() + args.timeout_total, args.max_backoff, on_retry)

    return ask


def ask_local(args, rows: list[dict]) -> Ask:
    """Ask a model of this machine, one request at a time."""
    from trees import Tree, branch_prompts

    model, tokenizer, _ = load_checkpoint(args.model)
    refuse_special_tokens([{k: row[k] for k in ("context", "prompt") if k in row} for row in rows],
                                tokenizer, args.input_file)
    eos_id = end_of_turn(tokenizer)
    limit = model.config.get_text_config().max_position_embeddings - args.max_tokens
    if limit < 1:
        fail(USAGE, f"--max_tokens {args.max_tokens} leaves {args.model} no room for a prompt", "lower it")

    def ask(message: str, seed: int) -> api.Answer:
        prompt = encode_prompt(tokenizer, message)
        if len(prompt) > limit:
            raise api.Failed(f"the request has {len(prompt)} tokens, {limit} fit beside --max_tokens", False)
        tree = Tree(branch_prompts([prompt], [1]))
        [[ids]] = sample(model, [tree], [seed], tokenizer.pad_token_id, eos_id, args.max_tokens,
                                  args.temperature)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return api.Answer(text, args.model, "length" if len(ids) >= args.max_tokens else "stop", len(prompt) + len(ids))

    return ask


def load_embed() -> Callable:
    """Sentence embeddings of unit length, one thread at a time."""
    quiet()
    embedder, lock = load_embedder(), threading.Lock()

    def embed(texts: list[str]):
        with lock:
            return embedder.encode(texts, normalize_embeddings=True, show_progress_bar=False)

    return embed


# ---- the run ------------------------------------------------------------------------------------


def read_finished(path: Path, rows: dict[str, dict]) -> dict[str, dict]:
    """The rows of an interrupted run's file by key; dies over rows that are none of this run."""
    if not path.exists():
        return {}
    utils.repair_tail(path)
    finished = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                row = utils.parse_line(line.decode("utf-8"))
                key = row["made"]["key"]
            except (ValueError, KeyError, TypeError):
                key = None
            if key not in rows:
                fail(USAGE, f"{path}:{number}: this row is not made from --input_file with these flags",
                          "use the same input and flags, or another --save_file")
            finished[key] = row
    return finished


def make_all(rows: dict[str, dict], made: dict, rejected: dict, files: tuple[Path, Path], make: Callable, args) -> None:
    """Make the rows that are not finished yet; each is appended to its file and put into made or rejected.

    Raises api.Stopped where the server fails row after row.
    """
    from tqdm import tqdm

    todo = [key for key in rows if key not in made and key not in rejected]
    failed = 0  # rows in a row
    with tqdm(total=len(rows), initial=len(rows) - len(todo), unit="row", desc=files[0].stem) as bar:
        for row in api.work(make, todo, args.max_connections if args.base_url else 1):
            accepted = len(row["candidates"]) >= args.min_candidates
            if accepted or "failed" not in row["made"]:  # what failed is tried again after a kill
                utils.append_jsonl(files[0] if accepted else files[1], [row])
            (made if accepted else rejected)[row["made"]["key"]] = row
            bar.update()
            failed = failed + 1 if "failed" in row["made"] else 0
            lasting = row["made"].get("failed") == "lasting"
            # Lasting failures may be these rows' own fault, unless there is no row that works.
            if args.base_url and failed >= MAX_FAILED_IN_A_ROW and not (lasting and made):
                raise api.Stopped(5 if lasting else 75, f"{failed} rows failed in a row: {row['made']['problem']}")


def finish(rows: dict, made: dict, rejected: dict, files: tuple[Path, Path], summary: dict) -> None:
    """Put both files into the order of the input, write SAVE.json, and tell how it went."""
    for path, part in zip(files, (made, rejected), strict=True):
        lines = [json.dumps(part[key], ensure_ascii=False, allow_nan=False) + "\n" for key in rows if key in part]
        if lines:
            utils.atomic_write(path, "".join(lines))
        else:
            path.unlink(missing_ok=True)  # rows that failed before and are made now
    everything = [*made.values(), *rejected.values()]
    problems = Counter(row["made"]["problem"] for row in rejected.values())
    dropped = sum((Counter(row["made"]["dropped"]) for row in everything), Counter())
    num_candidates = sum(len(row["candidates"]) for row in made.values())
    summary |= {
        "rows": len(rows), "made": len(made), "rejected": len(rejected), "candidates": num_candidates,
        "rounds": sum(row["made"]["rounds"] for row in everything),
        "tokens": sum(row["made"]["tokens"] for row in everything),
        "served_models": Counter(row["made"]["model"] for row in made.values()),
        "problems": problems, "dropped": dropped, "versions": utils.versions(),
    }
    utils.atomic_write(files[0].with_suffix(".json"), json.dumps(summary, indent=1, ensure_ascii=False))

    def counted(counts: Counter) -> str:
        return "; ".join(f"{count} x {what}" for what, count in counts.most_common(8))

    print(f"{len(made)} of {len(rows)} rows made, {num_candidates / max(1, len(made)):.1f} candidates a row, "
          f"{summary['rounds']} requests answered, {summary['tokens']:,} tokens")
    for name, counts in (("answers left out", dropped), ("repeated requests", Counter(summary["retries"]))):
        if counts:
            print(f"{name}: {counted(counts)}")
    if summary["shortened"]:
        print(f"{summary['shortened']} contexts were shown without their oldest turns (--max_input_length)")
    if rejected:
        print(f"{len(rejected)} rows rejected, in {files[1]}: {counted(problems)}")
    if made:
        print(f"next: python data/check.py {files[0]}")


def print_dry_run(rows: list[dict], args) -> None:
    """What a run would take at least and at most, and the first request."""
    message = list_message(rows[0], args.num_candidates, [], args)
    asked = sum(len(list_message(row, args.num_candidates, [], args)) for row in rows) / CHARACTERS_PER_TOKEN
    answered = len(rows) * args.num_candidates * TOKENS_PER_CANDIDATE
    print(f"{len(rows)} rows, {len(rows):,} to {len(rows) * args.max_rounds:,} calls")
    print(f"about {asked:,.0f} to {asked * args.max_rounds:,.0f} tokens asked and {answered:,.0f} to "
          f"{answered * args.max_rounds:,.0f} answered, at most {len(rows) * args.max_rounds * args.max_tokens:,}")
    print(f"\nthe first request:\n\n{message}")


# ---- flags --------------------------------------------------------------------------------------


def build_parser(method: str | None) -> FlagParser:
    parser = FlagParser(prog="data/make_candidates.py", description=__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--input_file", required=True, help="JSONL with context or prompt")
    group.add_argument("--save_file", required=True, help="JSONL: the rows + candidates")
    group.add_argument("--model", required=True,
                       help="the server's name for it; without --base_url smollm2, a folder or a hub id")
    group.add_argument("--base_url", help="an OpenAI-compatible server, with or without /v1 (default: a local model)")
    group.add_argument("--limit", type=int, help="use the first N rows only (default: all)")
    group.add_argument("--resume", action="store_true", help="go on with a --save_file that was interrupted")
    group.add_argument("--dry_run", action="store_true", help="print counts and one request, and call nothing")
    group = parser.add_argument_group("candidates")
    group.add_argument("--num_candidates", type=int, default=6, help="candidates a row (default: 6)")
    group.add_argument("--min_candidates", type=int,
                       help="a row with fewer is rejected (default: 4, or --num_candidates if that is less)")
    group.add_argument("--max_rounds", type=int, default=4, help="requests a row at most (default: 4)")
    group.add_argument("--max_cosine", type=float, default=0.9,
                       help="MiniLM cosine above which two candidates are one; 1 allows all (default: 0.9)")
    group.add_argument("--min_words", type=int, default=4, help="words of a candidate, for context rows (default: 4)")
    group.add_argument("--max_words", type=int, default=40, help="words of a candidate, for context rows (default: 40)")
    group.add_argument("--max_input_length", type=int, default=300,
                       help="words of the context shown; the oldest turns go (default: 300)")
    group = parser.add_argument_group("requests")
    group.add_argument("--temperature", type=float, default=0.7, help="softmax temperature (default: 0.7)")
    group.add_argument("--max_tokens", type=int, default=1024, help="tokens of one answer (default: 1024)")
    group.add_argument("--seed", type=int, default=42, help="of a local model; servers are sent none (default: 42)")
    group.add_argument("--max_connections", type=int, default=4, help="requests at a time (default: 4)")
    group.add_argument("--timeout", type=float, default=120.0,
                       help="seconds without a byte until a call counts as hung (default: 120)")
    group.add_argument("--timeout_total", type=float, default=600.0,
                       help="seconds for a call with its repeats (default: 600)")
    group.add_argument("--max_backoff", type=float, default=60.0,
                       help="seconds between two repeats at most (default: 60)")
    group.add_argument("--fail_on_error", type=float, default=0.5, metavar="SHARE",
                       help="exit with 4 when a larger share of rows is rejected (default: 0.5)")
    return parser


def check_flags(args) -> None:
    """Die over flags that cannot work, before anything is loaded."""
    if args.min_candidates is None:
        args.min_candidates = min(4, args.num_candidates)
    for name in ("num_candidates", "min_candidates", "max_rounds", "min_words", "max_words", "max_input_length",
                 "max_tokens", "max_connections", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            fail(USAGE, f"--{name} {value} must be at least 1")
    for name in ("temperature", "timeout", "timeout_total", "max_backoff"):
        if not 0 < getattr(args, name) < float("inf"):
            fail(USAGE, f"--{name} {getattr(args, name)} must be above 0")
    for low, high in (("min_candidates", "num_candidates"), ("min_words", "max_words")):
        if getattr(args, low) > getattr(args, high):
            fail(USAGE, f"--{low} {getattr(args, low)} is above --{high} {getattr(args, high)}")
    if not 0 < args.max_cosine <= 1 or not 0 <= args.fail_on_error <= 1:
        fail(USAGE, f"--max_cosine {args.max_cosine} --fail_on_error {args.fail_on_error}: both are shares of 1")
    if not args.save_file.endswith(".jsonl"):
        fail(USAGE, f"--save_file {args.save_file} must end in .jsonl")


def open_files(args, rows: dict[str, dict]) -> tuple[tuple[Path, Path], dict, dict, dict]:
    """(save file, rejected file), made and rejected rows by key, and the summary, of a new or a resumed run."""
    save_file = Path(args.save_file)
    files, summary_file = (save_file, save_file.with_suffix(".rejected.jsonl")), save_file.with_suffix(".json")
    if Path(args.input_file).resolve() in [path.resolve() for path in (*files, summary_file)]:
        fail(USAGE, f"--save_file {save_file} would overwrite {args.input_file}", "give another --save_file")
    there = [path for path in files if path.exists()]
    if there and not args.resume:
        fail(USAGE, f"{there[0]} is already there", "--resume goes on with it; or give another --save_file")
    settings = {name: getattr(args, name) for name in SETTINGS}
    summary = json.loads(summary_file.read_text(encoding="utf-8")) if there and summary_file.exists() else {}
    before = summary.get("settings", settings)
    for name in settings:
        if before.get(name) != settings[name]:
            fail(USAGE, f"--resume: {save_file} was made with --{name} {before.get(name)}, now it is {settings[name]}",
                      "use the same flags, or another --save_file")
    made, rejected = (read_finished(path, rows) for path in files)
    rejected = {key: row for key, row in rejected.items() if key not in made and "failed" not in row["made"]}
    summary = {"settings": settings, "input_file": args.input_file, "base_url": args.base_url,
               "retries": summary.get("retries", {})}
    utils.atomic_write(summary_file, json.dumps(summary, indent=1, ensure_ascii=False))
    return files, made, rejected, summary


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(build_parser, argv)
    check_flags(args)
    listed = utils.read_jsonl(args.input_file, lambda row: utils.check_row(row, candidates=False))[: args.limit]
    if args.dry_run:
        return print_dry_run(listed, args)
    rows = {row_key(row, args): row for row in listed}
    if len(rows) < len(listed):
        info(f"{len(listed) - len(rows)} rows of {args.input_file} repeat an earlier one and are made once")
    files, made, rejected, summary = open_files(args, rows)
    retries = summary["retries"] = Counter(summary["retries"])
    summary["shortened"] = sum("context" in row and asking.shown_turns(row, args.max_input_length) != label_turns(row["context"])
                               for row in rows.values())
    ask = ask_server(args, retries) if args.base_url else ask_local(args, listed)
    embed = load_embed()
    try:
        make_all(rows, made, rejected, files, lambda key: make_row(rows[key], key, ask, embed, args), args)
    except api.Stopped as stop:
        code, what = stop.args
        words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
        look = "check OPENAI_API_KEY, --model and --base_url; " if code == 5 else ""
        place = f"model {args.model} at {api.normalise_url(args.base_url)}"
        fail(code, f"{place}: {what}; {len(made)} of {len(rows)} rows are made",
                  f"{look}go on with: python data/make_candidates.py {shlex.join([*words, '--resume'])}")
    finish(rows, made, rejected, files, summary)
    if len(rejected) > args.fail_on_error * len(rows):
        fail(UNSCORED, f"{len(rejected)} of {len(rows)} rows are rejected, --fail_on_error is {args.fail_on_error:g}",
                  f"{files[1]} says why; a stronger model, more --max_rounds or a lower --min_candidates may help")


if __name__ == "__main__":
    utils.run(main)
