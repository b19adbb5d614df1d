"""Attributes of a text: scorers, thresholds and values."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from modeling.models import base_fingerprint, model_dir, quiet
from utils import MISSING, USAGE, fail

SLANG = frozenset("""
    ain't bc btw cuz dunno gimme gonna gotta haha hahaha hehe hey imma im ive dont kinda lemme lol nah nope ok okay omg
    pls plz sorta thx tho u ur wanna whatcha ya yall y'all yea yeah yep yo yup""".split())
CONTRACTION = re.compile(r"\b\w+['’](?:s|m|re|ve|ll|d|t)\b", re.I)


class Attribute(NamedTuple):
    """What an attribute is called, from low to high scores, who scores it, and where its values part by default."""

    values: tuple[str, ...]
    scorer: str
    thresholds: tuple[str, ...]  # numbers, or q0.5 for the median of the data


ATTRIBUTES = {
    "toxicity": Attribute(("nontoxic", "toxic"), "alt-profanity-check", ("0.5",)),
    "sentiment": Attribute(("neg", "neu", "pos"), "vaderSentiment", ("-0.05", "0.05")),
    "length": Attribute(("short", "long"), "words", ("q0.5",)),
    "question": Attribute(("statement", "question"), "question", ("0.5",)),
    "formality": Attribute(("casual", "formal"), "formality", ("q0.5",)),
}


def formality(text: str) -> float:
    """Share of six marks of careful writing that a text has, 0 to 1.

    A capital first, a full stop, ! or ? last, no contraction, no slang, no lower-case "i", no shouting (!!, ???, soooo).
    """
    words = re.findall(r"[\w'’]+", text)
    first = next((c for c in text if c.isalnum()), "a")
    marks = (first.isupper() or first.isdigit(), text.rstrip("\"'”’) ")[-1:] in tuple(".!?"),
             not CONTRACTION.search(text), not any(w.casefold().replace("’", "'") in SLANG for w in words),
             "i" not in words, not re.search(r"[!?]{2}|(\w)\1\1", text))
    return sum(marks) / len(marks)


def load_scorer(name: str, checkpoint: str | None = None) -> tuple[Callable[[list[str]], list[float]], str]:
    """(function from texts to one score each, version) of a scorer; dies with 3 where it is not installed."""
    rules = {"words": lambda text: float(len(text.split())), "question": lambda text: float(bool(re.search(r"\?[\"'”’)\s]*$", text))),
             "formality": formality}
    if name in rules:
        return lambda texts: [rules[name](text) for text in texts], "1"
    from importlib.metadata import PackageNotFoundError, version

    if name == "detoxify":
        return load_detoxify(checkpoint)
    package = {"alt-profanity-check": "1.9.1", "vaderSentiment": "3.3.2"}
    if name not in package:
        fail(USAGE, f"scorer {name!r} is unknown", f"one of {', '.join([*rules, *package])}, detoxify")
    try:
        found = version(name)
        if name == "alt-profanity-check":
            from profanity_check import predict_prob

            return lambda texts: [float(p) for p in predict_prob(texts)], found
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        analyzer = SentimentIntensityAnalyzer()
        return lambda texts: [analyzer.polarity_scores(text)["compound"] for text in texts], found
    except (PackageNotFoundError, ImportError):
        fail(MISSING, f"the scorer {name} is not installed", f"pip install {name}=={package[name]}")


def load_detoxify(checkpoint: str | None, batch_size: int = 64) -> tuple[Callable[[list[str]], list[float]], str]:
    """Probability of the label toxic (or toxicity) by a detoxify classifier, and the fingerprint of its weights.

    checkpoint: its folder or hub id, such as unitary/toxic-bert ("original") or unitary/unbiased-toxic-roberta, as
    safetensors; the .ckpt files of the package are pickles, and are not read.
    """
    if not checkpoint or Path(checkpoint).is_file():
        fail(USAGE, f"--detoxify_checkpoint {checkpoint} is no model folder", "a folder or hub id with safetensors, such as unitary/toxic-bert")
    folder = model_dir(checkpoint)
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    quiet()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True).eval()
    places = [i for i, label in model.config.id2label.items() if label in ("toxic", "toxicity")]
    if not places:
        fail(USAGE, f"--detoxify_checkpoint {checkpoint} has no label toxic", f"its labels: {', '.join(model.config.id2label.values())}")

    @torch.no_grad()
    def score(texts: list[str]) -> list[float]:
        found: list[float] = []
        for k in range(0, len(texts), batch_size):
            batch = tokenizer(texts[k : k + batch_size], return_tensors="pt", truncation=True, padding=True)
            found += model(**batch).logits[:, places[0]].sigmoid().tolist()
        return found

    return score, str(base_fingerprint(folder))


def has_letters(text: str) -> bool:
    """Whether there is anything that a scorer could read."""
    return any(c.isalpha() for c in text)


def value_of(score: float, thresholds: Sequence[float], values: Sequence[str]) -> str:
    """The value of a score: values from low to high, one threshold less than values (one or two)."""
    if score <= thresholds[0]:
        return values[0]
    return values[-1] if score >= thresholds[-1] else values[1]


def resolve_thresholds(name: str, given: Sequence[str], scores: Sequence[float]) -> list[float]:
    """Thresholds as numbers; q0.9 is the 0.9 quantile of the scores. Dies over thresholds that leave a value without text."""
    import numpy as np

    values = ATTRIBUTES[name].values
    try:
        found = [float(np.quantile(scores, float(t[1:]), method="lower")) if t.startswith("q") else float(t) for t in given]
    except ValueError:
        fail(USAGE, f"--threshold {name}={','.join(given)} is neither numbers nor quantiles", f"such as {name}=0.5 or {name}=q0.9")
    if len(found) != len(values) - 1 or sorted(found) != found:
        fail(USAGE, f"--threshold {name}={','.join(given)}: {len(values) - 1} rising numbers part {', '.join(values)}")
    labels = [value_of(score, found, values) for score in scores]
    empty = [value for value in values if value not in labels]
    if empty:
        fail(USAGE, f"--threshold {name}={','.join(given)}: no text is {empty[0]}; scores lie in "
                  f"[{min(scores):.3g}, {max(scores):.3g}], the median is {float(np.median(scores)):.3g}",
                  f"a number in between, or a quantile such as {name}=q0.9")
    return found


def values_of(scores: dict[str, float], schema: dict) -> dict[str, str]:
    """The value of every attribute of the schema."""
    return {name: value_of(scores[name], own["thresholds"], own["values"]) for name, own in schema.items()}


def opposite(want: dict[str, str], schema: dict) -> dict[str, str] | None:
    """The condition that asks for the other pole of every attribute; None where a value lies in between."""
    poles = {name: (own["values"][0], own["values"][-1]) for name, own in schema.items()}
    if not want or any(value not in poles[name] for name, value in want.items()):
        return None
    return {name: poles[name][1 - poles[name].index(value)] for name, value in want.items()}


def combinations(options: dict[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every choice of a value, or of none, for each attribute of {name: values}; the first asks for nothing."""
    choices = product(*([None, *values] for values in options.values()))
    return [{name: value for name, value in zip(options, choice, strict=True) if value} for choice in choices]


def write_want(want: dict[str, str]) -> str:
    """A condition in words: toxicity=nontoxic sentiment=pos."""
    return " ".join(f"{name}={value}" for name, value in want.items()) or "no condition"
