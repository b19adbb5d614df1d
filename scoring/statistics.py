"""Intervals, tests and comparisons. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def jackknife(measure, groups: list[list[str]], blocks: int = 20) -> tuple[float, float, float] | None:
    """A corpus score with its 95 % interval from leaving out each of `blocks` blocks of prompts.

    A bootstrap would repeat prompts, and with them their own n-grams: every draw would score too low.
    """
    pooled = lambda chosen: measure([text for group in chosen for text in group])  # noqa: E731
    value, blocks = pooled(groups), min(blocks, len(groups))
    if value is None or blocks < 2:
        return value and (value, value, value)
    left = [pooled([g for i, g in enumerate(groups) if i % blocks != b]) for b in range(blocks)]
    if None in left:
        return value, value, value
    half = 1.96 * np.sqrt((blocks - 1) * np.var(left))
    return value, value - half, value + half


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


def mutual_information(x: Sequence[int], y: Sequence[int]) -> float:
    """Mutual information of two paired label sequences in nats, from their frequencies (biased upwards)."""
    _, x = np.unique(x, return_inverse=True)
    _, y = np.unique(y, return_inverse=True)
    joint = np.zeros((x.max() + 1, y.max() + 1))
    np.add.at(joint, (x, y), 1 / len(x))
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    cells = joint > 0
    return float((joint[cells] * np.log(joint[cells] / independent[cells])).sum())


def paired_difference(a: Sequence[float | None], b: Sequence[float | None], rounds: int = 2000,
                      seed: int = 0) -> tuple[float, float, float, int] | None:
    """Mean of a - b over the prompts where both are defined, its 95 % bootstrap interval, and their number."""
    pairs = [x - y for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return (*interval(pairs, rounds, seed), len(pairs)) if pairs else None


def matched_difference(measure_a, measure_b, coherent_a: Sequence[Sequence[bool]], coherent_b: Sequence[Sequence[bool]],
                       draws: int = 50, rounds: int = 2000, seed: int = 0) -> dict:
    """The difference a - b of a diversity measure at matched coherence: coherent responses only, equally many of each.

    measure_x(row, keep) is the measure of the responses `keep` (indices) of a row; coherent_x[row] has a bool per
    response. A row counts where both systems have two coherent responses or more; of each, as many as the poorer one
    has are drawn at random, `draws` times. So a system gains nothing from incoherent responses, nor from having more
    coherent ones. What it cannot see: the rows that are left out (counted) are the hard ones.
    Returns difference ([mean, low, high] or None), prompts, left_out, and responses per system.
    """
    rng = np.random.default_rng(seed)
    differences, responses = [], 0
    for row, pair in enumerate(zip(coherent_a, coherent_b, strict=True)):
        good = [np.flatnonzero(c) for c in pair]
        size = min(map(len, good))
        if size < 2:
            continue
        found = []
        for measure, own in zip((measure_a, measure_b), good, strict=True):
            repeats = 1 if len(own) == size else draws
            values = [measure(row, sorted(rng.choice(own, size, replace=False).tolist())) for _ in range(repeats)]
            found.append(None if None in values else float(np.mean(values)))
        if None not in found:
            differences.append(found[0] - found[1])
            responses += size
    return {"difference": list(interval(differences, rounds, seed)) if differences else None, "prompts": len(differences),
            "left_out": len(coherent_a) - len(differences), "responses": responses}


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


def cluster_interval(values: Sequence[float], groups: Sequence[str], rounds: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % percentile bootstrap interval where whole groups of values are drawn: (mean, low, high).

    Rows of one person are not independent: their interval over rows would be too narrow.
    """
    values = np.asarray(values, dtype=float)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    sums, sizes = np.bincount(member, values), np.bincount(member)
    draws = np.random.default_rng(seed).integers(0, len(names), (rounds, len(names)))
    low, high = np.percentile(sums[draws].sum(1) / sizes[draws].sum(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
