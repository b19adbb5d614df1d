"""Which judge an evaluation uses, what it is shown, and what its verdicts look like."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import servers
from conftest import DIALOGUES, refused
from judge_cases import knows_references, replies_to, reply_in
from servers import ok, rated
from test_judge_local import ROWS, ByLetters

from flags import Args
from scoring import judging
from utils import MISSING

serve = servers.serve
DEFAULTS = {
    "judge": "local", "judge_model": "smollm2", "no_canaries": True, "judge_controls": False,
    "control_prompts": 20, "trust_judge": False,
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
    replies = replies_to(server)
    assert replies[:12] == [row["candidates"][0] for row in ROWS] and "" not in replies
    assert not any("noise" in reply for reply in replies)
    num_questions = len(replies)
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
    assert len(server.seen) == num_questions + 10, "the log has the others"
    assert verdicts[0]["noise 0"]["rating"] == 3 and "noise 10" not in verdicts[10]


def test_the_published_judge_shows_what_its_canaries_get(judge, serve):
    server = serve(then=rated(1))
    _, description = judge({"echo": ECHO}, judge="api", judge1="openai:m", base_url1=server.url,
                           no_canaries=False)
    assert len(server.seen) == 12 + 12 * 6 + 20, "replies, controls with references, canaries"
    assert description["canaries"] == {"canaries": 10, "scored": 10, "above_clean_twin": 0}
    assert "0 of 10 replies with a prompt injection" in description["text"]


# ---- the judge's own controls -------------------------------------------------------------------


def test_the_local_proxy_accepts_repeated_turns_and_is_not_trusted(judge):
    """12 different prompts. What checks the proxy changes nothing of its calibration."""
    verdicts, description = judge()
    assert description["controls"]["repeated turn"]["asked"] == 12
    assert len(verdicts) == 12 and "repeated turn" in description["failed"]
    assert description["trusted"] is False and description["overridden"] is False
    assert "of repeated turns" in description["reason"]
    assert description["reason"] in description["text"] and "NOT TRUSTED" in description["text"]
    again, trusted = judge(trust_judge=True)
    assert again == verdicts and trusted["trusted"] is False and trusted["overridden"] is True
    figures = ("auc", "feature_auc", "pairs", "threshold", "controls", "failed", "reason")
    assert all(trusted[name] == description[name] for name in figures)


def test_a_judge_that_answers_right_passes_and_one_that_likes_everything_does_not(judge, serve):
    def description_by(answer):
        server = serve(then=answer)
        flags = {"judge": "api", "judge1": f"openai:m{server.server_port}",
                 "base_url1": server.url}
        return judge({"echo": ECHO}, **flags)[1]

    right, fond, stern = map(description_by, (knows_references(ROWS), rated(9), rated(2)))
    assert right["trusted"] and not right["failed"] and "reason" not in right
    assert right["controls"] == {name: {"accepted": float(name == "references"), "asked": 12}
                                 for name in right["controls"]} and len(right["controls"]) == 6
    assert "references 100 % of 12" in right["text"] and "NOT TRUSTED" not in right["text"]
    assert len(fond["failed"]) == 5 and not fond["trusted"]
    assert fond["reason"].startswith("the judge accepts 100 % of repeated turns, ")
    assert stern["failed"] == ["references"]
    assert stern["reason"] == "the judge accepts only 0 % of the references"


def test_controls_without_a_verdict_count_against_a_judge(judge, serve):
    """It rates every reply of a system, and answers in prose to all that is none."""
    preds = {row["preds"][0] for row in ECHO}

    def rate(body):
        return rated(9) if reply_in(body["messages"][0]["content"]) in preds else ok("Hm.")

    _, description = judge({"echo": ECHO}, judge="api", judge1="openai:m",
                           base_url1=serve(then=rate).url)
    assert description["controls"]["scrambled"] == {
        "accepted": None, "asked": 12, "unscored": 12}
    assert not description["trusted"] and "gives no verdict on" in description["reason"]


def test_what_a_judge_costs_is_said_before_it_starts_with_its_controls(judge, serve, capsys):
    """12 replies, 3 prompts with 5 controls and a reference each, 20 canaries: 50 questions."""
    said = []
    server = serve(then=lambda body: said.append(capsys.readouterr().err) or rated(1))
    judge({"echo": ECHO}, judge="api", judge1="openai:m", base_url1=server.url,
          control_prompts=3, no_canaries=False, max_connections=1)
    assert "is asked about 12 replies, 18 texts that check it (controls and references of 3 " \
           "prompts, --control_prompts) and 20 canaries: 50 questions" in said[0]
    assert len(server.seen) == 50


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
