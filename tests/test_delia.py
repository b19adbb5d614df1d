"""Method delia: what is measured of a token that asks for a format, and the data."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib import import_module

import numpy as np
import pytest
from conftest import ROOT, refused, write_jsonl
from delia_cases import JSON, QUERIES, TASK, files, runs, talk  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

import infer
import utils
from methods.delia import evaluation, messages, mixing, probabilities, reading, self_sampling
from scoring import statistics
from scoring.evaluated import figure
from scoring.sources import Sources

DATA = ROOT / "data" / "delia"


# ---- reading replies ----------------------------------------------------------------------------


@pytest.mark.parametrize(("reply", "label"), [
    (JSON, "correct"), (f"  {JSON}\n", "correct"), (JSON.replace("correct", "error"), "error"),
    (JSON.replace('"', "'"), None), (JSON.replace("correct", "maybe"), None), (JSON[:-1], None),
    (f"Sure: {JSON}", None), (JSON.replace(", ", ",\n"), None), ('{"label": "error"}', None),
    (JSON.replace("}", ', "x": 1}'), None), ("[]", None), ("", None),
    ('{"thought": " ", "label": "error"}', None),
    ('{"thought": "a", "label": "error", "label": "correct"}', None),
    ('{"thought": 1, "label": "error"}', None), ('{"thought": "a", "label": ["error"]}', None),
])
def test_the_format_is_one_line_of_json_with_two_keys(reply, label):
    assert reading.read_format(reply) == label


@pytest.mark.parametrize(("reply", "label"), [
    ("This is wrong, since water boils at 100 degrees.", "error"),
    ("There is no factual error in it.", "correct"), ("Nothing is wrong here.", "correct"),
    ("That is not correct.", "error"), ("It's not quite right.", "error"),
    ("The correct number is eight, so the answer is wrong.", "error"),
    ("There is no error in the date, but the name is wrong.", "error"),
    ("True enough.", "correct"), ("I like cats.", None), ("", None),
])
def test_verdicts_are_read_from_prose(reply, label):
    assert reading.read_prose(reply) == label


def test_every_reference_verdict_of_the_data_is_read_as_its_label():
    for name in ("train", "test"):
        for row in utils.read_jsonl(DATA / f"{name}.jsonl"):
            reply = row["messages"][-1]["content"]
            read = reading.read_format if row["asks_format"] else reading.read_prose
            assert read(reply) == row["label"], reply


# ---- figures ------------------------------------------------------------------------------------


def test_balanced_accuracy_and_macro_f1_by_hand():
    """8 correct, 2 error. Found: 6 of the 8 right, 1 unread, 1 as error; of the errors 1 right.

    Balanced (6/8 + 1/2) / 2 = 0.625. F1: correct 2 x 6 / (8 + 7) = 0.8, error 2 x 1 / (2 + 2) =
    0.5; mean 0.65. Always "correct": accuracy 0.8, F1 (2 x 8 / (8 + 10) + 0) / 2 = 8/18.
    """
    truth = np.array(["correct"] * 8 + ["error"] * 2, dtype=object)
    found = np.array(["correct"] * 6 + [None, "error", "error", "correct"], dtype=object)
    figures = evaluation.label_figures(truth, found)
    balanced = figures["balanced_accuracy"]
    assert figures["accuracy"]["mean"] == 0.7 and balanced["mean"] == 0.625
    assert figures["macro_f1"]["mean"] == pytest.approx(0.65)
    assert figures["majority"] == {"label": "correct", "accuracy": 0.8, "balanced_accuracy": 0.5,
                                   "macro_f1": pytest.approx(8 / 18)}
    assert balanced["low"] < 0.625 < balanced["high"]


@given(st.lists(st.tuples(st.sampled_from(reading.LABELS),
                          st.sampled_from([*reading.LABELS, None])), min_size=1))
@settings(max_examples=50, deadline=None)
def test_what_is_resampled_is_what_scikit_learn_computes(pairs):
    """The intervals come from counts, since scikit-learn is too slow for 2,000 resamples."""
    truth, found = (np.array(column, dtype=object) for column in zip(*pairs, strict=True))
    codes, groups = evaluation.by_label(truth, found)
    want = statistics.macro_f1(truth, found, reading.LABELS)
    assert evaluation.macro_f1_of_codes(*codes) == pytest.approx(want)
    want = statistics.balanced_accuracy(truth, found)
    assert evaluation.mean_of_means(*groups) == pytest.approx(want)


def reply_rows(*replies, seen: bool = False) -> list[dict]:
    """Four questions: two that ask for the format (error, correct), one negated (correct), one
    silent (error)."""
    kinds = [("error", True, False), ("correct", True, False), ("correct", False, True),
             ("error", False, False)]
    rows = []
    for i, ((label, asks, negated), reply) in enumerate(zip(kinds, replies, strict=True)):
        prompt = f"Question {i}\n\nSay it{' again' * seen}."
        rows.append({**talk(prompt, "So."), "prompt": prompt, "label": label, "asks_format": asks,
                     "negated": negated, "preds": [reply]}
                    | ({"seen_phrasing": True} if seen else {}))
    return rows


def test_follow_and_leak_are_counted_apart():
    """Both asking rows follow, one with the wrong label; the negated row leaks, the other does not.

    Of two rows each, a resample of follow - leak has 1 - 0, 1 - 1/2 or 1 - 1.
    """
    figures, reasons = evaluation.reply_figures(reply_rows(JSON, JSON, JSON, "It is wrong."))
    shares = [figures[name]["mean"] for name in ("follow", "leak", "leak_negated", "leak_silent")]
    assert shares == [1, 0.5, 1, 0] and reasons == {}
    assert figures["follow_minus_leak"] == figure(0.5, 0, 1)
    assert figures["accuracy"]["mean"] == 0.5
    assert figures["verdict_accuracy"]["mean"] == 0.75 and figures["unread"] == 0
    always, _ = evaluation.reply_figures(reply_rows(*[JSON] * 4))
    assert always["follow_minus_leak"] == figure(0, 0, 0), \
        "a model that always writes the format has not understood the token"


def test_transfer_compares_the_same_questions_and_a_difference_the_same_rows():
    """Under seen phrasings both follow, under unseen ones the second alone.

    follow - leak: 1 and 0.5; accuracy: 0.5 and 0.5.
    """
    unseen = reply_rows("No.", JSON, "No.", "No.")
    seen = reply_rows(JSON, JSON, "No.", "No.", seen=True)
    found = evaluation.transfer(unseen, seen[::-1])
    assert found["pairs"] == 4 and found["follow_minus_leak"]["mean"] == -0.5
    assert found["accuracy"]["mean"] == 0
    assert evaluation.difference(unseen, seen)["follow_minus_leak"]["mean"] == -0.5
    assert evaluation.difference(seen, seen) == {
        "follow_minus_leak": figure(0, 0, 0), "balanced_accuracy": figure(0, 0, 0)}
    assert evaluation.transfer(unseen, seen[2:]) is None, "no pair asks for the format"


# ---- what is missing, and why -------------------------------------------------------------------


def test_figures_without_the_model_or_a_cache_are_none_with_a_reason(tmp_path):
    sources = Sources({"a": tmp_path / "a.jsonl"})
    result = evaluation.measure({"a": reply_rows(JSON, JSON, "No.", "No.")[:3]}, sources, None)
    system = result.summary["systems"]["a"]
    for name in probabilities.FIGURES:
        assert system[name] is None and "does not say which model" in system["reasons"][name]
    assert system["leak_silent"] is None and system["transfer"] is None
    assert system["reasons"]["leak_silent"] == "no row leaves the format unmentioned"
    assert system["reasons"]["difference"] == "the first system is the baseline"
    table, = evaluation.tables(result.summary)
    assert ["leak silent", "—"] not in table.rows, "a line that no system has is left out"
    assert any("no ratio, reply nll, token nll" in note for note in table.notes)
    assert probabilities.held_out_rows(sources) == ([], "no run names a --diverse_file")


def without(rows: list[dict], place: int, name: str) -> list[dict]:
    """The rows, one of which lacks a field."""
    del rows[place][name]
    return rows


@pytest.mark.parametrize(("rows", "why"), [
    ([row | {"preds": [JSON, JSON]} for row in reply_rows(*[JSON] * 4)], "2 replies a row"),
    (reply_rows(*[JSON] * 4)[:2], "rows that do not"),
    ([{"prompt": "a", "preds": ["b"]}], "do not say whether they ask for the format"),
    (without(reply_rows(*[JSON] * 4), 2, "label"), "row 3 of a needs a label (error or correct)"),
    (without(reply_rows(*[JSON] * 4), 1, "negated"), "row 2 of a needs a label"),
])
def test_rows_that_the_figures_cannot_read_have_none(tmp_path, rows, why):
    result = evaluation.measure({"a": rows}, Sources({"a": tmp_path / "a.jsonl"}), None)
    table, = evaluation.tables(result.summary)
    assert why in table.notes[0] and not table.rows


# ---- end to end ---------------------------------------------------------------------------------


def rows_with_token(tmp_path) -> str:
    """Four questions with the new token, and the same under seen phrasings."""
    kinds = [("error", True, False), ("correct", True, False), ("correct", False, True),
             ("error", False, False)]
    rows = [{**talk(f"Is {i} wet?\n\n{'Use' if i < 2 else 'No'} <sep> {k}.", JSON),
             "label": label, "asks_format": asks, "negated": negated}
            | ({"seen_phrasing": True} if k else {})
            for k in (0, 1) for i, (label, asks, negated) in enumerate(kinds)]
    return str(write_jsonl(tmp_path / "test.jsonl", rows))


@pytest.mark.parametrize("name", ["zero", "two"])
def test_an_evaluation_of_a_run_has_every_figure(
        runs, tiny_dir, embedder, tmp_path, name, capsys):  # noqa: F811
    """The base has no token, and its own retention changes by 0."""
    checkpoint = next(iter(utils.checkpoints_in(runs / name)))
    drawn = []
    for model, out in ((tiny_dir, "base"), (checkpoint, "run")):
        drawn.append(str(tmp_path / f"{out}.jsonl"))
        infer.main(["--method", "delia", "--model_name_or_path", str(model), "--test_file",
                    rows_with_token(tmp_path), "--decoding", "greedy", "--max_new_tokens", "6",
                    "--save_file", drawn[-1]])
    main = import_module("eval").main  # `eval` is a builtin function
    main(["--eval_file", *drawn, "--save_file", str(tmp_path / "e.json")])
    shown = capsys.readouterr().out
    summary = json.loads((tmp_path / "e.json").read_text())
    base, run = (summary["delia"]["systems"][name] for name in ("base", "run"))
    held_out = sum(mixing.is_held_out({"prompt": query}) for query in QUERIES)
    assert summary["kind"] == "eval/delia"
    assert base["retention"]["rows"] == run["retention"]["rows"] == held_out > 0
    assert base["retention"]["change"] == figure(0, 0, 0)
    assert run["retention"]["change"]["mean"] != 0
    assert base["token_nll"] is None
    assert base["reasons"]["token_nll"] == "the model has no new token"
    assert run["token_nll"]["mean"] > 0 and run["token_nll_before"]["mean"] > 0
    assert run["ratio"] == (0 if name == "zero" else 2)
    assert run["transfer"]["pairs"] == 4 and run["difference"] is not None
    assert len((tmp_path / "e.delia.jsonl").read_text().splitlines()) == 16
    assert "follow minus leak" in shown
    main(["--show", str(tmp_path / "e.json")])
    assert "cosine" in capsys.readouterr().out


def test_a_checkpoints_own_token_may_stand_in_test_rows_and_another_special_token_may_not(
        runs, tmp_path, capsys):  # noqa: F811
    checkpoint = next(iter(utils.checkpoints_in(runs / "zero")))
    path = write_jsonl(tmp_path / "test.jsonl", [TASK[0], talk("Say <|im_end|> <sep>.", "So.")])
    error = refused(capsys, 2, infer.main, [
        "--method", "delia", "--model_name_or_path", str(checkpoint), "--test_file", str(path),
        "--save_file", str(tmp_path / "out.jsonl")])
    assert "row 2 " in error and "the special token <|im_end|>" in error


# ---- the data -----------------------------------------------------------------------------------


def test_the_data_sets_hold_what_their_card_says():
    names = ("queries", "train", "test", "test_seen", "phrasings")
    rows = {name: utils.read_jsonl(DATA / f"{name}.jsonl") for name in names}
    assert [len(rows[name]) for name in names] == [300, 200, 80, 80, 90]
    assert len({row["query"].lower() for row in rows["queries"]}) == 300
    assert not any(map(self_sampling.check_query, rows["queries"]))
    text_of = {row["phrasing"]: row["text"] for row in rows["phrasings"]}
    for name in ("train", "test", "test_seen"):
        for row in rows[name]:
            assert messages.check_messages(row) is None
            assert messages.check_tokens(row, ["<sep>"], strict=True) is None
            question, _, sentence = row["messages"][0]["content"].rpartition("\n\n")
            assert sentence == text_of[row["phrasing"]]
            assert re.match(r"Question: .+\nAnswer: ", question)
            kind = row["phrasing"].split("_")[1]
            assert row["asks_format"] == (kind == "ask") and row["negated"] == (kind == "neg")
            assert ("<sep>" in sentence) == (kind != "sil")
        labels = Counter(row["label"] for row in rows[name])
        assert labels.most_common()[0][1] * 2 == len(rows[name]), "labels are balanced"


def test_the_data_sets_share_questions_and_phrasings_as_their_card_says():
    rows = {name: utils.read_jsonl(DATA / f"{name}.jsonl")
            for name in ("train", "test", "test_seen", "phrasings")}
    text_of = {row["phrasing"]: row["text"] for row in rows.pop("phrasings")}
    used = {name: {row["phrasing"] for row in rows[name]} for name in rows}
    assert not used["train"] & used["test"] and used["test_seen"] <= used["train"]
    assert not {text_of[p] for p in used["train"]} & {text_of[p] for p in used["test"]}

    def question(row: dict) -> str:
        return evaluation.question_of({**row, "prompt": row["messages"][0]["content"]})[0]

    questions = {name: {question(row) for row in rows[name]} for name in rows}
    assert questions["test"] == questions["test_seen"]
    assert not questions["test"] & questions["train"]
    texts = [text for name in ("train", "test") for row in rows[name]
             for text in question(row).lower().split("\nanswer: ")]
    assert len(set(texts)) == len(texts) == 560, "no question and no judged answer stands twice"
