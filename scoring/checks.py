"""What can be wrong with the texts and rows of a data file, one fault a function.

data/check.py reports on whole files with them; the tools that make data drop what they find. What
they cannot do: the language check is a heuristic (see `english_share`), profanity is a score for
offensive words that is biased against identity terms, and personal data is found by its form alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

import utils

# 16 of 15,201 harmless hand-written texts reach 0.9, none 0.98; strong profanity is above 0.99
MAX_PROFANITY = 0.98
SUSPECT_PROFANITY = 0.5
PERSONAL_DATA = {
    "an e-mail address": re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]*\w"),
    "a URL": re.compile(
        r"https?://\S+|\bwww\.\S+|\b[\w-]+\.(?:com|org|net|edu|gov|io)\b", re.IGNORECASE),
    "a card-like number": re.compile(r"(?<![\d.])(?:\d[ -]?){12,18}\d(?!\d)"),
    "a phone number": re.compile(
        # +44 20 7946 0958
        r"(?<![\w.])(?<!\d )(?:\+\d{1,3}(?:[ .-]?\(?\d{2,4}\)?){2,5}"
        # (801) 555-0123, 8015550123
        r"|(?:1[ .-])?\(?\d{3}\)?[ .-]?\d{3}[ .-]?\d{4}"
        # 020 7946 0958
        r"|0[1-9]\d{1,3}[ /-]\d{3,}(?:[ -]\d{2,})*"
        # 555-0123; no exchange starts with 0 or 1
        r"|[2-9]\d\d-\d{4})(?![\w-]|\.\d)"),
}
SPEAKER_LABEL = re.compile(
    r"^\W*(?:(?i:person|speaker|participant) ?\w\b"
    r"|(?i:user|assistant|human|bot|system)|[AB])\W{0,2}:|<speaker ?\d>", re.MULTILINE)
# Common words of English that its neighbours do not have (so not: a, in, me, was, will, is, on).
ENGLISH_WORDS = frozenset("""
    about after and any are because been before being can't could did didn't does don't down have
    he's here his how i'd i'll i'm i've isn't it it's let's may might mine my our out shall she
    she's some than that that's the their then these they they're this those too up very we'll
    we're were what what's when which why with without would you you'll you're your
    yours""".split())
# talk has 0.12 to 0.4; lists and headlines have few such words
MIN_ENGLISH = {"context": 0.08, "prompt": 0.02}
MIN_ENGLISH_LENGTH = 30  # words; a shorter text may hold none by chance
MIN_ASCII = 0.8  # of one text's letters


def find_personal_data(text: str) -> str | None:
    """What a text holds that looks like personal data ("an e-mail address: x@y.z"), or None."""
    for name, pattern in PERSONAL_DATA.items():
        if match := pattern.search(text):
            return f"{name}: {match[0].strip()}"
    return None


def english_share(text: str) -> tuple[float, int]:
    """Share of words that are common and distinctly English ones, and the number of words.

    A heuristic without a model: English talk lies near 0.3, other languages at 0. It cannot see one
    foreign reply among six English ones unless that is in another script.
    """
    found = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.casefold().replace("’", "'"))
    return sum(word in ENGLISH_WORDS for word in found) / max(len(found), 1), len(found)


def ascii_share(text: str) -> float:
    """Share of a text's letters that are ASCII; 1 for a text without letters."""
    letters = [c for c in text if c.isalpha()]
    return sum(c.isascii() for c in letters) / len(letters) if letters else 1.0


def opening(text: str) -> str:
    """The first three words, lower case, without punctuation."""
    return " ".join(re.findall(r"[\w']+", text.casefold().replace("’", "'"))[:3])


def profanity_scores(texts: Sequence[str]) -> np.ndarray | None:
    """Probability of offensive language (N,) by alt-profanity-check; None if not installed.

    A linear model over words: quick, and biased. "I am gay" scores 0.98, "I am a Muslim woman"
    0.30, "damn it" 0.98. Only a high score is evidence, and a person should read each hit.
    """
    try:
        from profanity_check import predict_prob  # here, since the other checks do without
    except ImportError:
        return None
    return predict_prob(texts)


# ---- rows ---------------------------------------------------------------------------------------


def kind_of(row: dict) -> str:
    return "context" if "context" in row else "prompt"


def turns_of(row: dict) -> list[str]:
    """The turns of a context; a prompt is one turn."""
    return row["context"].split("\n") if "context" in row else [row["prompt"]]


def texts_of(row: dict) -> Iterator[tuple[str, str]]:
    """Every text of a row with its name: ("turn 1", ...), ("candidate 1", ...)."""
    for name, texts in (("turn", turns_of(row)), ("candidate", row["candidates"])):
        for number, text in enumerate(texts, 1):
            yield f"{name} {number}", text


def short(text: str) -> str:
    """A text as it is shown in a message."""
    text = " ".join(text.split())
    return json.dumps(text if len(text) <= 70 else text[:67] + "...", ensure_ascii=False)


def check_row(row: dict, args) -> Iterator[tuple[str, str]]:
    """What is wrong with one row on its own: (kind, what)."""
    turns, candidates = turns_of(row), row["candidates"]
    if len(candidates) < args.min_candidates:
        yield "num_candidates", (f"{len(candidates)} candidates, "
                                 f"--min_candidates is {args.min_candidates}")
    if "context" in row:
        if not args.min_turns <= len(turns) <= args.max_turns:
            yield "turns", f"{len(turns)} turns, not {args.min_turns} to {args.max_turns}"
        if not all(turn.strip() for turn in turns):
            empty = [bool(turn.strip()) for turn in turns].index(False) + 1
            yield "turns", f"turn {empty} is empty"
        for number, text in enumerate(candidates, 1):
            if not args.min_words <= (num_words := len(text.split())) <= args.max_words:
                yield "length", (f"candidate {number} has {num_words} words, "
                                 f"not {args.min_words} to {args.max_words}: {short(text)}")
    for name, text in texts_of(row):
        if SPEAKER_LABEL.search(text) and ("context" in row or name.startswith("candidate")):
            yield "speaker_label", f"{name} holds a speaker label: {short(text)}"
        if found := find_personal_data(text):
            yield "personal_data", f"{name} holds {found}"
        if not args.any_language and ascii_share(text) < MIN_ASCII:
            yield "language", f"{name} has {ascii_share(text):.0%} ASCII letters: {short(text)}"
    sides = [" ".join(turns), " ".join(candidates)]
    for text in sides if "context" in row else [" ".join(sides)]:
        share, num_words = english_share(text)
        few = num_words >= MIN_ENGLISH_LENGTH and share < MIN_ENGLISH[kind_of(row)]
        if few and not args.any_language:
            yield "language", f"has {share:.0%} common English words: {short(text)}"


# ---- texts that repeat each other ---------------------------------------------------------------


def embed(texts: list[str], embedder, what: str) -> np.ndarray:
    """Sentence embeddings (N, D) of unit length, with a bar; texts beyond 256 tokens are cut."""
    starts = tqdm(range(0, len(texts), 256), desc=f"embed {what}", unit="batch")
    return np.concatenate([embedder.encode(texts[i : i + 256]) for i in starts])


def find_duplicates(texts: Sequence[str], vectors: np.ndarray,
                    cosine: float) -> list[tuple[int, int, float | None]]:
    """(later, earlier, cosine) for every text that repeats an earlier one.

    cosine is None where they are equal after utils.normalise. vectors: (N, D) of unit length. N dot
    products of growing length, so a second for 5,000 texts.
    """
    seen: dict[str, int] = {}
    repeats: list[tuple[int, int, float | None]] = []
    for i, text in enumerate(texts):
        key = utils.normalise(text)
        if key in seen:
            repeats.append((i, seen[key], None))
        elif i:
            similar = vectors[:i] @ vectors[i]
            j = int(similar.argmax())
            value = min(float(similar[j]), 1.0)  # rounding may carry a cosine above 1
            if value > cosine:
                repeats.append((i, j, value))
        seen.setdefault(key, i)
    return repeats
