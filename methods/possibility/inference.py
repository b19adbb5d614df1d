"""Drawing from models of possibility exploration fine-tuning, and from untuned ones."""

from __future__ import annotations

from pathlib import Path

from decoding.replies import clean_reply
from methods import defaults
from modeling.prompts import build_prompt, fit_prompts, keep_latest, label_turns
from trees import Tree, branch_prompts


def resolve(args, run: dict) -> dict:
    """The largest possibility number that the model has seen."""
    defaults.same_method(args, run)
    # base models and servers have no run.json; 9 is the published number
    return {"max_pos_number": run["args"].get("max_pos_number", 9)}


load_rows = defaults.read_rows
prepare_rows = defaults.rows_as_they_are


def decode_tree(row: dict, tokenizer, args) -> Tree | None:
    """A row's context with num_branches prompts: a number each for peft, else the same prompt."""
    # the last argument adds a length hint, which only an untuned model needs
    prompts, dropped = fit_prompts(
        row, _numbers(args), tokenizer, args.max_input_length,
        args.max_length - args.max_new_tokens, args.method == "base")
    if not prompts:
        return None
    return Tree(branch_prompts(prompts, list(range(1, args.num_branches + 1))), dropped)


def messages(row: dict, args) -> list[str]:
    """The same prompts as user messages."""
    # only words can be limited here: a server does not say how it counts tokens
    turns = keep_latest(label_turns(row["context"]), args.max_input_length) \
        if "context" in row else None
    return [build_prompt(row, number, args.method == "base", turns) for number in _numbers(args)]


def _numbers(args) -> list[int | None]:
    """Possibility numbers 1, 2, ... for peft, then from 1 again; None for the other methods.

    A number beyond the largest trained one would be a word that the model never saw there.
    """
    # numbers start again only when all are used: under one number, replies are mere samples
    return [i % args.max_pos_number + 1 if args.method == "peft" else None
            for i in range(args.num_branches)]


clean = clean_reply
finish = defaults.next_is_eval
talk = defaults.no_talk


def next_command(args, checkpoint: Path) -> list[str]:
    """The published command for drawing."""
    return ["--model_name_or_path", f"{checkpoint}/", "--num_response_per_input", "5",
            "--method", args.method, "--temperature", "0.75", "--decoding", "sampling",
            "--test_file", "data/test_dialogs.jsonl", "--save_file", f"outs/{args.exp_name}.jsonl"]
