"""Method spt: dialogues with a persona, in JSONL and in the published text format."""

from __future__ import annotations

import pytest
from conftest import ROOT, refused, write_jsonl
from spt_cases import ROWS

from methods.spt import personas

SELF = (
    "1 your persona: i like: tea.\n2 your persona: i ski.\n3 hi\thello there\n"
    "4 you ski ?\tyes , daily .\n1 your persona: i read.\n2 hey\tyo\n")
BOTH = ("1 your persona: i ski.\n2 partner's persona: i cook.\n"
        "3 my persona: none\thello\t\tbye|no|hello\n")


def convai(tmp_path, text: str) -> str:
    path = tmp_path / "valid.txt"
    path.write_bytes(text.encode())
    return str(path)


def test_the_published_text_format_is_read_with_and_without_candidates_and_personas(tmp_path):
    """A colon in a persona is kept, `persona:` inside an utterance is talk.

    Every reply is a row with all that was said before.
    """
    rows = personas.read(convai(tmp_path, SELF))
    assert [row["context"] for row in rows] == ["hi", "hi\nhello there\nyou ski ?", "hey"]
    assert [row["response"] for row in rows] == ["hello there", "yes , daily .", "yo"]
    assert rows[1]["persona"] == ["i like: tea.", "i ski."] and rows[2]["persona"] == ["i read."]
    assert "candidates" not in rows[0]
    row, = personas.read(convai(tmp_path, BOTH))
    assert row == {"persona": ["i ski."], "partner_persona": ["i cook."],
                   "context": "my persona: none", "response": "hello",
                   "candidates": ["bye", "no", "hello"]}
    row, = personas.read(convai(tmp_path, "1 partner's persona: i cook.\n2 hi\tho\n"))
    assert row["persona"] == [] and row["partner_persona"] == ["i cook."]
    row, = personas.read(convai(tmp_path, "1 hi\tho\r\n"))
    assert row["persona"] == row["partner_persona"] == [] and row["response"] == "ho"


PERSONA = "1 your persona: i ski.\n"


@pytest.mark.parametrize(("text", "problem"), [
    ("1 your persona: \n2 hi\tho\n", ":1: a persona line without text"),
    (f"{PERSONA}2 hi\tho\n3 your persona: late\n", ":3: a persona line after the first utterance"),
    (f"{PERSONA}2 hi\tho\n3 how are\n", ":3: must be an utterance, a tab and the reply"),
    (f"{PERSONA}2 hi\tho\n3 how are", ":3: the last line does not end: the file is cut"),
    (f"{PERSONA}2 hi\tho\n4 hi\tho\n", ":3: number 4 follows 2: lines are missing"),
    ("7 hi\tho\n", ":1: starts with number 7: the first lines of the dialogue are missing"),
    (f"{PERSONA}1 hi\tho\n", ":1: the dialogue ends before anybody speaks"),
    ("1 hi\tho\n1 your persona: i ski.\n", ":2: the dialogue ends before anybody speaks"),
    ("1 hi\tho\nhello\n", ":2: must be a number, a space and text"),
    ("1 hi\tho\n\n2 hi\tho\n", ":2: is empty"),
    ("1 hi\t\n", ":1: must be an utterance"), ("", ": no rows"),
])
def test_faults_of_text_files_are_named_by_line(tmp_path, capsys, text, problem):
    said = refused(capsys, 2, personas.read, convai(tmp_path, text))
    assert f"valid.txt{problem}" in said


def test_all_faults_of_a_text_file_are_told_at_once(tmp_path, capsys):
    said = refused(capsys, 2, personas.read, convai(tmp_path, "1 hi\n3 hi\tho\nhello\n"))
    assert "bad lines in" in said and said.count("error: ") == 3 and "note: " not in said
    assert [f"valid.txt:{line}: " in said for line in (1, 2, 3)] == [True] * 3


@pytest.mark.parametrize(("change", "problem"), [
    ({"persona": []}, 'field "persona" is empty'),
    ({"persona": ["I ski.", " "]}, 'field "persona": sentence 2 is empty'),
    ({"persona": "I ski."}, 'field "persona" must be a list of strings'),
    ({"response": ""}, 'field "response" must be a string with text'),
    ({"context": " "}, 'field "context" is empty'),
])
def test_faults_of_jsonl_rows_are_named_by_line(tmp_path, capsys, change, problem):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], ROWS[0] | change])
    assert f"{path}:2: {problem}" in refused(capsys, 2, personas.read, str(path))


def test_the_projects_persona_set_is_whole_and_split_by_person():
    """40 people with 6 sentences each, 200 dialogues; nobody stands on both sides."""
    sides = [personas.read(str(ROOT / "data" / "spt" / f"{name}.jsonl"))
             for name in ("train", "test")]
    people = [{row["person"] for row in rows} for rows in sides]
    assert [len(rows) for rows in sides] == [160, 40] and [len(p) for p in people] == [32, 8]
    assert not people[0] & people[1]
    assert all(len(row["persona"]) == 6 and row["response"] == row["candidates"][0]
               for rows in sides for row in rows)
