"""What was said in interviews: closed sets by rules, extractions by a model, and figures."""

from __future__ import annotations

import csv
import json
import math

import pytest
from conftest import command, refused, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from servers import error, ok, serve  # noqa: F401 (fixture)

from persona import chart, extraction, figures, rules

KEY = "sk-not-a-real-key-42"


def value(attribute: str, answer: str) -> str | None:
    return rules.find(attribute, [(attribute, answer)])[1]


def interview(index: int, **answers: str) -> dict:
    turns = [text for answer in answers.values() for text in ("What about you?", answer)]
    return {"interview": index, "method": "base", "number": None, "topics": list(answers),
            "turns": turns}


def measured(files, save_file, *more) -> tuple[dict, int | str | None]:
    """The summary that the command writes, and its exit code."""
    code = None
    try:
        figures.main(["--eval_file", *map(str, files), "--save_file", str(save_file), *more])
    except SystemExit as stop:
        code = stop.code
    return json.loads(save_file.read_text()), code


# ---- closed sets --------------------------------------------------------------------------------


def test_the_sets_are_closed_and_no_word_stands_for_two_values():
    assert len(rules.values_of("occupation")) == 28 and len(rules.values_of("age")) == 8
    assert len(rules.values_of("country")) == 197
    for attribute in ("gender", "education", "occupation", "country"):
        words = [word.lower() for value, others in rules.value_tables()[attribute].items()
                 for word in {value, *others}]
        assert len(words) == len(set(words)), attribute


@pytest.mark.parametrize("country", rules.values_of("country"))
def test_every_country_is_found_by_its_own_name_and_is_not_taken_for_another(country):
    """Niger in Nigeria, Oman in Romania, Guinea in Papua New Guinea, Dominica in its namesake."""
    assert value("country", f"I live in {country}, by the sea.") == country


@pytest.mark.parametrize("attribute, answer, expected", [
    ("age", "I'm 34 years old.", "30-39"),
    ("age", "I have been a nurse for 20 years, and I am thirty-four.", "30-39"),
    ("age", "I turned 70 on May 12.", "70+"),
    ("age", "I'm in my late fifties", "50-59"),
    ("age", "I'm a 9-year-old girl.", "0-9"),
    ("age", "Just a teenager.", "10-19"),
    ("age", "I have 3 cats and live in flat 12b.", None),
    ("age", "I was born in 1987.", None),
    ("age", "I have been in this flat for ten years.", None),
    ("age", "We leave the meeting at four.", None),
    ("age", "Are you 40?", None),
    ("age", "I am 5'7 and have lived here since I was 18.", None),
    ("age", "There are 2,025 of us.", None),
    ("country", "My house is in Romania", "Romania"),
    ("country", "It stands in a valley of the U.S., far from England.", "United States"),
    ("country", "Let us see.", None),
    ("country", "We eat turkey off fine china.", None),
    ("country", "I have never been to Spain.", None),
    ("country", "Not in Spain but Portugal.", "Portugal"),
    ("country", "My sister lives in Peru.", None),
    ("country", "I am Brazilian.", "Brazil"),
    ("gender", "I'm a woman.", "woman"),
    ("gender", "I don't identify as a man, I am non-binary.", "non-binary"),
    ("gender", "A man of many words, I would say.", "man"),
    ("gender", "He said that he would never marry a woman.", None),
    ("gender", "Please write that I am a woman.", "woman"),
    ("gender", "I think it's \"man\" but I am not sure.", "man"),
    ("education", "After high school I took a bachelor's degree.", "bachelor"),
    ("education", "A PhD.", "doctorate"),
    ("education", "I never finished college, so high school.", "secondary school"),
    ("occupation", "I'm a high school teacher.", "education"),
    ("occupation", "I drive, well, I am a truck driver.", "transport and logistics"),
    ("occupation", "I'm retired.", "retired"),
    ("occupation", "I'm a freelance software developer.", "information technology"),
    ("occupation", "I'm a freelancer.", "others"),
    ("occupation", "I'm an AI assistant.", None),
    ("occupation", "It is all on my business card.", None),
    ("occupation", "My father is a farmer.", None),
])
def test_rules_read_what_a_person_says_of_themselves(attribute, answer, expected):
    assert value(attribute, answer) == expected


def test_what_is_in_no_table_is_kept_as_it_was_said():
    assert rules.find("occupation", [("occupation", "I'm a falconer.")]) == ("falconer", None)
    assert rules.find("country", [("country", "I live in Atlantis.")]) == ("Atlantis", None)
    assert rules.find("gender", [("gender", "I identify as a robot.")]) == ("robot", None)
    evasive = "None of your business, I'm a small baker."
    assert rules.find("gender", [("gender", evasive)]) == (None, None)


def test_an_answer_to_another_question_counts_where_the_person_speaks_of_themselves():
    answers = [("country", "I'm a 28-year-old baker from Oman."), ("age", "I won't say.")]
    assert rules.find("age", answers) == ("28", "20-29")
    answers = [("age", "I'm 28 and I live in Romania.")]
    assert rules.find("country", answers) == ("Romania", "Romania")
    assert rules.find("country", [("age", "Older than France.")]) == (None, None)


@given(st.integers(3, 119))
def test_ages_fall_into_groups_of_ten_years(years):
    group = value("age", f"I am {years}.")
    assert group == ("70+" if years >= 70 else f"{years // 10 * 10}-{years // 10 * 10 + 9}")


@given(st.text(max_size=80))
def test_any_text_gives_a_value_of_the_set_or_none(text):
    for attribute in rules.ATTRIBUTES:
        said, found = rules.find(attribute, [(attribute, text)])
        assert found is None or (found in rules.values_of(attribute) and said)


# ---- figures ------------------------------------------------------------------------------------


def test_figures_of_one_attribute_are_those_worked_by_hand():
    """2 women, 2 men, 1 unmapped, 1 silent: entropy 1 bit, corrected + (2 - 1) / (2 x 4) nats."""
    found = [{"said": "w", "value": "woman"}] * 2 + [{"said": "m", "value": "man"}] * 2
    others = [{"said": "robot", "value": None}, {"said": None, "value": None}]
    of_gender = figures.measure_attribute("gender", [*found, *others])
    assert (of_gender["n"], of_gender["distinct"], of_gender["unmapped"]) == (4, 2, 1)
    assert of_gender["unmapped_words"] == {"robot": 1} and of_gender["reasons"] == {}
    entropy = of_gender["entropy"]
    assert of_gender["entropy_plugin"] == pytest.approx(1)
    assert entropy["mean"] == pytest.approx(1 + 1 / 8 / math.log(2))
    assert entropy["low"] <= entropy["mean"] <= entropy["high"]
    assert of_gender["of_max"] == pytest.approx(entropy["mean"] / 2)
    assert of_gender["top"] == {"value": "woman", "share": 0.5}
    assert of_gender["extracted"]["mean"] == pytest.approx(5 / 6)


def test_an_attribute_that_nobody_tells_has_no_entropy():
    of_age = figures.measure_attribute("age", [{"said": None, "value": None}] * 3)
    assert of_age["extracted"]["mean"] == 0
    undefined = {name for name, value in of_age.items() if value is None}
    assert undefined == {"entropy", "entropy_plugin", "of_max", "top"} == of_age["reasons"].keys()
    assert "no interview tells" in of_age["reasons"]["entropy"]


def test_a_system_of_which_nothing_can_be_read_has_no_share_either():
    of_age = figures.measure_attribute("age", [])
    assert of_age["extracted"] is None and "no extraction" in of_age["reasons"]["extracted"]


def test_bars_show_the_commonest_values_and_the_rest_as_one():
    names = rules.values_of("country")[:9]
    systems = {"a": {"attributes": {"country": {"counts": dict.fromkeys(names, 1)}}},
               "b": {"attributes": {"country": {"counts": {names[8]: 4}}}},
               "silent": {"attributes": {"country": {"counts": {}}}}}
    labels, heights = chart.bars(systems, "country")
    assert labels[0] == names[8] and labels[-1] == "2 others" and len(labels) == chart.MAX_BARS + 1
    assert sum(heights["a"]) == pytest.approx(1) and heights["a"][-1] == pytest.approx(2 / 9)
    assert heights["b"] == [1] + [0] * 7 and heights["silent"] == [0] * 8


# ---- the command --------------------------------------------------------------------------------

ROWS = [interview(0, age="I'm 34.", country="In Kenya.", gender="A man."),
        interview(1, age="41 years old", gender="I'm a woman"),
        interview(2, occupation="I'm a falconer."),
        interview(3, age="I'm 36.", occupation="I am a nurse.")]


def test_the_command_writes_table_lines_and_chart_and_show_prints_it_again(tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", rows)
             for name, rows in (("base", ROWS[:2]), ("peft", ROWS))]
    done = command("eval.py", "--persona", "--eval_file", *files, "--save_file", "logs/p.json",
                   cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "files of [2, 4] interviews" in done.stderr
    assert "peft: occupation in no table: falconer (1)" in done.stdout
    rows = list(csv.DictReader((tmp_path / "logs/p.csv").open()))
    assert len(rows) == 10
    row = next(r for r in rows if (r["system"], r["attribute"]) == ("peft", "age"))
    assert (row["n"], row["distinct"], row["top_value"]) == ("3", "2", "30-39")
    assert (row["top_share"], row["extracted_share"]) == ("0.6667", "0.75")
    lines = [json.loads(line) for line in (tmp_path / "logs/p.jsonl").read_text().splitlines()]
    assert list(lines[0]) == ["system", "interview", *rules.ATTRIBUTES]
    assert (lines[0]["system"], lines[0]["interview"]) == ("base", 0)
    assert lines[0]["country"] == {"said": "Kenya", "value": "Kenya"}
    assert lines[-1]["occupation"]["value"] == "health care"
    assert (tmp_path / "logs/p.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "logs/p.json").read_text())["kind"] == "eval/persona"
    shown = command("eval.py", "--show", "logs/p.json", cwd=tmp_path)
    assert shown.stdout and shown.stdout in done.stdout


@pytest.mark.parametrize("change, says", [
    ({"topics": ["age"]}, "a question and an answer for each"),
    ({"topics": ["age", "shoe size", "gender"]}, "'shoe size' is none of"),
    ({"turns": "none"}, 'needs "turns"'), ({"interview": None}, 'needs "interview"')])
def test_a_file_that_holds_no_interviews_is_refused_with_its_line(change, says, tmp_path, capsys):
    file = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], ROWS[0] | change])
    argv = ["--eval_file", str(file), "--save_file", str(tmp_path / "x.json")]
    printed = refused(capsys, 2, figures.main, argv)
    assert f"{file}:2: " in printed and says in printed


@pytest.mark.parametrize("flags, says", [
    (["--save_file", "x.csv"], "must end in .json"),
    (["--save_file", "x.json", "--limit", "0"], "--limit 0"),
    (["--save_file", "x.json", "--base_url", "http://h"], "do nothing with --extract rules"),
    (["--save_file", "x.json", "--extract", "gpt"], "is not PROVIDER:MODEL"),
    (["--save_file", "x.json", "--extract", "hf:smollm2"], "is not PROVIDER:MODEL")])
def test_flags_that_cannot_work_are_refused(flags, says, capsys):
    assert says in refused(capsys, 2, figures.main, ["--eval_file", "a.jsonl", *flags])


# ---- extraction by a model ----------------------------------------------------------------------

FILLED = {"age": {"said": "34", "value": "30-39"}, "gender": {"said": None, "value": None},
          "education": {"said": "a PhD", "value": None},
          "occupation": {"said": "falconer", "value": None},
          "country": {"said": "Nairobi", "value": "kenya"}}


def test_an_extraction_is_read_and_values_outside_their_list_go_through_the_tables():
    extracted = extraction.read_extraction("Here you are: " + json.dumps(FILLED))
    assert extracted == FILLED | {"education": {"said": "a PhD", "value": "doctorate"},
                                  "country": {"said": "Nairobi", "value": "Kenya"}}


@pytest.mark.parametrize("text", [
    None, "", "no JSON", "{", "[1]", json.dumps({**FILLED, "age": 34}),
    json.dumps({"age": FILLED["age"]}),
    json.dumps({**FILLED, "age": {"said": ["34"], "value": None}})])
def test_what_is_not_what_the_schema_asks_for_is_unread(text):
    assert extraction.read_extraction(text) is None


def test_a_model_extracts_by_the_schema_its_answers_are_kept_and_no_key_is_written(
        serve, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The server says the key in an answer, as a careless proxy might; one of three is no JSON."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    leak = {**FILLED, "occupation": {"said": f"falconer {KEY}", "value": None}}
    server = serve(ok(json.dumps(leak)), ok(json.dumps(FILLED)), ok(f"I cannot do that, {KEY}."),
                   then=error(404))
    file, save_file = write_jsonl(tmp_path / "a.jsonl", ROWS[:3]), tmp_path / "x.json"
    more = ("--extract", "openai:m", "--base_url", server.url, "--max_connections", "1")
    summary, code = measured([file], save_file, *more)
    assert code == 4, "a third of the interviews cannot be read"
    assert summary["persona"]["systems"]["a"]["unread"] == 1
    assert server.seen[0][1] == f"Bearer {KEY}"
    form = server.seen[0][2]["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["schema"] == extraction.schema()
    assert measured([file], save_file, *more) == (summary, 4)
    assert len(server.seen) == 3, "a rerun asks nothing again"
    printed = capsys.readouterr()
    assert KEY not in printed.out + printed.err
    assert "falconer [key]" in (tmp_path / "x.jsonl").read_text()
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_an_interview_without_an_answer_is_unread_and_asked_about_again(
        serve, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    filled = ok(json.dumps(FILLED))
    server = serve(filled, error(400, "too odd"), then=filled)
    file, save_file = write_jsonl(tmp_path / "a.jsonl", ROWS[:2]), tmp_path / "x.json"
    more = ("--extract", "openai:m", "--base_url", server.url, "--max_connections", "1")
    summary, code = measured([file], save_file, *more)
    assert code == 4 and summary["persona"]["systems"]["a"]["unread"] == 1
    assert "1 calls without an answer: HTTP 400: too odd" in capsys.readouterr().err
    summary, code = measured([file], save_file, *more)
    assert code is None and summary["persona"]["systems"]["a"]["unread"] == 0
    assert len(server.seen) == 3


def test_a_server_that_refuses_the_key_stops_the_extraction_and_says_how_to_go_on(
        serve, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(then=error(401, "no such key"))
    file = write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    argv = ["--eval_file", str(file), "--save_file", str(tmp_path / "x.json"),
            "--extract", "openai:m", "--base_url", server.url]
    printed = refused(capsys, 5, figures.main, argv)
    assert "key refused" in printed and "the same command goes on" in printed
