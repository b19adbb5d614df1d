"""Method control: what is measured of replies under conditions."""

from __future__ import annotations

import json
import math
from importlib import import_module

import pytest
import torch
from conftest import refused
from control_cases import SCHEMA, in_folder, trained  # noqa: F401

import infer
import utils
from methods.control import attributes, evaluation, tokens
from methods.control.perplexity import base_nats
from modeling.models import load_model, load_tokenizer
from scoring.evaluated import figure
from scoring.sources import Sources
from scoring.statistics import perplexity_ratio

POS, NEG = {"sentiment": "pos"}, {"sentiment": "neg"}
BOTH = {"toxicity": "nontoxic", "sentiment": "pos"}


def reply(row: int, condition: dict, sentiment: float | None, text: str = "x") -> evaluation.Reply:
    """A reply that is not toxic, or one without letters."""
    scores = None if sentiment is None else {"toxicity": 0.1, "sentiment": sentiment}
    values = scores and attributes.values_of(scores, SCHEMA)
    return evaluation.Reply(row, condition, text, scores, values, nll=0.0, tokens=0)


def key(condition: dict) -> tuple:
    return tuple(condition.items())


# ---- misalignment -------------------------------------------------------------------------------


def test_misalignment_by_hand():
    """Two rows. Nothing asked: pos, neu (one of two is not pos). Asked for pos: pos, pos (none).

    Asked for neg: neg, pos. The first system without a condition: neu, neu.
    """
    replies = {(): [reply(0, {}, 0.6), reply(1, {}, 0.0)],
               key(POS): [reply(0, POS, 0.6), reply(1, POS, 0.9)],
               key(NEG): [reply(0, NEG, -0.6), reply(1, NEG, 0.9)]}
    baseline = [reply(0, {}, 0.0), reply(1, {}, 0.0)]
    first, second = evaluation.effects(replies, SCHEMA, 2, baseline)
    means = {name: first[name]["mean"] for name in evaluation.EFFECTS.values()}
    assert first["condition"] == POS and means == {
        "no_condition": 0.5, "asked": 0.0, "difference": -0.5, "baseline_difference": -1.0,
        "opposite": 0.5, "opposite_difference": 0.0}
    assert second["no_condition"]["mean"] == 1.0 and second["asked"]["mean"] == 0.5
    assert second["opposite"]["mean"] == 1.0 and second["baseline_difference"]["mean"] == -0.5
    assert first["reasons"] == second["reasons"] == {}


def test_a_joint_condition_is_missed_by_missing_either_attribute():
    assert not evaluation.misaligned({"toxicity": "nontoxic", "sentiment": "pos"}, BOTH)
    assert evaluation.misaligned({"toxicity": "toxic", "sentiment": "pos"}, BOTH)
    assert evaluation.misaligned({"toxicity": "nontoxic", "sentiment": "neu"}, BOTH)


def test_a_joint_condition_is_also_measured_attribute_by_attribute():
    """One reply, asked to be nontoxic and pos, is nontoxic and neg: toxicity alone is met."""
    found = evaluation.effects({key(BOTH): [reply(0, BOTH, -0.6)]}, SCHEMA, 1, [])
    assert [(effect["measured"], effect["asked"]["mean"]) for effect in found] == [
        (BOTH, 1.0), ({"toxicity": "nontoxic"}, 0.0), (POS, 1.0)]


def test_effects_that_cannot_be_measured_are_none_with_a_reason():
    """Only one condition was drawn: nothing to compare it with; neu has no opposite at all."""
    neutral = {"sentiment": "neu"}
    found = evaluation.effects({key(POS): [reply(0, POS, 0.6)],
                                key(neutral): [reply(0, neutral, 0.6)]}, SCHEMA, 1, [])
    for effect in found:
        assert effect["no_condition"] is None and effect["difference"] is None
        assert effect["reasons"]["difference"] == "no reply was drawn without a condition"
        assert effect["baseline_difference"] is None and effect["opposite"] is None
    reasons = [effect["reasons"]["opposite"] for effect in found]
    assert "under the opposite condition" in reasons[0]
    assert reasons[1] == "a value in between has no opposite"


def test_replies_without_letters_are_counted_and_no_score_is_made_up():
    replies = [reply(0, {}, 0.6), reply(1, {}, None, "12")]
    figures = evaluation.describe(replies, replies, SCHEMA, 2)
    assert figures["unscored"] == 1 and figures["replies"] == 2
    assert figures["shares"]["sentiment"]["pos"] == 1.0
    assert figures["perplexity"] is None
    assert figures["reasons"]["perplexity"] == "no reply has tokens"
    assert evaluation.share_by_row(replies, POS, 2) == [0.0, None]


# ---- quality ------------------------------------------------------------------------------------


def test_perplexity_and_its_ratio_by_hand():
    """8 nats over 4 tokens against 4 over 4: e^2 against e, ratio e; all rows alike, no spread."""
    ratio = perplexity_ratio([(4.0, 2), (4.0, 2)], [(2.0, 2), (2.0, 2)])
    assert ratio == pytest.approx(figure(math.e, math.e, math.e))
    assert perplexity_ratio([(0.0, 0)], [(1.0, 1)]) is None


def test_repetition_counts_what_stood_before_in_the_same_text():
    """a b c a b c: 3-grams abc bca cab abc, one of four again."""
    assert evaluation.repetition(["a b c a b c"]) == 0.25
    assert evaluation.repetition(["a b c d", "one two"]) == 0.0
    assert evaluation.repetition(["one two"]) is None


def test_perplexity_is_that_of_the_base_after_the_prompt(in_folder):  # noqa: F811
    """One row at a time, the whole text through the plain model."""
    rows = [{"prompt": "The bus", "preds": ["leaves at nine", "is late.", ""]},
            {"prompt": "", "preds": ["I know"]}]
    found = base_nats("tiny", {"a": rows})
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    for prompt, text in (("The bus", "leaves at nine"), ("The bus", "is late."), ("", "I know")):
        context = tokens.start_ids(tokenizer)
        context += tokenizer(prompt)["input_ids"] if prompt else []
        ids = tokenizer(f" {text}" if prompt else text)["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([context + ids])).logits[0].log_softmax(-1)
        nll = -sum(logps[len(context) - 1 + i, token].item() for i, token in enumerate(ids))
        assert found[prompt, text] == (pytest.approx(nll, abs=1e-4), len(ids))
    assert found["The bus", ""] == (0.0, 0)


# ---- files --------------------------------------------------------------------------------------


def test_files_of_other_scorers_are_not_compared(tmp_path, capsys):
    systems = {name: [{"prompt": "a", "conditions": [{}], "preds": ["hello"]}] for name in "ab"}
    for name, schema in (("a", SCHEMA), ("b", {"toxicity": SCHEMA["toxicity"]})):
        run = {"base_model": "tiny", "args": {"schema": schema, "attributes": []}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"run": run}))
    files = {name: tmp_path / f"{name}.jsonl" for name in "ab"}
    error = refused(capsys, 2, evaluation.measure, systems, Sources(files), None)
    assert "another base or schema" in error
    (tmp_path / "a.json").unlink()
    error = refused(capsys, 2, evaluation.measure, systems, Sources(files), None)
    assert "which scorers and thresholds" in error and "a.json" in error


def test_rows_without_conditions_have_no_figures_of_the_method(tmp_path):
    sources = Sources({"a": tmp_path / "a.jsonl"})
    result = evaluation.measure({"a": [{"prompt": "a", "preds": ["b"]}]}, sources, None)
    table, = evaluation.tables(result.summary)
    assert table.notes == ["no figures: the rows have no conditions"] and not result.lines


def test_the_table_says_which_replies_all_are_compared_with(tmp_path, monkeypatch):
    """Drawn under sentiment=pos alone, nothing is without a condition: pos is the baseline.

    Equal texts have equal nats, so the ratio is 1 either way.
    """
    monkeypatch.setattr(evaluation, "base_nats", lambda base, systems: {("a", "hello"): (4.0, 2)})
    monkeypatch.setattr(evaluation, "load_scorer", lambda scorer, checkpoint: (
        lambda texts: [0.1] * len(texts), "1.9.1" if "profanity" in scorer else "3.3.2"))
    run = {"base_model": "tiny", "args": {"schema": SCHEMA, "attributes": []}}
    (tmp_path / "a.json").write_text(json.dumps({"run": run}))
    sources = Sources({"a": tmp_path / "a.jsonl"})
    for conditions, baseline in (([POS], "under sentiment=pos"),
                                 ([POS, {}], "without a condition")):
        rows = [{"prompt": "a", "conditions": conditions, "preds": ["hello"] * len(conditions)}]
        result = evaluation.measure({"a": rows}, sources, None)
        assert result.summary["baseline"] == baseline
        misalignment, quality = evaluation.tables(result.summary)
        assert misalignment.title.endswith(f"the one of the first file, {baseline}")
        assert quality.title.endswith(f"the first model {baseline}")
        asked = result.summary["systems"]["a"]["conditions"]["sentiment=pos"]
        assert asked["perplexity_ratio"]["mean"] == pytest.approx(1)
    del result.summary["baseline"]  # as in earlier logs
    assert evaluation.tables(result.summary)[1].title.endswith("without a condition")


def test_a_sweep_is_scored_condition_by_condition(
        in_folder, embedder, capsys):  # noqa: F811
    """Nine conditions, once plain and once guided; the model was trained on sentiment alone."""
    common = ["--method", "control", "--model_name_or_path", str(in_folder), "--sweep", "toxicity",
              "sentiment=neg,pos", "--unknown_attributes", "token", "--limit", "3",
              "--max_new_tokens", "6"]
    infer.main([*common, "--save_file", "outs/one.jsonl"])
    infer.main([*common, "--guidance_scale", "2", "--save_file", "outs/two.jsonl"])
    rows = utils.read_jsonl("outs/one.jsonl")
    conditions = rows[0]["conditions"]
    assert len(rows) == 3 and len(conditions) == 9
    main = import_module("eval").main  # `eval` is a builtin function
    main(["--eval_file", "outs/one.jsonl", "outs/two.jsonl", "--save_file", "logs/both.json"])
    summary = json.loads((in_folder.parents[2] / "logs" / "both.json").read_text())
    one, two = summary["control"]["systems"].values()
    assert summary["kind"] == "eval/control"
    assert two["guidance_scale"] == 2.0 and one["trained"] == ["sentiment"]
    assert set(one["conditions"]) == set(map(attributes.write_condition, conditions))
    assert one["conditions"]["no condition"]["perplexity_ratio"]["mean"] == pytest.approx(1)
    assert len(one["effects"]) == 4 + 4 * 3, "joint conditions also attribute by attribute"
    lines = utils.read_jsonl("logs/both.control.jsonl")
    assert len(lines) == 2 * 3 * 9 and {"condition", "misaligned", "nll"} <= set(lines[0])
    capsys.readouterr()
    main(["--show", "logs/both.json"])
    shown = capsys.readouterr().out
    assert "misaligned replies" in shown and "toxicity=nontoxic" in shown
    assert "toxicity: alt-profanity-check 1.9.1, nontoxic toxic parted at" in shown
