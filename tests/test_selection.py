"""Choosing N of M responses: worked cases, and the determinantal choice against determinants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import selection


def unit(*rows) -> np.ndarray:
    vectors = np.array(rows, dtype=float)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# 0 and 1 are close, 2 and 3 are close
TWO_PAIRS = unit([1, 0, 0], [0.99, 0.1, 0], [0, 1, 0], [0, 0.99, 0.1])
RELEVANCE = np.array([0.5, 0.6, 0.7, 0.4])


@pytest.mark.parametrize("how", ["mmr", "dpp", "medoids"])
def test_two_of_two_pairs_are_one_of_each(how):
    chosen = selection.choose(how, TWO_PAIRS, RELEVANCE, 2, min_relevance=0.0)
    assert {i // 2 for i in chosen} == {0, 1}


def test_mmr_weighs_relevance_against_likeness():
    """First 2 (0.7). Then 0: 0.25 - 0 = 0.25, 1: 0.3 - 0.5 x 0.1005 = 0.25 - 0.0002..., 3: < 0."""
    assert selection.mmr(TWO_PAIRS, RELEVANCE, 2) == [2, 0]
    assert selection.mmr(TWO_PAIRS, np.array([0.5, 0.9, 0.7, 0.4]), 2) == [1, 2]


def test_irrelevant_responses_stay_out_until_they_are_needed():
    """3 is less relevant than 0.45; with four wanted it comes last."""
    assert 3 not in selection.choose("dpp", TWO_PAIRS, RELEVANCE, 3, min_relevance=0.45)
    assert selection.choose("dpp", TWO_PAIRS, RELEVANCE, 4, min_relevance=0.45) == [2, 1, 0, 3]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 9), number=st.integers(1, 9))
def test_the_determinantal_choice_takes_the_largest_determinant_at_every_step(seed, count, number):
    rng = np.random.default_rng(seed)
    vectors, relevance = unit(*rng.normal(size=(count, 12))), rng.random(count)
    number = min(number, count)
    kernel, want = vectors @ vectors.T, [int(relevance.argmax())]
    while len(want) < number:
        rest = [i for i in range(count) if i not in want]
        volume = {i: np.linalg.det(kernel[np.ix_([*want, i], [*want, i])]) for i in rest}
        want.append(max(rest, key=volume.get))
    assert selection.dpp(vectors, relevance, number) == want


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 9), number=st.integers(1, 9),
       how=st.sampled_from(["mmr", "dpp", "medoids"]), copies=st.booleans())
def test_every_way_returns_as_many_as_asked_and_none_twice(seed, count, number, how, copies):
    """Also where all responses are the same, so that clusters and volumes vanish."""
    rng = np.random.default_rng(seed)
    different = rng.normal(size=(count, 5))
    vectors = unit(*(different[:1].repeat(count, 0) if copies else different))
    chosen = selection.choose(how, vectors, rng.uniform(-1, 1, count), min(number, count))
    assert len(chosen) == len(set(chosen)) == min(number, count)
    assert set(chosen) <= set(range(count))


@pytest.mark.parametrize("how", ["mmr", "dpp", "medoids"])
def test_of_no_responses_none_is_chosen(how):
    """A row whose responses are all empty once ended the run with a numpy error."""
    assert selection.choose(how, np.zeros((0, 3)), np.zeros(0), 0) == []
