"""Sampling the prompts of method diffuse, from the untuned model or from a trained one."""

from __future__ import annotations

from pathlib import Path

import utils
from methods import defaults
from methods.diffuse.prompts import read_prompts
from modeling.prompts import build_prompt, fit_prompts
from trees import Tree, branch_prompts
from utils import USAGE, fail, info


def resolve(args, run: dict) -> dict:
    """How many replies share a prefill, and what the prompts are called in messages."""
    # an untuned model has the method base, but may be sampled all the same
    if args.mode != "untuned":
        defaults.same_method(args, run)
    values = {"test_file": args.test_file or " ".join(args.train_file + args.test_prompts)}
    if args.decoding == "sampling":
        # a thousand branches would fill the memory; the rest is drawn in further turns
        values["num_branches"] = min(args.num_drawn, args.n_batch_size)
    return values | {"named_prompts": not args.test_file}


def load_rows(args, run: dict) -> list[dict]:
    """The prompts to sample, with `mode` and, where they are prompt files, `split`."""
    if args.named_prompts:
        train, test = read_prompts(args)
        # a list times False is empty: --split test leaves the training prompts out
        rows = [row | {"split": "train"} for row in train] * (args.split != "test")
        rows += [row | {"split": "test"} for row in test] * (args.split != "train")
        if not rows:
            fail(USAGE, "no prompts to sample",
                 "--config FILE.yaml, --train_prompts or --test_prompts name them")
    else:
        rows = utils.read_jsonl(args.test_file, lambda row: utils.check_row(row, candidates=False))
    info(f"mode {args.mode}: {args.model_name_or_path or args.engine}")
    return [row | {"mode": args.mode} for row in rows[: args.limit]]


prepare_rows = defaults.rows_as_they_are


def decode_tree(row: dict, tokenizer, args) -> Tree | None:
    """A row's request, as it is, once, with num_branches equal branches."""
    prompts, dropped = fit_prompts(row, [None], tokenizer, args.max_input_length,
                                   args.max_length - args.max_new_tokens)
    if not prompts:
        return None
    numbers = list(range(1, args.num_branches + 1))
    return Tree(branch_prompts(prompts * args.num_branches, numbers), dropped)


def messages(row: dict, args) -> list[str]:
    """The same as a user message."""
    # one message stands for all replies, so that a server can give them in one call
    return [build_prompt(row)]


clean = str.strip  # an answer may be anything, such as {"name": ...}
finish = defaults.next_is_eval
talk = defaults.no_talk


def next_command(args, checkpoint: Path) -> list[str]:
    """The flags of infer.py that sample what was trained."""
    prompts = ["--config", args.config] if args.config else []
    # beside a config, too: a flag of the training command may have replaced what stands in it
    prompts += ["--train_prompts", *args.train_file, "--model", args.model_name]
    if args.test_prompts:
        prompts += ["--test_prompts", *args.test_prompts]
    for flag, task in (("--leave_out", args.leave_out), ("--leave_in", args.leave_in)):
        if task:
            prompts += [flag, task]
    # these flags name the run, not the checkpoint: infer.py finds its newest one
    return ["--method", "diffuse", *prompts, "--mode", "lora", "--output_dir", args.output_dir,
            "--exp_name", args.exp_name, "--n_generations", str(args.n_generations),
            "--max_new_tokens", str(args.max_new_tokens)]
