"""Do two responses to one prompt say the same? A logistic regression on features of the pair.

It sees the prompt and the whole of both texts. The coefficients in data/equivalence.json were
fitted by `python -m benchmarks.equivalence --data PAIRS.jsonl --write` on 1,000 pairs of answers
that people labelled as functionally equivalent or not (the set of
github.com/facebookresearch/darling, MIT, not part of this project). Those are long answers of chat
models; for short dialogue replies no labels exist, so read the classes of short replies as this
rule's classes, not as people's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

import utils
from scoring import metrics

FILE = utils.ROOT / "data" / "equivalence.json"
PIECE = 60  # words that are embedded together; the embedder reads 256 tokens at most
START = 15  # words at the beginning of a text that are compared apart
# In the order of pair_features and of the weights in data/equivalence.json.
FEATURES = (
    "cosine", "best matches of pieces", "worst match of pieces", "shared words",
    "shared content words", "shared word pairs", "shared word triples", "ratio of lengths",
    "cosine to the prompt", "shared numbers", "shared names", "shared headings",
    "shared words of the beginning")
WORD = re.compile(r"\w+(?:['’]\w+)*")
NUMBER = re.compile(r"\d[\d.,]*")
NAME = re.compile(r"(?<=[a-z,;] )[A-Z]\w+")  # a capital inside a sentence
HEADING = re.compile(r"\*\*(.+?)\*\*|^#+ (.+)$|^\s*(?:\d+\.|[-*])\s+(.{1,60})", re.MULTILINE)
# Two texts without numbers neither agree nor disagree in their numbers.
UNKNOWN = 0.5  # similarity in what neither text has


def load_classifier(path: Path = FILE) -> dict:
    """mean, scale and weights (13,), bias, threshold; its accuracy, auc and pairs in validation."""
    return json.loads(path.read_text(encoding="utf-8"))


def same_probabilities(prompt: str, texts: list[str], embedder, classifier: dict) -> np.ndarray:
    """Probability (N, N) that two responses to a prompt say the same.

    Symmetric, 1 on the diagonal and for texts of equal wording. Only different texts are compared:
    of a hundred draws from a closed set few are.
    """
    different = list(dict.fromkeys(texts))
    views = [view(text, prompt, embedder) for text in different]
    asked = embed([prompt], embedder)[0].mean(0)
    wordings = [metrics.wording(text) for text in different]
    weights = np.array(classifier["weights"])
    probability = np.eye(len(different))
    for i in range(len(different)):
        for j in range(i):
            p = 1.0  # equal words say the same, whatever the classifier thinks of their marks
            if wordings[i] != wordings[j]:
                x = pair_features(views[i], views[j], asked)
                x = (x - classifier["mean"]) / classifier["scale"]
                p = 1 / (1 + np.exp(-(x @ weights + classifier["bias"])))
            probability[i, j] = probability[j, i] = p
    place = {text: i for i, text in enumerate(different)}
    where = [place[text] for text in texts]
    return probability[np.ix_(where, where)]


def embed(texts: list[str], embedder) -> list[np.ndarray]:
    """Unit vectors (pieces, D) of each text's pieces of PIECE words, so that nothing is cut off."""
    words = [text.split() or [""] for text in texts]
    pieces = [[" ".join(of_text[i : i + PIECE]) for i in range(0, len(of_text), PIECE)]
              for of_text in words]
    vectors = embedder.encode([piece for of_text in pieces for piece in of_text])
    # np.split takes the inner borders alone, hence without the last one.
    return np.split(vectors, np.cumsum([len(of_text) for of_text in pieces])[:-1])


def view(text: str, prompt: str, embedder) -> dict:
    """What the features need of one response."""
    # HEADING has three groups, one for each form of a heading, of which two are empty.
    words, headings = _words(text), _words(" ".join("".join(h) for h in HEADING.findall(text)))
    return {
        "pieces": embed([text], embedder)[0], "length": len(words),
        "words": _runs(words, 1), "pairs": _runs(words, 2), "triples": _runs(words, 3),
        "start": _runs(words[:START], 1),
        # Words of the prompt stand in most answers to it and tell none apart.
        "content": {*words} - ENGLISH_STOP_WORDS - {*_words(prompt)},
        "numbers": {*NUMBER.findall(text)}, "names": {*NAME.findall(text)},
        "headings": {*headings} - ENGLISH_STOP_WORDS}


def pair_features(a: dict, b: dict, asked: np.ndarray) -> np.ndarray:
    """The features (13,) of two views, the same in either order.

    asked: the prompt's mean vector (D,).
    """
    mean_a, mean_b, asked = (v / max(np.linalg.norm(v), 1e-12)
                             for v in (a["pieces"].mean(0), b["pieces"].mean(0), asked))
    # Every piece looks for its nearest one in the other text, since long answers may say the same
    # in another order; the worst match shows what only one of them says.
    matches = a["pieces"] @ b["pieces"].T
    of_a, of_b = matches.max(1), matches.max(0)
    shorter, longer = sorted((a["length"], b["length"]))
    return np.array([
        mean_a @ mean_b, of_a.mean() + of_b.mean(), min(of_a.min(), of_b.min()),
        _overlap(a["words"], b["words"]), _overlap(a["content"], b["content"]),
        _overlap(a["pairs"], b["pairs"]), _overlap(a["triples"], b["triples"]),
        shorter / max(1, longer), (asked @ mean_a + asked @ mean_b) / 2,
        _overlap(a["numbers"], b["numbers"], UNKNOWN), _overlap(a["names"], b["names"], UNKNOWN),
        _overlap(a["headings"], b["headings"], UNKNOWN), _overlap(a["start"], b["start"])])


def _words(text: str) -> list[str]:
    # Not metrics.words: the weights were fitted on these words, others would need a new fit.
    return [word.lower() for word in WORD.findall(text)]


def _runs(words: list[str], n: int) -> set[tuple[str, ...]]:
    return set(zip(*(words[i:] for i in range(n)), strict=False))


def _overlap(a: set, b: set, neither: float = 0.0) -> float:
    """Jaccard index of two sets; `neither` where both are empty."""
    return len(a & b) / len(a | b) if a | b else neither
