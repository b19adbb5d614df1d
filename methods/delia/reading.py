"""Read a reply's verdict: from the wanted line of JSON, or from prose."""

from __future__ import annotations

import json
import re

import utils

LABELS = ("error", "correct")

_NO_FAULT = (
    r"no (?:factual )?(?:error|errors|mistake|mistakes)"
    r"|(?:no|nothing|not|isn't) (?:is )?"
    r"(?:wrong|false|incorrect|inaccurate|mistaken|untrue)"
)
_FAULT = (
    r"error|errors|wrong|wrongly|incorrect|incorrectly|mistake|mistakes|mistaken"
    r"|false|untrue|inaccurate"
    r"|not (?:(?:quite|entirely|factually|completely) )?(?:correct|right|accurate|true)"
)
SAYS_NO_FAULT = re.compile(rf"\b(?:{_NO_FAULT})\b", re.IGNORECASE)
SAYS_ERROR = re.compile(rf"\b(?:{_FAULT})\b", re.IGNORECASE)
SAYS_CORRECT = re.compile(
    r"\b(?:correct|correctly|right|accurate|accurately|true)\b", re.IGNORECASE
)


def read_format(reply: str) -> str | None:
    """The label of a reply that is one line of JSON with exactly the keys thought and label.

    None for any other reply: a code fence, a second line, an empty thought, another label.
    """
    reply = reply.strip()
    try:
        # two labels in one object are no answer; json alone would keep the last one
        answer = json.loads(reply, object_pairs_hook=utils.unique_keys)
    except (ValueError, RecursionError):
        return None
    # JSON itself allows line breaks between keys, but one line is what the task asks for
    if "\n" in reply or not isinstance(answer, dict) or set(answer) != {"thought", "label"}:
        return None
    thought, label = answer["thought"], answer["label"]
    is_good = isinstance(thought, str) and thought.strip() and label in LABELS
    return label if is_good else None


def read_prose(reply: str) -> str | None:
    """The verdict of a reply in words, or None.

    "No error" means correct; any other word of fault means error, even next to words of praise.
    """
    # Denied faults are cut out first, else "there is no error" would hold the word "error".
    rest, num_denied = SAYS_NO_FAULT.subn(" ", reply)
    # faults come before praise: "not quite right" and "right, but with one error" are errors
    if SAYS_ERROR.search(rest):
        return "error"
    return "correct" if num_denied or SAYS_CORRECT.search(rest) else None
