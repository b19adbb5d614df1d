"""Replies under control tokens."""

from __future__ import annotations

from pathlib import Path

import utils
from decoding.mixtures import GuidedTree
from methods import defaults
from methods.control.attributes import combinations
from methods.control.tokens import encode, refuse_unknown
from trees import Tree, branch_prompts
from utils import USAGE, fail


def resolve(args, run: dict) -> dict:
    """The condition of every reply to a row, from what the checkpoint was trained on.

    conditions is what is asked for, applied_conditions what the tokens say: with
    --unknown_attributes skip, attributes that the model never saw get no token.
    """
    if run["method"] != "control":
        fail(USAGE, f"--model_name_or_path {args.model_name_or_path} is no checkpoint of "
                    "--method control", "train it with train.py --method control")
    trained = run["args"]
    # baselines are asked for attributes that they were not trained on, so all are known then
    known = trained["schema"] if args.unknown_attributes else \
        {name: trained["schema"][name] for name in trained["attributes"]}
    where = (f"{args.model_name_or_path} (trained on "
             f"{', '.join(trained['attributes']) or 'no attribute'})")
    conditions = _conditions(args, known, where)
    applied = [{name: value for name, value in condition.items()
                if name in trained["attributes"] or args.unknown_attributes == "token"}
               for condition in conditions]
    replies = len(conditions)
    return {"control_tokens": trained["control_tokens"], "conditions": conditions,
            "applied_conditions": applied, "num_response_per_input": replies, "num_drawn": replies,
            # beams grow from one prompt, and with beams all replies have the same condition
            "num_branches": 1 if args.decoding in ("beam", "diverse") else replies,
            "test_file": args.test_file or "no prompt", "has_prompts": bool(args.test_file)}


def _conditions(args, known: dict, where: str) -> list[dict[str, str]]:
    """The condition of every reply; exits over attributes and values that are not known."""
    if args.sweep is not None:
        options = {}
        # an empty list is --sweep without names: all attributes
        for word in args.sweep or known:
            name, _, values = word.partition("=")
            refuse_unknown({name: None}, known, where)
            options[name] = values.split(",") if values else known[name]["values"]
            for value in options[name]:
                refuse_unknown({name: value}, known, where)
        # the tokens of the training texts stand in the schema's order
        ordered = {name: options[name] for name in known if name in options}
        return combinations(ordered) * args.num_response_per_input
    condition = dict(word.split("=", 1) for word in args.condition)
    refuse_unknown(condition, known, where)
    ordered = {name: condition[name] for name in known if name in condition}
    return [ordered] * args.num_response_per_input


def load_rows(args, run: dict) -> list[dict]:
    """Rows with prompt, conditions, applied_conditions (one per reply) and guidance_scale.

    Without --test_file there are --limit rows, or one, with an empty prompt.
    """
    prompts = [""] * (args.limit or 1)
    if args.has_prompts:
        rows = utils.read_jsonl(args.test_file, _check_prompt)[: args.limit]
        prompts = [row["prompt"] for row in rows]
    return [{"prompt": prompt, "conditions": args.conditions,
             "applied_conditions": args.applied_conditions,
             "guidance_scale": args.guidance_scale} for prompt in prompts]


def _check_prompt(row: dict) -> str | None:
    """What is wrong with a test row, or None."""
    problem = utils.check_row(row, candidates=False)
    if not problem and "prompt" not in row:
        return 'needs "prompt": control tokens continue plain text'
    return problem


prepare_rows = defaults.rows_as_they_are


def decode_tree(row: dict, tokenizer, args) -> Tree | None:
    """A branch per reply, each under its own condition; with guidance also without it."""

    def prompt(condition: dict[str, str]) -> list[int]:
        # the tokens come before the prompt, since training never saw them inside a text
        start, text = encode(tokenizer, condition, args.control_tokens, row["prompt"])
        return start + text

    prompts = [prompt(condition) for condition in row["applied_conditions"][: args.num_branches]]
    if max(map(len, prompts)) > args.max_length - args.max_new_tokens:
        return None
    numbers = list(range(1, len(prompts) + 1))
    root = branch_prompts(prompts, numbers)
    if row["guidance_scale"] == 1:  # the condition alone: the unconditional branch would weigh 0
        return Tree(root)
    # guidance pairs the branches one by one, so there are as many as under a condition
    uncond = Tree(branch_prompts([prompt({})] * len(prompts), numbers))
    return GuidedTree(root, uncond=uncond, guidance_scale=row["guidance_scale"])


def messages(row: dict, args) -> None:
    """None: messages cannot hold control tokens."""


# replies are plain text, without a speaker label or quotes that could be taken off
clean = str.strip
finish = defaults.next_is_eval
talk = defaults.no_talk


def next_command(args, checkpoint: Path) -> list[str]:
    """The flags of infer.py that draw one reply per combination of values."""
    return ["--method", "control", "--model_name_or_path", f"{checkpoint}/", "--sweep",
            "--limit", "10", "--top_p", "0.9", "--save_file", f"outs/{args.exp_name}.jsonl"]
