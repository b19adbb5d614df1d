"""Intervals and tests: by hand, against the libraries, and against plain loops that draw the same.

What was published with this project was drawn by such loops; 1e-12 is the rounding of sums.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score, roc_auc_score

from scoring import statistics
from scoring.evaluated import figure, is_clear, rounded, with_half, with_interval

SAME = {"rel": 1e-12, "abs": 1e-12}


def same(value: dict, mean: float, low: float, high: float) -> None:
    assert list(value) == ["mean", "low", "high"]
    assert list(value.values()) == pytest.approx([mean, low, high], **SAME)


def numbers(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n)


def draws_of(n: int) -> np.ndarray:
    """The rows (2000, n) of 2000 resamples."""
    return np.random.default_rng(0).integers(0, n, (2000, n))


# ---- intervals ----------------------------------------------------------------------------------


def test_an_interval_holds_its_mean_is_reproducible_and_shrinks_with_rows():
    values = numbers(50)
    interval = statistics.interval(values)
    assert interval["low"] < interval["mean"] < interval["high"]
    assert interval["mean"] == pytest.approx(values.mean())
    assert statistics.interval(values) == interval
    narrow = statistics.interval(np.tile(values, 16))
    assert narrow["high"] - narrow["low"] < (interval["high"] - interval["low"]) / 3


def test_equal_values_and_a_single_one_have_an_interval_of_no_width_and_none_has_none():
    assert statistics.interval([2.0] * 9) == figure(2, 2, 2)
    assert statistics.interval([3, None]) == figure(3, 3, 3)
    assert statistics.interval([None]) is None and statistics.interval([]) is None


@pytest.mark.parametrize("n", [2, 7, 40, 300])
def test_intervals_are_those_of_plain_resampling(n):
    values, others = numbers(n), numbers(n, 2)
    means = values[draws_of(n)].mean(1)
    same(statistics.interval(values), values.mean(), *np.percentile(means, [2.5, 97.5]))
    means = (values - others)[draws_of(n)].mean(1)
    same(statistics.paired_difference(values, others), (values - others).mean(),
         *np.percentile(means, [2.5, 97.5]))


def test_groups_are_resampled_whole():
    """40 rows of 7 people: sums and sizes of people are drawn, and the ratio of totals is taken."""
    values, people = numbers(40), np.arange(40) % 7
    sums, sizes = np.bincount(people, values), np.bincount(people)
    draws = draws_of(7)
    means = sums[draws].sum(1) / sizes[draws].sum(1)
    same(statistics.cluster_interval(values, people), values.mean(),
         *np.percentile(means, [2.5, 97.5]))


def test_each_group_is_resampled_within_itself():
    """Three groups of row numbers, drawn one after the other; a group of one row stays as it is."""
    values, groups = numbers(30), [np.arange(7), np.array([9]), np.arange(10, 22)]

    def contrast(a, b, c):
        return float(values[a].mean() - 2 * values[b].mean() + values[c].max())

    rng = np.random.default_rng(0)
    drawn = [contrast(*(group[rng.integers(0, len(group), len(group))] for group in groups))
             for _ in range(2000)]
    same(statistics.bootstrap_within(contrast, *groups), contrast(*groups),
         *np.percentile(drawn, [2.5, 97.5]))
    assert statistics.bootstrap_within(lambda a: float(a[0]), [5]) == figure(5, 5, 5)


def test_a_ratio_of_perplexities_leaves_out_resamples_without_tokens():
    """Two of nine rows of a have tokens: the resamples that hold neither have no perplexity."""
    a = [(2.0 * count, count) for count in (0, 3, 0, 0, 5, 0, 0, 0, 0)]
    b = [(1.0 + i, 2) for i in range(9)]
    (a_nats, a_tokens), (b_nats, b_tokens) = (np.array(x, dtype=float)[draws_of(9)].sum(1).T
                                              for x in (a, b))
    kept = a_tokens > 0
    ratios = np.exp(a_nats[kept] / a_tokens[kept] - b_nats[kept] / b_tokens[kept])
    assert 0 < (~kept).sum() < 400
    same(statistics.perplexity_ratio(a, b), np.exp(2 - 45 / 18),
         *np.percentile(ratios, [2.5, 97.5]))
    assert statistics.perplexity_ratio(a, b[:3]) is None
    assert statistics.perplexity_ratio([(0.0, 0)], [(1.0, 1)]) is None


def test_the_entropys_interval_is_the_estimate_less_the_errors_of_resamples():
    counts = np.array([9, 4, 4, 2, 1])
    draws = np.random.default_rng(0).multinomial(20, counts / 20, 2000)
    errors = [statistics.miller_madow(draw) - statistics.entropy(counts) for draw in draws]
    value = statistics.miller_madow(counts)
    same(statistics.entropy_interval(counts), value,
         *(value - np.percentile(errors, [97.5, 2.5])))
    assert statistics.entropy_interval([0, 0]) is None
    assert statistics.entropy_interval([7])["low"] == 0


def test_a_share_has_the_wilson_interval():
    """3 of 7: (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n) with z = 1.96."""
    z, n, p = 1.959963984540054, 7, 3 / 7
    middle, half = p + z * z / 2 / n, z * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    same(statistics.share_interval(3, 7), p, (middle - half) / (1 + z * z / n),
         (middle + half) / (1 + z * z / n))
    assert statistics.share_interval(0, 0) is None


def test_a_corpus_score_is_jackknifed_by_blocks():
    """Lengths 1 to 4, a block each: leaving one out gives 9, 8, 7, 6; sqrt(3 x 1.25) x 1.96."""
    groups = [["a" * n] for n in (1, 2, 3, 4)]
    value = statistics.jackknife(lambda texts: float(sum(map(len, texts))), groups)
    same(value, 10, 10 - 1.96 * np.sqrt(3.75), 10 + 1.96 * np.sqrt(3.75))
    assert statistics.jackknife(lambda texts: None, groups) is None
    assert statistics.jackknife(lambda texts: 1.0, groups[:1]) == figure(1, 1, 1)


def test_a_paired_difference_uses_the_prompts_where_both_are_defined():
    """3 - 1 and 5 - 2: 2.5 over two prompts; the unpaired means would differ by 4.67 - 4."""
    found = statistics.paired_difference([3, None, 5, 6], [1, 9, 2, None])
    assert found["mean"] == 2.5 and 2 <= found["low"] <= found["high"] <= 3
    assert statistics.paired_difference([None], [1]) is None


def test_pairing_narrows_the_interval():
    """Prompts differ by 0..99, systems by 1 and a little noise: paired it is below 0.1 wide."""
    base = np.arange(100.0)
    better = base + 1 + np.random.default_rng(0).normal(0, 0.1, 100)
    found = statistics.paired_difference(better, base)
    assert 0.9 < found["low"] < 1 < found["high"] < 1.1 and found["high"] - found["low"] < 0.1
    unpaired = statistics.interval(better)
    assert unpaired["high"] - unpaired["low"] > 5


def test_at_matched_coherence_rambling_gains_nothing():
    """a: four coherent responses of two kinds, and six incoherent ones of their own kinds.

    b: the same four, twice, coherent. Kinds of all responses: 8 against 2. Of coherent ones,
    equally many: no difference on average.
    """
    kinds_a, kinds_b, rows = [0, 0, 1, 1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1] * 2, 30
    found = statistics.matched_difference(
        lambda row, keep: len({kinds_a[i] for i in keep}),
        lambda row, keep: len({kinds_b[i] for i in keep}),
        [[True] * 4 + [False] * 6] * rows + [[False] * 10], [[True] * 8] * (rows + 1))
    assert (found["prompts"], found["left_out"], found["responses"]) == (30, 1, 120)
    assert -0.1 < found["difference"]["low"] <= found["difference"]["high"] < 0.2
    nothing = statistics.matched_difference(None, None, [[True]], [[True, True]])
    assert nothing == {"difference": None, "prompts": 0, "left_out": 1, "responses": 0}


# ---- tests and classifiers ----------------------------------------------------------------------


@pytest.mark.parametrize(("counts", "weights"), [
    ([30, 10], [0.5, 0.5]), ([3, 0, 2, 5], [0.1, 0.2, 0.3, 0.4]), ([2, 2, 2], [1, 1, 1]),
    ([0, 1], [0.999, 0.001])])
def test_chi_square_counts_the_simulated_samples_that_are_as_far_off(counts, weights):
    total, shares = sum(counts), np.array(weights) / sum(weights)
    expected = total * shares
    simulated = np.random.default_rng(0).multinomial(total, shares, 10_000)
    distance = ((np.array(counts) - expected) ** 2 / expected).sum()
    as_far = ((simulated - expected) ** 2 / expected).sum(1) >= distance * (1 - 1e-12)
    found = statistics.chi_square(counts, weights)
    assert found["chi_square"] == pytest.approx(distance, **SAME)
    assert found["p_value"] == pytest.approx((1 + as_far.sum()) / 10_001, **SAME)
    assert found["least_expected"] == expected.min() and found["dof"] == len(counts) - 1
    assert statistics.chi_square([0, 0], [1, 1]) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_mutual_information_agrees_with_scikit_learn(pairs):
    x, y = zip(*pairs, strict=True)
    assert statistics.mutual_information(x, y) == pytest.approx(mutual_info_score(x, y), abs=1e-9)


def test_mutual_information_of_many_label_sequences_is_that_of_each():
    rng = np.random.default_rng(0)
    x, many = rng.integers(0, 4, 20), rng.integers(0, 3, (5, 20))
    want = [mutual_info_score(x, y) for y in many]
    np.testing.assert_allclose(statistics.mutual_information(x, many), want, atol=1e-12)


@pytest.mark.parametrize(("positive", "negative", "want"), [
    ([1, 1], [1, 1, 1], 0.5), ([3, 4], [1, 2], 1.0), ([1, 2], [3, 4], 0.0), ([2], [1, 2, 3], 0.5),
    ([0.9, 0.5], [0.5, 0.1], 3.5 / 4)])
def test_auc_is_the_share_of_pairs_in_order(positive, negative, want):
    """The fourth: 2 beats 1, ties with 2, loses to 3: (1 + 0.5 + 0) / 3."""
    assert statistics.auc(positive, negative) == pytest.approx(want, **SAME)
    truth = [1] * len(positive) + [0] * len(negative)
    assert statistics.auc(positive, negative) == roc_auc_score(truth, [*positive, *negative])


def test_f1_and_balanced_accuracy_by_hand():
    """Truth a a a b, found a b None b. a: precision 1, recall 1/3, F1 1/2; b: 1/2, 1, F1 2/3."""
    truth, found = ["a", "a", "a", "b"], ["a", "b", None, "b"]
    assert statistics.macro_f1(truth, found, ["a", "b"]) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert statistics.balanced_accuracy(truth, found) == pytest.approx((1 / 3 + 1) / 2)
    assert statistics.balanced_accuracy(["a", "a"], ["a", None]) == 0.5, "b does not occur"


# ---- how figures are written --------------------------------------------------------------------


def test_figures_are_texts_with_their_interval_and_a_dash_where_there_is_none():
    value = figure(0.1234, 0.1, 0.2)
    assert with_interval(value) == "0.12 [0.10, 0.20]" and with_half(value) == "0.12 ±0.08"
    assert with_interval(value, 1, "+", 100) == "+12.3 [+10.0, +20.0]"
    assert with_interval(figure(2.5), 1) == "2.5" == with_half(figure(2.5), 1)
    assert with_interval(None) == with_half(None) == "—"
    assert with_half(figure(-0.001, -0.1, 0.1), sign="+") == "+0.00 ±0.10", "no minus before a zero"
    assert rounded(figure(0.123456, None, None)) == {"mean": 0.1235, "low": None, "high": None}
    assert is_clear(value) and not is_clear(figure(0, -1, 1)) and not is_clear(None)
    assert not is_clear(figure(2.5)), "without an interval nothing is clear"
