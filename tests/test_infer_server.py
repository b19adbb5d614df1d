"""infer.py through a server: rows get their own answers, and no fault costs a finished row."""

from __future__ import annotations

import json
import socket

import pytest
import servers
from conftest import DIALOGUES, refused, write_jsonl
from servers import error
from test_engines import choices, echo, one_by_one

import infer
from decoding import api
from utils import REFUSED, TRY_LATER, UNSCORED, USAGE

serve, real_server = servers.serve, servers.real_server
ROWS = [{"context": row["context"]} for row in DIALOGUES]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(api.random, "uniform", lambda low, high: 0.0)


@pytest.fixture
def test_file(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def draw(url: str, test_file, out, *flags, engine: str = "openai:m") -> list[dict]:
    infer.main([
        "--engine", engine, "--base_url", url, "--test_file", str(test_file),
        "--save_file", str(out), "--num_response_per_input", "3", "--batch_size", "2",
        "--max_connections", "2", *map(str, flags)])
    return read(out)


def read(out) -> list[dict]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def newest_turn(row: dict) -> str:
    return row["context"].split("\n")[-1]


@pytest.mark.parametrize("engine", ["openai:m", "together:m"])
def test_every_row_gets_its_own_answers_and_the_summary_says_who_gave_them(
        serve, test_file, tmp_path, engine):
    server = serve(then=echo)
    rows = draw(server.url, test_file, tmp_path / "a.jsonl", "--temperature", "0.7",
                "--top_p", "0.9", "--min_p", "0.1", engine=engine)
    assert len(server.seen) == 4, "one call a row"
    for row, given in zip(rows, ROWS, strict=True):
        assert row["context"] == given["context"] and len(set(row["preds"])) == 3
        assert all(newest_turn(row) in pred for pred in row["preds"])
    path, _, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert (body["n"], body["temperature"], body["top_p"], body["min_p"]) == (3, 0.7, 0.9, 0.1)
    summary = json.loads((tmp_path / "a.json").read_text())
    assert summary["served_models"] == ["served-1"] and summary["tokens_per_second"] > 0


def test_a_server_without_n_is_asked_for_each_response(serve, test_file, tmp_path, capsys):
    """Two rows with n at first, one choice each; then single calls, 4 for them, 6 for the rest."""
    server = serve(then=one_by_one)
    rows = draw(server.url, test_file, tmp_path / "a.jsonl")
    assert len(server.seen) == 12 and all(len(set(row["preds"])) == 3 for row in rows)
    assert [body.get("n") for _, _, body in server.seen].count(3) == 2
    assert capsys.readouterr().err.count("gives one reply a call (no n)") == 1


def test_each_possibility_number_is_a_call_of_its_own(serve, test_file, tmp_path):
    server = serve(then=echo)
    draw(server.url, test_file, tmp_path / "a.jsonl", "--method", "peft")
    asked = sorted(body["messages"][0]["content"][-2:] for _, _, body in server.seen)
    assert asked == ["#1"] * 4 + ["#2"] * 4 + ["#3"] * 4


@pytest.mark.parametrize("trouble", ["429", "500", "half", "reset"])
def test_trouble_that_passes_is_waited_out_and_counted(trouble, serve, test_file, tmp_path):
    answers = {"429": error(429, headers={"Retry-After": "0"}), "500": error(500)}
    bad = answers.get(trouble, trouble)
    rows = draw(serve(echo, bad, bad, then=echo).url, test_file, tmp_path / "a.jsonl")
    assert all(len(row["preds"]) == 3 and "warnings" not in row for row in rows)
    assert sum(json.loads((tmp_path / "a.json").read_text())["retries"].values()) == 2


@pytest.mark.parametrize(("answer", "code", "what"), [
    (error(401), REFUSED, "key refused"), (error(404), REFUSED, "no such model"),
    (error(500), TRY_LATER, "HTTP 500"),
    (error(429, headers={"Retry-After": "3600"}), TRY_LATER, "asks to wait 3600 s"),
])
def test_trouble_that_stays_keeps_finished_rows_and_a_resume_asks_for_the_others_only(
        answer, code, what, serve, test_file, tmp_path, capsys):
    """Two rows are done when the server turns bad; mended, it is asked for the other two alone."""
    server, out = serve(echo, echo, then=answer), tmp_path / "a.jsonl"
    said = refused(capsys, code, draw, server.url, test_file, out)
    assert what in said and server.url in said and "--resume" in said
    kept = out.read_text()
    assert kept.count("\n") == 2
    server.then, server.seen[:] = echo, []
    rows = draw(server.url, test_file, out, "--resume")
    assert len(rows) == 4 and len(server.seen) == 2 and out.read_text().startswith(kept)


def test_a_message_that_the_server_refuses_leaves_its_row_short_and_the_run_says_so(
        serve, test_file, tmp_path, capsys):
    """Row 2 is refused for its content, with n and then three times alone; exit 4."""
    def picky(body):
        refuses = "train leaves" in body["messages"][0]["content"]
        return error(400, "content policy") if refuses else echo(body)

    out = tmp_path / "a.jsonl"
    said = refused(capsys, UNSCORED, draw, serve(then=picky).url, test_file, out)
    rows = read(out)
    assert [len(row["preds"]) for row in rows] == [3, 0, 3, 3]
    assert rows[1]["warnings"] == {"failed": 3, "missing": 3}
    assert "3 responses are missing" in said and "content policy" in said


def test_an_unreachable_server_is_named_with_the_way_out(test_file, tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    said = refused(capsys, TRY_LATER, draw, url, test_file, tmp_path / "a.jsonl",
                   "--timeout_total", "1")
    assert url in said and "ConnectError" in said
    assert "trying again" in said and "--resume" in said


@pytest.mark.parametrize(("flags", "what"), [
    (["--decoding", "diverse"], "does not work through a server"),
    (["--typical_p", "0.5"], "does not work through a server"),
    (["--base_url", "ftp://x"], "not a plain address"),
])
def test_what_no_server_can_do_is_refused_at_once(flags, what, test_file, tmp_path, capsys):
    said = refused(capsys, USAGE, draw, "http://127.0.0.1:9", test_file, tmp_path / "a.jsonl",
                   *flags)
    assert what in said


@pytest.mark.parametrize("decoding", ["list", "iterative"])
def test_asking_in_words_works_with_max_length_though_a_server_counts_no_tokens(
        decoding, serve, test_file, tmp_path):
    """--max_length is a limit of what we can count; a server refuses by itself what is too long."""
    def answer(body):
        request = body["messages"][0]["content"]
        number = request.count("\n- ") + 1
        return choices("1. Yes.\n2. No.\n3. Maybe." if decoding == "list" else f"Reply {number}.")

    server = serve(then=answer)
    rows = draw(server.url, test_file, tmp_path / "a.jsonl", "--decoding", decoding,
                "--max_length", "500")
    want = ["Yes.", "No.", "Maybe."] if decoding == "list" else ["Reply 1.", "Reply 2.", "Reply 3."]
    assert [row["preds"] for row in rows] == [want] * 4
    assert len(server.seen) == (4 if decoding == "list" else 12)


def test_a_real_server_answers_by_sampling_and_by_list(real_server, tmp_path):
    """`transformers serve` with the embedded model: every response is there, and rows differ."""
    url, model = real_server
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS[:2])
    common = ["--max_new_tokens", "12", "--served_model", model]
    rows = draw(url, file, tmp_path / "a.jsonl", *common, engine="openai")
    assert all(len(row["preds"]) == 3 and all(row["preds"]) for row in rows)
    assert rows[0]["preds"] != rows[1]["preds"]
    rows = draw(url, file, tmp_path / "b.jsonl", *common, "--decoding", "list",
                "--max_retries", "0", engine="openai")
    assert all("asked" in row for row in rows)
