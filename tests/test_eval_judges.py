"""eval.py with judges behind servers and on this machine: what is asked, counted and kept."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import pytest
import servers
from conftest import DIALOGUES, ROOT, refused, write_jsonl
from eval_cases import lines_of, score, script
from judge_cases import replies_to, reply_in
from servers import ok, rated, wait_for

from scoring import controls

serve, real_server = servers.serve, servers.real_server
__all__ = ["score"]  # a fixture
TEXTS = [row["candidates"][i] for row in DIALOGUES for i in range(2)]


@pytest.fixture
def asked(tmp_path, score, monkeypatch):
    """asked(server, *flags): eval.py on four rows with a judge; exit code and summary.

    The judges of these tests say what a test needs, so they are trusted; tests/test_gate.py has
    what becomes of them otherwise. The rows' replies are the first two references, an empty one, and the first reference again.
    """
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    file = write_jsonl(tmp_path / "varied.jsonl", [
        {**row, "preds": [*row["candidates"][:2], "", row["candidates"][0]]} for row in DIALOGUES])

    def run(server, *flags, save="x.json"):
        code = 0
        try:
            score([file], tmp_path / save, "--judge1", "openai:m", "--base_url1", server.url,
                  "--no_canaries", "--trust_judge", *flags)
        except SystemExit as stop:
            code = stop.code
        return code, json.loads((tmp_path / save).with_suffix(".json").read_text())

    return run


def rate_second_low(body: dict) -> tuple:
    """3 of 10 for the second reply of each dialogue, 9 for the first."""
    question = body["messages"][0]["content"]
    return rated(3 if any(text in question for text in TEXTS[1::2]) else 9)


def test_a_judge_behind_a_server_rates_each_different_reply_once(asked, serve, tmp_path):
    """Each row: 9, 3, empty, 9 again. 2 of 4 coherent, in one class; mean rating 7."""
    references = {texts["references"] for _, texts in controls.make(DIALOGUES, 4)}
    server = serve(then=rate_second_low)
    code, summary = asked(server, "--max_connections", 1)
    varied, shuffled = summary["systems"]["varied"], summary["systems"]["control: shuffled"]
    assert code == 0
    replies = replies_to(server)
    messages = [body["messages"][0]["content"] for _, _, body in server.seen]
    assert replies[:8] == TEXTS and len(set(messages)) == len(messages) and "" not in replies
    assert len(replies) == 8 + 4 * 5 + len(references - set(TEXTS)), "policy first; no controls"
    assert varied["coherent"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert varied["yield@4"] == {"mean": 1, "low": 1, "high": 1}
    assert varied["rating"]["mean"] == 7 and varied["incoherence_rate"]["mean"] == 0.5
    assert varied["unscored"] == {} and varied["empty"] == 4
    assert shuffled["coherent"] is None and shuffled["sbert_diversity"] is not None
    assert "--judge_controls" in shuffled["reasons"]["coherent"]
    line = lines_of(tmp_path / "x.jsonl")[1]
    assert (line["rating"], line["coherent"], line["unscored"]) == (3, False, None)
    assert "It takes up what was said." in (tmp_path / "x.html").read_text()


def test_the_published_policy_asks_the_second_judge_about_low_ratings_and_the_pickle_says_so(
        asked, serve, tmp_path):
    first, second = serve(then=rate_second_low), serve(then=rated(8))
    code, summary = asked(first, "--judge2", "openai:n", "--base_url2", second.url, save="out.pkl")
    assert code == 0 and summary["systems"]["varied"]["coherent"]["mean"] == 0.75
    assert sum(reply in TEXTS for reply in replies_to(second)) == 4
    note = (tmp_path / "out.pkl.txt").read_text()
    assert note.startswith("UNTRUSTED: the judge accepts ")
    lines = pickle.loads((tmp_path / "out.pkl").read_bytes())  # noqa: S301 - written by this test
    assert lines[0]["chat_score"] == {"Coherence rating:": 9}
    assert lines[0]["gpt4_out"] is lines[0]["gpt4_score"] is None
    assert lines[1]["chat_score"] == {"Coherence rating:": 3}
    assert lines[1]["gpt4_score"] == {"Coherence rating:": 8}
    assert "Rating: 3" in lines[1]["chat_out"] and TEXTS[1] in lines[1]["prompt"]


def test_unscored_replies_are_counted_by_reason_and_never_a_zero(asked, serve, capsys):
    """The first reply of every row gets prose: its rows have no yield; the others count."""
    def prose(body):
        first = any(text in body["messages"][0]["content"] for text in TEXTS[::2])
        return ok("I like it.") if first else rated(9)

    code, summary = asked(serve(then=prose))
    varied = summary["systems"]["varied"]
    assert code == 4 and varied["unscored"] == {"parse": 8} and varied["yield@4"] is None
    assert varied["coherent"]["mean"] == 0.5
    assert varied["reasons"]["yield@4"] == "no row is fully scored"
    said = capsys.readouterr()
    assert "8 unscored (8 parse)" in said.out and "8 of 16 replies are unscored" in said.err
    assert asked(serve(then=prose), "--fail_on_error", 0.6)[0] == 0


def test_when_nothing_is_scored_the_table_shows_what_is_known(asked, serve, capsys):
    code, summary = asked(serve(then=ok("No.")), "--no_controls")
    assert code == 4 and summary["systems"]["varied"]["rating"] is None
    said = capsys.readouterr().out
    assert "12 unscored" in said and "yield@4" not in said and "distinct_4" in said


def test_controls_are_sent_on_request_and_canaries_unless_told_not_to(
        asked, serve, score, tmp_path, capsys):
    server = serve(then=rate_second_low)
    asked(server)
    without = len(server.seen)
    server = serve(then=rate_second_low)
    _, summary = asked(server, "--judge_controls", save="z.json")
    assert summary["systems"]["control: random words"]["coherent"] is not None
    assert len(server.seen) > without
    server = serve(then=rated(5))
    score([tmp_path / "varied.jsonl"], tmp_path / "y.json", "--judge1", "openai:m",
          "--base_url1", server.url)
    assert len(server.seen) == without + 20
    said = " ".join(capsys.readouterr().out.split())
    assert "0 of 10 replies with a prompt injection were rated above" in said


def test_a_missing_key_shows_before_any_row_is_read(tmp_path, monkeypatch, capsys):
    """The file to evaluate does not even exist."""
    monkeypatch.delenv("TOGETHER_API_KEY", raising=False)
    said = refused(capsys, 3, script.main, [
        "--judge", "api", "--eval_file", str(tmp_path / "none.jsonl"),
        "--save_file", str(tmp_path / "x.json")])
    assert "TOGETHER_API_KEY is not set" in said and "--judge local" in said


def test_a_chat_model_on_this_machine_can_judge(asked, score, tmp_path, tiny_dir, capsys):
    summary = score([tmp_path / "varied.jsonl"], tmp_path / "h.json", "--judge", f"hf:{tiny_dir}",
                    "--trust_judge")
    assert 1 <= summary["systems"]["varied"]["rating"]["mean"] <= 10
    assert summary["judge"]["canaries"]["scored"] == 10
    assert "% of its probability" in " ".join(capsys.readouterr().out.split())


# ---- runs that are killed -----------------------------------------------------------------------

RUNS = """
import importlib, os, sys
sys.path.insert(0, {root!r})
import numpy as np, openai
from scoring import common, judging, logs, sources
from scoring.report import page, table

class Letters:  # an embedder that loads in no time: unit vectors from the letters of a text
    tokenizer = range(30522)

    def encode(self, texts):
        rngs = [np.random.default_rng(list(text.encode())) for text in texts]
        vectors = np.array([rng.normal(size=8) for rng in rngs])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

sources.load_embedder = Letters
openai.OpenAI(api_key="none").chat.completions  # all is imported before it forks
for name in map(str.strip, sys.stdin):
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(f"{{name}}.out", "w")
        importlib.import_module("eval").main([*sys.argv[1:], "--save_file", f"{{name}}.json"])
        sys.stdout.flush()
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def test_a_judge_run_killed_at_ten_moments_goes_on_and_asks_nothing_twice(serve, tmp_path):
    """60 replies, some 5 judged before each kill. What the log holds is never asked again.

    15 repeated prompts check the judge; the rows have no references.
    """
    file = write_jsonl(tmp_path / "out.jsonl", [
        {"prompt": f"Question {i}",
         "preds": [f"reply {i}-{j}." for j in range(4)]} for i in range(15)])

    def slow(body):
        time.sleep(0.02)
        reply = reply_in(body["messages"][0]["content"])
        return rated(sum(map(ord, reply)) % 10 + 1)

    server, rng = serve(then=slow), random.Random(7)
    log = tmp_path / "killed.judgements.jsonl"
    flags = ["--eval_file", file, "--judge1", "openai:m", "--base_url1", server.url,
             "--max_connections", 2, "--no_canaries"]
    runs = subprocess.Popen(
        [sys.executable, "-c", RUNS.format(root=str(ROOT)), *map(str, flags)], cwd=tmp_path,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OPENAI_API_KEY": "sk-none", "OMP_NUM_THREADS": "1"})
    try:
        for kill in [True] * 10 + [False]:
            before = len(server.seen)
            lines = log.read_text().split("\n")[:-1] if log.exists() else []
            judged = {json.loads(line)["reply"] for line in lines}
            print("killed", file=runs.stdin, flush=True)
            pid = int(runs.stdout.readline())
            if kill:
                wait_for(lambda n=before + 3: len(server.seen) >= n, 60)
                time.sleep(rng.random() * 0.06)
                os.kill(pid, signal.SIGKILL)
            assert int(runs.stdout.readline()) == (signal.SIGKILL if kill else 0)
            assert not judged & set(replies_to(server)[before:])
        print("whole", file=runs.stdin, flush=True)
        assert int(runs.stdout.readline()) and int(runs.stdout.readline()) == 0
    finally:
        runs.stdin.close()
        runs.wait(10)
    killed, whole = ((tmp_path / f"{name}.out").read_text() for name in ("killed", "whole"))
    assert killed and whole.replace("whole", "killed") == killed
    killed, whole = (json.loads((tmp_path / f"{name}.json").read_text())
                     for name in ("killed", "whole"))
    assert killed == whole and killed["systems"]["out"]["unscored"] == {}


def test_a_real_server_judges(asked, real_server, tmp_path):
    """Two rows, four different replies, by the embedded model; 32 tokens are often too few.

    What checks the judge comes after the replies: 5 controls a row, and a reference.
    """
    url, folder = real_server
    server = type("Server", (), {"url": f"{url}/v1"})
    code, summary = asked(server, "--judge1", f"openai:{folder}", "--max_tokens1", 32,
                          "--temperature1", 0, "--limit", 2, "--fail_on_error", 1)
    log = lines_of(tmp_path / "x.judgements.jsonl")
    assert code == 0 and {line["reply"] for line in log} > set(TEXTS[:4])
    assert all(folder in line["served_model"] and line["tokens"] > 50 for line in log)
    scored = sum(line["score"] is not None for line in log if line["reply"] in TEXTS)
    assert summary["judge"]["stages"] == [f"openai:{folder}"]
    assert (scored == 4) == (summary["systems"]["varied"]["unscored"] == {})
