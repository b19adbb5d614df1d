"""data/build_answers.py: from what was written to rows, and what it refuses."""

from __future__ import annotations

import builtins

import pytest
from conftest import ROOT, refused

import utils
from data import build_answers
from scoring import answers
from utils import MISSING, USAGE

TRAIN = """
- category: yellow fruits
  requests: ["Name a yellow fruit.", "Which fruit is yellow?"]
  answers: ["banana", "lemon = sour lemon; yellow citrus", "jujube", "yellow berry"]
"""
DEV = """
- category: odd numbers
  requests: ["Give a number above 3."]
  rule: {type: integer, min: 4}
  candidates: ["4", "5"]
"""
TEST = """
- category: languages
  requests: ["Name a language."]
  answers: ["Punjabi", "Greek", "Guaraní"]
- category: countries of Africa
  requests: ["Name a country of Africa."]
  answers: ["Tanzania", "DR Congo = Congo-Kinshasa", "Ivory Coast = Côte d'Ivoire"]
"""


def build(folder, train=TRAIN, dev=DEV, test=TEST) -> dict[str, list[dict]]:
    for name, text in (("train", train), ("dev", dev), ("test", test)):
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    build_answers.main(["--folder", str(folder)])
    return {name: utils.read_jsonl(folder / f"{name}.jsonl", answers.check_row) for name in build_answers.PARTS}


def test_every_request_becomes_a_row_with_all_canonical_answers_as_candidates(tmp_path, capsys):
    rows = build(tmp_path)["train"]
    assert [row["prompt"] for row in rows] == ["Name a yellow fruit.", "Which fruit is yellow?"]
    assert rows[0]["candidates"] == ["banana", "lemon", "jujube", "yellow berry"]
    assert rows[0]["answers"] == [["banana"], ["lemon", "sour lemon", "yellow citrus"], ["jujube"],
                                  ["yellow berry", "yellow berries"]]
    assert "train.jsonl: 2 requests of 1 categories, 4 answers" in capsys.readouterr().out


def test_a_rule_and_its_candidates_stay_as_they_are(tmp_path):
    assert build(tmp_path)["dev"] == [{"prompt": "Give a number above 3.", "category": "odd numbers",
                                       "rule": {"type": "integer", "min": 4}, "candidates": ["4", "5"]}]


def test_countries_get_the_other_names_of_those_that_are_listed(tmp_path):
    row = build(tmp_path)["test"][1]
    assert len(row["answers"]) == 3  # pycountry does not know where a country lies
    replies = ["the United Republic of Tanzania", "Cote d'Ivoire", "Côte d’Ivoire", "Congo-Kinshasa", "France"]
    assert [answers.find(row, reply) for reply in replies] == [0, 2, 2, 1, None]


def test_languages_get_those_of_the_iso_and_a_second_name_makes_no_second_answer(tmp_path):
    row = build(tmp_path)["test"][0]
    assert row["candidates"][:3] == ["Punjabi", "Greek", "Guaraní"]
    assert [answers.find(row, reply) for reply in ("Panjabi", "Modern Greek", "Guarani")] == [0, 1, 2]
    assert answers.find(row, "Welsh") > 2 and answers.find(row, "Kirghiz") == answers.find(row, "Kyrgyz") > 2
    assert answers.find(row, "Klingon") is None and 150 < len(row["answers"]) < 190


def test_without_pycountry_the_way_to_it_is_named(monkeypatch, capsys):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "pycountry":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert "requirements-dev.txt" in refused(capsys, MISSING, build_answers.country_names)


def test_names_keep_their_order_when_those_that_normalise_alike_go():
    assert build_answers._unique(["b", "a", "The B", "c", "A!"]) == ["b", "a", "c"]


def entry(category: str, requests='["Name one!"]', **fields: str) -> str:
    fields = fields or {"answers": '["one", "two"]'}
    return f"- category: {category}\n  requests: {requests}\n" + "".join(
        f"  {key}: {value}\n" for key, value in fields.items())


@pytest.mark.parametrize("train, place, problem", [
    (entry("toys", answers='["kite", "ball = Kite"]'), 1, "'Kite' stands for two answers"),
    (TRAIN + entry("toys", answers='["kite", no]'), 5, '"answers" must be a list of strings, got False'),
    (entry("toys", answers='"kite"'), 1, "must be a list of strings, got 'kite'"),
    (entry("toys", answers='["kite"]', hints="[]"), 1, "key 'hints' is unknown"),
    (entry("toys", answers='["kite"]', rule="{type: word}"), 1, 'needs either "answers", or "rule"'),
    (entry("toys", rule="{type: integer, min: 5}", candidates='["4"]'), 1, "candidate '4' is not a right answer"),
    (entry("toys", requests="[]"), 1, 'needs "requests"'),
    (entry("toys", requests='["Name one!", "name one"]'), 1, "request 'name one' stands twice"),
    (entry("toys", requests='["Give a number above 3"]'), 1, "stands twice"),
    (entry("rivers of Europe"), 1, "is reserved (rivers)"),
    (entry("Soups"), 1, "is reserved (soups and stews)"),
    (entry("kinds of bread"), 1, "is reserved (breads)"),
    (entry("plays by Shakespeare"), 1, "is reserved (Shakespeare's plays)"),
    (entry("a language"), 1, "is nearly"),
    (entry("odd number games", answers='["a game"]') + entry("games", '["Which?"]', answers='["b game"]'), 4, "is nearly 'odd number games'"),
    (entry("toys") + entry("pastimes", '["Which?"]', answers='["one", "two", "three"]'), 4, "2 answers stand in both"),
    ("category: toys", None, "must be a list of categories"),
    ("- [", None, "not YAML"),
])
def test_what_is_wrong_is_named_by_file_and_line_and_nothing_is_written(tmp_path, capsys, train, place, problem):
    message = refused(capsys, USAGE, lambda: build(tmp_path, train=train))
    assert problem in message and "train.yaml" in message
    assert place is None or f"train.yaml:{place}" in message
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize("name", ["bread toppings", "things in a room", "video games", "languages", "countries of Asia",
                                  "words that start with b", "parts of a car", "mushrooms"])
def test_categories_beside_the_reserved_ones_are_free(name):
    assert not any(build_answers._is_part(reserved, name) for reserved in build_answers.RESERVED)


@pytest.mark.parametrize("first, second, alike", [
    ("birds", "birds of prey", True), ("water sports", "sports", True), ("the tools", "tool", True),
    ("countries of Africa", "countries of Asia", False), ("bird food", "birds", False),
    ("words that start with a", "words that start with b", False), ("words that start with b", "words that end with b", False)])
def test_categories_are_alike_where_one_says_all_that_the_other_does_of_the_same_noun(first, second, alike):
    assert (build_answers._is_narrower(first, second) or build_answers._is_narrower(second, first)) == alike


def test_the_rows_that_are_kept_are_those_that_would_be_built(tmp_path):
    folder = ROOT / "data" / "answers"
    if not all((folder / f"{part}.{kind}").is_file() for part in build_answers.PARTS for kind in ("yaml", "jsonl")):
        pytest.skip("data/answers is not written yet")
    texts = {part: (folder / f"{part}.yaml").read_text(encoding="utf-8") for part in build_answers.PARTS}
    build(tmp_path, **texts)
    for part in build_answers.PARTS:
        assert (tmp_path / f"{part}.jsonl").read_bytes() == (folder / f"{part}.jsonl").read_bytes(), part
