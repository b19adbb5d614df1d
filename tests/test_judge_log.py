"""The published judge's log: nothing is paid for twice, whatever ended the run before."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import judge_cases
from conftest import DIALOGUES, ROOT
from judge_cases import ITEMS, reply_in
from servers import error, ok, rated, wait_for

from scoring import judge_api

judge, serve, waits = judge_cases.judge, judge_cases.serve, judge_cases.waits  # fixtures


def test_the_key_depends_on_all_that_an_answer_depends_on_and_on_nothing_else():
    stage = judge_api.PUBLISHED[1]

    def plan(*args, **changes):
        return judge_api.plan_call(stage._replace(**changes), *args).key

    key = plan(DIALOGUES[0], "Yes.")
    assert key == plan(DIALOGUES[0], "Yes.", timeout=1.0, base_url="http://h/v1")
    others = [plan(DIALOGUES[0], "No."), plan(DIALOGUES[1], "Yes."), plan(DIALOGUES[0], "Yes.", 1),
              plan(DIALOGUES[0], "Yes.", model="m"), plan(DIALOGUES[0], "Yes.", provider="openai"),
              plan(DIALOGUES[0], "Yes.", temperature=0.2),
              plan(DIALOGUES[0], "Yes.", max_tokens=9)]
    assert len({key, *others}) == 8


def test_keys_are_those_of_logs_that_earlier_versions_wrote():
    """Else every log would be paid for again."""
    keys = [judge_api.plan_call(judge_api.PUBLISHED[1], {"prompt": "Name a fruit."}, "A plum.").key,
            judge_api.plan_call(judge_api.PUBLISHED[2], DIALOGUES[0], "Ask the cook.", 1).key]
    assert [key[:16] for key in keys] == ["ccd9c3a6d62b399d", "eccd2ac78c408a9f"]


def test_what_the_log_holds_is_not_asked_again_but_for_timeouts_and_http_errors(judge, serve):
    """8 scored, parse and http_error: the second run asks for the last one alone."""
    verdicts, _ = judge(ITEMS[:3], serve(rated(8), ok("Hm."), error(400), then=rated(1)))
    assert [v.reason for v in verdicts] == [None, "parse", "http_error"]
    server = serve(then=rated(4))
    verdicts, said = judge(ITEMS[:3], server)
    assert [v.score for v in verdicts] == [8, None, 4] and len(server.seen) == 1
    assert "2 of 3 judgements" in said


def test_judgements_of_other_settings_are_not_reused_and_that_is_said_once(
        judge, serve, monkeypatch):
    """Row E13: another model, another repeat, another rubric."""
    judge(ITEMS[:3], serve(then=rated(8)))
    for count, changes in ((3, {"model": "other"}), (6, {"repeat": 1})):
        verdicts, said = judge(ITEMS[:3], serve(then=rated(2)), **changes)
        assert [v.score for v in verdicts] == [2] * 3
        assert said.count(f"holds {count} judgements of other") == 1
    monkeypatch.setattr(judge_api, "RUBRIC", judge_api.RUBRIC + 1)
    verdicts, _ = judge(ITEMS[:3], serve(then=rated(5)))
    assert verdicts[0].score == 5 and len(judge.log()) == 12


def test_lines_that_are_no_judgements_are_asked_for_again_and_counted(judge, serve):
    """Row E19: not JSON, a score off the scale, a field missing, a cut last line; one is whole."""
    judge(ITEMS[:5], serve(then=rated(8)))
    lines = judge.log_file.read_text().splitlines()
    lines = ["{]", lines[1].replace('"score": 8', '"score": 80'),
             lines[2].replace('"text"', '"txt"'), lines[4], lines[3][:40]]
    judge.log_file.write_text("\n".join(lines))
    server = serve(then=rated(3))
    verdicts, said = judge(ITEMS[:5], server)
    assert [v.score for v in verdicts] == [3, 3, 3, 3, 8] and len(server.seen) == 4
    assert "holds 3 lines that are no judgements" in said and "half a row" in said
    server = serve()
    assert [v.score for v in judge(ITEMS[:5], server)[0]] == [3, 3, 3, 3, 8] and not server.seen


RUN = f"""
import json, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import openai, utils
from scoring import judge_api
openai.OpenAI(api_key="none").chat.completions  # imported before it forks
items = [({{"context": "Who is there?"}}, f"It is number {{i}}.") for i in range(240)]
def run(url, log_file):
    stages = [judge_api.parse_stage(n, "openai:m", url) for n in (1, 2)]
    verdicts = judge_api.APIJudge(stages, "first", log_file, 4).judge(items)
    assert all(verdict.score == 7 for verdict in verdicts)
"""
KILLED = RUN + """
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        run(*sys.argv[1:])
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def test_a_killed_run_never_asks_again_for_what_its_log_holds(serve, tmp_path):
    """Row E11: ten kills at random moments after a run's first call, then a run to the end.

    A run of 240 items takes 1.2 s without kills.
    """
    log_file, pause = tmp_path / "log.jsonl", threading.Event()
    server = serve(then=lambda body: rated(7 + pause.wait(0.02)))
    process = subprocess.Popen([sys.executable, "-c", KILLED, server.url, log_file], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    rng, sizes = random.Random(0), []
    try:
        for last in [False] * 10 + [True]:
            lines = log_file.read_text().split("\n")[:-1] if log_file.exists() else []
            before, asked = {json.loads(line)["reply"] for line in lines}, len(server.seen)
            sizes.append(len(before))
            print("go", file=process.stdin, flush=True)
            pid = int(process.stdout.readline())
            if not last:
                wait_for(lambda: len(server.seen) > asked, 60)  # noqa: B023
                time.sleep(rng.uniform(0, 0.06))
                os.kill(pid, signal.SIGKILL)
            assert int(process.stdout.readline()) == (0 if last else signal.SIGKILL)
            replies = {reply_in(body["messages"][0]["content"])
                       for _, _, body in server.seen[asked:]}
            assert not replies & before
            if len(sizes) == 5:  # as if the kill had hit in the middle of a line
                with open(log_file, "a") as file:
                    file.write('{"key": "ab')
    finally:
        process.stdin.close()
        process.wait(5)
    assert 0 < sizes[5] < sizes[-1] and len(log_file.read_text().splitlines()) == 240, sizes


def test_ctrl_c_keeps_what_finishes_within_seconds_and_drops_what_hangs(serve, tmp_path):
    """Row E12: 4 in flight, of which two answer half a second after the signal and two never do."""
    log_file, release = tmp_path / "log.jsonl", threading.Event()

    def late(body):
        release.wait(10)
        return rated(7)

    server = serve(rated(7), rated(7), late, late, "hang", "hang")
    script = RUN + "utils.run(lambda: run(*sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", script, server.url, log_file],
                               stderr=subprocess.PIPE, text=True)

    def lines() -> list[str]:
        return log_file.read_text().splitlines() if log_file.exists() else []

    try:
        wait_for(lambda: len(server.seen) == 6 and len(lines()) == 2, 60)
        process.send_signal(signal.SIGINT)
        threading.Timer(0.5, release.set).start()
        assert process.wait(20) == 130, "it does not wait for what hangs"
    finally:
        process.kill()
    assert len(server.seen) == 6 and "Traceback" not in process.stderr.read()
    assert [json.loads(line)["score"] for line in lines()] == [7] * 4
