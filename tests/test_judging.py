"""Which judge an evaluation uses, what it is shown, and what its verdicts look like."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import servers
from conftest import DIALOGUES, refused
from servers import ok, rated
from test_judge_local import ROWS, ByLetters

from flags import Args
from scoring import judging
from utils import MISSING

serve = servers.serve
DEFAULTS = {
    "judge": "local", "judge_model": "smollm2", "no_canaries": True, "judge_controls": False,
    "judge1": None, "judge2": None, "base_url1": None, "base_url2": None, "temperature1": None,
    "temperature2": None, "max_tokens1": None, "max_tokens2": None, "policy": "first",
    "max_connections": 2, "timeout": 5.0, "timeout_total": 60.0, "key_file": None}
SOURCES = SimpleNamespace(embedder=ByLetters())
ECHO = [{**row, "preds": [row["candidates"][0]] * 2} for row in ROWS]
VARIED = [{**row, "preds": [row["candidates"][0], ""]} for row in ROWS]
NOISE = [{**row, "preds": [f"noise {i}"] * 2} for i, row in enumerate(ROWS)]
SYSTEMS = {"echo": ECHO, "varied": VARIED, "control: noise": NOISE}


@pytest.fixture
def judge(tmp_path, tiny_dir):
    """judge(systems, **flags): verdicts and description, with the tiny model as a local judge."""
    def run(systems=SYSTEMS, **flags):
        args = Args(**DEFAULTS | {"judge_model": str(tiny_dir)} | flags)
        return judging.judge(systems, SOURCES, args, tmp_path / "eval.json")

    return run


def test_the_local_judge_is_calibrated_on_the_rows_and_judges_each_text_once(judge):
    verdicts, description = judge()
    assert [set(of_row) for of_row in verdicts[:10]] == [
        {row["candidates"][0], "", f"noise {i}"} for i, row in enumerate(ROWS[:10])]
    assert [set(of_row) for of_row in verdicts[10:]] == [
        {row["candidates"][0], ""} for row in ROWS[10:]], "10 rows show what a control scores"
    for of_row in verdicts:
        for text, verdict in of_row.items():
            assert set(verdict) == {"coherent", "coherence", "pmi", "shown"}
            if text:
                assert verdict["coherent"] == (verdict["coherence"] >= description["threshold"])
                assert verdict["shown"] == f"{verdict['coherence']:.2f}"
            else:
                assert (verdict["coherent"], verdict["shown"]) == (False, "empty")
    assert description["pairs"] == 12 * 6 and f"AUC {description['auc']:.3f}" in description["text"]
    assert "a proxy" in description["text"]
    json.dumps([verdicts, description], allow_nan=False)


def test_without_references_the_local_judge_says_why_it_judges_nothing(judge):
    """Nine rows with candidates are too few; the run goes on with its other figures."""
    rows = [{key: value for key, value in row.items() if i < 9 or key != "candidates"}
            for i, row in enumerate(ECHO)]
    verdicts, description = judge({"echo": rows}, judge_model="is never loaded")
    assert all(verdict == {"coherent": None, "shown": "not judged"}
               for of_row in verdicts for verdict in of_row.values())
    assert [list(of_row) for of_row in verdicts] == [[row["preds"][0]] for row in rows]
    assert description["name"] is None
    assert "needs 10 rows with reference replies" in description["reason"]
    assert description["reason"] in description["text"]


def test_responses_of_rows_without_candidates_calibrate_the_local_judge(judge):
    rows = [{"context": row["context"], "response": row["candidates"][1], "preds": row["preds"]}
            for row in ECHO]
    assert judge({"echo": rows})[1]["pairs"] == 12 * 2


def test_a_local_chat_model_gives_expected_ratings(judge, tiny_dir):
    verdicts, description = judge(judge=f"hf:{tiny_dir}", no_canaries=False)
    for of_row in verdicts:
        for text, verdict in of_row.items():
            if text:
                assert 1 <= verdict["rating"] <= 10 and verdict["unscored"] is None
                assert verdict["coherent"] == (verdict["rating"] > 5)
            else:
                assert verdict == judging.rated(None)
    assert 0 <= description["rating_mass"] < 1 and description["canaries"]["scored"] == 10
    assert "replies with a prompt injection" in description["text"]


def test_the_published_judge_is_sent_neither_controls_nor_empty_replies(judge, serve):
    server = serve(rated(9), ok("Hm."), then=rated(3))
    flags = {"judge": "api", "judge1": "openai:m", "base_url1": server.url, "max_connections": 1}
    verdicts, description = judge(**flags)
    assert len(server.seen) == 12 and not any("noise" in str(body) for _, _, body in server.seen)
    first, second, third = (of_row[row["candidates"][0]]
                            for of_row, row in zip(verdicts[:3], ROWS, strict=False))
    assert [first["shown"], second["shown"], third["shown"]] == [
        "9/10", "unscored: parse", "3/10"]
    assert [first["coherent"], second["coherent"], third["coherent"]] == [True, None, False]
    assert second["unscored"] == "parse" and second["judge1"]["text"] == "Hm."
    assert second["judge2"] is None and DIALOGUES[1]["candidates"][0] in second["prompt"]
    assert all(of_row[""] == judging.rated(None) for of_row in verdicts)
    assert description["stages"] == ["openai:m"] and description["unscored"] is True
    assert "openai:m (policy first)" in description["text"] and "canaries" not in description
    verdicts, _ = judge(**flags, judge_controls=True)
    assert len(server.seen) == 12 + 10, "the log has the others"
    assert verdicts[0]["noise 0"]["rating"] == 3 and "noise 10" not in verdicts[10]


def test_the_published_judge_shows_what_its_canaries_get(judge, serve):
    server = serve(then=rated(1))
    _, description = judge({"echo": ECHO}, judge="api", judge1="openai:m", base_url1=server.url,
                           no_canaries=False)
    assert len(server.seen) == 12 + 20
    assert description["canaries"] == {"canaries": 10, "scored": 10, "above_clean_twin": 0}
    assert "0 of 10 replies with a prompt injection" in description["text"]


def test_a_missing_key_shows_before_anything_is_judged(judge, monkeypatch, capsys):
    monkeypatch.delenv("TOGETHER_API_KEY", raising=False)
    said = refused(capsys, MISSING, lambda: judge(judge="api"))
    assert "TOGETHER_API_KEY is not set" in said


@pytest.mark.parametrize("score, reason, coherent, shown", [
    (5.0, None, False, "5/10"), (5.5, None, True, "5.5/10"), (10.0, None, True, "10/10"),
    (None, "timeout", None, "unscored: timeout"), (None, None, False, "empty")])
def test_a_rating_above_5_is_coherent_and_no_rating_is_no_verdict(score, reason, coherent, shown):
    assert judging.rated(score, reason) == {
        "coherent": coherent, "rating": score, "unscored": reason, "shown": shown}
