"""Method control: what is measured of replies under conditions."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from conftest import refused, write_jsonl
from control_cases import SCHEMA, in_folder, trained  # noqa: F401

import infer
import utils
from methods.control import attributes, evaluation, tokens
from modeling.models import load_model, load_tokenizer

# ---- figures ------------------------------------------------------------------------------------


def reply(row: int, want: dict, sentiment: float | None, text: str = "x", nll: float = 0.0, tokens: int = 0) -> evaluation.Reply:
    scores = None if sentiment is None else {"toxicity": 0.1, "sentiment": sentiment}
    return evaluation.Reply(row, want, text, scores, scores and attributes.values_of(scores, SCHEMA), nll, tokens)


def test_misalignment_by_hand():
    """Two rows. Nothing asked: pos, neu (one of two is not pos). Asked for pos: pos, pos (none). Asked for neg: neg, pos."""
    pos, neg = {"sentiment": "pos"}, {"sentiment": "neg"}
    replies = {(): [reply(0, {}, 0.6), reply(1, {}, 0.0)],
               tuple(pos.items()): [reply(0, pos, 0.6), reply(1, pos, 0.9)],
               tuple(neg.items()): [reply(0, neg, -0.6), reply(1, neg, 0.9)]}
    first, second = evaluation.effects(replies, SCHEMA, 2, [reply(0, {}, 0.0), reply(1, {}, 0.0)])
    assert first["baseline_difference"][0] == -1.0 and second["baseline_difference"][0] == -0.5
    assert first["want"] == pos and first["no_condition"][0] == 0.5 and first["asked"][0] == 0.0 and first["difference"][0] == -0.5
    assert first["opposite"][0] == 0.5 and first["opposite_difference"][0] == 0.0
    assert second["no_condition"][0] == 1.0 and second["asked"][0] == 0.5 and second["opposite"][0] == 1.0


def test_a_joint_condition_is_missed_by_missing_either_attribute():
    want = {"toxicity": "nontoxic", "sentiment": "pos"}
    assert not evaluation.misaligned({"toxicity": "nontoxic", "sentiment": "pos"}, want)
    assert evaluation.misaligned({"toxicity": "toxic", "sentiment": "pos"}, want)
    assert evaluation.misaligned({"toxicity": "nontoxic", "sentiment": "neu"}, want)
    assert attributes.opposite(want, SCHEMA) == {"toxicity": "toxic", "sentiment": "neg"}
    assert attributes.opposite({"sentiment": "neu"}, SCHEMA) is None and attributes.opposite({}, SCHEMA) is None


def test_a_joint_condition_is_also_measured_attribute_by_attribute():
    """One reply asked to be nontoxic and pos, nontoxic and neg as it is: jointly missed, sentiment missed, toxicity met."""
    want = {"toxicity": "nontoxic", "sentiment": "pos"}
    found = evaluation.effects({tuple(want.items()): [reply(0, want, -0.6)]}, SCHEMA, 1, [])
    assert [(own["measured"], own["asked"][0]) for own in found] == [(want, 1.0), ({"toxicity": "nontoxic"}, 0.0), ({"sentiment": "pos"}, 1.0)]
    assert found[0]["no_condition"] is None and found[0]["difference"] is None


def test_replies_without_letters_are_counted_and_no_score_is_made_up():
    replies = [reply(0, {}, 0.6), reply(1, {}, None, "12")]
    figures = evaluation.describe(replies, replies, SCHEMA, 2)
    assert figures["unscored"] == 1 and figures["replies"] == 2 and figures["shares"]["sentiment"]["pos"] == 1.0
    assert evaluation.share_by_row(replies, {"sentiment": "pos"}, 2) == [0.0, None]


def test_perplexity_and_its_ratio_by_hand():
    """8 nats over 4 tokens against 4 over 4: e^2 against e, ratio e; all rows alike, so the interval is the point."""
    a, b = [(4.0, 2), (4.0, 2)], [(2.0, 2), (2.0, 2)]
    assert evaluation.ratio_interval(a, b) == pytest.approx((math.e, math.e, math.e))
    assert evaluation.ratio_interval([(0.0, 0)], [(1.0, 1)]) is None


def test_repetition_counts_what_stood_before_in_the_same_text():
    """a b c a b c: 3-grams abc bca cab abc, one of four again."""
    assert evaluation.repetition(["a b c a b c"]) == 0.25 and evaluation.repetition(["a b c d", "one two"]) == 0.0
    assert evaluation.repetition(["one two"]) is None


def test_files_of_other_scorers_are_not_compared(in_folder, capsys, tmp_path):
    row = {"prompt": "a", "wants": [{}], "guidance": 1.0, "preds": ["hello"]}
    for name, schema in (("a", SCHEMA), ("b", {"toxicity": SCHEMA["toxicity"]})):
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
        run = {"base_model": "tiny", "args": {"schema": schema, "attributes": []}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"run": run}))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert refused(evaluation.main, "--eval_file", *files, "--save_file", tmp_path / "e.json") == 2
    assert "another base or schema" in capsys.readouterr().err
    (tmp_path / "a.json").unlink()
    assert refused(evaluation.main, "--eval_file", files[0], "--save_file", tmp_path / "e.json") == 2
    assert "which scorers and thresholds" in capsys.readouterr().err


# ---- end to end ---------------------------------------------------------------------------------


def test_a_sweep_asks_for_every_combination_and_evaluation_scores_it(in_folder, capsys):
    common = ["--method", "control", "--model_name_or_path", str(in_folder), "--sweep", "toxicity", "sentiment=neg,pos", "--untrained",
              "token", "--limit", "3", "--max_new_tokens", "6"]
    infer.main([*common, "--save_file", "outs/one.jsonl"])
    infer.main([*common, "--guidance", "2", "--save_file", "outs/two.jsonl"])
    rows = utils.read_jsonl("outs/one.jsonl")
    wants = rows[0]["wants"]
    assert len(rows) == 3 and len(wants) == 9 and wants[0] == {} and {"toxicity": "toxic", "sentiment": "neg"} in wants
    assert all(len(row["preds"]) == 9 for row in rows)
    evaluation.main(["--eval_file", "outs/one.jsonl", "outs/two.jsonl", "--save_file", "logs/both.json"])
    summary = json.loads((in_folder.parents[2] / "logs" / "both.json").read_text())
    one, two = summary["systems"].values()
    assert two["guidance"] == 2.0 and one["trained"] == ["sentiment"]
    assert set(one["conditions"]) == {attributes.write_want(want) for want in wants}
    assert one["conditions"]["no condition"]["perplexity_ratio"][0] == pytest.approx(1)
    assert len(one["effects"]) == 4 + 4 * 3  # single values; joint ones, also attribute by attribute
    capsys.readouterr()
    evaluation.main(["--show", "logs/both.json"])
    assert "misaligned replies" in (out := capsys.readouterr().out) and "toxicity=nontoxic" in out


def test_perplexity_is_that_of_the_base_after_the_prompt(in_folder):
    """One row at a time, the whole text through the plain model."""
    preds = ["leaves at nine", "is late.", ""]
    found = evaluation.base_nats("tiny", {"a": [{"prompt": "The bus", "preds": preds}, {"prompt": "", "preds": ["I know"]}]})
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    for prompt, text in (("The bus", "leaves at nine"), ("The bus", "is late."), ("", "I know")):
        context = tokens.start_ids(tokenizer) + (tokenizer(prompt)["input_ids"] if prompt else [])
        ids = tokenizer(f" {text}" if prompt else text)["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([context + ids])).logits[0].log_softmax(-1)
        nll = -sum(logps[len(context) - 1 + i, token].item() for i, token in enumerate(ids))
        assert found[prompt, text][0] == pytest.approx(nll, abs=1e-4) and found[prompt, text][1] == len(ids)
    assert found["The bus", ""] == (0.0, 0)
