"""The classifier of equal meaning: what it sees, and how well it agrees with labels."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, refused
from hypothesis import given, settings
from hypothesis import strategies as st

import utils
from benchmarks.equivalence import check_pair, main
from scoring import equivalence, statistics

PAIRS = ROOT / "tests" / "fixtures" / "equivalence_pairs.jsonl"  # 40, of which 20 say the same


class Letters:
    """A stand-in embedder: the share of each letter, so that equal words give equal vectors."""

    def __init__(self):
        self.seen = []

    def encode(self, texts):
        self.seen += texts
        counts = np.array([[1e-3 + t.lower().count(chr(c)) for c in range(97, 123)] for t in texts])
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


TEXTS = st.text(alphabet="ab cd. é漢1\n*", max_size=40)


@settings(max_examples=60, deadline=None)
@given(prompt=TEXTS, texts=st.lists(TEXTS, min_size=1, max_size=5), order=st.randoms())
def test_probabilities_are_symmetric_one_for_equal_texts_and_move_with_their_texts(
        prompt, texts, order):
    classifier = equivalence.load_classifier()
    p = equivalence.same_probabilities(prompt, texts, Letters(), classifier)
    assert p.shape == (len(texts), len(texts)) and ((p >= 0) & (p <= 1)).all()
    assert np.allclose(p, p.T) and np.allclose(p.diagonal(), 1)
    mixed = order.sample(range(len(texts)), len(texts))
    other = equivalence.same_probabilities(prompt, [texts[i] for i in mixed], Letters(), classifier)
    np.testing.assert_allclose(other, p[np.ix_(mixed, mixed)], atol=1e-9)
    same = equivalence.same_probabilities(prompt, ["A  b.", "a b"], Letters(), classifier)
    assert same[0, 1] == 1


def test_the_end_of_a_long_text_counts():
    """Two texts of 400 words that part in the last fifty: their vectors and their words differ."""
    start = "word " * 350
    embedder = Letters()
    a, b = (equivalence.view(start + end * 50, "p", embedder) for end in ("zebra ", "quilt "))
    assert any("zebra" in piece for piece in embedder.seen) and len(a["pieces"]) == 7
    assert equivalence.pair_features(a, b, np.ones(26))[0] < 1 - 1e-4


def test_features_by_hand():
    """a: "I saw Bo in 1990", b: "I saw Bo in 1991"; the prompt has "saw".

    Words 4 of 6, content {bo} of {bo, 1990, 1991}, pairs 3 of 5, triples 2 of 4.
    """
    a, b = (equivalence.view(f"I saw Bo in {year}", "saw", Letters()) for year in (1990, 1991))
    features = equivalence.pair_features(a, b, np.ones(26))
    x = dict(zip(equivalence.FEATURES, features, strict=True))
    assert x["shared words"] == pytest.approx(4 / 6)
    assert x["shared content words"] == pytest.approx(1 / 3)
    assert x["shared word pairs"] == pytest.approx(3 / 5)
    assert x["shared word triples"] == pytest.approx(2 / 4)
    assert x["ratio of lengths"] == 1 and x["shared numbers"] == 0 and x["shared names"] == 1
    assert x["shared headings"] == equivalence.UNKNOWN, "neither has one"


def test_texts_that_come_twice_are_compared_once(monkeypatch):
    """A hundred draws of three texts: three comparisons, and equal rows for equal texts."""
    compared = []
    features = equivalence.pair_features
    monkeypatch.setattr(equivalence, "pair_features",
                        lambda *views: compared.append(views) or features(*views))
    texts = ["an apple", "a pear", "a plum and a pear"]
    draws = [texts[i] for i in np.random.default_rng(0).integers(0, 3, 100)]
    classifier = equivalence.load_classifier()
    p = equivalence.same_probabilities("p", draws, Letters(), classifier)
    assert len(compared) == 3 and p.shape == (100, 100)
    plain = equivalence.same_probabilities("p", texts, Letters(), classifier)
    where = [texts.index(text) for text in draws]
    np.testing.assert_array_equal(p, plain[np.ix_(where, where)])


def test_the_shipped_classifier_agrees_with_forty_labelled_pairs(embedder):
    """33 of 40 are on the right side of 0.5; of two pairs the equal one is nearly always above."""
    classifier = equivalence.load_classifier()
    assert classifier["features"] == list(equivalence.FEATURES)
    rows = utils.read_jsonl(PAIRS, check_pair)
    truth = np.array([row["similar"] == "1" for row in rows])
    p = np.array([equivalence.same_probabilities(
        row["prompt"], [row["generation_0"], row["generation_1"]], embedder, classifier)[0, 1]
        for row in rows])
    assert ((p >= classifier["threshold"]) == truth).mean() >= 0.8
    assert statistics.auc(p[truth], p[~truth]) >= 0.95


def benchmark(data) -> dict:
    """The last line of the benchmark's output."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.equivalence", "--data", str(data)],
                          cwd=ROOT, capture_output=True, text=True, timeout=1200)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_benchmark_measures_agreement_by_cross_validation(embedder):
    """40 pairs of 10 prompts: each fold leaves out one prompt's pairs."""
    result = benchmark(PAIRS)
    assert (result["pairs"], result["prompts"], result["majority"]) == (40, 10, 0.5)
    assert result["accuracy"] >= 0.75 and result["auc"] >= 0.85


def test_the_benchmark_needs_its_data_and_says_which(tmp_path, capsys):
    file = tmp_path / "nowhere.jsonl"
    assert f"{file} is not there" in refused(capsys, 2, main, ["--data", str(file)])
    file.write_text('{"prompt": "p", "generation_0": "a", "generation_1": "b", "similar": "yes"}')
    assert 'needs similar, "0" or "1"' in refused(capsys, 2, main, ["--data", str(file)])


@pytest.mark.skipif("EQUIVALENCE_PAIRS" not in os.environ,
                    reason="labels of people are not part of the project: set EQUIVALENCE_PAIRS")
def test_agreement_with_people_by_cross_validation():
    result = benchmark(os.environ["EQUIVALENCE_PAIRS"])
    assert result["accuracy"] >= 0.75 and result["auc"] >= 0.8
