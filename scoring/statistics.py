"""Intervals, tests and comparisons. Pure functions of numbers.

Intervals are 95 % and come as figures, {"mean", "low", "high"} (scoring/evaluated.py); what is not
defined is None. They are bootstrap intervals over prompts (rows) unless a function says otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats
from sklearn.metrics import f1_score, recall_score, roc_auc_score

from scoring.evaluated import Figure, figure

# With 2000 resamples each end of a 95 % interval has 50 of them beyond it.
ROUNDS = 2000  # resamples of a bootstrap interval
PERCENTILES = (2.5, 97.5)


# ---- intervals ----------------------------------------------------------------------------------


def bootstrap(statistic: Callable, *columns: Sequence, groups: Sequence | None = None,
              rounds: int = ROUNDS, seed: int = 0) -> Figure:
    """statistic(*columns, axis=-1) of columns of a number per row, with its percentile interval.

    Rows are resampled, the same ones in every column. With groups, a label per row, whole groups
    are resampled, and statistic gets each column's sums per group: it must be a function of sums,
    such as a ratio of totals. Resamples in which it is nan are left out. One row, or one group, has
    an interval of no width.
    """
    data = [np.asarray(column, dtype=float) for column in columns]
    if groups is not None:
        member = np.unique(np.asarray(groups), return_inverse=True)[1]
        # A ratio of totals needs no more than sums, so a group is resampled as one number.
        data = [np.bincount(member, column) for column in data]
    value = float(statistic(*data, axis=-1))
    if len(data[0]) < 2:  # scipy refuses it
        return figure(value, value, value)
    return _with_percentiles(value, data, statistic, rounds, seed, paired=True)


def bootstrap_within(statistic: Callable, *groups: Sequence, rounds: int = ROUNDS,
                     seed: int = 0) -> Figure:
    """statistic(*groups) with its percentile interval, each group resampled within itself.

    For figures that compare groups of rows (asking and others, label by label), whose sizes are
    part of the data's design. A group's values may be row numbers, by which statistic looks up what
    it needs.
    """
    groups = [np.asarray(group) for group in groups]
    value = float(statistic(*groups))
    resampled = [group for group in groups if len(group) > 1]
    if not resampled:
        return figure(value, value, value)

    def of_resample(*drawn, axis):  # scipy refuses groups of one value, which stay as they are
        drawn = iter(drawn)
        return np.array([statistic(*(next(drawn)[0] if len(group) > 1 else group
                                     for group in groups))])

    # batch=1 draws a resample of every group before the next resample of any
    return _with_percentiles(value, resampled, of_resample, rounds, seed, paired=False, batch=1)


def _with_percentiles(value: float, data: list[np.ndarray], statistic: Callable, rounds: int,
                      seed: int, **options) -> Figure:
    """A value with the percentiles of scipy's resamples, which are taken here to leave nan out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # of nan in its interval
        # scipy's own interval is nan as soon as a single resample is, so it is not used.
        found = stats.bootstrap(data, statistic, vectorized=True, n_resamples=rounds,
                                method="percentile", rng=np.random.default_rng(seed), **options)
    low, high = np.nanpercentile(found.bootstrap_distribution, PERCENTILES)
    return figure(value, float(low), float(high))


def interval(values: Sequence[float | None], rounds: int = ROUNDS, seed: int = 0) -> Figure | None:
    """Mean of the values that are defined, with its interval; None if none is."""
    known = [value for value in values if value is not None]
    return bootstrap(np.mean, known, rounds=rounds, seed=seed) if known else None


def cluster_interval(values: Sequence[float | None], groups: Sequence[str], rounds: int = ROUNDS,
                     seed: int = 0) -> Figure | None:
    """The same where whole groups of values are resampled; one group alone has no interval.

    Rows of one person are not independent: their interval over rows would be too narrow.
    """
    known = [(value, group) for value, group in zip(values, groups, strict=True)
             if value is not None]
    if not known:
        return None
    kept, names = zip(*known, strict=True)
    # Groups differ in size, so the mean of a resample is the sum of its values over their number.
    return cluster_ratio(kept, np.ones(len(kept)), names, rounds, seed)


def cluster_ratio(a: Sequence[float], b: Sequence[float], groups: Sequence[str],
                  rounds: int = ROUNDS, seed: int = 0) -> Figure:
    """The sum of a over that of b, where whole groups are resampled; one alone has no interval."""
    if len(set(groups)) == 1:
        return figure(float(np.sum(a) / np.sum(b)))
    return bootstrap(_ratio_of_totals, a, b, groups=groups, rounds=rounds, seed=seed)


def _ratio_of_totals(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    return a.sum(axis) / b.sum(axis)


def paired_difference(a: Sequence[float | None], b: Sequence[float | None], rounds: int = ROUNDS,
                      seed: int = 0) -> Figure | None:
    """Mean of a - b over the prompts where both are defined, with its interval; else None."""
    return interval([None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)],
                    rounds, seed)


def matched_difference(measure_a: Callable, measure_b: Callable,
                       coherent_a: Sequence[Sequence[bool]], coherent_b: Sequence[Sequence[bool]],
                       draws: int = 50, rounds: int = ROUNDS, seed: int = 0) -> dict:
    """The difference a - b of a diversity measure at matched coherence.

    Only coherent responses count, equally many of each system. measure_x(row, keep) is the measure
    of the responses `keep` (indices) of a row; coherent_x[row] has a bool per response. A row
    counts where both systems have two coherent responses or more; of each, as many as the poorer
    one has are drawn at random, `draws` times. So a system gains nothing from incoherent responses,
    nor from having more coherent ones. What it cannot see: the rows left out are the hard ones.
    Returns difference (a figure or None), prompts, left_out, and responses per system.
    """
    rng = np.random.default_rng(seed)
    differences, responses = [], 0
    for row, pair in enumerate(zip(coherent_a, coherent_b, strict=True)):
        coherent = [np.flatnonzero(of_row) for of_row in pair]
        size = min(map(len, coherent))
        if size < 2:
            continue
        means = []
        for measure, indices in zip((measure_a, measure_b), coherent, strict=True):
            # The system with fewer coherent responses has one choice, all of them.
            repeats = 1 if len(indices) == size else draws
            values = [measure(row, sorted(rng.choice(indices, size, replace=False).tolist()))
                      for _ in range(repeats)]
            means.append(None if None in values else float(np.mean(values)))
        if None not in means:
            differences.append(means[0] - means[1])
            responses += size
    return {"difference": interval(differences, rounds, seed), "prompts": len(differences),
            "left_out": len(coherent_a) - len(differences), "responses": responses}


def perplexity_ratio(a: Sequence[tuple[float, int]], b: Sequence[tuple[float, int]],
                     rounds: int = ROUNDS, seed: int = 0) -> Figure | None:
    """Perplexity of a over that of b, with an interval over their rows, which are paired.

    a, b: per row the summed negative log-probability in nats, and its number of tokens. None where
    the rows are not the same, or one of the two has no token.
    """
    if len(a) != len(b) or not sum(count for _, count in a) or not sum(count for _, count in b):
        return None

    def ratio(a_nats, a_tokens, b_nats, b_tokens, axis):
        # Nats and tokens are summed before they are divided: short rows would rule a mean of the
        # rows' perplexities.
        a_tokens, b_tokens = a_tokens.sum(axis), b_tokens.sum(axis)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.exp(a_nats.sum(axis) / a_tokens - b_nats.sum(axis) / b_tokens)
        return np.where((a_tokens > 0) & (b_tokens > 0), found, np.nan)

    return bootstrap(ratio, *zip(*a, strict=True), *zip(*b, strict=True), rounds=rounds, seed=seed)


def share_interval(hits: int, total: int) -> Figure | None:
    """A share with its Wilson interval; None of nothing."""
    if not total:
        return None
    # Wilson's interval stays within 0..1 and keeps its width at a share of 0 or 1.
    ends = stats.binomtest(hits, total).proportion_ci(method="wilson")
    return figure(hits / total, float(ends.low), float(ends.high))


def jackknife(measure: Callable[[list[str]], float | None], groups: Sequence[Sequence[str]],
              blocks: int = 20) -> Figure | None:
    """A corpus score with its interval from leaving out each of `blocks` blocks of prompts.

    No bootstrap: that would repeat prompts, and with them their n-grams, so that every resample
    would score too low.
    """
    def pooled(chosen: list[Sequence[str]]) -> float | None:
        return measure([text for group in chosen for text in group])

    value, blocks = pooled(list(groups)), min(blocks, len(groups))
    if value is None or blocks < 2:
        return None if value is None else figure(value, value, value)
    left = [pooled([group for i, group in enumerate(groups) if i % blocks != block])
            for block in range(blocks)]
    if None in left:
        return figure(value, value, value)
    # The jackknife's variance is (B - 1) / B times the sum of squares, and var divides by B.
    half = float(1.96 * np.sqrt((blocks - 1) * np.var(left)))
    return figure(value, value - half, value + half)


# ---- entropy ------------------------------------------------------------------------------------


def entropy(counts: Sequence[float]) -> float | None:
    """Entropy in nats of the empirical distribution of counts (biased low); None without counts."""
    counts = np.asarray(counts, dtype=float)
    return float(stats.entropy(counts)) + 0.0 if counts.sum() > 0 else None  # + 0.0: never -0


def miller_madow(counts: Sequence[float]) -> float | None:
    """Entropy in nats with its bias of first order taken off (Miller 1955); None without counts.

    The correction is (m - 1) / 2N for m values seen among N.
    """
    plain = entropy(counts)
    if plain is None:
        return None
    counts = np.asarray(counts)
    return float(plain + (np.count_nonzero(counts) - 1) / (2 * counts.sum()))


def entropy_interval(counts: Sequence[int], rounds: int = ROUNDS, seed: int = 0) -> Figure | None:
    """The Miller-Madow entropy in nats, with a basic bootstrap interval over the sampled answers.

    Resamples scatter around the entropy without correction of what they are drawn from, so their
    deviations from it are taken off the estimate; their own percentiles would lie too low, and so
    would scipy's basic interval, which centres them on the corrected estimate. The counts of a
    resample are drawn at once (multinomial), which is the same as drawing its answers, and cheaper.
    """
    counts = np.asarray(counts)
    if not counts.sum():
        return None
    draws = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), rounds)
    # A resample may miss values that were seen, so each has a correction of its own.
    corrections = (np.count_nonzero(draws, axis=1) - 1) / (2 * counts.sum())
    errors = stats.entropy(draws, axis=1) + corrections - entropy(counts)
    value = miller_madow(counts)
    # The interval is turned round: where resamples lie too high, the estimate probably does, too.
    low, high = value - np.percentile(errors, PERCENTILES[::-1])
    return figure(value, max(0.0, float(low)), float(high))


def mutual_information(x: Sequence[int], y: Sequence[int] | np.ndarray) -> float | np.ndarray:
    """Mutual information in nats of paired labels, from their frequencies (biased upwards).

    x: (N,) labels; y: (N,), or (..., N) for as many values. H(x) + H(y) - H(x, y); scikit-learn's
    function takes one pair of sequences a call, and is too slow for a permutation test.
    """
    x, y = np.unique(np.asarray(x), return_inverse=True)[1], np.asarray(y)
    values, y = np.unique(y, return_inverse=True)
    # numpy's versions differ in the shape of the inverse of an array with several dimensions.
    y = y.reshape(np.shape(y) if y.ndim > 1 else (-1,))
    # Counts (..., labels of x, labels of y), from one-hot codes.
    joint = np.einsum("nk,...nc->...kc", np.eye(x.max() + 1)[x], np.eye(len(values))[y])
    found = (stats.entropy(joint.sum(-1), axis=-1) + stats.entropy(joint.sum(-2), axis=-1)
             - stats.entropy(joint.reshape(*joint.shape[:-2], -1), axis=-1))
    return float(found) if found.ndim == 0 else found


# ---- tests and classifiers ----------------------------------------------------------------------


def chi_square(counts: Sequence[int], weights: Sequence[float], rounds: int = 10_000,
               seed: int = 0) -> dict | None:
    """Pearson's goodness of fit of counts to a distribution over the same values.

    p_value: share of `rounds` simulated samples of that size at least as far off, which also holds
    where expected counts are small. Values of weight 0 must not be counted in. None without counts.
    """
    counts, weights = np.asarray(counts, dtype=float), np.asarray(weights, dtype=float)
    total = int(counts.sum())
    if not total:
        return None
    shares = weights / weights.sum()
    expected = total * shares
    rng = np.random.default_rng(seed)
    result = stats.monte_carlo_test(
        # Only a large statistic speaks against the fit, hence the one-sided test.
        counts, lambda size: rng.multinomial(total, shares, size[0]),
        lambda observed, axis: stats.chisquare(observed, expected, axis=axis).statistic,
        vectorized=True, n_resamples=rounds, alternative="greater")
    return {"chi_square": float(result.statistic), "dof": len(counts) - 1,
            "p_value": float(result.pvalue), "least_expected": float(expected.min())}


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive scores above a negative, ties half (area under the ROC curve)."""
    truth = np.repeat([1, 0], [len(positive), len(negative)])
    return float(roc_auc_score(truth, np.concatenate([positive, negative])))


def macro_f1(truth: Sequence[str], found: Sequence[str | None], labels: Sequence[str]) -> float:
    """Mean F1 of the labels; an answer that is None was found as none of them."""
    return float(f1_score(_texts(truth), _texts(found), labels=list(labels), average="macro",
                          zero_division=0))


def balanced_accuracy(truth: Sequence[str], found: Sequence[str | None]) -> float:
    """Mean of the accuracies within each label that occurs; an answer that is None is wrong.

    0.5 for two labels by chance, and for one label always.
    """
    truth = _texts(truth)
    # Without labels, answers that no row has as its truth would enter as labels of recall 0.
    return float(recall_score(truth, _texts(found), labels=np.unique(truth), average="macro",
                              zero_division=0))


def _texts(labels: Sequence[str | None]) -> np.ndarray:
    # scikit-learn sorts the labels, and None does not compare with text.
    return np.array(["" if label is None else label for label in labels], dtype=str)
