"""Sampling the prompts of method diffuse."""

from __future__ import annotations

from pathlib import Path

import utils
from methods.diffuse.prompts import read_prompts
from modeling.prompts import build_prompt, fit_prompts
from utils import USAGE, fail, info


def decode_tree(row: dict, tokenizer, args):
    """A row's request, as it is, once, with num_branches equal branches."""
    from trees import Tree, branch_prompts

    prompts, dropped = fit_prompts(row, [None], tokenizer, args.max_input_length, args.max_length - args.max_new_tokens)
    if not prompts:
        return None
    return Tree(branch_prompts(prompts * args.num_branches, list(range(1, args.num_branches + 1))), dropped)


def decode_messages(row: dict, args) -> list[str]:
    """The same as a user message, for a server."""
    return [build_prompt(row)]


def inference_rows(args) -> list[dict]:
    """The prompts to sample; settles the checkpoint, the file to write and how many replies share a prefill."""
    if args.n_batch_size < 1:
        fail(USAGE, f"--n_batch_size {args.n_batch_size} must be at least 1")
    if args.mode is None:
        fail(USAGE, "--method diffuse needs --mode", "untuned: the model as it is; lora: the checkpoint of the run")
    if args.decoding == "sampling":
        args.num_branches = min(args.num_drawn, args.n_batch_size)
    if args.test_file:
        rows = utils.read_jsonl(args.test_file, lambda row: utils.check_row(row, candidates=False))
    else:
        train, test = read_prompts(args)
        rows = [row | {"split": "train"} for row in train] * (args.split != "test")
        rows += [row | {"split": "test"} for row in test] * (args.split != "train")
        args.test_file = " ".join(args.train_file + args.test_prompts)
        if not rows:
            fail(USAGE, "no prompts to sample", "--config FILE.yaml, --train_prompts or --test_prompts name them")
    settle_model(args)
    args.save_file = args.save_file or f"outs/{args.exp_name}_{args.mode}.jsonl"
    info(f"mode {args.mode}: {args.model_name_or_path}")
    return [row | {"mode": args.mode} for row in rows[: args.limit]]


def settle_model(args) -> None:
    """--model_name_or_path of the mode: the base model, or the newest checkpoint of the run."""
    if args.engine == "openai":
        return
    if args.mode == "untuned":
        if args.model_name_or_path:
            fail(USAGE, "--mode untuned samples --model, not --model_name_or_path", "give --model NAME, or --mode lora")
        args.model_name_or_path = args.model_name
    elif args.model_name_or_path is None:
        run_dir = Path(args.output_dir) / args.exp_name
        checkpoint = utils.newest_checkpoint(run_dir)
        if checkpoint is None:
            fail(USAGE, f"{run_dir} holds no whole checkpoint", "train it with train.py, or give --model_name_or_path check_N")
        args.model_name_or_path = str(checkpoint)


def infer_flags(args, checkpoint: Path) -> list[str]:
    """The flags of infer.py that sample what was trained."""
    where = ["--config", args.config] if args.config else ["--train_prompts", *args.train_file, "--model", args.model_name]
    name = args.exp_name
    for flag in ("leave_out", "leave_in"):
        if task := getattr(args, flag):
            where += [f"--{flag}", task]
            name = name.removesuffix(f"_{'without' if flag == 'leave_out' else 'only'}_{task}")
    return ["--method", "diffuse", *where, "--mode", "lora", "--output_dir", args.output_dir, "--exp_name", name,
            "--n_generations", str(args.n_generations), "--max_new_tokens", str(args.max_new_tokens)]
