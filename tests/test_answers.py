"""Verifiable tasks: what is a right answer, what is the same one, and the figures of a prompt."""

from __future__ import annotations

import time

import pytest
from conftest import refused, write_jsonl
from hypothesis import example, given
from hypothesis import strategies as st

import utils
from scoring import answers, rules
from scoring.answers import check_row, figures, find, normalise
from utils import USAGE

BIRDS = {"prompt": "Name a bird. Answer with the name only.", "category": "birds",
         "answers": [["crow", "carrion crow"], ["finch"], ["goose", "geese"], ["Éider"]],
         "candidates": ["crow", "finch", "goose", "Éider"]}


def ruled(kind: str, **bounds) -> dict:
    return {"prompt": "?", "category": kind,
            "rule": {"type": kind, **{key.rstrip("_"): value for key, value in bounds.items()}}}


# ---- normalising and finding --------------------------------------------------------------------


@pytest.mark.parametrize("reply, normal", [
    ("crow", "crow"), ("  A Crow. ", "crow"), ('"The crow"', "crow"), ("**crow**", "crow"),
    ("(crow)", "crow"), ("“an 'owl'”!", "owl"), ("crow\nfinch", "crow"), ("\n\ncrow", "crow"),
    ("ＣＲＯＷ", "crow"), ("carrion \t crow", "carrion crow"), ("crow, who", "crow, who"),
    ("A", "a"), ("the", "the"), ("an apple a day", "apple a day"), ("", ""), ("...", "")])
def test_normalising_takes_the_first_line_without_case_articles_and_what_stands_around_it(reply, normal):
    assert normalise(reply) == normal


@given(st.text())
@example("'a 'the 'an x")
@example("the the crow")
@example("İ\u0301 ﷺ")
def test_normalising_twice_is_normalising_once(text):
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize("reply, answer", [
    ("Crow", 0), ("a carrion crow.", 0), ("crows", 0), ("finches", 1), ("Geese", 2), ("gooses", 2), ("ÉIDERS", 3),
    ("A crow, who has seen it all.", None), ("The bird is a crow", None), ("1. crow", None), ("crow, finch", None),
    ("Eider", None), ("crowes", 0), ("cro", None), ("", None), ("s", None)])
def test_a_reply_is_right_only_if_it_is_a_listed_name_its_singular_or_plural(reply, answer):
    assert find(BIRDS, reply) == answer


def test_a_singular_is_an_answer_where_the_plural_is_listed():
    row = {**BIRDS, "answers": [["scissors"], ["tweezers", "eyebrow boxes"]]}
    assert [find(row, reply) for reply in ("scissor", "the tweezer", "eyebrow box")] == [0, 1, 1]


NAMES = st.lists(st.text("abcxyz' ", min_size=1, max_size=8).filter(normalise), min_size=1, max_size=3)


@given(st.lists(NAMES, min_size=1, max_size=4), st.sampled_from(["{}", "The {}.", '"{}"', " {}\nmore", "A {}!"]))
def test_every_name_of_a_row_that_passes_finds_its_own_answer(named, form):
    row = {"prompt": "?", "category": "c", "answers": named}
    if check_row(row) is None:
        for number, names in enumerate(named):
            assert all(find(row, form.format(name)) == number for name in names)


def test_no_reply_costs_time():
    """Long lines, accents without end and articles without end, each read in milliseconds."""
    start = time.perf_counter()
    for reply in ("crow " * 200_000, "a\u0301\u0323" * 300_000, "the " * 200_000, "'" * 300_000 + "crow", "\n" * 1_000_000):
        assert find(BIRDS, reply) is None
        assert find(ruled("sentence", must_contain=["crow"]), reply) is None
    assert time.perf_counter() - start < 3


# ---- rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, right, wrong", [
    (ruled("integer", min=10, max=30, divisible_by=7), {"14": "14", "+21.": "21", '"28"': "28"},
     ["7", "35", "15", "-14", "fourteen", "14, 21", "14.5", ""]),
    (ruled("integer", max=-1), {"-7": "-7", "−1,000": "-1000"}, ["7", "0", "-1,00"]),
    (ruled("word", starts_with="Z", ends_with="a", max_letters=6), {"Zebra": "zebra", "a zebra.": "zebra"},
     ["zebras", "zxqa", "zebra stripe", "zoologica", "za"]),
    (ruled("sentence", must_contain=["rain", "Tea"], min_words=4, max_words=8),
     {"Rain and hot tea help.": "rain and hot tea help", '"Tea in the rain with Dr. Who?"': "tea in the rain with dr. who"},
     ["Rain helps tea.", "Rain comes. Tea is ready.", "rain and hot tea help.", "Rain and hot tea help", "Rainy days need hot teas.",
      "Rain and tea and rain and tea and rain."]),
    (ruled("date", month=2, year=2024), {"February 29, 2024": "2024-02-29", "the 29th of Feb": "2024-02-29", "2024-02-05": "2024-02-05", "Feb. 5": "2024-02-05"},
     ["February 30", "March 1, 2024", "February 5, 2023", "02/05/2024", "2024-02", "in February", "Febtember 3"]),
    (ruled("date", month=2), {"29 February": "02-29", "February 5th, 1999": "02-05"}, ["29 February 2023", "1 May"]),
    (ruled("time", from_="22:00", to="06:30"), {"11 p.m.": "23:00", "12 am": "00:00", "Midnight": "00:00", "6:30": "06:30", "22:00.": "22:00"},
     ["6:31", "noon", "11", "11 am", "25:00", "13 pm", "23:60", "at 23:00"]),
    (ruled("expression", equals=12), {"3*4": "3 * 4", "(3 × 4)": "3 * 4", "2^3 + 4": "2 ** 3 + 4", "1/3*36": "1 / 3 * 36", "-(2 - 14).": "-(2 - 14)"},
     ["12", "+12", "3*5", "3*4 = 12", "twelve", "144**(1/2)", "3*x", "12/0", "1e1+2", "9**9**9**9", "(" * 199, "3(4)", "12 if 1 else 2", "7//2"]),
    (ruled("expression", equals=0.3), {"0.1+0.2": "0.1 + 0.2"}, ["0.1+0.20001"]),
    (ruled("pattern", regex=r"[A-Z]{3}-\d{3}"), {"ABC-123": "abc-123", "'ABC-123'.": "abc-123"}, ["abc-123", "ABC-1234", "see ABC-123", ""]),
], ids=lambda value: value["category"] if isinstance(value, dict) and "category" in value else "")
def test_replies_are_right_by_their_rule_and_have_one_canonical_form(row, right, wrong):
    assert check_row(row) is None
    assert {reply: find(row, reply) for reply in right} == right
    assert {reply: find(row, reply) for reply in wrong} == dict.fromkeys(wrong)


def test_a_pattern_that_backtracks_without_end_is_refused_and_costs_no_reply_time():
    start = time.perf_counter()
    row = ruled("pattern", regex="(a|aa)+b")
    assert "backtracks without end" in check_row(row)
    assert find(row, "a" * 300) is None and find(row, "aab") == "aab"
    assert time.perf_counter() - start < 1


@given(st.text("0123456789+-*/(). ", max_size=30))
def test_any_arithmetic_is_answered_in_no_time(text):
    start = time.perf_counter()
    found = rules.find({"type": "expression", "equals": 1}, text)
    assert time.perf_counter() - start < 0.2
    assert found is None or rules.find({"type": "expression", "equals": 1}, found) == found


# ---- rows ---------------------------------------------------------------------------------------


def test_rows_of_both_kinds_pass():
    assert check_row(BIRDS) is None
    assert check_row({**ruled("integer", min=3), "candidates": ["3", "4"]}) is None
    assert check_row({key: BIRDS[key] for key in ("prompt", "category", "answers")}) is None


@pytest.mark.parametrize("change, problem", [
    ({"category": ""}, '"category" must be a string'),
    ({"answers": []}, 'field "answers" must be a list that is not empty'),
    ({"answers": [["crow"], []]}, "answer 2 must be a list of strings"),
    ({"answers": [["crow", "..."]]}, "'...' holds no answer"),
    ({"answers": [["crow"], ["raven", "The Crow"]]}, "'The Crow' stands for two answers, 'crow' and 'raven'"),
    ({"answers": [["crow"], ["crows"]]}, "are one answer, singular and plural"),
    ({"candidates": ["crow", "stone"]}, "candidate 'stone' is not a right answer"),
    ({"candidates": ["crow", "Crows"]}, "'crow' and 'Crows' are the same answer"),
    ({"candidates": "crow"}, '"candidates" must be a list of strings'),
    ({"rule": {"type": "word"}}, "needs either"),
    ({"prompt": " "}, '"prompt" is empty'),
])
def test_a_row_that_is_wrong_is_refused_by_its_file_and_line(tmp_path, capsys, change, problem):
    path = write_jsonl(tmp_path / "rows.jsonl", [BIRDS, {**BIRDS, **change}])
    message = refused(capsys, USAGE, utils.read_jsonl, path, check_row)
    assert f"{path}:2: " in message and problem in message


@pytest.mark.parametrize("rule, problem", [
    ("integer", '"rule" needs a "type"'), ({"type": "poem"}, '"rule" needs a "type"'), ({"type": ["word"]}, '"rule" needs a "type"'),
    ({"type": "integer", "low": 3}, 'key "low" is unknown'), ({"type": "integer", "min": "3"}, "\"min\" cannot be '3'"),
    ({"type": "integer", "min": True}, '"min" cannot be True'), ({"type": "integer", "divisible_by": 0}, "must be 1 or more"),
    ({"type": "integer", "min": 8, "max": 13, "divisible_by": 7}, "nothing from 8 to 13 is divisible by 7"),
    ({"type": "integer", "min": 9, "max": 3}, "nothing from 9 to 3"),
    ({"type": "word", "starts_with": "qqx"}, "no word of the list fits"), ({"type": "word", "min_letters": 5, "max_letters": 4}, "nothing has"),
    ({"type": "word", "max_letters": 2}, "no word of the list fits"),
    ({"type": "sentence", "must_contain": ["two words"]}, "list of single words"),
    ({"type": "sentence", "must_contain": ["a", "b"], "max_words": 1}, "leaves no room for 2 words"),
    ({"type": "date", "month": 13}, "there is no month 13"), ({"type": "date", "year": 0}, "must be 1 to 9999"),
    ({"type": "time", "from": "9:30"}, 'must be a time like "09:30"'), ({"type": "time", "to": "24:00"}, 'must be a time like "09:30"'),
    ({"type": "expression"}, 'needs "equals"'), ({"type": "expression", "equals": float("inf")}, "cannot be inf"),
    ({"type": "pattern", "regex": "(a"}, "does not compile"), ({"type": "pattern"}, 'needs "regex"'),
])
def test_a_rule_that_cannot_be_met_or_is_not_understood_is_refused(rule, problem):
    assert problem in check_row({"prompt": "?", "category": "c", "rule": rule})


# ---- figures ------------------------------------------------------------------------------------


def test_figures_of_a_prompt_by_hand():
    """crow, crows, finch, stone: 3 of 4 right, 2 of 4 answers, 4 strings, one of 6 pairs the same."""
    replies = ["crow", "crows", "finch", "stone"]
    found = [find(BIRDS, reply) for reply in replies]
    assert found == [0, 0, 1, None]
    assert figures(found, replies, 4) == {
        "valid": 0.75, "yield": 2, "distinct": 4, "coverage": 0.5, "collision": pytest.approx(1 / 6)}


def test_wrong_replies_are_distinct_but_never_the_same_right_answer_and_empty_ones_are_nothing():
    assert figures([None] * 4, ["stone", "Stone.", "", " "], 4) == {
        "valid": 0, "yield": 0, "distinct": 1, "coverage": 0, "collision": 0}


def test_coverage_and_collision_are_none_where_they_are_not_defined():
    one = figures(["14"], ["14"], None)
    assert one["coverage"] is None and one["collision"] is None and one["yield"] == 1


def test_the_number_of_answers_is_that_of_the_list():
    assert answers.num_answers(BIRDS) == 4 and answers.num_answers(ruled("word")) is None
