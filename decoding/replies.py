"""A reply as it comes from a model, and as it is kept."""

from __future__ import annotations

import re
from typing import NamedTuple

SPEAKER = re.compile(r"^\s*(?:\**Person [AB](?:'s (?:next )?(?:reply|response))?\**\s*:\**|Possibility(?: number)? #?\d+\s*:)\s*", re.I)
NEXT_SPEAKER = re.compile(r"\s*\n+\s*\**(?:Person [AB])\**\s*:.*", re.S)
QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'"})


def clean_reply(text: str) -> str:
    """A reply without speaker labels, outer quotes and line breaks; what it says stays untouched.

    Text from the point where the model starts to speak for the other person is cut. Brackets, dashes,
    emoji and every script are kept. The result may be empty; callers count that.
    """
    text = SPEAKER.sub("", text.translate(QUOTES))
    text = " ".join(NEXT_SPEAKER.sub("", text).split())
    if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        text = text[1:-1].strip()
    return text


class Reply(NamedTuple):
    """A text, its number of tokens (0 where a server does not tell), and whether the token limit cut it."""

    text: str
    tokens: int
    cut: bool
