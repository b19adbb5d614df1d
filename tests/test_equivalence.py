"""The classifier of equal meaning: what it sees, that its order does not matter, and that it tells plain cases apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring import equivalence


class Letters:
    """A stand-in embedder: the share of each letter, so that equal words give equal vectors."""

    def __init__(self):
        self.seen = []

    def encode(self, texts, **options):
        self.seen += texts
        counts = np.array([[1e-3 + t.lower().count(chr(c)) for c in range(97, 123)] for t in texts])
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


TEXTS = st.text(alphabet="ab cd. é漢1\n*", max_size=40)


@settings(max_examples=60, deadline=None)
@given(prompt=TEXTS, texts=st.lists(TEXTS, min_size=1, max_size=5), order=st.randoms())
def test_probabilities_are_symmetric_one_for_equal_texts_and_move_with_their_texts(prompt, texts, order):
    classifier = equivalence.load_classifier()
    p = equivalence.same_probabilities(prompt, texts, Letters(), classifier)
    assert p.shape == (len(texts), len(texts)) and ((p >= 0) & (p <= 1)).all()
    assert np.allclose(p, p.T) and np.allclose(p.diagonal(), 1)
    mixed = order.sample(range(len(texts)), len(texts))
    other = equivalence.same_probabilities(prompt, [texts[i] for i in mixed], Letters(), classifier)
    np.testing.assert_allclose(other, p[np.ix_(mixed, mixed)], atol=1e-9)
    assert equivalence.same_probabilities(prompt, ["A  b.", "a b"], Letters(), classifier)[0, 1] == 1


def test_the_end_of_a_long_text_counts():
    """Two texts of 400 words that part in the last fifty: their vectors and their words differ."""
    start = "word " * 350
    embedder = Letters()
    a, b = (equivalence.view(start + end * 50, "p", embedder) for end in ("zebra ", "quilt "))
    assert any("zebra" in piece for piece in embedder.seen) and len(a["pieces"]) == 7
    assert equivalence.pair_features(a, b, np.ones(26))[0] < 1 - 1e-4


def test_features_by_hand():
    """a: "I saw Bo in 1990", b: "I saw Bo in 1991": words 4 of 6, content {bo} of {bo, 1990, 1991}, pairs 3 of 5, triples 2 of 4."""
    a, b = (equivalence.view(f"I saw Bo in {year}", "saw", Letters()) for year in (1990, 1991))
    x = dict(zip(equivalence.FEATURES, equivalence.pair_features(a, b, np.ones(26)), strict=True))
    assert x["shared words"] == pytest.approx(4 / 6) and x["shared content words"] == pytest.approx(1 / 3)
    assert x["shared word pairs"] == pytest.approx(3 / 5) and x["shared word triples"] == pytest.approx(2 / 4)
    assert x["ratio of lengths"] == 1 and x["shared numbers"] == 0 and x["shared names"] == 1
    assert x["shared headings"] == equivalence.UNKNOWN, "neither has one"


def test_the_embedded_sentences_tell_a_rewording_from_another_answer(embedder):
    texts = ["Paris is the capital of France.", "The capital of France is Paris.", "I would rather talk about my dog and his bone."]
    p = equivalence.same_probabilities("What is the capital of France?", texts, embedder, equivalence.load_classifier())
    assert p[0, 1] > 0.5 > max(p[0, 2], p[1, 2])


def test_the_shipped_classifier_says_how_it_was_measured():
    classifier = equivalence.load_classifier()
    assert classifier["features"] == list(equivalence.FEATURES) and classifier["pairs"] == 1000
    assert classifier["auc"] > 0.8 and classifier["accuracy"] > classifier["majority"]


def test_the_benchmark_needs_its_data_and_says_which(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "equivalence.py", "--data", "nowhere.jsonl"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "nowhere.jsonl is not there" in done.stderr


@pytest.mark.skipif("EQUIVALENCE_PAIRS" not in os.environ, reason="labelled pairs are not part of the project: set EQUIVALENCE_PAIRS to their file")
def test_agreement_with_people_by_cross_validation(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "equivalence.py", "--data", os.environ["EQUIVALENCE_PAIRS"]],
                          cwd=ROOT, capture_output=True, text=True, timeout=1200)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["accuracy"] >= 0.75 and result["auc"] >= 0.8
