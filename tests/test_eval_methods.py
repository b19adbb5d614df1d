"""eval.py on files of one method: the common figures and the method's own, through one writer."""

from __future__ import annotations

import json
import pickle

import pytest
import servers
from conftest import DIALOGUES, refused, write_jsonl
from eval_cases import drawn_by, lines_of, score, script
from servers import ok

from scoring import common

serve = servers.serve
__all__ = ["score"]  # a fixture

PEOPLE = ["I sell tomatoes.", "I drive a train.", "My cat writes my reports.", "Grandma surfs."]
TALKS = [  # 12 rows of method spt, three of each person
    {"persona": [PEOPLE[i % 4]], "context": f"{row['context']} ({i})",
     "response": row["candidates"][i // 4]}
    for i, row in enumerate(DIALOGUES * 3)]


def spoken(tmp_path, name: str = "spt", num_replies: int = 2, method: str = "spt"):
    """A file of replies to TALKS, the true one and the last reference, drawn from a server."""
    replies = [[talk["response"], *row["candidates"][:-num_replies:-1]]
               for talk, row in zip(TALKS, DIALOGUES * 3, strict=True)]
    return drawn_by(tmp_path / f"{name}.jsonl", method,
                    [{**talk, "preds": preds} for talk, preds in zip(TALKS, replies, strict=True)])


def test_rows_of_a_method_get_the_common_figures_and_its_own(tmp_path, score, capsys):
    """spt: the true reply is the first of two, so its F1 is 1; it is what calibrates the judge."""
    summary = score([spoken(tmp_path)], tmp_path / "x.json", "--trust_judge")
    assert summary["kind"] == "eval/spt" and summary["judge"]["pairs"] == 24
    assert summary["systems"]["spt"]["yield@2"]["mean"] <= 2
    assert summary["systems"]["spt"]["distinct_k"]["mean"] == 2
    assert summary["spt"]["systems"]["spt"]["published"]["F1"] == pytest.approx(100)
    assert "control: shuffled" in summary["systems"]
    assert list(summary["spt"]["systems"]) == ["spt"], "controls are none of the method's systems"
    assert len(lines_of(tmp_path / "x.jsonl")) == 24, "a line per response"
    assert len(lines_of(tmp_path / "x.spt.jsonl")) == 12, "a line per row"
    assert (tmp_path / "x.csv").exists() and (tmp_path / "x.html").exists()
    said = capsys.readouterr().out
    assert "12 prompts x 2 replies" in said and "published columns" in said
    assert "x.spt.jsonl" in said
    script.main(["--show", str(tmp_path / "x.json")])
    assert capsys.readouterr().out in said, "the same tables"


def test_json_the_pickle_and_unscored_replies_mean_the_same_with_figures_of_a_method(
        tmp_path, score, serve, capsys):
    """A judge that answers in prose: 24 replies unscored, which is more than the allowed 5 %."""
    flags = ("--judge1", "openai:m", "--base_url1", serve(then=ok("I like it.")).url,
             "--no_canaries", "--json", "--no_controls", "--limit", "3")
    file = spoken(tmp_path)
    with pytest.raises(SystemExit) as stop:
        score([file], tmp_path / "x.pkl", *flags)
    said = capsys.readouterr()
    assert stop.value.code == 4 and "6 of 6 replies are unscored" in said.err
    summary = json.loads(said.out)
    assert summary == json.loads((tmp_path / "x.json").read_text())
    assert list(summary["systems"]) == ["spt"] and summary["systems"]["spt"]["rows"] == 3
    assert summary["spt"]["systems"]["spt"]["rows"] == 3
    lines = pickle.loads((tmp_path / "x.pkl").read_bytes())  # noqa: S301 - written by this test
    assert len(lines) == 6 and lines[0]["chat_out"] == "I like it."
    score([file], tmp_path / "x.pkl", *flags, "--fail_on_error", "1")


def test_what_drew_a_file_says_its_method_and_a_rows_fields_do_not(tmp_path, score):
    """Rows with the fields of spt and of diffuse: outs/X.json decides, --method overrules it."""
    both = {"targets": ["{a}", "{b}"], "weights": [0.5, 0.5], "eos": True, "split": "test"}
    rows = [{**talk, **both, "prompt": talk["context"], "preds": ["{a}", "{c}"]} for talk in TALKS]
    for row in rows:
        del row["context"]
    file = drawn_by(tmp_path / "both.jsonl", "diffuse", rows)
    summary = score([file], tmp_path / "x.json")
    assert summary["kind"] == "eval/diffuse" and "spt" not in summary
    (tmp_path / "both.json").unlink()
    assert score([file], tmp_path / "x.json")["kind"] == "common"
    summary = score([file], tmp_path / "x.json", "--method", "diffuse")
    assert summary["kind"] == "eval/diffuse"
    drawn_by(tmp_path / "both.jsonl", "diffuse", rows)
    assert score([file], tmp_path / "x.json", "--method", "base")["kind"] == "common"


def test_a_base_model_is_compared_with_a_method_but_two_methods_are_not(
        tmp_path, score, capsys):
    files = [spoken(tmp_path, "plain", method="base"), spoken(tmp_path)]
    summary = score(files, tmp_path / "x.json")
    assert summary["kind"] == "eval/spt" and list(summary["spt"]["systems"]) == ["plain", "spt"]
    assert "spt - plain" in summary["differences"] and "spt" in summary["spt"]["differences"]
    said = refused(capsys, 2, score, [*files, spoken(tmp_path, "other", method="delia")],
                   tmp_path / "y.json")
    assert "several methods: delia, spt" in said and "--method" in said


def test_where_numbers_of_replies_differ_only_the_methods_figures_are_there(
        tmp_path, score, capsys):
    files = [spoken(tmp_path, "two"), spoken(tmp_path, "three", 3)]
    summary = score(files, tmp_path / "x.json")
    assert summary["k"] is None
    assert summary["reasons"]["common figures"].endswith("two 2, three 3")
    assert summary["systems"]["three"]["responses"] == 36
    assert list(summary["spt"]["systems"]) == ["two", "three"]
    said = capsys.readouterr().out
    assert "no common figures" in said and "published columns" in said
    assert len(lines_of(tmp_path / "x.spt.jsonl")) == 24 and not (tmp_path / "x.jsonl").exists()
    script.main(["--show", str(tmp_path / "x.json")])
    assert capsys.readouterr().out in said


def test_a_thousand_draws_from_a_closed_set_are_counted_by_the_method_and_looked_at_in_part(
        tmp_path, score, monkeypatch, capsys):
    """The first 4 of 6 replies are "{2}" and count as one class; of all 6, two are "{4}"."""
    monkeypatch.setattr(common, "MAX_REPLIES", 4)
    rows = [{"prompt": f"Give an even number ({i}).", "targets": ["{2}", "{4}"], "split": "test",
             "weights": [0.5, 0.5], "eos": True, "response": [""],
             "preds": ["{2}"] * 4 + ["{4}"] * 2}
            for i in range(2)]
    summary = score([drawn_by(tmp_path / "even.jsonl", "diffuse", rows)], tmp_path / "x.json")
    even = summary["systems"]["even"]
    assert (summary["k"], summary["drawn"]) == (4, 6) and even["distinct_k"]["mean"] == 1
    assert even["yield@4"] is None and "reference replies" in even["reasons"]["yield@4"]
    figures = next(iter(summary["diffuse"]["systems"]["even"]["prompts"].values()))
    assert (figures["replies"], figures["coverage"]) == (6, 2)
    assert list((tmp_path / "x_plots").rglob("*.png"))
    assert "the first 4 of 6 replies" in " ".join(capsys.readouterr().out.split())


def test_interviews_have_a_command_of_their_own(tmp_path, capsys):
    """--persona is a flag with help; its figures are shown again by --show."""
    write_jsonl(tmp_path / "talk.jsonl", [
        {"interview": i, "method": "base", "topics": ["age"],
         "turns": ["How old are you?", f"I am {30 + i} years old."]} for i in range(3)])
    save = tmp_path / "x.json"
    script.main(["--persona", "--eval_file", str(tmp_path / "talk.jsonl"),
                 "--save_file", str(save)])
    said = capsys.readouterr().out
    assert json.loads(save.read_text())["kind"] == "eval/persona"
    script.main(["--show", str(save)])
    assert capsys.readouterr().out in said
    assert "--persona" in script.build_parser().format_help()
