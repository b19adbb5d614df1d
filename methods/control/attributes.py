"""Attributes of a text: scorers, thresholds and values, for training data and for replies alike.

| attribute | values              | scorer                                                       |
| toxicity  | nontoxic, toxic     | alt-profanity-check, probability of offensive language; or a |
|           |                     | detoxify classifier                                          |
| sentiment | neg, neu, pos       | VADER compound, -1 to 1                                      |
| length    | short, long         | words                                                        |
| question  | statement, question | 1 if the text ends in a question mark, else 0                |
| formality | casual, formal      | by rule, see `formality`                                     |

A schema says how texts were labelled: {attribute: {"values", "thresholds", "scorer", "version"}}.
Training and evaluation read it from one manifest, so scorer and thresholds cannot differ. With one
threshold t a text is low if score <= t, else high; with two, low if score <= t1, high if
score >= t2, else in between.

alt-profanity-check is a linear model over words: it scores offensive language, not harm, and it is
biased against identity terms ("I am gay" scores 0.98, "I am a Muslim woman" 0.30).
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from utils import MISSING, USAGE, fail

Scorer = Callable[[list[str]], list[float]]  # from texts to one score each

# the list also has contractions without their apostrophe, such as dont
SLANG = frozenset("""
    ain't bc btw cuz dunno gimme gonna gotta haha hahaha hehe hey imma im ive dont kinda lemme lol
    nah nope ok okay omg pls plz sorta thx tho u ur wanna whatcha ya yall y'all yea yeah yep yo
    yup""".split())
CONTRACTION = re.compile(r"\b\w+['’](?:s|m|re|ve|ll|d|t)\b", re.I)
QUESTION = re.compile(r"\?[\"'”’)\s]*$")


class Attribute(NamedTuple):
    """An attribute's values from low to high scores, its scorer, and its default thresholds."""

    values: tuple[str, ...]
    scorer: str
    thresholds: tuple[str, ...]  # numbers, or q0.5 for the median of the data


# VADER's authors recommend -0.05 and 0.05 for its compound score. Length and formality have no
# natural border, so the median of the data parts them.
ATTRIBUTES = {
    "toxicity": Attribute(("nontoxic", "toxic"), "alt-profanity-check", ("0.5",)),
    "sentiment": Attribute(("neg", "neu", "pos"), "vaderSentiment", ("-0.05", "0.05")),
    "length": Attribute(("short", "long"), "words", ("q0.5",)),
    "question": Attribute(("statement", "question"), "question", ("0.5",)),
    "formality": Attribute(("casual", "formal"), "formality", ("q0.5",)),
}


# ---- scorers ------------------------------------------------------------------------------------


def formality(text: str) -> float:
    """Share of six marks of careful writing that a text has, 0 to 1.

    A capital first, a full stop, ! or ? last, no contraction, no slang, no lower-case "i", no
    shouting (!!, ???, soooo).
    """
    words = re.findall(r"[\w'’]+", text)
    first = next((c for c in text if c.isalnum()), "a")
    marks = (
        first.isupper() or first.isdigit(),
        # the marks are a tuple, since "" is in every string and quotes alone would pass
        text.rstrip("\"'”’) ")[-1:] in tuple(".!?"),
        not CONTRACTION.search(text),
        not any(word.casefold().replace("’", "'") in SLANG for word in words),
        "i" not in words,
        not re.search(r"[!?]{2}|(\w)\1\1", text))
    return sum(marks) / len(marks)


RULES = {
    "words": lambda text: float(len(text.split())),
    "question": lambda text: float(bool(QUESTION.search(text))),
    "formality": formality,
}
PACKAGES = {"alt-profanity-check": "1.9.1", "vaderSentiment": "3.3.2"}  # scorers by their versions


def load_scorer(name: str, checkpoint: str | None = None) -> tuple[Scorer, str]:
    """A scorer and its version; exits with MISSING where its package is not installed.

    checkpoint: the model of the scorer detoxify.
    """
    # a changed rule needs another version than "1": evaluation compares it with the manifest
    if name in RULES:
        return lambda texts: [RULES[name](text) for text in texts], "1"
    if name == "detoxify":
        from methods.control.detoxify import load_detoxify  # torch, which no other scorer needs

        return load_detoxify(checkpoint)
    if name not in PACKAGES:
        fail(USAGE, f"scorer {name!r} is unknown",
             f"one of {', '.join([*RULES, *PACKAGES])}, detoxify")
    try:
        version = importlib.metadata.version(name)
        return (_profanity() if name == "alt-profanity-check" else _vader()), version
    except ImportError:  # also PackageNotFoundError
        fail(MISSING, f"the scorer {name} is not installed",
             f"pip install {name}=={PACKAGES[name]}")


def _profanity() -> Scorer:
    """The probability of offensive language."""
    from profanity_check import predict_prob  # optional

    return lambda texts: [float(p) for p in predict_prob(texts)]


def _vader() -> Scorer:
    """The compound sentiment, -1 to 1."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # optional

    analyzer = SentimentIntensityAnalyzer()
    return lambda texts: [analyzer.polarity_scores(text)["compound"] for text in texts]


def has_letters(text: str) -> bool:
    """Whether there is anything that a scorer could read."""
    return any(c.isalpha() for c in text)


# ---- thresholds and values ----------------------------------------------------------------------


def value_of(score: float, thresholds: Sequence[float], values: Sequence[str]) -> str:
    """The value of a score; values from low to high, one more than thresholds (one or two)."""
    if score <= thresholds[0]:
        return values[0]
    # with a single threshold the score is above it here, so there is no value in between
    return values[-1] if score >= thresholds[-1] else values[1]


def values_of(scores: dict[str, float], schema: dict) -> dict[str, str]:
    """The value of every attribute of the schema."""
    return {name: value_of(scores[name], labels["thresholds"], labels["values"])
            for name, labels in schema.items()}


def resolve_thresholds(name: str, given: Sequence[str], scores: Sequence[float]) -> list[float]:
    """Thresholds as numbers; q0.9 is the 0.9 quantile of the scores.

    Exits over thresholds that leave a value without text.
    """
    values, flag = ATTRIBUTES[name].values, f"--threshold {name}={','.join(given)}"
    try:
        # method "lower" takes a score that occurs: a median of word counts stays a whole number
        thresholds = [float(np.quantile(scores, float(t[1:]), method="lower"))
                      if t.startswith("q") else float(t) for t in given]
    # numpy raises the same error for quantiles outside 0 to 1
    except ValueError:
        fail(USAGE, f"{flag} is neither numbers nor quantiles",
             f"such as {name}=0.5 or {name}=q0.9")
    if len(thresholds) != len(values) - 1 or sorted(thresholds) != thresholds:
        fail(USAGE, f"{flag}: {len(values) - 1} rising numbers part {', '.join(values)}")
    labels = {value_of(score, thresholds, values) for score in scores}
    # the token of a value without texts would never be trained
    empty = [value for value in values if value not in labels]
    if empty:
        fail(USAGE, f"{flag}: no text is {empty[0]}; scores lie in [{min(scores):.3g}, "
                    f"{max(scores):.3g}], the median is {float(np.median(scores)):.3g}",
             f"a number in between, or a quantile such as {name}=q0.9")
    return thresholds


# ---- conditions ---------------------------------------------------------------------------------


def opposite(condition: dict[str, str], schema: dict) -> dict[str, str] | None:
    """The condition with the other pole of every attribute; None where a value lies in between."""
    poles = {name: (labels["values"][0], labels["values"][-1]) for name, labels in schema.items()}
    if not condition or any(value not in poles[name] for name, value in condition.items()):
        return None
    return {name: poles[name][1 - poles[name].index(value)] for name, value in condition.items()}


def combinations(options: dict[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every choice of a value, or of none, for each attribute of {name: values}.

    The first is no condition at all.
    """
    choices = product(*([None, *values] for values in options.values()))
    return [{name: value for name, value in zip(options, choice, strict=True) if value}
            for choice in choices]


def write_condition(condition: dict[str, str]) -> str:
    """A condition in words: toxicity=nontoxic sentiment=pos."""
    return " ".join(f"{name}={value}" for name, value in condition.items()) or "no condition"
