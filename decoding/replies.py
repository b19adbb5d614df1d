"""A reply as it comes from a model, and as it is kept."""

from __future__ import annotations

import re
from typing import NamedTuple

# Small models answer as a script: "Person B: ...", "Possibility #2: ...".
SPEAKER = re.compile(
    r"^\s*(?:\**Person [AB](?:'s (?:next )?(?:reply|response))?\**\s*:\**"
    r"|Possibility(?: number)? #?\d+\s*:)\s*", re.IGNORECASE)
# They also go on with the other person's next turn.
NEXT_SPEAKER = re.compile(r"\s*\n+\s*\**(?:Person [AB])\**\s*:.*", re.DOTALL)
QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'"})


class Reply(NamedTuple):
    """One text of a model.

    tokens: number of new tokens, 0 where a server does not tell. cut: whether the token limit ended
    it. finish_reason, served_model: as the server names them. total_tokens: prompt and new ones of
    the whole call, 0 where a server does not tell.
    """

    text: str
    tokens: int
    cut: bool
    finish_reason: str = "stop"
    served_model: str = ""
    total_tokens: int = 0


class Drawn(NamedTuple):
    """The responses of one row.

    tokens: new ones of all of them. cut: responses that the token limit ended; cut_at: which ones.
    failed: responses that a server refused. asked, parsed: where the model was asked in words, the
    replies that were requested and those that could be read.
    """

    texts: list[str]
    tokens: int
    cut: int
    cut_at: list[int]
    failed: int
    asked: int = 0
    parsed: int = 0


def clean_reply(text: str) -> str:
    """A reply without speaker labels, outer quotes and line breaks; its words stay untouched.

    Text from the point where the model starts to speak for the other person is cut. Brackets,
    dashes, emoji and every script are kept. The result may be empty; callers count that.
    """
    # plain quotes first: the pair at the ends may be curly
    text = SPEAKER.sub("", text.translate(QUOTES))
    text = " ".join(NEXT_SPEAKER.sub("", text).split())
    # Quotes inside would mean that the outer two need not be a pair: "Yes", he said, "now".
    if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        text = text[1:-1].strip()
    return text
