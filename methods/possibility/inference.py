"""Prompts for drawing from models of possibility exploration fine-tuning."""

from __future__ import annotations

from modeling.prompts import build_prompt, fit_prompts, keep_latest, label_turns


def decode_tree(row: dict, tokenizer, args):
    """A row's context with num_branches prompts: a number each for peft, the same prompt for the others."""
    from trees import Tree, branch_prompts

    prompts, dropped = fit_prompts(row, numbers_of(args), tokenizer, args.max_input_length,
                                         args.max_length - args.max_new_tokens, args.method == "base")
    if not prompts:
        return None
    return Tree(branch_prompts(prompts, list(range(1, args.num_branches + 1))), dropped)


def decode_messages(row: dict, args) -> list[str]:
    """The same prompts as user messages, for a server."""
    turns = keep_latest(label_turns(row["context"]), args.max_input_length) if "context" in row else None
    return [build_prompt(row, number, args.method == "base", turns) for number in numbers_of(args)]


def numbers_of(args) -> list[int | None]:
    """Possibility numbers 1, 2, ... for peft, from 1 again after the largest trained one; None for the others."""
    return [i % args.max_pos_number + 1 if args.method == "peft" else None for i in range(args.num_branches)]
