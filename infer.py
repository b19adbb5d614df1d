"""Draw N different responses per row from a checkpoint or a base model.

    python infer.py --model_name_or_path checkpoints/my_peft/check_1000/ --num_response_per_input 5 \\
        --decoding sampling --temperature 0.75 --test_file data/test_dialogs.jsonl --save_file outs/my_peft.jsonl

rows -> prompt trees -> shared prefill -> N responses -> cleaned -> appended row by row to --save_file.
A killed run goes on with --resume and ends with the same file.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from pathlib import Path

import utils
from flags import FlagParser, parse_flags
from methods import METHODS, load_method

SETTINGS = ("model_name_or_path", "method", "decoding", "num_response_per_input", "temperature", "top_p", "top_k",
            "min_p", "max_new_tokens", "max_input_length", "max_length", "batch_size", "seed", "limit",
            "chat_template")


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
    group.add_argument("--decoding", choices=["sampling"], default="sampling", help="how responses are drawn")
    group.add_argument("--temperature", type=float, default=1.0, help="softmax temperature (default: 1)")
    group.add_argument("--top_p", type=float, default=1.0, help="nucleus mass, 1 is off (default)")
    group.add_argument("--top_k", type=int, default=0, help="keep the k best tokens, 0 is off (default)")
    group.add_argument("--min_p", type=float, default=0.0, help="drop tokens below this share of the best one, 0 is off (default)")
    group.add_argument("--max_new_tokens", type=int, default=64, help="tokens per response at most (default: 64)")
    group.add_argument("--seed", type=int, default=42, help="each row draws from a seed of its own (default: 42)")
    group = parser.add_argument_group("running")
    group.add_argument("--batch_size", type=int, default=8, help="rows decoded together (default: 8)")
    group.add_argument("--max_input_length", type=int, help="words of the context (default: as in training, else 1000)")
    group.add_argument("--max_length", type=int, help="tokens in all (default: as in training, else the model's limit)")
    group.add_argument("--chat_template", metavar="FILE", help="for base models: Jinja chat template, or none")
    group.add_argument("--resume", action="store_true", help="go on with a --save_file that was interrupted")
    group.add_argument("--force_base", action="store_true", help="use an adapter on another base than its own")
    group.add_argument("--strict_split", action="store_true", help="refuse test rows that were trained on")
    return parser


def check_flags(args) -> None:
    """Die over flags that cannot work, before anything is loaded."""
    for name in ("num_response_per_input", "max_new_tokens", "batch_size", "limit", "max_length", "max_input_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            utils.die(2, f"--{name} {value} must be at least 1")
    if not 0 < args.temperature < math.inf:
        utils.die(2, f"--temperature {args.temperature} with --decoding sampling must be above 0", "0.75 is the published value")
    if not 0 < args.top_p <= 1 or not 0 <= args.min_p < 1 or args.top_k < 0:
        utils.die(2, f"--top_p {args.top_p} --min_p {args.min_p} --top_k {args.top_k}: out of range",
                  "0 < top_p <= 1, 0 <= min_p < 1, top_k >= 0")


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(build_parser, argv)
    check_flags(args)
    rows = utils.read_jsonl(args.test_file, lambda row: utils.check_row(row, candidates=False))[: args.limit]
    save_file, summary_file = Path(args.save_file), Path(args.save_file).with_suffix(".json")
    if save_file.suffix != ".jsonl":
        utils.die(2, f"--save_file {save_file} must end in .jsonl", f"{save_file.with_suffix('.jsonl')}")
    if save_file.exists() and not args.resume:
        utils.die(2, f"{save_file} is already there", "--resume goes on with it; or give another --save_file")
    save_file.parent.mkdir(parents=True, exist_ok=True)

    model, tokenizer, run = utils.load_checkpoint(args.model_name_or_path, args.force_base, args.chat_template)
    settle_settings(args, run, model)
    utils.refuse_special_tokens([{k: row[k] for k in ("context", "prompt") if k in row} for row in rows],
                                tokenizer, args.test_file)
    warn_of_overlap(rows, run, args)
    method = load_method(args.method)
    trees = [method.decode_tree(row, tokenizer, args) for row in rows]
    short = [i for i, tree in enumerate(trees) if tree is None]
    if short:
        utils.die(2, f"{args.test_file}: row {short[0] + 1} and {len(short) - 1} more do not fit into "
                  f"{args.max_length} tokens with {args.max_new_tokens} new ones", "shorten them, or raise --max_length")
    counts = Counter(truncated=sum(tree.dropped_turns > 0 for tree in trees))

    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["data_sha256"] = utils.sha256(json.dumps(rows, sort_keys=True))[:16]
    done = rows_done(save_file, summary_file, settings)
    if not done:
        utils.atomic_write(summary_file, json.dumps({"settings": settings, "run": brief(run)}, indent=1))
    start = time.time()
    decode_rows(model, tokenizer, rows, trees, args, done, save_file, counts)
    summary = summarise(save_file, summary_file, settings, run, counts, time.time() - start)
    print(f"{summary['rows']} rows x {args.num_response_per_input} responses in {save_file}: "
          f"{summary.get('responses_per_second', 0)} responses/s, {summary.get('tokens_per_second', 0)} tokens/s; "
          f"{summary['empty']} empty, {summary['cut']} cut at {args.max_new_tokens} tokens, "
          f"{counts['truncated']} contexts shortened")
    print(f"next: python eval.py --eval_file {save_file} --save_file eval_logs/{save_file.stem}.json")


def settle_settings(args, run: dict, model) -> None:
    """Method and lengths come from the checkpoint; a flag that contradicts its method is refused."""
    if args.method and args.method != run["method"]:
        if run["method"] != "base" or args.method != "base":
            utils.die(2, f"--method {args.method}, but {args.model_name_or_path} is a {run['method']} model",
                      f"drop --method, or pass --method {run['method']}")
    args.method = run["method"]
    if args.max_input_length is None:
        args.max_input_length = run["args"].get("max_input_length", 1000)
    if args.max_length is None:
        limit = model.config.get_text_config().max_position_embeddings
        args.max_length = min(limit, run["args"].get("max_length", limit))


def warn_of_overlap(rows: list[dict], run: dict, args) -> None:
    """Tell how many test rows the checkpoint was trained on."""
    trained = set(run.get("row_hashes", []))
    overlap = [i for i, row in enumerate(rows, 1) if utils.row_hash(row) in trained]
    if overlap:
        what = f"{args.test_file}: {len(overlap)} of {len(rows)} rows were trained on (first: row {overlap[0]})"
        if args.strict_split:
            utils.die(2, what, "remove them, or drop --strict_split")
        utils.note(f"warning: {what}")


def brief(run: dict) -> dict:
    """run.json without the long list of row hashes."""
    return {key: value for key, value in run.items() if key != "row_hashes"}


def rows_done(save_file: Path, summary_file: Path, settings: dict) -> int:
    """How many rows an interrupted run has written; dies if it ran with other settings."""
    if not save_file.exists():
        return 0
    before = json.loads(summary_file.read_text(encoding="utf-8"))["settings"] if summary_file.exists() else {}
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        name = changed[0]
        utils.die(2, f"--resume: {save_file} was made with {name} {before.get(name)}, now it is {settings[name]}",
                  "use the same flags, or another --save_file")
    utils.repair_tail(save_file)
    return sum(1 for line in save_file.read_bytes().split(b"\n") if line.strip())


def decode_rows(model, tokenizer, rows, trees, args, done: int, save_file: Path, counts: Counter) -> None:
    """Decode the rows after the first `done` and append each; batches keep their place after a resume.

    Rows are batched by their index, so a resumed run decodes the very batches of an uninterrupted one.
    """
    from tqdm import tqdm

    first = len(rows) if done >= len(rows) else done // args.batch_size * args.batch_size
    eos_id = utils.end_of_turn(tokenizer)
    with tqdm(total=len(rows), initial=done, unit="row", desc=save_file.stem) as bar:
        for start in range(first, len(rows), args.batch_size):
            block = list(range(start, min(start + args.batch_size, len(rows))))
            began = time.time()
            drawn = draw(model, tokenizer, [trees[i] for i in block], block, eos_id, args)
            counts["seconds"] += time.time() - began
            counts["responses"] += args.num_response_per_input * len(block)
            counts["tokens"] += sum(len(ids) for replies in drawn for ids in replies)
            fresh = [(i, replies) for i, replies in zip(block, drawn, strict=True) if i >= done]
            utils.append_jsonl(save_file, [finish_row(rows[i], replies, tokenizer, args) for i, replies in fresh])
            bar.update(len(fresh))


def draw(model, tokenizer, trees, block: list[int], eos_id: int, args) -> list[list[list[int]]]:
    """Token ids [row][response] of a block of rows; when memory runs out, of its halves."""
    import decoding

    seeds = [int(utils.sha256(f"{args.seed}-{i}")[:15], 16) for i in block]
    try:
        return decoding.sample(model, trees, seeds, tokenizer.pad_token_id, eos_id, args.max_new_tokens,
                               args.temperature, args.top_p, args.top_k, args.min_p)
    except Exception as error:
        if not utils.is_out_of_memory(error):
            raise
        if len(block) == 1:
            utils.die(75, f"out of memory at row {block[0] + 1}, alone in its batch",
                      "--resume with fewer responses, or --max_new_tokens, on a machine with more memory")
    half = len(block) // 2
    utils.note(f"note: out of memory with {len(block)} rows, trying {half} (same seeds)")
    return (draw(model, tokenizer, trees[:half], block[:half], eos_id, args)
            + draw(model, tokenizer, trees[half:], block[half:], eos_id, args))


def finish_row(row: dict, replies: list[list[int]], tokenizer, args) -> dict:
    """The row with its cleaned responses, and how many were empty or cut at --max_new_tokens."""
    from decoding import clean_reply

    preds = [clean_reply(tokenizer.decode(ids, skip_special_tokens=True)) for ids in replies]
    done = {**{k: v for k, v in row.items() if k != "warnings"}, "preds": preds}
    problems = {"empty": sum(not p for p in preds), "cut": sum(len(ids) >= args.max_new_tokens for ids in replies)}
    if any(problems.values()):
        done["warnings"] = {k: v for k, v in problems.items() if v}
    return done


def summarise(save_file: Path, summary_file: Path, settings: dict, run: dict, counts: Counter, seconds: float) -> dict:
    """Write outs/X.json: what produced the file, what was empty or cut, and how fast it went."""
    rows = [json.loads(line) for line in save_file.read_bytes().split(b"\n") if line.strip()]
    summary = {"rows": len(rows), "responses": sum(len(row["preds"]) for row in rows)}
    for problem in ("empty", "cut"):
        summary[problem] = sum(row.get("warnings", {}).get(problem, 0) for row in rows)
    if counts["seconds"]:
        summary["seconds_per_row"] = round(counts["seconds"] * settings["num_response_per_input"] / counts["responses"], 3)
        summary["responses_per_second"] = round(counts["responses"] / counts["seconds"], 2)
        summary["tokens_per_second"] = round(counts["tokens"] / counts["seconds"], 1)
    elif summary_file.exists():  # nothing was left to do: keep the speed that was measured
        summary |= {k: v for k, v in json.loads(summary_file.read_text(encoding="utf-8")).items() if "second" in k}
    utils.atomic_write(summary_file, json.dumps(
        {"settings": settings, "run": brief(run), **summary, "truncated": counts["truncated"],
         "versions": utils.versions()}, indent=1))
    return summary


if __name__ == "__main__":
    utils.run(main)
