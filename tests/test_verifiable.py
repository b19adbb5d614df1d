"""eval.py on rows whose right answers a program checks: numbers worked by hand, terminal and page."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from conftest import make_model, refused, write_jsonl
from eval_cases import drawn_by, lines_of, score, script

import infer
import train
from scoring.report.page import render
from scoring.sources import read_systems
from scoring.verifiable import describe, matched_yield

__all__ = ["score"]  # a fixture

BIRDS = {"category": "birds", "answers": [["crow", "jackdaw"], ["sparrow"], ["robin"], ["finch"]]}
FRUITS = {"category": "fruits", "answers": [["apple"], ["pear"]]}
ROWS = [{"prompt": "Name a bird.", **BIRDS}, {"prompt": "Which bird flies by?", **BIRDS},
        {"prompt": "Name a fruit.", **FRUITS}]
BASE = [["crow", "Jackdaws.", "stone", "A sparrow"], ["stone"] * 4, ["apple"] * 4]
TUNED = [["crow", "sparrow", "robin", "finch"], ["crow", "sparrow", "stone", ""],
         ["apple", "pear", "stone", "stone"]]


def answered(path, preds: list[list[str]], rows: list[dict] = ROWS):
    return write_jsonl(path, [{**row, "preds": of_row}
                              for row, of_row in zip(rows, preds, strict=True)])


@pytest.fixture
def files(tmp_path):
    return [answered(tmp_path / "base.jsonl", BASE), answered(tmp_path / "tuned.jsonl", TUNED)]


# ---- the figures --------------------------------------------------------------------------------


def test_the_figures_of_two_systems_by_hand(files, tmp_path, score):
    """
    base    valid 3/4 0 1    yield 2 0 1   distinct 4 1 1   coverage 1/2 0 1/2   collision 1/6 0 1
    tuned   valid 1 1/2 1/2  yield 4 2 2   distinct 4 3 3   coverage 1 1/2 1     collision 0 0 0
    Uniform draws collide with 1/4 1/4 1/2, together 1. yield of base is 1 in both categories.
    """
    summary = score(files, tmp_path / "x.json", "--no_controls")
    base, tuned = summary["systems"]["base"], summary["systems"]["tuned"]

    def means(system):
        keys = ("valid", "yield@4", "distinct", "coverage", "collision", "collision_ratio")
        return [system[key]["mean"] for key in keys]

    assert means(base) == pytest.approx([7 / 12, 1, 2, 1 / 3, 7 / 18, 7 / 6], abs=1e-4)
    assert means(tuned) == pytest.approx([2 / 3, 8 / 3, 10 / 3, 5 / 6, 0, 0], abs=1e-4)
    assert base["yield@4"] == {"mean": 1, "low": 1, "high": 1}
    assert (summary["k"], summary["rows"], summary["categories"]) == (4, 3, 2)
    assert summary["kind"] == "common" and summary["task"] == "verifiable"


def test_differences_are_over_categories_and_at_equal_validity(files, tmp_path, score):
    """yield of tuned - base: 2 2 1; of two categories alone 2 or 1.

    With equally many right replies, row 1 compares three (2 and 3 different ones), row 3 two (1 and
    2); in row 2 base has none.
    """
    summary = score(files, tmp_path / "x.json", "--no_controls")
    assert summary["differences"]["tuned - base"]["yield@4"] == {
        "mean": 1.6667, "low": 1, "high": 2}
    assert summary["matched"]["tuned - base"] == {
        "measures": {"yield@4": {"mean": 1, "low": 1, "high": 1}},
        "prompts": 2, "left_out": 1, "responses": 5}


def test_intervals_resample_whole_categories(tmp_path, score):
    """valid by row 1 1 1/2 0, by category 1 and 1/4; where two right replies each are compared,
    only the rows of category a are left, and one category alone has no interval.
    """
    rows = [{**ROWS[0], "prompt": f"Name a bird ({i}).", "category": "aabb"[i]} for i in range(4)]
    low = [["crow", "crow"], ["crow", "crow"], ["crow", "stone"], ["stone", "stone"]]
    high = [["crow", "finch"], ["crow", "finch"], ["crow", "robin"], ["stone", "stone"]]
    files = [answered(tmp_path / f"{name}.jsonl", preds, rows)
             for name, preds in (("low", low), ("high", high))]
    summary = score(files, tmp_path / "x.json", "--no_controls")
    assert summary["systems"]["low"]["valid"] == {"mean": 0.625, "low": 0.25, "high": 1}
    assert summary["systems"]["low"]["yield@2"] == {"mean": 0.75, "low": 0.5, "high": 1}
    assert summary["differences"]["high - low"]["yield@2"] == {"mean": 0.75, "low": 0.5, "high": 1}
    assert summary["matched"]["high - low"] == {
        "measures": {"yield@2": {"mean": 1, "low": None, "high": None}},
        "prompts": 2, "left_out": 2, "responses": 4}


def test_at_equal_validity_more_right_replies_of_the_same_kinds_gain_nothing():
    """Ten right replies, two kinds by turns, against one of each: two of ten differ in 5 of 9."""
    matched = matched_yield([[0, 1] * 5] * 40, [[0, 1] + [None] * 8] * 40, list(map(str, range(40))))
    assert matched["difference"]["mean"] == pytest.approx(5 / 9 - 1, abs=0.05)


def test_the_figures_that_need_no_judge_stand_beside_them_and_those_of_a_judge_do_not(
        files, tmp_path, score):
    """base repeats 4 words of 12: "jackdaws." is another word, though no other right answer."""
    summary = score(files, tmp_path / "x.json")
    base = summary["systems"]["base"]
    assert base["duplicates"]["mean"] == pytest.approx((0 + 3 / 4 + 3 / 4) / 3, abs=1e-4)
    assert base["words"]["mean"] == pytest.approx(13 / 12, abs=1e-4)
    assert {"sbert_diversity", "vendi", "self_bleu", "distinct-1", "ead-2", "characters"} <= set(base)
    assert not {"coherent", "rating", "cosine", "distinct_k"} & set(base)
    assert "no judge was asked" in summary["judge"]["text"] and "exact" in summary["judge"]["text"]
    for system in summary["systems"].values():
        assert {key for key, value in system.items() if value is None} == set(system["reasons"])


def test_the_controls_are_scored_like_systems_and_have_no_lines(files, tmp_path, score):
    """Repeated: the first reply of each row, crow, stone and apple: valid 2/3, one answer each."""
    summary = score(files, tmp_path / "x.json")
    repeated = summary["systems"]["control: repeated"]
    assert repeated["valid"]["mean"] == repeated["yield@4"]["mean"] == pytest.approx(2 / 3, abs=1e-4)
    assert repeated["collision"]["mean"] == pytest.approx(2 / 3, abs=1e-4)
    assert {line["system"] for line in lines_of(tmp_path / "x.jsonl")} == {"base", "tuned"}


def test_one_reply_and_a_rule_leave_out_what_is_not_defined_with_reasons(tmp_path, score):
    rows = [{"prompt": "Name an even number.", "category": name,
             "rule": {"type": "integer", "divisible_by": 2}} for name in ("a", "b")]
    summary = score([answered(tmp_path / "x.jsonl", [["4"], ["5"]], rows)], tmp_path / "y.json")
    system = summary["systems"]["x"]
    assert (system["valid"]["mean"], system["yield@1"]["mean"]) == (0.5, 0.5)
    assert system["coverage"] is system["collision"] is system["collision_ratio"] is None
    assert {"coverage", "collision", "collision_ratio", "self_bleu"} <= set(system["reasons"])


def test_one_category_has_figures_without_intervals_in_the_table_and_on_the_page(
        tmp_path, score, capsys):
    files = [answered(tmp_path / f"{name}.jsonl", preds[:2], ROWS[:2])
             for name, preds in (("base", BASE), ("tuned", TUNED))]
    summary = score(files, tmp_path / "x.json")
    assert summary["systems"]["tuned"]["yield@4"] == {"mean": 3, "low": None, "high": None}
    assert "tuned: 3.00 of 4 answers are right and different, +2.00 against base" in (
        capsys.readouterr().out)
    page = (tmp_path / "x.html").read_text()
    assert "None" not in page and "<b>+2.00</b>" in page


# ---- replies ------------------------------------------------------------------------------------


def test_a_reply_is_repeated_if_its_answer_or_its_wrong_words_stood_before():
    row = {**ROWS[0], "preds": ["stone", "jackdaw", "The crow!", "Stone.", "", ""]}
    found = [None, 0, 0, None, None, None]
    assert [(reply["answer"], reply["repeated"]) for reply in describe(row, found)] == [
        (None, False), ("crow", False), ("crow", True), (None, True), (None, False), (None, True)]


def test_every_line_names_the_answer_that_its_reply_is(files, tmp_path, score):
    score(files, tmp_path / "x.json")
    lines = lines_of(tmp_path / "x.jsonl")
    assert len(lines) == 24
    assert lines[1] == {"system": "base", "row": 1, "category": "birds", "context": "Name a bird.",
                        "response": "Jackdaws.", "answer": "crow", "repeated": True}
    assert [line["answer"] for line in lines[:4]] == ["crow", "crow", None, "sparrow"]


def test_the_published_pickle_has_its_keys_and_no_scores(files, tmp_path, score):
    score(files, tmp_path / "x.pkl")
    lines = pickle.loads((tmp_path / "x.pkl").read_bytes())  # noqa: S301 - written by this test
    assert len(lines) == 24 and lines[0]["context"] == "Name a bird."
    assert lines[0]["chat_score"] == {"Coherence rating:": None}


# ---- the terminal -------------------------------------------------------------------------------


def test_the_terminal_shows_the_block_first_examples_and_one_sentence_a_system(
        files, tmp_path, score, capsys):
    summary = score(files, tmp_path / "x.json")
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "3 prompts x 4 replies; mean ± 95 % interval over categories" in lines[0]
    first = [line.split()[0] for line in lines[4:9]]
    assert first == ["valid", "yield@4", "distinct@4", "coverage", "collision"]
    assert re.search(r"^yield@4, eq. valid +\+1.00 ±0.00\*", printed, re.M)
    assert "examples (✗ wrong, ↺ repeated):\n1. Name a bird.\n" in printed
    assert re.search(r"^ +base +crow, ↺ Jackdaws\., ✗ stone, A sparrow *$", printed, re.M)
    assert re.search(r"^ +tuned +crow, sparrow, ✗ stone, ✗ \(empty\) *$", printed, re.M)
    assert ("tuned: 2.67 of 4 answers are right and different, +1.67 [+1.00, +2.00] against base"
            in printed)
    assert "fewer than two right replies" in " ".join(printed.split())
    script.main(["--show", str(tmp_path / "x.json")])
    assert capsys.readouterr().out in printed, "the same tables and examples"
    script.main(["--show", str(tmp_path / "x.json"), "--json"])
    assert json.loads(capsys.readouterr().out) == summary


def test_examples_are_five_requests_of_different_categories(tmp_path, score):
    """12 rows, two of each of six categories."""
    rows = [{"prompt": f"Name one ({i}).", "category": f"c{i // 2}", "answers": [["a b"]]}
            for i in range(12)]
    summary = score([answered(tmp_path / "x.jsonl", [["a b"] * 12] * 12, rows)], tmp_path / "y.json")
    assert [example["row"] for example in summary["examples"]] == [1, 3, 5, 7, 9]
    assert [len(example["systems"]["x"]) for example in summary["examples"]] == [10] * 5


# ---- the page -----------------------------------------------------------------------------------


def test_the_page_shows_answers_as_chips_with_signs_and_the_share_of_right_ones_on_the_x_axis(
        files, tmp_path, score):
    score(files, tmp_path / "x.json", "--no_controls")
    page = (tmp_path / "x.html").read_text()
    chips = re.findall(r'<li class="answer (.*?)" title="(.*?)"><b>(.*?)</b>\s*<span>(.*?)</span>',
                       page)
    assert len(chips) == 24 and '<li class="reply' not in page
    assert chips[:4] == [("right", "right: crow", "✓", "crow"),
                         ("right repeated", "right: crow, repeated", "↺", "Jackdaws."),
                         ("wrong", "wrong", "✗", "stone"),
                         ("right", "right: sparrow", "✓", "A sparrow")]
    assert ("wrong", "wrong", "✗", "<em>empty</em>") in chips
    assert ("wrong repeated", "wrong, repeated", "✗↺", "stone") in chips
    assert "3 right of 4, 2 of them different" in page
    assert "right replies</text>" in page and "Diversity against validity" in page
    assert "answers are right and different from each other" in page
    assert "coherent" not in page.partition("<main>")[2]


def test_a_reply_with_markup_stays_text(files, tmp_path, score):
    evil = '<img src=x onerror="document.title = 1">'
    file = answered(tmp_path / "evil.jsonl", [[evil, "[b]crow[/b]"]] * 3)
    score([file], tmp_path / "x.json")
    assert "<img" not in (tmp_path / "x.html").read_text()


def test_a_summary_with_undefined_figures_makes_a_page(tmp_path, score):
    rows = [{"prompt": "Even?", "category": name, "rule": {"type": "integer", "divisible_by": 2}}
            for name in ("a", "b")]
    summary = score([answered(tmp_path / "x.jsonl", [["4"], ["5"]], rows)], tmp_path / "y.json")
    assert "collision" not in render(summary, []).partition("<main>")[2]


# ---- what is refused ----------------------------------------------------------------------------


def test_a_row_of_the_other_kind_is_named(tmp_path, capsys):
    file = write_jsonl(tmp_path / "mixed.jsonl", [
        {**ROWS[0], "preds": ["crow"]}, {"prompt": "Tell me more.", "preds": ["No."]}])
    said = refused(capsys, 2, read_systems, [str(file)], None)
    assert "mixed.jsonl:2: has no \"answers\" or \"rule\" and the first row has" in said
    file = write_jsonl(tmp_path / "other.jsonl", [
        {"prompt": "Tell me more.", "preds": ["No."]}, {**ROWS[0], "preds": ["crow"]}])
    assert "other.jsonl:2: has \"answers\" or \"rule\" and the first row has none" in refused(
        capsys, 2, read_systems, [str(file)], None)


@pytest.mark.parametrize(("change", "why"), [
    ({"answers": []}, '"answers" must be a list that is not empty'),
    ({"rule": {"type": "word"}}, 'needs either "answers" or "rule"'),
    ({"category": ""}, '"category" must be a string'),
    ({"candidates": ["stone"]}, "'stone' is not a right answer"),
])
def test_a_row_that_cannot_be_checked_is_named(tmp_path, capsys, change, why):
    file = write_jsonl(tmp_path / "bad.jsonl", [{**ROWS[0], **change, "preds": ["crow"]}])
    said = refused(capsys, 2, read_systems, [str(file)], None)
    assert "bad.jsonl:1: " in said and why in said


def test_files_with_other_right_answers_or_other_numbers_of_replies_are_not_compared(
        files, tmp_path, score, capsys):
    rows = [*ROWS[:2], {**ROWS[2], "answers": [["apple"]]}]
    other = answered(tmp_path / "other.jsonl", TUNED, rows)
    assert "holds other rows than" in refused(capsys, 2, read_systems, [files[0], other], None)
    short = answered(tmp_path / "short.jsonl", [of_row[:3] for of_row in TUNED])
    assert "different numbers of replies a row: base 4, short 3" in refused(
        capsys, 2, score, [files[0], short], tmp_path / "x.json")


def test_a_judge_that_is_named_is_not_asked(files, tmp_path, score, capsys, monkeypatch):
    """Nor could it be: tests reach no server."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    score(files, tmp_path / "x.json", "--judge1", "openai:gpt-4o")
    assert "--judge api is not asked: a program checks these rows" in capsys.readouterr().err
    assert not (tmp_path / "x.judgements.jsonl").exists()


def test_files_of_several_methods_can_be_compared(tmp_path, score):
    """Which is refused for rows of a method, whose own figures would be wanted."""
    files = [drawn_by(tmp_path / f"{method}.jsonl", method,
                      [{**row, "preds": of_row} for row, of_row in zip(ROWS, BASE, strict=True)])
             for method in ("spt", "control")]
    assert set(score(files, tmp_path / "x.json", "--no_controls")["systems"]) == {"spt", "control"}


# ---- from training to the page ------------------------------------------------------------------


@pytest.fixture
def able_to_end(tokenizer, tmp_path):
    """A folder with the tiny model, whose end token is row 0, the row of padding: all zeros."""
    model, folder = make_model(len(tokenizer)), tmp_path / "tiny"
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = torch.randn(32) * 0.3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_is_trained_on_candidates_draws_and_is_scored(
        able_to_end, tmp_path, score, capsys):
    """Two rows of two names each, 180 steps: the tiny model learns to answer with them."""
    rows = [{**row, "candidates": [names[0] for names in row["answers"]][:2]}
            for row in (ROWS[0], ROWS[2])]
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    train.main(["--method", "otm", "--train_file", str(data), "--model_name", str(able_to_end),
                "--num_response_per_input", "2", "--num_train_epochs", "90", "--learning_rate", "6e-3",
                "--lora_target_modules", "all-linear", "--lora_r", "32", "--lora_alpha", "32",
                "--output_dir", str(tmp_path / "ck"), "--exp_name", "names"])
    checkpoint = max((tmp_path / "ck" / "names").glob("check_*"),
                     key=lambda path: int(path.name.partition("_")[2]))
    files = []
    for name, model in (("base", able_to_end), ("tuned", checkpoint)):
        files.append(tmp_path / f"{name}.jsonl")
        method = ["--method", "base"] if name == "base" else []
        infer.main(["--model_name_or_path", f"{model}/", "--test_file", str(data), *method,
                    "--num_response_per_input", "3", "--max_new_tokens", "9", "--temperature", "0.5",
                    "--save_file", str(files[-1])])
    capsys.readouterr()
    summary = score(files, tmp_path / "x.json", "--json")
    assert json.loads(capsys.readouterr().out) == summary
    base, tuned = summary["systems"]["base"], summary["systems"]["tuned"]
    assert base["valid"]["mean"] == 0 and tuned["valid"]["mean"] > 0.5
    assert base["seconds_per_row"] is not None
    script.main(["--show", str(tmp_path / "x.json")])
    printed = capsys.readouterr().out
    assert f"tuned: {tuned['yield@3']['mean']:.2f} of 3 answers are right and different" in printed
    assert (tmp_path / "x.html").read_text().count('<li class="answer right') >= 3
    assert {line["answer"] for line in lines_of(tmp_path / "x.jsonl")} > {None}
