"""Method spt: what is measured of replies to people with a persona."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from spt_cases import ROWS, drawn, finished, reference_logps  # noqa: F401

import utils
from methods.spt import evaluation
from modeling.checkpoints import load_checkpoint
from scoring import metrics, statistics

# ---- figures ------------------------------------------------------------------------------------


def test_reference_figures_by_hand():
    """a b c against b c d e: 2 common of 3 and 4; a b a: 2 of 3 distinct words, 2 of 2 pairs; an empty text is one token."""
    assert metrics.token_f1("a b c", "b c d e") == pytest.approx(4 / 7) and metrics.token_f1("A", "a") == 0
    assert metrics.plain_distinct(["a b a"], 1) == pytest.approx(2 / 3) and metrics.plain_distinct(["a b a"], 2) == 1
    assert metrics.plain_distinct(["", "a."], 1) == 1 and metrics.plain_distinct([""], 2) is None
    score, signature = metrics.corpus_bleu(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert score == pytest.approx(100) and "tok:13a" in signature and "smooth:exp" in signature
    assert metrics.persona_overlap("My cat sleeps.", ["I have a cat."]) == pytest.approx(0.5)
    assert metrics.persona_overlap("I am.", ["I have a cat."]) is None


def test_an_interval_over_persons_is_wider_than_one_over_rows():
    """Two persons, ten equal rows each: drawing persons gives 0, 1/2 or 1, so the interval is the whole range."""
    values, people = [0.0] * 10 + [1.0] * 10, ["a"] * 10 + ["b"] * 10
    assert statistics.cluster_interval(values, people) == (0.5, 0.0, 1.0)
    mean, low, high = statistics.interval(values)
    assert mean == 0.5 and 0.2 < low < high < 0.8


def test_one_person_has_no_interval():
    assert evaluation.mean_of([1.0, None, 2.0], ["a", "a", "a"]) == [1.5] and evaluation.mean_of([None], ["a"]) is None
    assert len(evaluation.mean_of([1.0, 2.0], ["a", "b"])) == 3


class Embedder:
    """Two texts are alike if they have equal length."""

    def encode(self, texts, **_):
        import numpy as np

        return np.eye(200)[[len(text) for text in texts]]


def test_choice_figures_by_hand():
    """nll (2, 1, 3), chosen 1: random 2, oracle 1, regret 1, no agreement; the reply compared is the one under prompt 1."""
    row = ROWS[0] | {"preds": ["Never.", "Ask my cat.", "No!"], "prompts": [2, 1, 3], "chosen": 1, "scores": [0.5, 0.1, 0.1]}
    own = evaluation.row_figures(row, [2.0, 1.0, 3.0], Embedder())
    assert (own["nll"], own["random"], own["oracle"], own["regret"], own["agreement"]) == (2.0, 2.0, 1.0, 1.0, 0.0)
    assert own["F1"] == own["R-1"] == own["embedding"] == 1.0 and own["sbert_diversity"] == 1.0


def test_gain_over_the_baseline_is_the_mean_over_columns():
    columns = dict.fromkeys(evaluation.COLUMNS)
    assert evaluation.mean_gain(columns | {"F1": 11.0, "BLEU": 3.0}, columns | {"F1": 10.0, "BLEU": 2.0}) == pytest.approx(30)


def test_the_published_table_has_one_value_under_every_heading(finished, tmp_path, monkeypatch, capsys):
    drawn(finished, tmp_path, "one", "--prompts", "all")
    drawn(finished, tmp_path, "two", "--prompt_id", "1", "--num_response_per_input", "4")
    monkeypatch.setattr(utils, "load_embedder", Embedder)
    capsys.readouterr()
    evaluation.main(["--eval_file", str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl"), "--save_file", str(tmp_path / "e.json")])
    said = capsys.readouterr().out
    header, *lines = (tmp_path / "e.csv").read_text().splitlines()
    assert header == "system," + ",".join(evaluation.COLUMNS) and [len(line.split(",")) for line in lines] == [12, 12]
    summary = json.loads((tmp_path / "e.json").read_text())
    one, two = summary["systems"].values()
    assert one["persons"] == 3 and sum(one["usage"].values()) == pytest.approx(1) and two["usage"]["1"] == 1
    assert one["figures"]["oracle"][0] <= one["figures"]["nll"][0] and one["figures"]["oracle"] == two["figures"]["oracle"]
    assert "nrefs:1" in said and "BERTScore: bert-score is not installed" in said or "BERTScore" in said
    evaluation.main(["--show", str(tmp_path / "e.json")])
    assert "published columns" in capsys.readouterr().out


def test_nll_of_the_figures_is_that_of_ordinary_rows(finished, tokenizer):
    model = load_checkpoint(str(finished[2]))[0]
    args = argparse.Namespace(max_length=1000, max_input_length=250)
    nlls = evaluation.prompt_nlls(model, tokenizer, ROWS[1], args)
    with torch.no_grad():
        assert nlls == pytest.approx([-reference_logps(model, ROWS[1], k, tokenizer, args).mean().item() for k in range(4)], abs=1e-4)
