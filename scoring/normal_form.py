"""What of a reply is compared with right answers: its first line, in a normal form."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MAX_CHARACTERS = 500  # of a first line; no right answer is longer, and some checks are quadratic


def first_line(text: str) -> str:
    """The first line that is not blank, in NFKC with single spaces.

    A longer one than MAX_CHARACTERS is cut to one character more, by which it can be told.
    """
    line = (text.strip().splitlines() or [""])[0]
    for form in (str, lambda line: unicodedata.normalize("NFKC", line)):
        # cut first: NFKC needs quadratic time for accents without end, and makes text longer
        line = " ".join(form(line).split())[: MAX_CHARACTERS + 1]
    return line


def normalise(text: str) -> str:
    """A reply for comparisons.

    First line, NFKC, lower case, without outer quotes, outer punctuation and leading articles, with
    single spaces. normalise(normalise(text)) is normalise(text).
    """
    return _normalise_line(first_line(text))


@lru_cache(maxsize=100_000)  # the answers of a row are asked for with every reply
def _normalise_line(line: str) -> str:
    before = None
    while line != before:  # quotes may hold an article, and the article quotes
        before, line = line, first_line(line.lower())
        line = re.sub(r"^(?:(?:an?|the) )+(?=.)", "", _without_outer_punctuation(line))
    return line


def _without_outer_punctuation(text: str) -> str:
    start, end = 0, len(text)
    while start < end and _is_outer(text[start]):
        start += 1
    while start < end and _is_outer(text[end - 1]):
        end -= 1
    return text[start:end]


def _is_outer(character: str) -> bool:
    return character in "`´ " or unicodedata.category(character).startswith("P")
