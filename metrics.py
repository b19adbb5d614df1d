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


# ---- distributions over targets -----------------------------------------------------------------
# Exact figures come from the targets' log-probabilities, the others from counts of sampled answers. In nats.


def exact_fit(weights: Sequence[float], logps: Sequence[float]) -> dict[str, float]:
    """How a model's sequence probabilities p of the targets fit the wanted distribution w.

    kl = sum w ln(w / p), infinite where a wanted target has probability 0; outside = 1 - sum p over the wanted targets
    (w > 0), the mass of every other text; tv = (sum |w - p| + outside) / 2; entropy of w, the floor of the loss.
    """
    weights, logps = (np.asarray(x, dtype=float) for x in (weights, logps))
    wanted = weights > 0
    w, logp = weights[wanted], logps[wanted]
    outside = max(0.0, float(1 - np.exp(logp).sum()))  # rounding may bring the sum above 1
    return {"kl": float((w * (np.log(w) - logp)).sum()), "outside": outside,
            "tv": float((np.abs(w - np.exp(logp)).sum() + outside) / 2), "floor": float(-(w * np.log(w)).sum())}


def entropy(counts: Sequence[float]) -> float | None:
    """Entropy of the empirical distribution of counts (the plug-in estimate, biased low); None without counts."""
    counts = np.asarray(counts, dtype=float)
    counts = counts[counts > 0]
    if not len(counts):
        return None
    shares = counts / counts.sum()
    return max(0.0, float(-(shares * np.log(shares)).sum()))


def miller_madow(counts: Sequence[float]) -> float | None:
    """Plug-in entropy + (m - 1) / 2N for m values seen among N (Miller 1955): takes off the bias of first order."""
    plain = entropy(counts)
    if plain is None:
        return None
    counts = np.asarray(counts)
    return float(plain + (np.count_nonzero(counts) - 1) / (2 * counts.sum()))


def entropy_interval(counts: Sequence[int], rounds: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of the Miller-Madow entropy: basic bootstrap over the sampled answers.

    Resamples scatter around the plug-in entropy of what they are drawn from, so their deviations from it are taken
    off the estimate; the percentiles of the resamples themselves would lie too low.
    """
    counts = np.asarray(counts)
    if not counts.sum():
        return None
    draws = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), rounds)
    errors = np.array([miller_madow(draw) for draw in draws]) - entropy(counts)
    low, high = miller_madow(counts) - np.percentile(errors, [97.5, 2.5])
    return max(0.0, float(low)), float(high)


def share_interval(hits: int, total: int) -> tuple[float, float, float] | None:
    """A share with its 95 % Wilson interval; None of nothing."""
    if not total:
        return None
    from scipy.stats import binomtest

    interval = binomtest(hits, total).proportion_ci(method="wilson")
    return hits / total, float(interval.low), float(interval.high)


def chi_square(counts: Sequence[int], weights: Sequence[float], rounds: int = 10_000, seed: int = 0) -> dict | None:
    """Pearson's goodness of fit of counts to a distribution over the same values; None without counts.

    p_value: share of `rounds` simulated samples of that size at least as far off, which also holds where
    expected counts are small. Values of weight 0 must not be counted in.
    """
    counts, weights = np.asarray(counts, dtype=float), np.asarray(weights, dtype=float)
    total = int(counts.sum())
    if not total:
        return None
    expected = total * weights / weights.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    simulated = np.random.default_rng(seed).multinomial(total, weights / weights.sum(), rounds)
    as_far = ((simulated - expected) ** 2 / expected).sum(1) >= statistic * (1 - 1e-12)
    return {"chi_square": statistic, "dof": len(counts) - 1, "p_value": float((1 + as_far.sum()) / (1 + rounds)),
            "least_expected": float(expected.min())}
