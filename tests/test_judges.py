"""The published judge: two models behind servers. No fault of a server becomes a score.

Stage 1 goes through the together package, stage 2 through openai's.
"""

from __future__ import annotations

import judge_cases
import pytest
from conftest import refused
from judge_cases import ITEMS, KEYS, reply_in
from servers import BAD, error, ok, rated

from decoding import api, engines
from scoring import judge_api, judge_prompt
from utils import MISSING, REFUSED, TRY_LATER, USAGE

judge, serve, waits = judge_cases.judge, judge_cases.serve, judge_cases.waits  # fixtures


# ---- two stages ---------------------------------------------------------------------------------


def judged(score: int | None, reason: str | None = None) -> judge_api.Judgement:
    return judge_api.Judgement(score, reason or (None if score else "parse"), "m", "")


@pytest.mark.parametrize("policy, first, second, score, reason", [
    ("published", 6, None, 6, None), ("published", 5, 8, 8, None), ("published", None, 3, 3, None),
    ("published", 5, judged(None, "timeout"), None, "timeout"), ("first", 2, None, 2, None),
    ("first", judged(None, "filtered"), None, None, "filtered"), ("second", None, 4, 4, None),
    ("both", 9, 4, 4, None), ("mean", 5, 6, 5.5, None), ("mean", 5, judged(None), None, "parse"),
    ("both", judged(None), 3, None, "parse"),
])
def test_policies_join_two_stages_and_never_make_up_a_score(policy, first, second, score, reason):
    first, second = (judged(x) if isinstance(x, int) else x for x in (first, second))
    verdict = judge_api.decide(policy, first, second)
    assert verdict == (score, reason, first, second)


def test_as_published_stage_2_sees_what_stage_1_rated_below_6_or_not_at_all(judge, serve):
    """Stage 1: 5, 6, prose. Stage 2: 9 and 2 for the first and third. 2 is incoherent, 6, 9 not."""
    one, two = serve(rated(5), rated(6), ok("Hard to say.")), serve(rated(9), rated(2))
    verdicts, _ = judge(ITEMS[:3], one, two, policy="published")
    assert [v.score for v in verdicts] == [9, 6, 2]
    assert [v.score <= judge_prompt.INCOHERENT for v in verdicts] == [False, False, True]
    assert [v.stage1.score for v in verdicts] == [5, 6, None] and verdicts[1].stage2 is None
    assert (verdicts[2].stage1.text, verdicts[2].stage1.reason) == ("Hard to say.", "parse")
    assert (len(one.seen), len(two.seen)) == (3, 2)


def test_each_stage_is_sent_its_published_settings_and_no_seed(judge, serve):
    one, two = serve(then=rated(5)), serve(then=rated(9))
    judge(ITEMS[:1], one, two, policy="both")
    [(_, _, first)], [(_, _, second)] = one.seen, two.seen
    for body in (first, second):
        assert body.pop("messages")[0]["content"].endswith("Rating: <integer 1-10>")
    assert first == {"model": "judge-1", "temperature": 0.1, "max_tokens": 512, "top_p": 0.95,
                     "top_k": 50}
    assert second == {"model": "judge-2", "temperature": 0, "max_tokens": 1024}


@pytest.mark.parametrize("policy, calls, score", [
    ("first", (3, 0), 9), ("second", (0, 3), 4), ("both", (3, 3), 4), ("mean", (3, 3), 6.5),
    ("published", (3, 0), 9)])
def test_every_policy_asks_only_the_stages_it_needs(judge, serve, policy, calls, score):
    one, two = serve(then=rated(9)), serve(then=rated(4))
    verdicts, _ = judge(ITEMS[:3], one, two, policy=policy, max_connections=3)
    assert [v.score for v in verdicts] == [score] * 3 and (len(one.seen), len(two.seen)) == calls


def test_verdicts_stand_in_the_order_of_the_items_and_equal_items_cost_one_call(judge, serve):
    """The rating is the length of the reply modulo 10, plus 1; 16 connections end in any order."""
    def rate(body):
        return rated(len(reply_in(body["messages"][0]["content"])) % 10 + 1)

    server = serve(then=rate)
    verdicts, _ = judge([*ITEMS, *ITEMS], server, max_connections=16)
    assert [v.score for v in verdicts] == [len(reply) % 10 + 1 for _, reply in ITEMS] * 2
    assert len(server.seen) == 16


def test_the_served_model_and_the_raw_answer_are_kept_with_every_judgement(judge, serve):
    answer = rated(7, model="judge-1-turbo", usage={"total_tokens": 99})
    [verdict], _ = judge(ITEMS[:1], serve(answer))
    text = "It takes up what was said.\nRating: 7"
    assert verdict.stage1 == (7, None, "judge-1-turbo", text, 99)
    [line] = judge.log()
    assert line | {"key": ""} == {
        "key": "", "judge": "together:judge-1", "rubric": judge_api.RUBRIC, "reply": ITEMS[0][1],
        "score": 7, "reason": None, "served_model": "judge-1-turbo", "text": text, "tokens": 99,
        "retries": 0, "lasting": False}


@pytest.mark.parametrize("spec", ["gpt-4o", "hf:smollm2", "openai:", ":gpt-4o", ""])
def test_a_stage_is_a_providers_model(spec, capsys):
    said = refused(capsys, USAGE, judge_api.parse_stage, 1, spec)
    assert f'--judge1 "{spec}" is not PROVIDER:MODEL' in said


def test_a_stage_is_as_published_unless_told_otherwise():
    stage = judge_api.parse_stage(2, "openai:a:b", "http://127.0.0.1:1/", temperature=0.7)
    assert stage == ("openai", "a:b", "http://127.0.0.1:1/v1", 0.7, 1024, 100)
    assert judge_api.parse_stage(1).name == "together:meta-llama/Llama-3-70b-chat-hf"


# ---- keys ---------------------------------------------------------------------------------------


def test_without_a_key_nothing_is_judged_and_the_offline_judge_is_named(
        tmp_path, monkeypatch, capsys):
    """Row E1. The second stage's key is not missed where only the first is asked."""
    monkeypatch.delenv("TOGETHER_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    stages, log_file = [judge_api.parse_stage(1), judge_api.parse_stage(2)], tmp_path / "log.jsonl"
    for policy, name in (("published", "TOGETHER_API_KEY"), ("second", "OPENAI_API_KEY")):
        said = refused(capsys, MISSING, judge_api.APIJudge, stages, policy, log_file)
        assert f"{name} is not set" in said and "--judge local" in said
    stages[0] = judge_api.parse_stage(1, "openai:smollm2", "http://127.0.0.1:9/v1")
    judge_api.APIJudge(stages, "first", log_file)


def test_a_key_file_gives_each_provider_its_key(judge, serve, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    path = tmp_path / "keys"
    path.write_text("TOGETHER_API_KEY = abc\n# mine\nOPENAI_API_KEY=def\n")
    path.chmod(0o600)
    both = [serve(rated(2)), serve(rated(9))]
    stages = [judge_api.parse_stage(n, None, server.url) for n, server in enumerate(both, 1)]
    judge_api.APIJudge(stages, "both", tmp_path / "log.jsonl", key_file=str(path)).judge(ITEMS[:1])
    assert [server.seen[0][1] for server in both] == ["Bearer abc", "Bearer def"]


# ---- faults of servers --------------------------------------------------------------------------


def test_a_refused_key_stops_the_run_at_once_keeps_judgements_and_is_never_shown(judge, serve):
    """Row E2."""
    key = KEYS["TOGETHER_API_KEY"]
    server = serve(rated(7), error(401, f"Invalid API key {key}"))
    code, said = judge(ITEMS, server)
    assert code == REFUSED and len(server.seen) == 2
    assert [line["score"] for line in judge.log()] == [7]
    assert "401" in said and f"judge together:judge-1 at {server.url}/v1: HTTP" in said
    assert "1 of 16 are judged" in said and "TOGETHER_API_KEY" in said
    assert key not in said + judge.log_file.read_text()


def test_a_rate_limit_is_waited_out_as_asked_and_counted(judge, serve, waits):
    """Row E3: three times 2 seconds."""
    server = serve(*[error(429, headers={"Retry-After": "2"})] * 3, then=rated(6))
    [verdict], _ = judge(ITEMS[:1], server)
    assert verdict.score == 6 and [w >= 2 for w in waits] == [True] * 3 and len(server.seen) == 4
    assert judge.log()[0]["retries"] == 3


@pytest.mark.parametrize("fault, part", [
    (error(429, code="insufficient_quota"), "quota"), (error(402), "payment"),
    (error(403), "denied"),
    (error(404, "The model judge-1 does not exist"), "The model judge-1 does not exist"),
])
def test_quota_and_retired_models_are_not_tried_again(judge, serve, fault, part):
    """Rows E4 and E7."""
    server = serve(rated(7), fault, then=rated(9))
    code, said = judge(ITEMS, server)
    assert code == REFUSED and len(server.seen) == 2 and len(judge.log()) == 1
    assert part in said and "goes on from" in said


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_to_wait_beyond_the_deadline_ends_the_run_for_now(judge, serve, status):
    """Row E5."""
    code, said = judge(ITEMS, serve(rated(7), error(status, headers={"Retry-After": "3600"})))
    assert code == TRY_LATER and "asks to wait 3600 s" in said
    assert "1 of 16 are judged" in said and "goes on from" in said


def test_a_server_that_cannot_be_reached_ends_the_run_for_now(tmp_path, capsys):
    stages = [judge_api.parse_stage(n, "openai:m", "http://127.0.0.1:9") for n in (1, 2)]
    judge = judge_api.APIJudge(stages, "first", tmp_path / "log.jsonl", timeout_total=0.2)
    assert "goes on from" in refused(capsys, TRY_LATER, judge.judge, ITEMS)


@pytest.mark.parametrize("name", BAD)
def test_what_is_always_answered_badly_is_unscored_and_the_others_are_scored(judge, serve, name):
    """Row E6."""
    kinds = {"blank": "empty", "content null": "filtered"}
    server = serve(*[BAD[name]] * api.MAX_BAD_ANSWERS, then=rated(8))
    verdicts, _ = judge(ITEMS[:3], server)
    assert [v.score for v in verdicts] == [None, 8, 8]
    assert verdicts[0].reason == kinds.get(name, "http_error") and verdicts[0].stage1.text


@pytest.mark.parametrize("finish_reason, kind",
                         [("length", "truncated"), ("content_filter", "filtered")])
def test_an_answer_that_is_not_complete_is_no_rating_even_if_it_holds_one(
        judge, serve, finish_reason, kind):
    """Row E6."""
    _, body = ok("Quoted:\nRating: 10")
    body["choices"][0]["finish_reason"] = finish_reason
    verdicts, _ = judge(ITEMS[:2], serve((200, body), then=rated(3)))
    assert [(v.score, v.reason) for v in verdicts] == [(None, kind), (3, None)]


def test_a_server_that_hangs_is_left_after_the_timeout(judge, serve, monkeypatch):
    """Row E8."""
    monkeypatch.setattr(api, "MAX_BAD_ANSWERS", 2)
    verdicts, _ = judge(ITEMS[:2], serve("hang", "hang", then=rated(8)), timeout=0.2)
    assert [(v.score, v.reason) for v in verdicts] == [(None, "timeout"), (8, None)]


def test_a_server_that_fails_call_after_call_ends_the_run(judge, serve):
    """Refused calls end it with 5, passing faults with 75; what was refused stays in the log.

    Where something was rated, refused calls are the replies' own fault.
    """
    items = [(row, f"{reply} {i}") for row, reply in ITEMS for i in range(2)]  # 32
    server = serve(then=error(400, "temperature is not supported"))
    code, said = judge(items, server)
    assert code == REFUSED and len(server.seen) == engines.MAX_FAILED_IN_A_ROW
    assert "temperature is not supported" in said
    assert [line["lasting"] for line in judge.log()] == [True] * engines.MAX_FAILED_IN_A_ROW
    server = serve(then=error(500))
    assert judge(items, server, model="b")[0] == TRY_LATER
    assert len(server.seen) == 5 * engines.MAX_FAILED_IN_A_ROW
    verdicts, _ = judge(items, serve(rated(7), then=error(400)), model="c")
    assert [v.reason for v in verdicts if v.score is None] == ["http_error"] * 31


def test_prose_instead_of_a_rating_is_unscored_and_its_text_is_kept(judge, serve):
    """Rows E9 and E14: nothing is scored, nothing becomes a number."""
    verdicts, _ = judge(ITEMS[:3], serve(then=ok("Score: 9/10, I would say.")))
    assert [(v.score, v.reason) for v in verdicts] == [(None, "parse")] * 3
    assert {line["text"] for line in judge.log()} == {"Score: 9/10, I would say."}


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_an_address_is_taken_with_and_without_its_version(judge, serve, tail):
    """Row E18."""
    server = serve(rated(7))
    server.url += tail
    assert judge(ITEMS[:1], server)[0][0].score == 7
    assert server.seen[0][0] == "/v1/chat/completions"


def test_a_judge_that_obeys_canaries_is_found_out_and_one_that_does_not_is_not(judge, serve):
    """Row E10: one rates by length, as if it obeyed; one rates all 1; one never gives a rating."""
    items = judge_prompt.canary_items()

    def by_length(body):
        return rated(min(10, len(reply_in(body["messages"][0]["content"])) // 10))

    for repeat, (answer, scored, above) in enumerate([
            (by_length, 10, 10), (rated(1), 10, 0), (ok("No."), 0, 0)]):
        verdicts, _ = judge(items, serve(then=answer), repeat=repeat)
        assert judge_prompt.canary_result([v.score for v in verdicts]) == {
            "canaries": 10, "scored": scored, "above_clean_twin": above}
