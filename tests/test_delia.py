"""Method delia: what is measured of a token that asks for a format, and the data."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, refused, write_jsonl
from delia_cases import JSON, QUERIES, TASK, files, runs, talk  # noqa: F401

import infer
import utils
from methods.delia import evaluation, messages, mixing, reading, self_sampling

DATA = ROOT / "data" / "delia"


# ---- reading replies ----------------------------------------------------------------------------


@pytest.mark.parametrize(("reply", "label"), [
    (JSON, "correct"), (f"  {JSON}\n", "correct"), (JSON.replace("correct", "error"), "error"),
    (JSON.replace('"', "'"), None), (JSON.replace("correct", "maybe"), None), (JSON[:-1], None), (f"Sure: {JSON}", None),
    (JSON.replace(", ", ",\n"), None), ('{"label": "error"}', None), (JSON.replace("}", ', "x": 1}'), None), ("[]", None), ("", None),
    ('{"thought": " ", "label": "error"}', None), ('{"thought": "a", "label": "error", "label": "correct"}', None),
    ('{"thought": 1, "label": "error"}', None), ('{"thought": "a", "label": ["error"]}', None),
])
def test_the_format_is_one_line_of_json_with_two_keys(reply, label):
    assert reading.read_format(reply) == label


@pytest.mark.parametrize(("reply", "label"), [
    ("This is wrong, since water boils at 100 degrees.", "error"), ("There is no factual error in it.", "correct"),
    ("Nothing is wrong here.", "correct"), ("That is not correct.", "error"), ("It's not quite right.", "error"),
    ("The correct number is eight, so the answer is wrong.", "error"), ("True enough.", "correct"), ("I like cats.", None), ("", None),
])
def test_verdicts_are_read_from_prose(reply, label):
    assert reading.read_prose(reply) == label


def test_every_reference_verdict_of_the_data_is_read_as_its_label():
    for name in ("train", "test"):
        for row in utils.read_jsonl(DATA / f"{name}.jsonl"):
            reply = row["messages"][-1]["content"]
            read = reading.read_format(reply) if row["asks_format"] else reading.read_prose(reply)
            assert read == row["label"], reply


# ---- figures ------------------------------------------------------------------------------------


def test_balanced_accuracy_and_macro_f1_by_hand():
    """8 correct, 2 error. Found: 6 of the 8 right, 1 unread, 1 as error; 1 of 2 errors found, 1 as correct.

    Balanced (6/8 + 1/2) / 2 = 0.625. F1: correct 2 x 6 / (8 + 7) = 0.8, error 2 x 1 / (2 + 2) = 0.5; mean 0.65.
    """
    truth = np.array(["correct"] * 8 + ["error"] * 2, dtype=object)
    found = np.array(["correct"] * 6 + [None, "error", "error", "correct"], dtype=object)
    assert evaluation.balanced_accuracy(truth, found) == 0.625 and evaluation.macro_f1(truth, found) == pytest.approx(0.65)
    figures = evaluation.label_figures(truth, found)
    assert figures["accuracy"][0] == 0.7 and figures["majority"] == {
        "label": "correct", "accuracy": 0.8, "balanced_accuracy": 0.5, "macro_f1": pytest.approx(8 / 18)}
    assert figures["balanced_accuracy"][1] < 0.625 < figures["balanced_accuracy"][2]


def reply_rows(*replies, seen: bool = False) -> list[dict]:
    """Four questions: two that ask for the format (error, correct), one negated (correct), one silent (error)."""
    kinds = [("error", True, False), ("correct", True, False), ("correct", False, True), ("error", False, False)]
    return [{**talk(f"Question {i}\n\nSay it{' again' * seen}.", "So."), "prompt": f"Question {i}\n\nSay it{' again' * seen}.",
             "label": label, "asks_format": asks, "negated": negated, "preds": [reply], **({"seen_phrasing": True} if seen else {})}
            for i, ((label, asks, negated), reply) in enumerate(zip(kinds, replies, strict=True))]


def test_follow_and_leak_are_counted_apart():
    """Both asking rows follow, one with the wrong label; the negated row leaks, the silent one does not."""
    figures = evaluation.reply_figures(reply_rows(JSON, JSON, JSON, "It is wrong."))
    assert [figures[name][0] for name in ("follow", "leak", "leak_negated", "leak_silent")] == [1, 0.5, 1, 0]
    assert figures["follow_minus_leak"] == [0.5, 0, 1] and figures["accuracy"][0] == 0.5
    assert figures["verdict_accuracy"][0] == 0.75 and figures["unread"] == 0
    always = evaluation.reply_figures(reply_rows(*[JSON] * 4))
    assert always["follow_minus_leak"] == [0, 0, 0], "a model that always writes the format has not understood the token"


def test_transfer_compares_the_same_questions_and_a_difference_the_same_rows():
    """Under seen phrasings both follow, under unseen ones the second alone: follow - leak 1 and 0.5, accuracy 0.5 and 0.5."""
    unseen, seen = reply_rows("No.", JSON, "No.", "No."), reply_rows(JSON, JSON, "No.", "No.", seen=True)
    found = evaluation.transfer(unseen, seen[::-1])
    assert found["pairs"] == 4 and found["follow_minus_leak"][0] == -0.5 and found["accuracy"][0] == 0
    assert evaluation.difference(unseen, seen)["follow_minus_leak"][0] == -0.5
    assert evaluation.difference(seen, seen) == {"follow_minus_leak": [0, 0, 0], "balanced_accuracy": [0, 0, 0]}


def test_the_nll_of_a_token_is_that_of_a_padded_pass(tiny_model, tokenizer):
    """Against log_softmax of an ordinary forward pass, for the chosen places, several sequences packed."""
    sequences = [([5, 6, 7, 8], [False, False, True, True]), ([9, 5, 7], [False, True, False]), ([6] * 30, [False] * 29 + [True])]
    got = evaluation.sequence_logps(tiny_model, sequences)
    for (ids, chosen), logps in zip(sequences, got, strict=True):
        want = tiny_model(torch.tensor([ids])).logits[0].log_softmax(-1)
        want = [want[i - 1, ids[i]].item() for i in range(1, len(ids)) if chosen[i]]
        np.testing.assert_allclose(logps, want, atol=1e-5)


def test_the_neighbours_of_an_embedding(tiny_model, tokenizer):
    """A row that is twice the mean of a description's rows has cosine 1 with it, and no token is more like it."""
    words = "the board says"
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        table = tiny_model.get_input_embeddings().weight
        table[0] = 2 * table[ids].mean(0)
    found = evaluation.embedding_figures(tiny_model, tokenizer, tokenizer.convert_ids_to_tokens(0), words)
    assert found["description"] == pytest.approx(1, abs=1e-5) and found["less_like_description"] == pytest.approx(1 - 1 / len(tokenizer))
    assert len(found["nearest"]) == 10 and found["nearest"][0][1] <= 1


# ---- end to end ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero", "two"])
def test_an_evaluation_of_a_run_has_every_figure(runs, tiny_dir, tmp_path, name, capsys):
    """Base and run on four rows and their seen phrasings; the base has no token, and its own retention changes by 0."""
    import eval as evaluation

    kinds = [("error", True, False), ("correct", True, False), ("correct", False, True), ("error", False, False)]
    rows = [{**talk(f"Is {i} wet?\n\n{'Use' if i < 2 else 'No'} <sep> {k}.", JSON), "label": label, "asks_format": asks, "negated": negated,
             **({"seen_phrasing": True} if k else {})} for k in (0, 1) for i, (label, asks, negated) in enumerate(kinds)]
    test_file = write_jsonl(tmp_path / "test.jsonl", rows)
    checkpoint = next(iter(utils.checkpoints_in(runs / name)))
    for model, out in ((tiny_dir, "base"), (checkpoint, "run")):
        infer.main(["--method", "delia", "--model_name_or_path", str(model), "--test_file", str(test_file), "--decoding", "greedy",
                    "--max_new_tokens", "6", "--save_file", str(tmp_path / f"{out}.jsonl")])
    evaluation.main(["--eval_file", str(tmp_path / "base.jsonl"), str(tmp_path / "run.jsonl"), "--save_file", str(tmp_path / "e.json")])
    said = capsys.readouterr().out
    systems = json.loads((tmp_path / "e.json").read_text())["systems"]
    base, run = systems["base"], systems["run"]
    held_out = sum(mixing.is_held_out({"prompt": query}) for query in QUERIES)
    assert base["retention"]["rows"] == run["retention"]["rows"] == held_out > 0
    assert base["retention"]["change"] == [0, 0, 0] and run["retention"]["change"][0] != 0
    assert "token_nll" not in base and run["token_nll"][0] > 0 and run["token_nll_before"][0] > 0
    assert run["ratio"] == (0 if name == "zero" else 2) and run["transfer"]["pairs"] == 4 and "difference" in run
    assert len((tmp_path / "e.jsonl").read_text().splitlines()) == 16 and "follow minus leak" in said
    evaluation.main(["--show", str(tmp_path / "e.json")])
    assert "cosine" in capsys.readouterr().out


def test_a_checkpoints_own_token_may_stand_in_test_rows_and_another_special_token_may_not(runs, tmp_path, capsys):
    checkpoint = next(iter(utils.checkpoints_in(runs / "zero")))
    path = write_jsonl(tmp_path / "test.jsonl", [TASK[0], talk("Say <|im_end|> <sep>.", "So.")])
    said = refused(capsys, 2, infer.main, ["--method", "delia", "--model_name_or_path", str(checkpoint), "--test_file", str(path),
                                        "--save_file", str(tmp_path / "out.jsonl")])
    assert "row 2 spells the special token <|im_end|>" in said


# ---- the data -----------------------------------------------------------------------------------


def test_the_data_sets_hold_what_their_card_says():
    rows = {name: utils.read_jsonl(DATA / f"{name}.jsonl") for name in ("queries", "train", "test", "test_seen", "phrasings")}
    assert [len(rows[name]) for name in ("queries", "train", "test", "test_seen", "phrasings")] == [300, 200, 80, 80, 90]
    assert len({row["query"].lower() for row in rows["queries"]}) == 300 and not any(map(self_sampling.check_query, rows["queries"]))
    text_of = {row["phrasing"]: row["text"] for row in rows["phrasings"]}
    for name in ("train", "test", "test_seen"):
        for row in rows[name]:
            assert messages.check_messages(row) is None and messages.check_tokens(row, ["<sep>"], strict=True) is None
            question, _, sentence = row["messages"][0]["content"].rpartition("\n\n")
            assert sentence == text_of[row["phrasing"]] and re.match(r"Question: .+\nAnswer: ", question)
            kind = row["phrasing"].split("_")[1]
            assert (row["asks_format"], row["negated"], "<sep>" in sentence) == (kind == "ask", kind == "neg", kind != "sil")
    of = {name: {row["phrasing"] for row in rows[name]} for name in ("train", "test", "test_seen")}
    assert not of["train"] & of["test"] and of["test_seen"] <= of["train"]
    assert not {text_of[p] for p in of["train"]} & {text_of[p] for p in of["test"]}
    questions = {name: {evaluation.question_of({**row, "prompt": row["messages"][0]["content"]})[0] for row in rows[name]} for name in of}
    assert questions["test"] == questions["test_seen"] and not questions["test"] & questions["train"]
    every = [text for name in ("train", "test") for row in rows[name] for text in evaluation.question_of(
        {**row, "prompt": row["messages"][0]["content"]})[0].lower().split("\nanswer: ")]
    assert len(set(every)) == len(every) == 560, "no question and no judged answer stands twice"
    for name in of:
        assert Counter(row["label"] for row in rows[name]).most_common()[0][1] * 2 == len(rows[name]), "labels are balanced"
