"""Read a reply's verdict: in the wanted line of JSON, or in prose."""

from __future__ import annotations

import json
import re

import utils

LABELS = ("error", "correct")
SAYS_ERROR = re.compile(r"\b(?:error|errors|wrong|wrongly|incorrect|incorrectly|mistake|mistakes|mistaken|false|untrue|inaccurate"
                        r"|not (?:(?:quite|entirely|factually|completely) )?(?:correct|right|accurate|true))\b", re.IGNORECASE)
SAYS_CORRECT = re.compile(r"\b(?:correct|correctly|right|accurate|accurately|true|no (?:factual )?(?:error|errors|mistake|mistakes)"
                          r"|(?:no|nothing|not|isn't) (?:is )?(?:wrong|false|incorrect|inaccurate|mistaken|untrue))\b", re.IGNORECASE)
NO_FAULT = re.compile(r"\b(?:no (?:factual )?(?:error|errors|mistake|mistakes)|(?:no|nothing|not|isn't) (?:is )?"
                      r"(?:wrong|false|incorrect|inaccurate|mistaken|untrue))\b", re.IGNORECASE)


def read_format(reply: str) -> str | None:
    """The label of a reply that is one line of JSON with exactly the keys thought and label, else None."""
    reply = reply.strip()
    try:
        found = json.loads(reply, object_pairs_hook=utils.unique_keys)
    except (ValueError, RecursionError):
        return None
    if "\n" in reply or not isinstance(found, dict) or set(found) != {"thought", "label"}:
        return None
    good = isinstance(found["thought"], str) and found["thought"].strip() and found["label"] in LABELS
    return found["label"] if good else None


def read_prose(reply: str) -> str | None:
    """The verdict of a reply in words, or None: "no error" is correct, any other word of fault is an error."""
    rest, cleared = NO_FAULT.subn(" ", reply)
    if SAYS_ERROR.search(rest):
        return "error"
    return "correct" if cleared or SAYS_CORRECT.search(rest) else None
