"""Rows of messages, and their tokens."""

from __future__ import annotations

import json
import re

from jinja2 import TemplateError

import utils
from modeling.prompts import encode_messages

MARK = re.compile(r"<[^\s<>]+>")  # what looks like a token of its own, such as <sep>


def read_messages(path: str, new_tokens: list[str], strict: bool) -> list[dict]:
    """Rows of a messages file with `prompt`, the last user turn, and `file`, their file:line.

    strict: they are task rows, as in check_tokens.
    """
    # tokens are looked for only in rows that are well formed
    rows = utils.read_jsonl(
        path, lambda row: check_messages(row) or check_tokens(row, new_tokens, strict))
    return [{"messages": row["messages"], "prompt": row["messages"][-2]["content"],
             "file": f"{path}:{number}"} for number, row in enumerate(rows, 1)]


def check_messages(row: dict) -> str | None:
    """What is wrong with a row's messages, or None.

    A system turn may come first; then user and assistant alternate, and the assistant comes last.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return f'field "messages" must be a list of turns, got {json.dumps(messages)[:60]}'
    for number, turn in enumerate(messages, 1):
        if not (isinstance(turn, dict) and isinstance(turn.get("role"), str)
                and isinstance(turn.get("content"), str)):
            return f'field "messages": turn {number} needs "role" and "content", both strings'
        if not turn["content"].strip():
            return f'field "messages": turn {number} is empty'
    roles = [turn["role"] for turn in messages]
    first = 1 if roles[0] == "system" else 0
    # many chat templates raise an error where the roles do not alternate
    for place, role in enumerate(roles[first:]):
        expected = ("user", "assistant")[place % 2]
        if role != expected:
            return (f'field "messages": turn {first + place + 1} is by {json.dumps(role)}, '
                    f"its place is the {expected}'s")
    # the loop also accepts a last turn by the user, which leaves nothing to learn
    if roles[-1] != "assistant":
        return 'field "messages": the assistant\'s turn is missing at the end'
    return None


def check_tokens(row: dict, new_tokens: list[str], strict: bool) -> str | None:
    """What is wrong with the <marks> in a row, or None.

    strict: a task row, whose marks must all be new tokens, since a misspelt one would be learnt as
    ordinary text. A diverse row may hold any mark (code, HTML) except a new token.
    """
    for number, turn in enumerate(row["messages"], 1):
        if strict:
            unknown = [mark for mark in MARK.findall(turn["content"]) if mark not in new_tokens]
            if unknown:
                return (f"turn {number} mentions {unknown[0]}, which is none of --new_tokens "
                        f"{' '.join(new_tokens) or '(none given)'}")
        else:
            # the model that wrote the cache did not know the token, so it means nothing there
            mentioned = [token for token in new_tokens if token in turn["content"]]
            if mentioned:
                return (f"turn {number} mentions {mentioned[0]}, a new token; "
                        "diverse rows must not")
    return None


def encode(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of some turns, up to where the reply starts.

    Where the chat template knows no system role, its text opens the first user turn.
    """
    try:
        return encode_messages(tokenizer, messages)
    except TemplateError:  # raise_exception in the template, as Gemma's does over a system turn
        # without a system turn, the template objects to something else
        if messages[0]["role"] != "system":
            raise
        system, first, *rest = messages
        first = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
        return encode_messages(tokenizer, [first, *rest])


def context_of(row: dict) -> list[dict]:
    """The turns before the reply."""
    # test rows end with their reference reply, queries of self-sampling with the user's turn
    messages = row["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages
