"""What a soft prompt stands before, and what the retriever sees."""

from __future__ import annotations

from modeling.prompts import build_prompt, fit_messages


def latest(row: dict, max_turns: int) -> dict:
    """The row with its last 2n - 1 turns, so that the first of them is Person A's."""
    turns = row["context"].strip("\n").split("\n")
    return row | {"context": "\n".join(turns if max_turns == -1 else turns[-(2 * max_turns - 1) :])}


def message(row: dict, turns: list[str]) -> str:
    """The user message: who Person B is, and the dialogue."""
    about = "\n".join(row.get("persona", []))
    return (f"About Person B:\n\n{about}\n\n" if about else "") + build_prompt(row, turns=turns)


def prompt_ids(row: dict, tokenizer, args, room: int) -> tuple[list[int] | None, int]:
    """Token ids of a row's message without its soft prompt, and how many turns went; None if it does not fit."""
    row = latest(row, args.max_context_turns)
    prompts, dropped = fit_messages(row, lambda turns: [message(row, turns)], tokenizer, args.max_input_length, room)
    return (prompts[0] if prompts else None), dropped


def retrieval_ids(row: dict, tokenizer, args) -> list[int]:
    """What the retriever sees: persona and dialogue, never the reply, nor what all messages have in common."""
    text = "\n".join([*row.get("persona", []), latest(row, args.max_context_turns)["context"]])
    return tokenizer(text, add_special_tokens=False)["input_ids"]
