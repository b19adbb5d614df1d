"""The message after a soft prompt, what the retriever sees, and the tree that carries both."""

from __future__ import annotations

from dataclasses import dataclass

from modeling.prompts import build_prompt, fit_messages
from trees import Tree


@dataclass(kw_only=True)
class DialogueTree(Tree):
    """A row's runs under every soft prompt, with what the losses of the retriever need.

    retrieval_ids: what the retriever sees. about: the text by which rows count as similar.
    """

    retrieval_ids: list[int]
    about: str


def latest(row: dict, max_turns: int) -> dict:
    """The row with its last 2 * max_turns - 1 turns, so that Person A begins; -1 keeps all."""
    turns = row["context"].strip("\n").split("\n")
    kept = turns if max_turns == -1 else turns[-(2 * max_turns - 1) :]
    return row | {"context": "\n".join(kept)}


def message(row: dict, turns: list[str]) -> str:
    """The user message: who Person B is, and the labelled turns of the dialogue."""
    # the persona is no turn, so it stays when the oldest turns are dropped
    about = "\n".join(row.get("persona", []))
    return (f"About Person B:\n\n{about}\n\n" if about else "") + build_prompt(row, turns=turns)


def prompt_ids(row: dict, tokenizer, args, room: int) -> tuple[list[int] | None, int]:
    """Token ids of a row's message without its soft prompt, and how many turns were dropped.

    room: the tokens that it may have. The ids are None if it does not fit even with one turn.
    """
    row = latest(row, args.max_context_turns)
    # the soft prompt stands before the message, so it takes no part in the template
    prompts, dropped = fit_messages(
        row, lambda turns: [message(row, turns)], tokenizer, args.max_input_length, room)
    return (prompts[0] if prompts else None), dropped


def retrieval_ids(row: dict, tokenizer, args) -> list[int]:
    """Token ids of persona and dialogue: never the reply, nor what all messages have in common."""
    # words that all messages share would make their embeddings more alike
    context = latest(row, args.max_context_turns)["context"]
    text = "\n".join([*row.get("persona", []), context])
    return tokenizer(text, add_special_tokens=False)["input_ids"]
