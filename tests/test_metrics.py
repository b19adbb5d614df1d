"""Metrics worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy
from vendi_score import vendi

from scoring import metrics, statistics

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


def test_diversity_is_0_for_equal_1_for_orthogonal_and_undefined_for_one():
    assert metrics.pairwise_diversity(np.stack([E[0]] * 3)) == pytest.approx(0)
    assert metrics.pairwise_diversity(E[:3]) == pytest.approx(1)
    assert metrics.pairwise_diversity(np.stack([E[0], E[0], E[1]])) == pytest.approx(2 / 3)  # 2 of 3 pairs differ
    assert metrics.pairwise_diversity(E[:1]) is None


def test_an_interval_holds_its_mean_is_reproducible_and_shrinks_with_rows():
    values = np.random.default_rng(1).normal(size=50)
    mean, low, high = statistics.interval(values)
    assert low < mean < high and mean == pytest.approx(values.mean())
    assert statistics.interval(values) == (mean, low, high)
    assert statistics.interval([2.0] * 9) == (2, 2, 2)
    _, narrow, wide = statistics.interval(np.tile(values, 16))
    assert wide - narrow < (high - low) / 3


@pytest.mark.parametrize(("positive", "negative", "want"), [
    ([1, 1], [1, 1, 1], 0.5), ([3, 4], [1, 2], 1.0), ([1, 2], [3, 4], 0.0), ([2], [1, 2, 3], 0.5),
])
def test_auc_is_the_share_of_pairs_in_order(positive, negative, want):
    """The last: 2 beats 1, ties with 2, loses to 3: (1 + 0.5 + 0) / 3."""
    assert statistics.auc(positive, negative) == want


def test_auc_by_hand_and_against_scikit_learn():
    """0.9 beats both negatives, 0.5 ties with one and beats the other: (2 + 1.5) / 4."""
    from sklearn.metrics import roc_auc_score

    assert statistics.auc([0.9, 0.5], [0.5, 0.1]) == pytest.approx(3.5 / 4)
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 40), rng.integers(0, 7, 30)
    assert statistics.auc(a, b) == pytest.approx(roc_auc_score([1] * 40 + [0] * 30, [*a, *b]))


def test_ead_by_hand():
    """a, b, a: N = 2 of C = 3 draws from V = 4: 4 (1 - 0.75^3) = 2.3125 kinds are expected, 2 / 2.3125."""
    assert metrics.ead(["a b a"], 1, 4) == pytest.approx(2 / 2.3125)
    assert metrics.ead(["a"], 1, 4) is None


def test_ead_does_not_fall_with_length_where_distinct_does():
    """1,000 and 4,000 uniform draws from 500 words: distinct-1 falls from about 0.43 to 0.125, ead stays near 1."""
    rng = np.random.default_rng(0)
    short, long = ([" ".join(f"w{i}" for i in rng.integers(0, 500, n))] for n in (1000, 4000))
    assert metrics.distinct_n(short, 1) > 3 * metrics.distinct_n(long, 1)
    assert metrics.ead(short, 1, 500) == pytest.approx(1, abs=0.03) and metrics.ead(long, 1, 500) == pytest.approx(1, abs=0.03)


def test_self_bleu_is_100_for_copies_and_sacrebleus_own_for_others():
    texts = ["the cat sat on the mat today", "the cat sat on my hat", "a dog ran off"]
    want = np.mean([sacrebleu.sentence_bleu(t, [o for o in texts if o != t]).score for t in texts])
    assert metrics.self_bleu(texts) == pytest.approx(want) and 0 < want < 60
    assert metrics.self_bleu(["one two three four five"] * 3) == pytest.approx(100)
    assert metrics.self_bleu(["alone", "  "]) is None
    assert "nrefs:2" in metrics.self_bleu_signature(2)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 8), order=st.randoms())
def test_vendi_agrees_with_its_package_lies_between_1_and_n_and_ignores_order(seed, n, order):
    vectors = np.random.default_rng(seed).normal(size=(n, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    value = metrics.vendi_score(vectors)
    assert 1 <= value <= n and value == pytest.approx(vendi.score_K(vectors @ vectors.T), rel=1e-5)
    mixed = order.sample(range(n), n)
    assert metrics.vendi_score(vectors[mixed]) == pytest.approx(value)


def test_vendi_of_copies_is_1_of_orthogonal_ones_n_and_of_none_undefined():
    assert metrics.vendi_score(np.stack([E[0]] * 3)) == pytest.approx(1)
    assert metrics.vendi_score(E) == pytest.approx(4)
    assert metrics.vendi_score(E[:0]) is None


def test_duplicates_ignore_case_spaces_and_outer_punctuation():
    """Of four, two repeat the first; an apostrophe inside a word is part of it."""
    assert metrics.duplicates(["It's fine.", "it's  FINE", "“It's fine!”", "its fine"]) == pytest.approx(0.5)
    assert metrics.duplicates([]) is None


def test_incoherence_counts_ratings_up_to_five_and_leaves_the_unrated_apart():
    assert metrics.incoherence_rate([5, 6, None, 1]) == (pytest.approx(2 / 3), 1)
    assert metrics.incoherence_rate([None]) == (None, 1)


SIMILAR = np.array([[1, 0.9, 0.2], [0.9, 1, 0.6], [0.2, 0.6, 1]])


def test_partition_joins_by_the_mean_of_all_pairs():
    """0 and 1 join at 0.9; the third is 0.2 and 0.6 from them, 0.4 on average: apart at 0.5, although 1 and 2 alone pass it."""
    assert metrics.partition(SIMILAR, 0.5) == [0, 0, 1]
    assert metrics.partition(SIMILAR, 0.4) == [0, 0, 0]
    assert metrics.partition(SIMILAR, 0.95) == [0, 1, 2]
    assert metrics.partition(SIMILAR[:1, :1], 0.5) == [0] and metrics.partition(SIMILAR[:0, :0], 0.5) == []


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 9), order=st.randoms(), threshold=st.floats(0.05, 0.95))
def test_the_partition_and_what_is_counted_from_it_do_not_depend_on_order(seed, n, order, threshold):
    half = np.random.default_rng(seed).random((n, n))
    matrix = (half + half.T) / 2
    classes = metrics.partition(matrix, threshold)
    mixed = order.sample(range(n), n)
    other = metrics.partition(matrix[np.ix_(mixed, mixed)], threshold)
    assert {frozenset(np.flatnonzero(np.array(classes) == c)) for c in classes} == \
        {frozenset(np.array(mixed)[np.array(other) == c]) for c in other}
    assert metrics.semantic_entropy(classes) == pytest.approx(metrics.semantic_entropy(other))
    assert 1 <= metrics.effective_number(classes) <= metrics.distinct_k(classes) + 1e-9 <= n + 1e-9


def test_entropy_effective_number_and_yield_of_classes_by_hand():
    """Classes a, a, b, c: (1/2) ln 2 + (1/2) ln 4 = 1.5 ln 2; its exp is 2.83. Coherent are both of a and c: yield 2."""
    classes = [0, 0, 1, 2]
    assert metrics.semantic_entropy(classes) == pytest.approx(1.5 * np.log(2)) == pytest.approx(scipy_entropy([2, 1, 1]))
    assert metrics.effective_number(classes) == pytest.approx(2**1.5)
    assert metrics.yield_of_classes(classes, [True, True, False, True]) == 2
    assert metrics.semantic_entropy([]) is None and metrics.effective_number([]) is None


def test_utility_k_by_hand():
    """p = 0.8, k = 3, classes a, a, b with 5, 9, 10: 0.2 / 0.488 x (5 + 0 + 0.64 x 10); the second a may be unrated."""
    want = 0.2 / 0.488 * (5 + 6.4)
    assert metrics.utility_k([0, 0, 1], [5, 9, 10]) == pytest.approx(want) == metrics.utility_k([0, 0, 1], [5, None, 10])
    assert metrics.utility_k([0, 1, 2], [10, 10, 10]) == pytest.approx(10), "all new and best: the best score"
    assert metrics.utility_k([0, 1], [5, None]) is None and metrics.utility_k([], []) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_mutual_information_agrees_with_scikit_learn(pairs):
    from sklearn.metrics import mutual_info_score

    x, y = zip(*pairs, strict=True)
    assert statistics.mutual_information(x, y) == pytest.approx(mutual_info_score(x, y), abs=1e-9)


def test_a_handle_that_decides_the_class_is_told_from_one_that_does_not():
    """Three numbers x four seeds. Perfect: number k gives class k, so ln 3 nats, no coincidence, all stable."""
    perfect = [np.repeat([[0], [1], [2]], 4, axis=1)] * 10
    found = metrics.controllability(perfect)
    assert found["mutual_information"] == pytest.approx(np.log(3)) and found["p_value"] < 0.01
    assert (found["coincide"], found["stable"], found["prompts"]) == (0, 1, 10)
    rng = np.random.default_rng(0)
    idle = metrics.controllability([rng.integers(0, 3, (3, 4)) for _ in range(40)])
    assert abs(idle["excess"]) < 0.05 < idle["p_value"] and idle["mutual_information"] > 0.2, "the plug-in value alone misleads"
    one_seed = metrics.controllability([np.array([[0], [0], [1]])])
    assert one_seed["coincide"] == pytest.approx(1 / 3)
    assert one_seed["stable"] is None and one_seed["mutual_information"] is None and one_seed["p_value"] is None


def test_a_paired_difference_uses_the_prompts_where_both_are_defined():
    """3 - 1 and 5 - 2: 2.5 over two prompts; the unpaired means would differ by 4.67 - 1.5."""
    mean, low, high, prompts = statistics.paired_difference([3, None, 5, 6], [1, 9, 2, None])
    assert (mean, prompts) == (2.5, 2) and 2 <= low <= high <= 3
    assert statistics.paired_difference([None], [1]) is None


def test_pairing_narrows_the_interval():
    """Prompts differ by 0..99, systems by 1 and a little noise: paired the interval is below 0.1 wide, the means' are above 5."""
    rng = np.random.default_rng(0)
    base = np.arange(100.0)
    better = base + 1 + rng.normal(0, 0.1, 100)
    _, low, high, _ = statistics.paired_difference(better, base)
    assert 0.9 < low < 1 < high < 1.1 and high - low < 0.1
    assert np.ptp(statistics.interval(better)[1:]) > 5


def test_at_matched_coherence_rambling_gains_nothing():
    """a: four coherent responses of two kinds, and six incoherent ones of their own kinds; b: the same four, twice, coherent.

    Kinds of all responses: 8 against 2. Of coherent ones, equally many: no difference on average.
    """
    kinds_a = [0, 0, 1, 1, 2, 3, 4, 5, 6, 7]
    kinds_b = [0, 0, 1, 1] * 2
    rows = 30
    found = statistics.matched_difference(
        lambda row, keep: len({kinds_a[i] for i in keep}), lambda row, keep: len({kinds_b[i] for i in keep}),
        [[True] * 4 + [False] * 6] * rows + [[False] * 10], [[True] * 8] * (rows + 1))
    assert (found["prompts"], found["left_out"], found["responses"]) == (30, 1, 120)
    mean, low, high = found["difference"]
    assert -0.1 < low <= mean <= high < 0.2
    nothing = statistics.matched_difference(None, None, [[True]], [[True, True]])
    assert nothing == {"difference": None, "prompts": 0, "left_out": 1, "responses": 0}


GROUPS = [["a b", "c"], ["d e f", "g"], ["h", "i j"]]


def test_controls_are_what_their_names_say():
    words_only = metrics.random_words(GROUPS, 1)
    assert [[len(t.split()) for t in g] for g in words_only] == [[2, 1], [3, 1], [1, 2]]
    assert {w for g in words_only for t in g for w in t.split()} <= set("abcdefghij")
    moved = metrics.shuffled_replies(GROUPS, 1)
    assert sorted(t for g in moved for t in g) == sorted(t for g in GROUPS for t in g)
    assert not any(t in own for own, g in zip(GROUPS, moved, strict=True) for t in g), "none stays under its prompt"
    assert metrics.shuffled_replies(GROUPS[:1]) is None
    assert metrics.repeated_first(GROUPS) == [["a b"] * 2, ["d e f"] * 2, ["h"] * 2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab ,.é漢ж¿", max_size=12), max_size=5))
def test_texts_of_any_kind_have_a_figure_in_range_or_none(texts):
    """Empty texts, only punctuation, other scripts: no division by zero, nothing out of range."""
    for value, high in ((metrics.ead(texts, 1, 100), 10), (metrics.self_bleu(texts), 100.001), (metrics.duplicates(texts), 1)):
        assert value is None or 0 <= value <= high
    if len(texts) > 1:
        controls = [metrics.random_words([texts, texts]), metrics.shuffled_replies([texts, texts]), metrics.repeated_first([texts])]
        assert all(len(group) == len(texts) for made in controls for group in made)
