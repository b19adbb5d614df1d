"""Do two responses to one prompt say the same? A logistic regression on thirteen features of the pair.

It sees the prompt and the whole of both texts. The coefficients in data/equivalence.json were fitted by
`python benchmarks/equivalence.py --data PAIRS.jsonl --write` on 1,000 pairs of answers that people labelled
as functionally equivalent or not (the set of github.com/facebookresearch/darling, MIT, not part of this project).
Those are long answers of chat models; for short dialogue replies no labels exist, so read the classes of short
replies as this rule's classes, not as people's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

import utils
from scoring import metrics

FILE = utils.ROOT / "data" / "equivalence.json"
PIECE = 60  # words that are embedded together; the embedder reads 256 tokens at most
FEATURES = ("cosine", "best matches of pieces", "worst match of pieces", "shared words", "shared content words",
            "shared word pairs", "shared word triples", "ratio of lengths", "cosine to the prompt", "shared numbers",
            "shared names", "shared headings", "shared words of the beginning")
WORD = re.compile(r"\w+(?:['’]\w+)*")
NUMBER = re.compile(r"\d[\d.,]*")
NAME = re.compile(r"(?<=[a-z,;] )[A-Z]\w+")  # a capital inside a sentence
HEADING = re.compile(r"\*\*(.+?)\*\*|^#+ (.+)$|^\s*(?:\d+\.|[-*])\s+(.{1,60})", re.MULTILINE)
UNKNOWN = 0.5  # of what neither text has


def load_classifier(path: Path = FILE) -> dict:
    """mean, scale, weights (13,), bias, threshold; and how it did in cross-validation: accuracy, auc, pairs."""
    return json.loads(path.read_text(encoding="utf-8"))


def same_probabilities(prompt: str, texts: list[str], embedder, classifier: dict) -> np.ndarray:
    """Probability (N, N) that two responses to a prompt say the same: symmetric, 1 for equal texts and on the diagonal."""
    views = [view(text, prompt, embedder) for text in texts]
    asked = embed([prompt], embedder)[0].mean(0)
    equal = [metrics.normalise(text) for text in texts]
    probability = np.eye(len(texts))
    for i in range(len(texts)):
        for j in range(i):
            if equal[i] == equal[j]:
                p = 1.0
            else:
                x = (pair_features(views[i], views[j], asked) - classifier["mean"]) / classifier["scale"]
                p = 1 / (1 + np.exp(-(x @ np.array(classifier["weights"]) + classifier["bias"])))
            probability[i, j] = probability[j, i] = p
    return probability


def embed(texts: list[str], embedder) -> list[np.ndarray]:
    """Unit vectors (pieces, D) of each text's pieces of PIECE words, so that nothing of a long text is cut off."""
    words = [text.split() or [""] for text in texts]
    pieces = [[" ".join(w[i : i + PIECE]) for i in range(0, len(w), PIECE)] for w in words]
    vectors = embedder.encode([p for own in pieces for p in own], normalize_embeddings=True, show_progress_bar=False)
    return np.split(vectors, np.cumsum([len(own) for own in pieces])[:-1])


def view(text: str, prompt: str, embedder) -> dict:
    """What the features need of one response."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    def words(part: str) -> list[str]:
        return [word.lower() for word in WORD.findall(part)]

    own, asked = words(text), set(words(prompt))
    headings = words(" ".join(part for found in HEADING.findall(text) for part in found))
    return {"pieces": embed([text], embedder)[0], "words": own, "numbers": set(NUMBER.findall(text)), "names": set(NAME.findall(text)),
            "content": {w for w in own if w not in ENGLISH_STOP_WORDS and w not in asked},
            "headings": {w for w in headings if w not in ENGLISH_STOP_WORDS}}


def pair_features(a: dict, b: dict, asked: np.ndarray) -> np.ndarray:
    """The features (13,) of two views, the same in either order; asked: the prompt's mean vector (D,)."""
    mean_a, mean_b, asked = (v / max(np.linalg.norm(v), 1e-12) for v in (a["pieces"].mean(0), b["pieces"].mean(0), asked))
    matches = a["pieces"] @ b["pieces"].T
    of_a, of_b = matches.max(1), matches.max(0)
    lengths = sorted((len(a["words"]), len(b["words"])))
    return np.array([
        mean_a @ mean_b, of_a.mean() + of_b.mean(), min(of_a.min(), of_b.min()),
        *(overlap(runs(a["words"], n), runs(b["words"], n)) for n in (1,)), overlap(a["content"], b["content"]),
        *(overlap(runs(a["words"], n), runs(b["words"], n)) for n in (2, 3)), lengths[0] / max(1, lengths[1]),
        (asked @ mean_a + asked @ mean_b) / 2, overlap(a["numbers"], b["numbers"], UNKNOWN), overlap(a["names"], b["names"], UNKNOWN),
        overlap(a["headings"], b["headings"], UNKNOWN), overlap(runs(a["words"][:15], 1), runs(b["words"][:15], 1))])


def runs(words: list[str], n: int) -> set[tuple[str, ...]]:
    return set(zip(*(words[i:] for i in range(n)), strict=False))


def overlap(a: set, b: set, neither: float = 0.0) -> float:
    """Jaccard index of two sets; `neither` where both are empty."""
    return len(a & b) / len(a | b) if a | b else neither
