"""eval.py on rows of any method: the common figures, what is written and shown, what is refused."""

from __future__ import annotations

import json
import pickle

import pytest
from conftest import refused, write_jsonl
from eval_cases import ROWS, drawn_by, lines_of, outs, score, script

from scoring import common
from scoring.sources import read_systems

__all__ = ["outs", "score"]  # fixtures


def is_figure(value) -> bool:
    return isinstance(value, dict) and value.keys() == {"mean", "low", "high"}


# ---- the common figures -------------------------------------------------------------------------


def test_two_systems_are_compared_row_by_row(outs, tmp_path, score, capsys):
    """Three equal replies: SBERT diversity 0, yield at most 1; the difference is paired."""
    save = tmp_path / "logs" / "x.json"
    summary = score([outs / "echo.jsonl", outs / "varied.jsonl"], save, "--trust_judge")
    echo, varied = summary["systems"]["echo"], summary["systems"]["varied"]
    assert echo["sbert_diversity"]["mean"] == pytest.approx(0, abs=1e-4)
    assert echo["yield@3"]["high"] <= 1
    assert echo["distinct_k"] == {"mean": 1, "low": 1, "high": 1}
    assert echo["duplicates"]["mean"] == pytest.approx(2 / 3, abs=1e-3)
    assert echo["self_bleu"]["mean"] > 99
    assert echo["seconds_per_row"] == {"mean": 0.5, "low": None, "high": None}
    assert varied["empty"] == 12 and varied["responses"] == 36
    assert varied["coherent"]["mean"] <= 2 / 3 + 1e-4
    difference = summary["differences"]["varied - echo"]["sbert_diversity"]
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert difference["mean"] == pytest.approx(varied["sbert_diversity"]["mean"], abs=1e-3)
    assert summary["settings"]["self_bleu"].startswith("nrefs:2|")
    assert summary["settings"]["ead_vocabulary"] == 30522
    lines = lines_of(tmp_path / "logs" / "x.jsonl")
    assert len(lines) == 72
    assert {"system", "row", "context", "response", "meaning_class", "coherence",
            "coherent"} <= set(lines[0])
    said = capsys.readouterr().out
    assert "a proxy" in said and "AUC" in said and "12 empty" in said and "x.html" in said
    script.main(["--show", str(save)])
    again = capsys.readouterr().out
    assert "minus echo" in again and again in said, "the same tables"


def test_the_local_judge_is_calibrated_on_the_rows_that_are_judged(outs, tmp_path, score):
    """12 rows with three true and three mismatched replies each: 72 pairs."""
    judge = score([outs / "varied.jsonl"], tmp_path / "x.json")["judge"]
    assert judge["pairs"] == 72 and 0 <= judge["auc"] <= 1 and 0 < judge["threshold"] < 1
    lines = lines_of(tmp_path / "x.jsonl")
    assert all(line["coherent"] == (line["coherence"] >= judge["threshold"]) for line in lines
               if abs(line["coherence"] - judge["threshold"]) > 1e-4)
    assert not any(line["coherent"] for line in lines if not line["response"])


@pytest.mark.parametrize("flags", [(), ("--trust_judge",)])
def test_every_figure_has_an_interval_that_holds_it_and_every_missing_one_a_reason(
        outs, tmp_path, score, flags):
    summary = score([outs / "varied.jsonl"], tmp_path / "x.json", *flags)
    for name, system in summary["systems"].items():
        figures = [value for value in system.values() if is_figure(value)]
        judged = flags and name != "references"
        assert len(figures) >= (18 if judged else 15) and all(f["low"] <= f["mean"] <= f["high"] for f in figures)
        assert {key for key, value in system.items() if value is None} == set(system["reasons"])


def test_controls_show_what_diversity_alone_rewards(outs, tmp_path, score, capsys):
    """Repeating is one class; moved replies are as diverse as they were, and less coherent."""
    systems = score([outs / "varied.jsonl"], tmp_path / "x.json", "--trust_judge")["systems"]
    assert [name for name, system in systems.items() if system["control"]] == [
        "control: random words", "control: shuffled", "control: repeated", "references"]
    varied, shuffled = systems["varied"], systems["control: shuffled"]
    assert systems["control: repeated"]["distinct_k"]["mean"] == 1
    assert shuffled["distinct-1"]["mean"] == varied["distinct-1"]["mean"]
    assert shuffled["coherent"]["mean"] < varied["coherent"]["mean"]
    assert all(line["system"] == "varied" for line in lines_of(tmp_path / "x.jsonl"))
    capsys.readouterr()
    score([outs / "varied.jsonl"], tmp_path / "x.json", "--no_controls")
    assert "control:" not in capsys.readouterr().out


def test_one_response_a_row_has_no_diversity_rather_than_a_zero(tmp_path, score, capsys):
    file = write_jsonl(tmp_path / "one.jsonl",
                       [{**row, "preds": [row["candidates"][0]]} for row in ROWS])
    one = score([file], tmp_path / "x.json")["systems"]["one"]
    assert one["sbert_diversity"] is None and one["self_bleu"] is None
    assert one["vendi"]["mean"] == 1
    assert one["reasons"]["sbert_diversity"] == "one response a prompt has nothing to differ from"
    assert "SBERT" not in capsys.readouterr().out


@pytest.mark.parametrize("preds", [["", ""], ["?!", "..."], ["漢字", "漢 字"], ["a", "a"]],
                         ids=["empty", "marks", "han", "equal"])
def test_odd_replies_have_figures_or_reasons_and_never_nan(tmp_path, score, preds):
    file = write_jsonl(tmp_path / "odd.jsonl", [{**row, "preds": preds} for row in ROWS])
    summary = score([file], tmp_path / "x.json")
    text = (tmp_path / "x.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert summary["systems"]["odd"]["distinct_k"]["high"] <= 2


def test_rows_without_references_have_every_figure_but_those_of_the_local_judge(tmp_path, score):
    file = write_jsonl(tmp_path / "bare.jsonl", [
        {"prompt": f"Name a fruit ({i}).", "preds": ["A pear.", "A plum."]} for i in range(3)])
    summary = score([file], tmp_path / "x.json")
    bare = summary["systems"]["bare"]
    assert bare["yield@2"] is None
    assert "10 rows with reference replies" in bare["reasons"]["yield@2"]
    assert summary["judge"]["name"] is None
    assert bare["distinct_k"]["mean"] == 2 and bare["sbert_diversity"]["mean"] > 0


def test_a_continuation_of_nothing_is_a_row_like_others(tmp_path, score):
    file = write_jsonl(tmp_path / "free.jsonl", [
        {"prompt": "", "preds": [f"It rained on day {i}.", "The end."]} for i in range(2)])
    free = score([file], tmp_path / "x.json")["systems"]["free"]
    assert free["distinct_k"]["mean"] == 2 and free["cosine"] is not None


def test_of_many_replies_the_first_hundred_are_looked_at_and_that_is_said(
        tmp_path, score, capsys, monkeypatch):
    """Here the first three: the fourth reply, which differs, changes nothing."""
    monkeypatch.setattr(common, "MAX_REPLIES", 3)
    file = write_jsonl(tmp_path / "many.jsonl", [
        {"prompt": f"Name a fruit ({i}).", "preds": ["A pear."] * 3 + ["A car."]}
        for i in range(2)])
    summary = score([file], tmp_path / "x.json")
    assert (summary["k"], summary["drawn"]) == (3, 4)
    assert summary["systems"]["many"]["distinct_k"]["mean"] == 1
    assert len(lines_of(tmp_path / "x.jsonl")) == 6
    said = " ".join(capsys.readouterr().out.split())
    assert "the first 3 of 4 replies a prompt are looked at" in said


def test_files_that_differ_in_their_seed_alone_tell_whether_numbers_mean_something(
        tmp_path, score, capsys):
    """Number 1 always gives the first reference and number 2 the second, whatever the seed."""
    files = [drawn_by(tmp_path / f"seed{seed}.jsonl", "peft",
                      [{**row, "preds": row["candidates"][:2]} for row in ROWS], seed=seed)
             for seed in (1, 2)]
    summary = score(files, tmp_path / "x.json", "--no_controls")
    found = summary["controllability"]["seed1 + seed2"]
    assert found["stable"] == 1 and found["coincide"] == 0
    assert found["excess"] > 0 and found["prompts"] == 12
    said = " ".join(capsys.readouterr().out.split())
    assert "a number keeps its class over seeds in 100 %" in said


# ---- what is written and shown ------------------------------------------------------------------


def test_json_prints_the_summary_and_nothing_else(outs, tmp_path, score, capsys):
    summary = score([outs / "echo.jsonl"], tmp_path / "x.json", "--json")
    assert json.loads(capsys.readouterr().out) == summary


def test_the_published_pickle_name_works_and_holds_plain_dicts_with_the_published_keys(
        outs, tmp_path, score):
    score([outs / "echo.jsonl"], tmp_path / "out.pkl")
    note = (tmp_path / "out.pkl.txt").read_text()
    assert note.startswith("UNTRUSTED: the judge accepts ") and "raw judgements" in note
    lines = pickle.loads((tmp_path / "out.pkl").read_bytes())  # noqa: S301 - written by this test
    assert len(lines) == 36 and all(type(line) is dict for line in lines)
    assert list(lines[0]) == ["context", "response", "prompt", "chat_out", "chat_score",
                              "gpt4_out", "gpt4_score"]
    assert lines[0]["chat_score"] == {"Coherence rating:": None}, "the proxy rates nothing"
    assert lines[0]["gpt4_score"] is None
    assert all((tmp_path / f"out.{kind}").exists() for kind in ("json", "jsonl", "html"))


@pytest.mark.parametrize(("text", "why"), [
    ('{"kind": "interview", "rows": 3}', "its kind is 'interview'"),
    ('{"kind": "self-samples"}', "its kind is 'self-samples'"),
    ('{"kind": "eval/os"}', "its kind is 'eval/os'"),
    ('{"kind": "antigravity"}', "its kind is 'antigravity'"),
    ('{"kind": ["eval/spt"]}', "its kind is ['eval/spt']"),
    ('{"systems": {}, "k": 5}', "it has no kind"),
    ("[1, 2]", "it has no kind"),
    ('{"kind": "common", "k": 2}', "KeyError"),
    ("not JSON", "JSONDecodeError"),
])
def test_only_a_summary_of_eval_is_shown_and_no_module_that_a_file_names_is_imported(
        tmp_path, capsys, monkeypatch, text, why):
    imported = []
    monkeypatch.setattr(script, "import_module", imported.append)
    file = tmp_path / "x.json"
    file.write_text(text)
    said = refused(capsys, 2, script.main, ["--show", str(file)])
    assert "not a summary of eval.py" in said and why in said and not imported


# ---- what is refused ----------------------------------------------------------------------------


def test_files_of_other_rows_are_refused(outs, tmp_path, capsys):
    other = write_jsonl(tmp_path / "other.jsonl",
                        [{**row, "preds": ["a", "b", "c"]} for row in ROWS[:5]])
    said = refused(capsys, 2, read_systems, [outs / "echo.jsonl", other], None)
    assert "holds other rows than" in said and "(5 and 12)" in said and "one --test_file" in said


@pytest.mark.parametrize(("text", "said"), [
    ('{"context": "a\\nb", "preds": "c"}', 'bad.jsonl:1: needs "preds", a list of strings'),
    ('{"context": "a\\nb", "preds": []}', "bad.jsonl holds no responses at all"),
    ('{"preds": ["c"]}', 'bad.jsonl:1: needs either "context" or "prompt"'),
])
def test_a_row_without_responses_is_named(tmp_path, capsys, text, said):
    (tmp_path / "bad.jsonl").write_text(text + "\n")
    assert said in refused(capsys, 2, script.main, [
        "--eval_file", str(tmp_path / "bad.jsonl"), "--save_file", str(tmp_path / "x.json")])


def test_a_pickle_is_never_read(tmp_path, capsys):
    """A pickle that would create a file when loaded is refused, and the file does not appear."""
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "old.pkl").write_bytes(pickle.dumps(Trap()))
    said = refused(capsys, 2, read_systems, [tmp_path / "old.pkl"], None)
    assert ".pkl files are not read" in said and not (tmp_path / "sprung").exists()


def test_responses_that_a_row_lacks_are_empty_ones_and_counted(tmp_path, capsys):
    """Rows of one, two and no responses have up to two: 12 rows lack 4 x 1 + 4 x 2 of 24."""
    file = write_jsonl(tmp_path / "mixed.jsonl", [
        {**row, "preds": ["a", "b"][: (1, 2, 0)[i % 3]]} for i, row in enumerate(ROWS)])
    rows = read_systems([str(file)], None)["mixed"]
    assert [row["preds"] for row in rows[:3]] == [["a", ""], ["a", "b"], ["", ""]]
    assert "12 of 24 responses are missing; they count as empty" in capsys.readouterr().err


def test_files_of_different_numbers_of_replies_have_no_common_figures_to_compare(
        tmp_path, score, capsys):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [{**row, "preds": preds} for row in ROWS])
             for name, preds in (("two", ["a", "b"]), ("three", ["a", "b", "c"]))]
    said = refused(capsys, 2, score, files, tmp_path / "x.json")
    assert "different numbers of replies a row: two 2, three 3" in said
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(("flags", "says"), [
    (["--judge", "gpt"], "--judge gpt is none of local, api, hf:MODEL"),
    (["--judge", "local", "--judge1", "openai:m"], "--judge1 does nothing with --judge local"),
    (["--judge1", "m"], '--judge1 "m" is not PROVIDER:MODEL'),
    (["--fail_on_error", "5"], "--fail_on_error 5 must be a share"),
    (["--limit", "0"], "--limit 0 must be at least 1"),
    (["--save_file", "x.txt"], "--save_file x.txt must end in .json or .pkl"),
    (["--method", "grpo"], "--method invalid choice"),
])
def test_flags_that_cannot_work_are_refused_before_anything_is_read(tmp_path, capsys, flags, says):
    """The file to evaluate does not even exist."""
    said = refused(capsys, 2, script.main, [
        "--eval_file", str(tmp_path / "none.jsonl"), "--save_file", str(tmp_path / "x.json"),
        *flags])
    assert says in said
