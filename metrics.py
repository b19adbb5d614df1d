"""Diversity metrics and intervals. Pure functions of texts, embeddings and numbers.

Sources: corpus distinct-n and SBERT diversity as in arXiv:2412.03343; distinct-n from Li et al.,
arXiv:1510.03055; yield@k as the number of distinct and coherent responses among k.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

PUNCTUATION = set(string.punctuation) | {"``", "''", "...", "..", "–", "…", "•", "“", "”", "‘", "’"}
SAME_MEANING = 0.8  # cosine of two responses that count as one answer in yield@k


def words(text: str) -> list[str]:
    """Lower-cased NLTK (Penn Treebank) word tokens."""
    from nltk.tokenize import NLTKWordTokenizer

    return [word.lower() for word in NLTKWordTokenizer().tokenize(text)]


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Distinct n-grams over all n-grams of a pool of texts, in (0, 1]; higher is more diverse.

    n-grams that hold a punctuation token do not count, and texts of one token hold none, as published.
    None if there is no n-gram. The score falls as the pool grows: compare pools of one size only.
    """
    grams = []
    for text in texts:
        tokens = words(text)
        if len(tokens) > 1:
            runs = zip(*(tokens[i:] for i in range(n)), strict=False)
            grams += [run for run in runs if not PUNCTUATION & set(run)]
    return len(set(grams)) / len(grams) if grams else None


def mean_distinct_n(groups: Sequence[Sequence[str]], n: int) -> float | None:
    """distinct_n of each prompt's responses, averaged over prompts; does not fall with their number."""
    values = [v for v in (distinct_n(group, n) for group in groups) if v is not None]
    return float(np.mean(values)) if values else None


def pairwise_diversity(embeddings: np.ndarray) -> float | None:
    """1 - mean cosine over the pairs of one prompt's responses; embeddings (N, D) of unit length.

    None for fewer than two responses. Published corpus score = mean over prompts with equal N.
    """
    n = len(embeddings)
    if n < 2:
        return None
    cosine = embeddings @ embeddings.T
    return float(1 - (cosine.sum() - np.trace(cosine)) / (n * (n - 1)))


def num_distinct(embeddings: np.ndarray, texts: Sequence[str], threshold: float = SAME_MEANING) -> int:
    """Number of different answers: connected components where cosine >= threshold or texts are equal.

    Does not depend on the order of the responses.
    """
    n = len(texts)
    cosine = embeddings @ embeddings.T if n else np.zeros((0, 0))
    group = list(range(n))
    for i in range(n):
        for j in range(i):
            if group[i] != group[j] and (cosine[i, j] >= threshold or texts[i] == texts[j]):
                old, new = group[i], group[j]
                group = [new if g == old else g for g in group]
    return len(set(group))


def yield_at_k(texts: Sequence[str], embeddings: np.ndarray, coherent: Sequence[bool]) -> int:
    """How many of k responses are coherent AND different from each other."""
    keep = [i for i, good in enumerate(coherent) if good]
    return num_distinct(embeddings[keep], [texts[i] for i in keep])


def interval(values: Sequence[float], rounds: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % percentile bootstrap interval over prompts: (mean, low, high)."""
    values = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(values), (rounds, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive scores above a negative, ties half (area under the ROC curve)."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positive, negative]))
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
