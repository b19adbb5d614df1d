"""Replies under control tokens."""

from __future__ import annotations

import json
from pathlib import Path

import utils
from methods.control.attributes import combinations
from methods.control.tokens import encode, refuse_unknown
from utils import USAGE, fail


def decode_tree(row: dict, tokenizer, args):
    """A branch per reply, each under its own condition; with guidance, a twin of unconditioned branches."""
    from trees import Tree, branch_prompts

    if "wants" not in row:
        fail(USAGE, "this checkpoint was trained with --method control", "infer.py --method control --want NAME=VALUE ...")
    prompts = [sum(encode(tokenizer, want, args.control_tokens, row["prompt"]), []) for want in row["given"][: args.num_branches]]
    if max(map(len, prompts)) > args.max_length - args.max_new_tokens:
        return None
    numbers = list(range(1, len(prompts) + 1))
    tree = Tree(branch_prompts(prompts, numbers))
    if row["guidance"] != 1:
        plain = sum(encode(tokenizer, {}, args.control_tokens, row["prompt"]), [])
        tree.twin, tree.guidance = Tree(branch_prompts([plain] * len(prompts), numbers)), row["guidance"]
    return tree


def decode_messages(row: dict, args) -> list[str]:
    """Servers take messages, which cannot hold control tokens."""
    fail(USAGE, "--engine openai cannot send control tokens", "--engine hf")


def inference_rows(args) -> list[dict]:
    """Rows with prompt, wants (a condition per reply), given (those that get tokens) and guidance.

    Without --test_file, --limit rows of no prompt.

    Settles the number of replies a row, and the tokens of the checkpoint.
    """
    run = read_run(args)
    trained = run["args"]
    args.control_tokens = trained["control_tokens"]
    known = trained["schema"] if args.untrained else {n: trained["schema"][n] for n in trained["attributes"]}
    where = f"{args.model_name_or_path} (trained on {', '.join(trained['attributes']) or 'no attribute'})"
    if args.engine != "hf":
        decode_messages({}, args)
    if args.guidance != 1 and args.decoding not in ("sampling", "greedy"):
        fail(USAGE, f"--guidance does nothing with --decoding {args.decoding}", "drop it, or --decoding sampling")
    if args.guidance < 0:
        fail(USAGE, f"--guidance {args.guidance} must be at least 0")
    if args.overgenerate or args.decoding not in ("sampling", "greedy", "beam", "diverse"):
        fail(USAGE, "control tokens stand before plain text: no --overgenerate, no decoding by asking", "--decoding sampling")
    wants = wanted(args, known, where)
    args.num_response_per_input = args.num_drawn = len(wants)
    args.num_branches = 1 if args.decoding in ("beam", "diverse") else len(wants)
    if args.test_file:
        rows = utils.read_jsonl(args.test_file, lambda row: utils.check_row(row, candidates=False) or
                                (None if "prompt" in row else 'needs "prompt": control tokens continue plain text'))[: args.limit]
    else:
        rows, args.test_file = [{"prompt": ""}] * (args.limit or 1), "no prompt"
    given = [{n: v for n, v in want.items() if n in trained["attributes"] or args.untrained == "token"} for want in wants]
    return [{"prompt": row["prompt"], "wants": wants, "given": given, "guidance": args.guidance} for row in rows]


def wanted(args, known: dict, where: str) -> list[dict[str, str]]:
    """The condition of every reply to a row; dies over attributes and values that the checkpoint does not know."""

    if args.sweep is not None:
        if args.want or args.decoding in ("beam", "diverse"):
            fail(USAGE, "--sweep asks for all combinations, so it takes neither --want nor beams", "drop one of them")
        options = {}
        for word in args.sweep or known:
            name, _, values = word.partition("=")
            refuse_unknown({name: None}, known, where)
            options[name] = values.split(",") if values else known[name]["values"]
            for value in options[name]:
                refuse_unknown({name: value}, known, where)
        return combinations({name: options[name] for name in known if name in options}) * args.num_response_per_input
    pairs = [word.partition("=") for word in args.want]
    if bad := [word for word, (name, equals, value) in zip(args.want, pairs, strict=True) if not (name and equals and value)]:
        fail(USAGE, f"--want {bad[0]} is not NAME=VALUE", "such as sentiment=pos")
    want = {name: value for name, _, value in pairs}
    if len(want) < len(pairs):
        fail(USAGE, f"--want {' '.join(args.want)}: an attribute stands twice", "each text has one value of it")
    refuse_unknown(want, known, where)
    order = [name for name in known if name in want]
    return [{name: want[name] for name in order}] * args.num_response_per_input


def read_run(args) -> dict:
    """run.json of the checkpoint; dies where it is none of this method."""
    folder = Path(args.model_name_or_path or "")
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        run = {}
    if args.model_name_or_path is None or run.get("method") != "control":
        fail(USAGE, f"--model_name_or_path {args.model_name_or_path} is no checkpoint of --method control", "train it with train.py --method control")
    return run


def infer_flags(args, checkpoint: Path) -> list[str]:
    """The flags of infer.py that draw from what was trained, one reply per combination of values."""
    return ["--method", "control", "--model_name_or_path", f"{checkpoint}/", "--sweep", "--limit", "10", "--top_p", "0.9",
            "--save_file", f"outs/{args.exp_name}.jsonl"]
