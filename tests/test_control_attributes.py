"""Method control: scorers, thresholds, values and conditions."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch
from conftest import make_tokenizer, refused
from control_cases import SCHEMA
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification

from methods.control import attributes
from modeling.models import base_fingerprint

SENTIMENT = ("neg", "neu", "pos")


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.floats(-0.9, 0.4),
       st.floats(0.01, 0.5))
def test_values_rise_with_scores_and_ties_are_no_pole(scores, low, gap):
    thresholds = [low, low + gap]
    values = [attributes.value_of(score, thresholds, SENTIMENT) for score in sorted(scores)]
    assert values == sorted(values)  # neg < neu < pos in the alphabet, too
    assert attributes.value_of(low + gap / 2, thresholds, SENTIMENT) == "neu"


def test_a_text_without_sentiment_words_is_neutral_not_negative():
    score, _ = attributes.load_scorer("vaderSentiment")
    scores = score(["The bus leaves at nine.", "I love it.", "I hate it."])
    values = [attributes.value_of(one, [-0.05, 0.05], SENTIMENT) for one in scores]
    assert values == ["neu", "pos", "neg"]


def test_formality_length_and_question_follow_their_rules():
    """Six marks: capital, stop, no contraction, no slang, no lone i, no shouting.

    The second text has two of them: a mark at its end, and no contraction with an apostrophe.
    """
    assert attributes.formality("I would like to see it.") == 1
    assert attributes.formality("i dont wanna go!!") == pytest.approx(2 / 6)
    assert attributes.load_scorer("words")[0](["one two three"]) == [3.0]
    question, _ = attributes.load_scorer("question")
    assert question(['"Is it?"', "It is. Is it? Yes."]) == [1.0, 0.0]


def test_a_scorer_that_is_not_installed_is_named_with_its_command(monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    said = refused(capsys, 3, attributes.load_scorer, "vaderSentiment")
    assert "pip install vaderSentiment==3.3.2" in said


def test_an_unknown_scorer_is_refused_with_those_that_are_known(capsys):
    said = refused(capsys, 2, attributes.load_scorer, "beauty")
    assert "'beauty' is unknown" in said and "vaderSentiment" in said and "detoxify" in said


def test_detoxify_scores_are_the_sigmoid_of_its_label_and_pickles_are_refused(tmp_path, capsys):
    """A tiny random classifier with three labels; toxic is the second."""
    tokenizer, folder = make_tokenizer("bytelevel"), tmp_path / "m"
    labels = ("insult", "toxic", "threat")
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)})).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    score, version = attributes.load_scorer("detoxify", str(folder))
    texts = ["I know.", "The bus leaves at nine, says the man."]
    with torch.no_grad():
        logits = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits for text in texts]
    assert score(texts) == pytest.approx([one[0, 1].sigmoid().item() for one in logits], abs=1e-5)
    assert version == base_fingerprint(str(folder))
    pickle = tmp_path / "toxic.ckpt"
    pickle.touch()
    said = refused(capsys, 2, attributes.load_scorer, "detoxify", str(pickle))
    assert "is not a model folder" in said


def test_the_opposite_of_a_condition_is_the_other_pole_of_all_its_attributes():
    condition = {"toxicity": "nontoxic", "sentiment": "pos"}
    assert attributes.opposite(condition, SCHEMA) == {"toxicity": "toxic", "sentiment": "neg"}
    assert attributes.opposite({"sentiment": "neu"}, SCHEMA) is None
    assert attributes.opposite({}, SCHEMA) is None


def test_every_combination_stands_once_and_the_first_asks_for_nothing():
    combinations = attributes.combinations({"toxicity": ["nontoxic", "toxic"],
                                            "sentiment": ["pos"]})
    assert combinations[0] == {}
    assert len(combinations) == 6 == len({json.dumps(one) for one in combinations})


def test_a_condition_is_written_as_it_is_asked_for():
    assert attributes.write_condition({"toxicity": "toxic", "sentiment": "pos"}) == \
        "toxicity=toxic sentiment=pos"
    assert attributes.write_condition({}) == "no condition"
