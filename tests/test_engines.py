"""Responses through a server: n where it is honoured, waits and refusals, and a real server with the embedded model."""

from __future__ import annotations

import json
import socket

import pytest
from conftest import DIALOGUES, write_jsonl
from servers import error, ok, real_server, serve  # noqa: F401 (fixtures)

import infer

ROWS = [{"context": row["context"]} for row in DIALOGUES]


def choices(*texts: str) -> tuple:
    return ok(choices=[{"index": i, "message": {"content": text}, "finish_reason": "stop"} for i, text in enumerate(texts)],
              usage={"completion_tokens": 4 * len(texts), "total_tokens": 50})


def echo(body: dict) -> tuple:
    """As many choices as asked, each naming the newest turn and its place."""
    turn = body["messages"][0]["content"].split("Person A: ")[-1].split("\n")[0]
    return choices(*(f"{turn} answer {i} seed {body['seed']}" for i in range(body.get("n", 1))))


@pytest.fixture
def test_file(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def draw(url: str, test_file, out, *flags) -> list[dict]:
    infer.main(["--engine", "openai", "--base_url", url, "--served_model", "m", "--test_file", str(test_file), "--save_file",
                str(out), "--num_response_per_input", "3", "--batch_size", "2", "--max_connections", "2", *map(str, flags)])
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def refused(capsys, code: int, *args) -> str:
    with pytest.raises(SystemExit) as stop:
        draw(*args)
    assert stop.value.code == code
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(api.random, "uniform", lambda low, high: 0.0)


def test_a_server_that_honours_n_is_asked_once_per_row(serve, test_file, tmp_path):  # noqa: F811
    server = serve(*[echo] * 4)
    rows = draw(server.url, test_file, tmp_path / "a.jsonl", "--temperature", "0.7", "--top_p", "0.9", "--min_p", "0.1")
    assert len(server.seen) == 4 and all(len(set(row["preds"])) == 3 for row in rows)
    assert all(row["preds"][0].startswith(row["context"].split("\n")[-1]) for row in rows), "answers reach their own rows"
    path, _, body = server.seen[0]
    assert path == "/v1/chat/completions" and (body["n"], body["temperature"], body["top_p"], body["min_p"]) == (3, 0.7, 0.9, 0.1)
    summary = json.loads((tmp_path / "a.json").read_text())
    assert summary["served_models"] == ["served-1"] and summary["tokens_per_second"] > 0


def test_a_server_without_n_is_asked_for_each_response_and_that_is_said_once(serve, test_file, tmp_path, capsys):  # noqa: F811
    """Two rows with n at first, one choice each; then single calls: 4 for them, 6 for the other two rows. Seeds differ."""
    server = serve(*[lambda body: echo({**body, "n": 1})] * 12)
    rows = draw(server.url, test_file, tmp_path / "a.jsonl")
    assert len(server.seen) == 12 and all(len(set(row["preds"])) == 3 for row in rows)
    assert [body.get("n") for _, _, body in server.seen].count(3) == 2
    assert capsys.readouterr().err.count("gives one reply a call (no n)") == 1


def test_each_possibility_number_is_a_call_of_its_own(serve, test_file, tmp_path):  # noqa: F811
    server = serve(*[echo] * 12)
    draw(server.url, test_file, tmp_path / "a.jsonl", "--method", "peft")
    asked = sorted(body["messages"][0]["content"][-2:] for _, _, body in server.seen)
    assert asked == ["#1"] * 4 + ["#2"] * 4 + ["#3"] * 4


@pytest.mark.parametrize("trouble", ["429", "500", "half", "reset"])
def test_trouble_that_passes_is_waited_out_and_counted(trouble, serve, test_file, tmp_path):  # noqa: F811
    bad = {"429": error(429, headers={"Retry-After": "0"}), "500": error(500)}.get(trouble, trouble)
    server = serve(echo, bad, bad, *[echo] * 9)
    rows = draw(server.url, test_file, tmp_path / "a.jsonl")
    assert all(len(row["preds"]) == 3 and "warnings" not in row for row in rows)
    assert sum(json.loads((tmp_path / "a.json").read_text())["retries"].values()) == 2


@pytest.mark.parametrize(("answer", "code", "what"), [
    (error(401), 5, "key refused"), (error(404), 5, "no such model"), (error(500), 75, "HTTP 500"),
    (error(429, headers={"Retry-After": "3600"}), 75, "asks to wait 3600 s"),
])
def test_trouble_that_stays_keeps_finished_rows_and_a_resume_asks_for_the_others_only(
        answer, code, what, serve, test_file, tmp_path, capsys):  # noqa: F811
    """Two rows are done when the server turns bad; with it mended, only the other two are asked for."""
    server = serve(echo, echo, *[answer] * 10)
    said = refused(capsys, code, server.url, test_file, tmp_path / "a.jsonl")
    assert what in said and server.url in said and "--resume" in said
    kept = (tmp_path / "a.jsonl").read_text()
    assert kept.count("\n") == 2
    server.answers, server.seen[:] = [echo] * 2, []
    rows = draw(server.url, test_file, tmp_path / "a.jsonl", "--resume")
    assert len(rows) == 4 and len(server.seen) == 2 and (tmp_path / "a.jsonl").read_text().startswith(kept)


def test_a_message_that_the_server_refuses_leaves_its_row_short_and_the_run_says_so(serve, test_file, tmp_path, capsys):  # noqa: F811
    """Row 2 is refused for its content, with n and then three times alone; the others are whole; exit 4."""
    def picky(body):
        return error(400, "content policy") if "train leaves" in body["messages"][0]["content"] else echo(body)

    server = serve(*[picky] * 20)
    said = refused(capsys, 4, server.url, test_file, tmp_path / "a.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [len(row["preds"]) for row in rows] == [3, 0, 3, 3] and rows[1]["warnings"] == {"failed": 3, "missing": 3}
    assert "3 responses are missing" in said and "content policy" in said


def test_an_unreachable_server_is_named_with_the_way_out(test_file, tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    said = refused(capsys, 75, url, test_file, tmp_path / "a.jsonl", "--timeout_total", "1")
    assert url in said and "ConnectError" in said and "trying again" in said and "--resume" in said


@pytest.mark.parametrize(("flags", "what"), [
    (["--decoding", "diverse"], "does not work through a server"), (["--typical_p", "0.5"], "does not work through a server"),
    (["--base_url", "ftp://x"], "not a plain address"),
])
def test_what_no_server_can_do_is_refused_at_once(flags, what, test_file, tmp_path, capsys):
    assert what in refused(capsys, 2, "http://127.0.0.1:9", test_file, tmp_path / "a.jsonl", *flags)


def test_a_real_server_answers_by_sampling_and_by_list(real_server, tmp_path):  # noqa: F811
    """`transformers serve` with the embedded model: every response is there, and no two rows are alike."""
    url, model = real_server
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS[:2])
    common = ["--max_new_tokens", "12", "--served_model", model]
    rows = draw(url, file, tmp_path / "a.jsonl", *common)
    assert all(len(row["preds"]) == 3 and all(row["preds"]) for row in rows) and rows[0]["preds"] != rows[1]["preds"]
    listed = draw(url, file, tmp_path / "b.jsonl", *common, "--decoding", "list", "--max_retries", "0")
    assert all("asked" in row for row in listed)
