"""Metrics worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import metrics

E = np.eye(4)


@pytest.mark.parametrize(("texts", "n", "want"), [
    (["a b a"], 1, 2 / 3),  # a, b, a
    (["a b a"], 2, 1.0),  # a-b, b-a
    (["a b", "A b"], 1, 0.5),  # lower-cased, pooled over texts
    (["a, b, c"], 1, 1.0),  # a, b, c; with the commas it would be 4/5
    (["a b, b, b"], 2, 1.0),  # a-b only: b-, and ,-b come twice but hold punctuation
    (["a b ?"], 3, None),  # the only run of three holds punctuation
    (["b", "b c"], 1, 1.0),  # b, c: a text of one token gives nothing
    (["a b c"], 4, None),
    (["a", ""], 1, None),
    ([], 2, None),
])
def test_distinct_n_by_hand(texts, n, want):
    assert metrics.distinct_n(texts, n) == (want if want is None else pytest.approx(want))


@given(st.lists(st.text(alphabet="ab ,.é漢", max_size=20), max_size=6), st.integers(1, 3))
def test_distinct_n_stays_between_0_and_1(texts, n):
    value = metrics.distinct_n(texts, n)
    assert value is None or 0 < value <= 1


def test_mean_distinct_n_averages_over_prompts_and_leaves_out_empty_ones():
    """2/3 and 1, the third prompt has no n-gram: 5/6."""
    assert metrics.mean_distinct_n([["a b a"], ["a b"], [""]], 1) == pytest.approx(5 / 6)


def test_diversity_is_0_for_equal_1_for_orthogonal_and_undefined_for_one():
    assert metrics.pairwise_diversity(np.stack([E[0]] * 3)) == pytest.approx(0)
    assert metrics.pairwise_diversity(E[:3]) == pytest.approx(1)
    assert metrics.pairwise_diversity(np.stack([E[0], E[0], E[1]])) == pytest.approx(2 / 3)  # 2 of 3 pairs differ
    assert metrics.pairwise_diversity(E[:1]) is None


@given(st.permutations(range(4)))
def test_a_chain_of_similar_answers_is_one_answer_in_any_order(order):
    """Angles 0, 30, 60 degrees are linked (cos 30 = 0.87), the fourth vector stands alone: 2 answers."""
    angles = np.radians([0, 30, 60])
    vectors = np.array([[np.cos(a), np.sin(a), 0] for a in angles] + [[0, 0, 1]])
    assert metrics.num_distinct(vectors[list(order)], [f"t{i}" for i in order]) == 2


@given(st.permutations(range(9)))
def test_the_number_of_answers_does_not_depend_on_their_order(order):
    """Nine random unit vectors in three dimensions, where many chains form."""
    vectors = np.random.default_rng(3).normal(size=(9, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    count = metrics.num_distinct(vectors, list("abcdefghi"))
    assert 1 < count < 9 and metrics.num_distinct(vectors[list(order)], ["abcdefghi"[i] for i in order]) == count


@pytest.mark.parametrize(("cosine", "want"), [(0.79, 2), (0.81, 1)])
def test_answers_are_one_from_a_cosine_of_four_fifths(cosine, want):
    vectors = np.array([[1, 0], [cosine, (1 - cosine**2) ** 0.5]])
    assert metrics.num_distinct(vectors, ["a", "b"]) == want


def test_equal_texts_count_once_whatever_their_embeddings_say():
    assert metrics.num_distinct(E[:3], ["a", "b", "a"]) == 2


def test_yield_counts_coherent_and_distinct_responses():
    """Five responses: two equal ones, one incoherent, two more of their own: yield 3."""
    vectors = np.stack([E[0], E[0], E[1], E[2], E[3]])
    assert metrics.yield_at_k(list("aabcd"), vectors, [True, True, False, True, True]) == 3
    assert metrics.yield_at_k(list("abcde"), vectors, [False] * 5) == 0


def test_an_interval_holds_its_mean_is_reproducible_and_shrinks_with_rows():
    values = np.random.default_rng(1).normal(size=50)
    mean, low, high = metrics.interval(values)
    assert low < mean < high and mean == pytest.approx(values.mean())
    assert metrics.interval(values) == (mean, low, high)
    assert metrics.interval([2.0] * 9) == (2, 2, 2)
    _, narrow, wide = metrics.interval(np.tile(values, 16))
    assert wide - narrow < (high - low) / 3


@pytest.mark.parametrize(("positive", "negative", "want"), [
    ([1, 1], [1, 1, 1], 0.5), ([3, 4], [1, 2], 1.0), ([1, 2], [3, 4], 0.0), ([2], [1, 2, 3], 0.5),
])
def test_auc_is_the_share_of_pairs_in_order(positive, negative, want):
    """The last: 2 beats 1, ties with 2, loses to 3: (1 + 0.5 + 0) / 3."""
    assert metrics.auc(positive, negative) == want


def test_auc_by_hand_and_against_scikit_learn():
    """0.9 beats both negatives, 0.5 ties with one and beats the other: (2 + 1.5) / 4."""
    from sklearn.metrics import roc_auc_score

    assert metrics.auc([0.9, 0.5], [0.5, 0.1]) == pytest.approx(3.5 / 4)
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 40), rng.integers(0, 7, 30)
    assert metrics.auc(a, b) == pytest.approx(roc_auc_score([1] * 40 + [0] * 30, [*a, *b]))
