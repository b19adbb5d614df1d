"""The rows' own references, measured beside the systems: how diverse people are in as many replies."""

from __future__ import annotations

import re

import pytest
from conftest import write_jsonl
from eval_cases import ROWS, lines_of, outs, score

from scoring import common

__all__ = ["outs", "score"]  # fixtures

NAME = "references"


def system_of(num_replies: int, rows: list[dict] = ROWS) -> dict[str, list[dict]]:
    return {"echo": [{**row, "preds": ["Yes."] * num_replies} for row in rows]}


def test_as_many_references_as_replies_are_drawn_of_every_row_without_repeats():
    """Rows have four references: 3 of 4 leave out one, another one from row to row."""
    drawn = common.references_as_system(system_of(3))[NAME]
    left_out = [set(row["candidates"]) - set(row["preds"]) for row in drawn]
    assert all(len(row["preds"]) == 3 and len(rest) == 1
               for row, rest in zip(drawn, left_out, strict=True))
    places = [row["candidates"].index(rest.pop()) for row, rest in zip(drawn, left_out, strict=True)]
    assert len(set(places)) > 1
    assert common.references_as_system(system_of(3)) == {NAME: drawn}, "seeded"
    assert common.references_as_system(system_of(3, ROWS[:2]))[NAME] == drawn[:2]


@pytest.mark.parametrize("systems", [
    system_of(5), system_of(1), system_of(3, [*ROWS, {"prompt": "Why?"}]),
    {NAME: system_of(3)["echo"]}], ids=["too few", "one reply", "a row without", "a file's name"])
def test_rows_with_too_few_have_none(systems):
    assert common.references_as_system(systems) == {}


def test_references_have_the_diversity_figures_and_no_judgement(outs, tmp_path, score, capsys):
    """All different: 3 classes, no duplicate; they are no system, so they have no line or card."""
    summary = score([outs / "echo.jsonl"], tmp_path / "x.json", "--trust_judge")
    people, echo = summary["systems"][NAME], summary["systems"]["echo"]
    assert people["distinct_k"]["mean"] == 3 and people["duplicates"]["mean"] == 0
    assert people["sbert_diversity"]["mean"] > 0.5 > echo["sbert_diversity"]["mean"]
    assert people["coherent"] is None and people["yield@3"] is None
    assert people["reasons"]["coherent"].startswith("references are not judged")
    gain = summary["differences"]["references - echo"]["distinct_k"]
    assert gain["mean"] == pytest.approx(3 - echo["distinct_k"]["mean"])
    assert {line["system"] for line in lines_of(tmp_path / "x.jsonl")} == {"echo"}
    printed = capsys.readouterr().out
    assert "references" in printed and "references: " not in printed
    page = (tmp_path / "x.html").read_text()
    assert page.count('class="card"') == 1
    assert '<line class="level"' in page and "own references" in page


def test_people_who_beat_a_system_do_not_mark_a_figure_as_one_that_rewards_noise(
        tmp_path, score, capsys):
    """Two replies of which no control is made that is more diverse: they are all one word."""
    file = write_jsonl(tmp_path / "same.jsonl", [{**row, "preds": ["Yes.", "Yes."]} for row in ROWS])
    score([file], tmp_path / "x.json")
    printed = capsys.readouterr().out
    assert re.search(r"^distinct_2 ↑  ", printed, re.M) and "†" not in printed


def test_they_are_left_out_with_the_controls(outs, tmp_path, score):
    summary = score([outs / "echo.jsonl"], tmp_path / "x.json", "--no_controls")
    assert list(summary["systems"]) == ["echo"]
    assert '<line class="level"' not in (tmp_path / "x.html").read_text()
