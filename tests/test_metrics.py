"""Metrics worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy
from vendi_score import vendi

import utils
from scoring import metrics

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
    (["I study. You study."], 1, 3 / 4),  # i, study, you, study: no word keeps its full stop
    (["I study. You study."], 2, 1.0),  # i-study, you-study: none across the end of a sentence
    (["We sing. We sing!", "“Go.” We sing"], 1, 3 / 7),  # we, sing, we, sing, go, we, sing
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
    two_of_three_pairs = metrics.pairwise_diversity(np.stack([E[0], E[0], E[1]]))
    assert two_of_three_pairs == pytest.approx(2 / 3)
    assert metrics.pairwise_diversity(E[:1]) is None


def test_ead_by_hand():
    """a, b, a: N = 2 of C = 3 draws from V = 4; 4 (1 - 0.75^3) = 2.3125 kinds are expected."""
    assert metrics.ead(["a b a"], 1, 4) == pytest.approx(2 / 2.3125)
    assert metrics.ead(["a"], 1, 4) is None


def test_ead_does_not_fall_with_length_where_distinct_does():
    """1,000 and 4,000 uniform draws from 500 words: distinct-1 falls from 0.43 to 0.125."""
    rng = np.random.default_rng(0)
    short, long = ([" ".join(f"w{i}" for i in rng.integers(0, 500, n))] for n in (1000, 4000))
    assert metrics.distinct_n(short, 1) > 3 * metrics.distinct_n(long, 1)
    assert metrics.ead(short, 1, 500) == pytest.approx(1, abs=0.03)
    assert metrics.ead(long, 1, 500) == pytest.approx(1, abs=0.03)


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
    texts = ["It's fine.", "it's  FINE", "“It's fine!”", "its fine"]
    assert metrics.duplicates(texts) == pytest.approx(0.5)
    assert metrics.duplicates([]) is None


def test_incoherence_counts_ratings_up_to_five_and_leaves_the_unrated_apart():
    assert metrics.incoherence_rate([5, 6, None, 1]) == (pytest.approx(2 / 3), 1)
    assert metrics.incoherence_rate([None]) == (None, 1)


SIMILAR = np.array([[1, 0.9, 0.2], [0.9, 1, 0.6], [0.2, 0.6, 1]])


def test_partition_joins_by_the_mean_of_all_pairs():
    """0 and 1 join at 0.9; the third is 0.2 and 0.6 from them, 0.4 on average: apart at 0.5."""
    assert metrics.partition(SIMILAR, 0.5) == [0, 0, 1]
    assert metrics.partition(SIMILAR, 0.4) == [0, 0, 0]
    assert metrics.partition(SIMILAR, 0.95) == [0, 1, 2]
    assert metrics.partition(SIMILAR[:1, :1], 0.5) == [0]
    assert metrics.partition(SIMILAR[:0, :0], 0.5) == []


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 9), order=st.randoms(),
       threshold=st.floats(0.05, 0.95))
def test_the_partition_and_what_is_counted_from_it_do_not_depend_on_order(
        seed, n, order, threshold):
    half = np.random.default_rng(seed).random((n, n))
    matrix = (half + half.T) / 2
    classes = metrics.partition(matrix, threshold)
    mixed = order.sample(range(n), n)
    other = metrics.partition(matrix[np.ix_(mixed, mixed)], threshold)
    assert {frozenset(np.flatnonzero(np.array(classes) == c)) for c in classes} == \
        {frozenset(np.array(mixed)[np.array(other) == c]) for c in other}
    assert metrics.semantic_entropy(classes) == pytest.approx(metrics.semantic_entropy(other))
    number, count = metrics.effective_number(classes), metrics.distinct_k(classes)
    assert 1 <= number <= count + 1e-9 <= n + 1e-9


def test_entropy_effective_number_and_yield_of_classes_by_hand():
    """Classes a, a, b, c: (1/2) ln 2 + (1/2) ln 4 = 1.5 ln 2. Coherent are both of a, and c."""
    classes = [0, 0, 1, 2]
    assert metrics.semantic_entropy(classes) == pytest.approx(1.5 * np.log(2))
    assert metrics.semantic_entropy(classes) == pytest.approx(scipy_entropy([2, 1, 1]))
    assert metrics.effective_number(classes) == pytest.approx(2**1.5)
    assert metrics.yield_of_classes(classes, [True, True, False, True]) == 2
    assert metrics.semantic_entropy([]) is None and metrics.effective_number([]) is None


def test_utility_k_by_hand():
    """p = 0.8, k = 3, classes a, a, b with 5, 9, 10: 0.2 / 0.488 x (5 + 0 + 0.64 x 10).

    The second a does not count, so it may be unrated. All new and best is the best score.
    """
    want = pytest.approx(0.2 / 0.488 * (5 + 6.4))
    assert metrics.utility_k([0, 0, 1], [5, 9, 10]) == want
    assert metrics.utility_k([0, 0, 1], [5, None, 10]) == want
    assert metrics.utility_k([0, 1, 2], [10, 10, 10]) == pytest.approx(10)
    assert metrics.utility_k([0, 1], [5, None]) is None and metrics.utility_k([], []) is None


def test_a_handle_that_decides_the_class_is_told_from_one_that_does_not():
    """Three numbers x four seeds. Perfect: number k gives class k, so ln 3 nats, all stable."""
    perfect = [np.repeat([[0], [1], [2]], 4, axis=1)] * 10
    found = metrics.controllability(perfect)
    assert found["mutual_information"] == pytest.approx(np.log(3)) and found["p_value"] < 0.01
    assert (found["coincide"], found["stable"], found["prompts"]) == (0, 1, 10)
    rng = np.random.default_rng(0)
    idle = metrics.controllability([rng.integers(0, 3, (3, 4)) for _ in range(40)])
    assert abs(idle["excess"]) < 0.05 < idle["p_value"]
    assert idle["mutual_information"] > 0.2, "the plug-in value alone misleads"
    one_seed = metrics.controllability([np.array([[0], [0], [1]])])
    assert one_seed["coincide"] == pytest.approx(1 / 3)
    assert one_seed["stable"] is one_seed["mutual_information"] is one_seed["p_value"] is None


GROUPS = [["a b", "c"], ["d e f", "g"], ["h", "i j"]]


def test_controls_are_what_their_names_say():
    words_only = metrics.random_words(GROUPS, 1)
    assert [[len(t.split()) for t in g] for g in words_only] == [[2, 1], [3, 1], [1, 2]]
    assert {w for g in words_only for t in g for w in t.split()} <= set("abcdefghij")
    moved = metrics.shuffled_replies(GROUPS, 1)
    assert sorted(t for g in moved for t in g) == sorted(t for g in GROUPS for t in g)
    assert not any(text in old for old, new in zip(GROUPS, moved, strict=True)
                   for text in new), "none stays under its prompt"
    assert metrics.shuffled_replies(GROUPS[:1]) is None
    assert metrics.repeated_first(GROUPS) == [["a b"] * 2, ["d e f"] * 2, ["h"] * 2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab ,.é漢ж¿", max_size=12), max_size=5))
def test_texts_of_any_kind_have_a_figure_in_range_or_none(texts):
    """Empty texts, only punctuation, other scripts: no division by zero, nothing out of range."""
    ead, self_bleu = metrics.ead(texts, 1, 100), metrics.self_bleu(texts)
    for value, high in ((ead, 10), (self_bleu, 100.001), (metrics.duplicates(texts), 1)):
        assert value is None or 0 <= value <= high
    if len(texts) > 1:
        controls = [metrics.random_words([texts, texts]),
                    metrics.shuffled_replies([texts, texts]), metrics.repeated_first([texts])]
        assert all(len(group) == len(texts) for made in controls for group in made)


def test_words_are_those_of_sentences_as_nltk_splits_them():
    """A stop inside a number or a name without a space stays; one before a quote mark goes."""
    assert metrics.words("I work in retail. Are you well?") == (
        "i", "work", "in", "retail", ".", "are", "you", "well", "?")
    assert metrics.words("It cost 3.50 euros.") == ("it", "cost", "3.50", "euros", ".")
    assert "go" in metrics.words('He said "go." Then he left.')
    assert metrics.words("") == ()


def test_two_texts_of_one_wording_are_duplicates_although_training_tells_them_apart():
    """A comma inside: one answer to a reader of the table, two replies that a model can learn."""
    a, b = "Well, yes.", "well yes"
    assert metrics.wording(a) == metrics.wording(b) and utils.normalise(a) != utils.normalise(b)


def test_content_words_leave_out_what_every_text_has():
    """"i", "in", "do", "n't" and marks go; "sing" at the end of a sentence is the word "sing"."""
    assert metrics.content_words("I don't sing. I work in retail.") == {"sing", "work", "retail"}
    assert metrics.persona_overlap("I sing. It's retail!", ["Retail is my job."]) == 0.5
    assert metrics.persona_overlap("It is.", ["Retail"]) is None


def test_equal_responses_have_the_self_bleu_that_each_has_on_its_own():
    texts = ["the cat sat on the mat", "a dog ran off", "the cat sat on the mat", "a dog ran off"]
    each = [sacrebleu.sentence_bleu(text, texts[:i] + texts[i + 1:]).score
            for i, text in enumerate(texts)]
    assert metrics.self_bleu(texts) == np.mean(each)
