"""The gate of eval.py: figures of coherence are shown only where the judge passes its checks."""

from __future__ import annotations

import json
import pickle

import pytest
import servers
from conftest import ROOT, write_jsonl
from eval_cases import ROWS, lines_of, outs, score, script
from judge_cases import knows_references
from servers import rated

import utils

serve = servers.serve
__all__ = ["outs", "score"]  # fixtures

FIGURES = ("coherent", "incoherence_rate", "rating", "utility_k", "yield@3")
WORDS = ("yield@3", "utility@3", "eq. coh.", "at equal coherence", "Incoherence rate",
         "coherent and different", "Diversity against coherence", "coherent ↑")


@pytest.fixture
def by_api(outs, tmp_path, score, serve, capsys, monkeypatch):
    """by_api(answer, *flags): eval.py on echo and varied; summary, and the table with the page.

    The answer is what the scripted judge gives to everything.
    """
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(answer, *flags, save="x.json"):
        summary = score([outs / "echo.jsonl", outs / "varied.jsonl"], tmp_path / save, "--judge1",
                        "openai:m", "--base_url1", serve(then=answer).url, "--no_canaries", *flags)
        said = capsys.readouterr().out
        return summary, said, (tmp_path / save).with_suffix(".html").read_text()

    return run


def check_withheld(summary: dict, said: str, page: str, why: str) -> None:
    """Nothing that hangs on the judge's verdicts is there, and the reason is everywhere."""
    assert summary["judge"]["trusted"] is False and why in summary["judge"]["reason"]
    assert why in summary["reasons"]["figures of coherence"]
    for system in summary["systems"].values():
        for figure in FIGURES:
            assert system[figure] is None and why in system["reasons"][figure]
    assert all(differences[figure] is None for differences in summary["differences"].values()
               for figure in FIGURES)
    assert summary["matched"] == {} and summary["untrusted"] == []
    for word in WORDS:
        assert word not in said and word not in page, word
    assert why in " ".join(said.split()) and "NOT TRUSTED" in said
    assert f"No figures of coherence: {summary['judge']['reason']}".replace("'", "&#39;") in page
    for absent in ('<div class="card"', 'class="scatter"', 'class="pip of', "✓", "✗", "yield of"):
        assert absent not in page, absent
    assert "SBERT diversity" in said and "SBERT diversity" in page, "other figures stay"


def test_the_gate_closes_on_the_local_proxy_which_accepts_repeated_turns(
        outs, tmp_path, score, capsys):
    summary = score([outs / "echo.jsonl", outs / "varied.jsonl"], tmp_path / "x.json")
    said, page = capsys.readouterr().out, (tmp_path / "x.html").read_text()
    check_withheld(summary, said, page, "% of repeated turns")
    lines = lines_of(tmp_path / "x.jsonl")
    assert all(line["trusted"] is False for line in lines), "raw verdicts, marked"
    assert {line["coherent"] for line in lines} == {True, False}
    script.main(["--show", str(tmp_path / "x.json")])
    assert capsys.readouterr().out in said


def test_the_gate_closes_on_a_judge_that_likes_everything(by_api, tmp_path):
    summary, said, page = by_api(rated(9), save="x.pkl")
    check_withheld(summary, said, page, "the judge accepts 100 % of repeated turns")
    lines = lines_of(tmp_path / "x.jsonl")
    assert all((line["rating"], line["coherent"], line["trusted"]) == (9, True, False)
               for line in lines if line["response"])
    lines = pickle.loads((tmp_path / "x.pkl").read_bytes())  # noqa: S301 - written by this test
    assert lines[0]["chat_score"] == {"Coherence rating:": 9}, "the pickle has what was said"
    note = (tmp_path / "x.pkl.txt").read_text()
    assert note.startswith("UNTRUSTED: the judge accepts 100 % of repeated turns")


def test_the_gate_opens_on_a_judge_that_answers_right(by_api, tmp_path):
    """echo gives one reference three times, varied two and an empty reply: 3/3 and 2/3 coherent."""
    summary, said, page = by_api(knows_references(ROWS), save="x.pkl")
    judge = summary["judge"]
    assert judge["trusted"] is True and judge["failed"] == [] and summary["untrusted"] == []
    assert judge["controls"]["references"] == {"accepted": 1.0, "asked": 12}
    assert judge["controls"]["repeated turn"] == {"accepted": 0.0, "asked": 12}
    echo, varied = summary["systems"]["echo"], summary["systems"]["varied"]
    assert echo["coherent"]["mean"] == 1 and echo["yield@3"]["mean"] == 1
    assert varied["coherent"]["mean"] == pytest.approx(2 / 3, abs=1e-3)
    assert summary["matched"]["varied - echo"]["prompts"] == 12 and summary["reasons"] == {}
    for word in set(WORDS) - {"Diversity against coherence", "at equal coherence"}:
        assert word in said, word
    assert "‡" not in said and "‡" not in page and "NOT TRUSTED" not in said
    assert 'class="card"' in page and 'class="scatter"' in page and "✓ 9/10" in page
    assert all(line["trusted"] for line in lines_of(tmp_path / "x.jsonl"))
    assert (tmp_path / "x.pkl.txt").read_text().startswith("The judge passed its checks.")


def test_trust_judge_shows_the_figures_marked_in_table_page_and_json(by_api, tmp_path, capsys):
    summary, said, page = by_api(rated(9), "--trust_judge")
    judge = summary["judge"]
    assert (judge["trusted"], judge["overridden"]) == (False, True)
    assert sorted(summary["untrusted"]) == sorted(FIGURES)
    assert summary["systems"]["echo"]["coherent"]["mean"] == 1 and summary["reasons"] == {}
    for marked in ("yield@3 ‡ ↑", "coherent ‡ ↑", "rating ‡ ↑", "utility@3 ‡ ↑",
                   "distinct_3, eq. coh. ‡", "Incoherence rate: 0.0 ‡"):
        assert marked in said, marked
    assert all(line.endswith("‡") for line in said.split("\n") if "replies are coherent" in line)
    assert "cosine ↑" in said and "distinct_3 ↑" in said, "others bear no mark"
    assert "NOT TRUSTED" in said and "marked ‡ (--trust_judge)" in " ".join(said.split())
    assert "<b>yield@3 ‡</b>" in page and "of 3 ‡</small>" in page
    assert "‡ By a judge that failed its checks: the judge accepts 100 % of repeated" in page
    assert all(line["trusted"] is False for line in lines_of(tmp_path / "x.jsonl"))
    script.main(["--show", str(tmp_path / "x.json")])
    assert capsys.readouterr().out in said


def test_without_degenerate_systems_the_judge_is_checked_all_the_same(by_api):
    summary, *_ = by_api(rated(9), "--no_controls")
    assert not any(system["control"] for system in summary["systems"].values())
    assert summary["judge"]["controls"]["scrambled"]["accepted"] == 1
    assert summary["systems"]["echo"]["coherent"] is None
    said = " ".join(script.build_parser().format_help().split())
    assert "the judge's own controls cannot be left out, see --trust_judge" in said


def test_rows_without_references_are_checked_by_what_needs_none(tmp_path, score, serve):
    """A judge that knows no answer refuses repeated prompts and their words: nothing fails."""
    rows = [{"prompt": f"Name a sweet yellow fruit, number {i}."} for i in range(4)]
    file = write_jsonl(tmp_path / "bare.jsonl", [{**row, "preds": ["A pear."]} for row in rows])
    summary = score([file], tmp_path / "x.json", "--judge1", "openai:m", "--base_url1",
                    serve(then=knows_references(rows)).url, "--no_canaries")
    assert list(summary["judge"]["controls"]) == ["repeated turn", "context words"]
    assert summary["judge"]["trusted"] and summary["systems"]["bare"]["coherent"]["mean"] == 0


def test_where_no_control_can_be_made_nothing_vouches_for_the_judge(tmp_path, score, serve):
    file = write_jsonl(tmp_path / "free.jsonl", [{"prompt": "", "preds": ["It rained."]}] * 2)
    summary = score([file], tmp_path / "x.json", "--judge1", "openai:m", "--base_url1",
                    serve(then=rated(9)).url, "--no_canaries")
    assert summary["systems"]["free"]["coherent"] is None
    assert "no control of the judge can be made" in summary["reasons"]["figures of coherence"]
    json.dumps(summary, allow_nan=False)


def test_the_embedded_proxy_is_not_trusted_on_the_shipped_dialogues(
        embedded, tmp_path, score, capsys):
    """It accepts Person A's last turn, repeated, in all of 10 dialogues."""
    rows = utils.read_jsonl(ROOT / "data" / "test_dialogs.jsonl", utils.check_row)[:10]
    file = write_jsonl(tmp_path / "echo.jsonl", [
        {**row, "preds": [row["context"].split("\n")[-1]]} for row in rows])
    summary = score([file], tmp_path / "x.json", "--judge_model", "smollm2", "--no_controls")
    assert summary["judge"]["controls"]["repeated turn"] == {"accepted": 1.0, "asked": 10}
    assert "100 % of repeated turns" in summary["systems"]["echo"]["reasons"]["yield@1"]
