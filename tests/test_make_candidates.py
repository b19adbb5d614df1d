"""data/make_candidates.py: rows are made once, and every fault of a server has its way out."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import servers
from conftest import DIALOGUES, ROOT, refused, write_jsonl
from servers import FOUR, error, listed, ok, wait_for
from test_candidates import distinct_vectors

from data import make_candidates
from decoding import api, providers
from utils import REFUSED, TRY_LATER, UNSCORED, USAGE

ROWS = [{"context": row["context"]} for row in DIALOGUES]
serve, real_server = servers.serve, servers.real_server
KEY = "sk-not-a-real-key-42"


@pytest.fixture
def make(tmp_path, monkeypatch, capsys):
    """make(rows, url, *flags) runs the script: exit code, made and rejected rows, what was said."""
    monkeypatch.setattr(make_candidates, "load_embed", distinct_vectors)
    for _, key in providers.PROVIDERS.values():
        monkeypatch.delenv(key, raising=False)
    save_file = tmp_path / "mine.jsonl"

    def run(rows: list[dict] | None, url: str | None, *flags, argv: list[str] | None = None):
        if rows is not None:
            write_jsonl(tmp_path / "prompts.jsonl", rows)
        base = ["--input_file", str(tmp_path / "prompts.jsonl"), "--save_file", str(save_file),
                "--model", "m", "--num_candidates", "4", "--max_backoff", "0.01",
                "--max_connections", "1", *(["--base_url", url] if url else [])]
        code = 0
        try:
            make_candidates.main(argv or [*base, *map(str, flags)])
        except SystemExit as stop:
            code = stop.code
        files = [save_file, tmp_path / "mine.rejected.jsonl"]
        made, rejected = ([json.loads(line) for line in path.read_text().splitlines()]
                          if path.exists() else [] for path in files)
        return code, made, rejected, "".join(capsys.readouterr())

    return run


def contexts(rows: list[dict]) -> list[str]:
    return [row["context"] for row in rows]


# ---- who is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, engine", [
    (["--model", "smollm2"], "hf:smollm2"), (["--model", "hf:smollm2"], "hf:smollm2"),
    (["--model", "checkpoints/a/check_3"], "hf:checkpoints/a/check_3"),
    (["--model", "m", "--base_url", "http://h"], "openai:m"),
    (["--model", "llama3:8b", "--base_url", "http://h"], "openai:llama3:8b"),
    (["--model", "openai:gpt-4o"], "openai:gpt-4o"),
    (["--model", "together:m", "--base_url", "http://h"], "together:m"),
])
def test_a_model_is_named_as_everywhere_or_in_the_old_form(flags, engine):
    args = make_candidates.read_flags(["--input_file", "a.jsonl", "--save_file", "b.jsonl", *flags])
    assert args.engine == engine and args.model == flags[1]


@pytest.mark.parametrize("flags, says", [
    (["--model", "hf:smollm2", "--base_url", "http://h"], "--base_url does nothing"),
    (["--model", "openai:"], "is not PROVIDER:MODEL"),
    (["--model", "m", "--num_candidates", "3", "--min_candidates", "4"], "is above"),
    (["--model", "m", "--min_words", "9", "--max_words", "8"], "is above"),
    (["--model", "m", "--max_cosine", "0"], "--max_cosine 0"),
    (["--model", "m", "--temperature", "0"], "--temperature 0"),
])
def test_flags_that_cannot_work_are_refused(flags, says, capsys):
    argv = ["--input_file", "a.jsonl", "--save_file", "b.jsonl", *flags]
    assert says in refused(capsys, USAGE, make_candidates.read_flags, argv)


def test_min_candidates_follows_num_candidates():
    argv = ["--input_file", "a.jsonl", "--save_file", "b.jsonl", "--model", "m"]
    assert make_candidates.read_flags(argv).min_candidates == 4
    assert make_candidates.read_flags([*argv, "--num_candidates", "2"]).min_candidates == 2


def test_a_provider_is_asked_through_its_own_package_and_key(make, serve, monkeypatch):
    monkeypatch.setenv("TOGETHER_API_KEY", "tgp_v1_mine")
    server = serve()
    code, [row], _, _ = make(ROWS[:1], server.url, "--model", "together:m")
    assert code == 0 and row["candidates"] == FOUR
    path, authorisation, body = server.seen[0]
    assert (path, authorisation) == ("/v1/chat/completions", "Bearer tgp_v1_mine")
    assert body["model"] == "m" and body["temperature"] == 0.7 and "seed" not in body


def test_a_local_model_makes_rows_that_depend_on_the_seed_alone(make, tiny_dir, tmp_path):
    flags = ("--model", tiny_dir, "--num_candidates", "1", "--max_tokens", "400",
             "--temperature", "3")
    files = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for file in files:
        assert make([{"prompt": "Name a fruit"}], None, *flags, "--save_file", file)[0] == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    row = json.loads(files[0].read_text())
    assert len(row["candidates"]) == 1 and row["made"]["model"] == str(tiny_dir)
    assert row["made"]["tokens"] > 20


def test_a_local_model_without_room_for_a_prompt_is_refused(make, tiny_dir):
    code, _, _, said = make(ROWS[:1], None, "--model", f"hf:{tiny_dir}", "--max_tokens", "1024")
    assert code == USAGE and "no room for a prompt" in said


def test_a_real_server_makes_a_row(make, real_server):
    url, folder = real_server
    code, made, rejected, said = make(
        [{"prompt": "Name a colour of the rainbow."}], url, "--model", folder,
        "--num_candidates", "1", "--max_tokens", "48")
    assert code == 0, (said, rejected)
    assert made[0]["candidates"][0].strip()
    assert folder in made[0]["made"]["model"] and made[0]["made"]["tokens"] > 20


# ---- rows ---------------------------------------------------------------------------------------


def test_a_row_below_min_candidates_is_rejected_never_padded_and_candidates_it_has_count(
        make, serve):
    three = ["Trust the man, boards lie.", "Let us shout at 4.", "Take my bus instead."]
    rows = [ROWS[0], {**ROWS[1], "candidates": three}]
    server = serve(*[ok(listed(FOUR[0]))] * 5)
    code, made, rejected, said = make(rows, server.url, "--max_rounds", 3)
    assert [row["candidates"] for row in made] == [[*three, FOUR[0]]]
    assert [row["candidates"] for row in rejected] == [[FOUR[0]]]
    assert "1 rows rejected" in said and code == 0
    assert rejected[0]["made"]["problem"] == "fewer than 4 candidates after 3 rounds"


def test_a_context_shown_without_its_oldest_turns_is_counted(make, serve):
    server = serve()
    code, made, _, said = make(ROWS[:2], server.url, "--max_input_length", 12)
    assert code == 0 and "2 contexts were shown without their oldest turns" in said
    assert made[0]["context"] == ROWS[0]["context"], "in full"
    request = str(server.seen[0])
    assert "Then why is it in my salad?" in request and "Is a tomato a fruit?" not in request


def test_more_rejected_rows_than_allowed_exit_with_4(make, serve):
    assert make(ROWS[:1], serve(ok("No.")).url, "--max_rounds", 1)[0] == UNSCORED


def test_the_output_has_the_order_of_the_input_whichever_row_is_done_first(make, serve):
    def slow(body: dict) -> tuple:
        time.sleep(0.3)
        return ok()

    code, made, _, _ = make(ROWS, serve(slow).url, "--max_connections", "4")
    assert code == 0 and contexts(made) == contexts(ROWS)


def test_a_dry_run_calls_nothing_and_shows_the_first_request(make, serve):
    server = serve()
    code, made, _, said = make(ROWS, server.url, "--dry_run")
    assert code == 0 and not made and not server.seen
    assert "4 rows, 4 to 16 calls" in said and "list of 4 replies" in said


def test_an_existing_file_other_settings_and_other_rows_are_refused_and_equal_rows_made_once(
        make, serve, tmp_path):
    url, prompts = serve().url, tmp_path / "prompts.jsonl"
    assert len(make([*ROWS[:2], ROWS[0]], url)[1]) == 2
    for flags, says in (([], "already there"), (["--resume", "--limit", "1"], "mine.jsonl:2"),
                        (["--resume", "--temperature", "0.5"],
                         "--temperature 0.7, now it is 0.5")):
        code, made, _, said = make(None, url, *flags)
        assert code == USAGE and says in said and len(made) == 2
    same_name = prompts.rename(prompts.with_name("mine.json"))
    assert "overwrite" in make(None, url, "--input_file", same_name)[3]


# ---- faults of servers --------------------------------------------------------------------------


def test_a_refused_key_stops_the_run_at_once_keeps_rows_and_is_never_shown(
        make, serve, monkeypatch, tmp_path):
    server = serve(ok(), error(401, f"Incorrect API key provided: {KEY}"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    code, made, _, said = make(ROWS, server.url + "/v1/")
    assert code == REFUSED and len(made) == 1 and len(server.seen) == 2
    assert "401" in said and "check OPENAI_API_KEY" in said and "--resume" in said
    assert server.seen[0][:2] == ("/v1/chat/completions", f"Bearer {KEY}")
    assert not any(KEY in text for text in [said, *(p.read_text() for p in tmp_path.iterdir())])


@pytest.mark.parametrize("fault", [
    error(403), error(404, "The model m does not exist"), error(402),
    error(429, code="insufficient_quota"), error(429, type="insufficient_quota")])
def test_access_model_and_quota_faults_are_not_retried(make, serve, fault):
    server = serve(fault)
    code, _, _, said = make(ROWS[:1], server.url, "--max_connections", 3)
    assert code == REFUSED and len(server.seen) == 1
    assert f"HTTP {fault[0]}" in said and "--model" in said


def test_retry_after_is_honoured_and_retries_are_counted(make, serve, monkeypatch, tmp_path):
    waits = []
    monkeypatch.setattr(api.time, "sleep", waits.append)
    server = serve(*[error(429, headers={"Retry-After": "2"})] * 3)
    code, made, _, said = make(ROWS[:1], server.url)
    assert code == 0 and len(made) == 1 and waits == [2.0, 2.0, 2.0] and "3 x HTTP 429" in said
    assert json.loads((tmp_path / "mine.json").read_text())["retries"] == {"HTTP 429": 3}


def test_a_wait_beyond_the_deadline_exits_with_75_and_its_resume_line_works(make, serve):
    server = serve(ok(), error(429, headers={"Retry-After": "3600"}))
    code, made, _, said = make(ROWS, server.url)
    assert code == TRY_LATER and len(made) == 1 and "asks to wait 3600 s" in said
    line = re.search(r"go on with: python -m data.make_candidates (.*)", said)[1]
    code, made, _, _ = make(None, None, argv=shlex.split(line))
    assert code == 0 and contexts(made) == contexts(ROWS)
    assert len(server.seen) == 2 + 3, "the finished row is not asked for again"


def test_a_row_that_always_fails_is_rejected_after_five_tries_and_tried_again_by_resume(
        make, serve):
    server = serve(*[error(500, "this row breaks me")] * 5)
    code, made, rejected, said = make(ROWS, server.url)
    assert code == 0 and len(made) == 3 and len(server.seen) == 5 + 3
    assert "1 x HTTP 500: this row breaks me" in said
    assert rejected[0]["context"] == ROWS[0]["context"]
    assert "this row breaks me" in rejected[0]["made"]["problem"]
    code, made, rejected, _ = make(None, server.url, "--resume")
    assert code == 0 and len(server.seen) == 9 and not rejected
    assert contexts(made) == contexts(ROWS), "in the order of the input"


def test_a_server_that_fails_or_refuses_every_row_stops_the_run(make, serve):
    rows = [{"prompt": f"Name fruit number {i}"} for i in range(9)]
    server = serve(*[error(503)] * 99)
    assert make(rows, server.url)[0] == TRY_LATER and len(server.seen) == 5 * 5
    server = serve(*[error(400, "temperature is not supported")] * 99)
    code, _, _, said = make(rows, server.url)
    assert code == REFUSED and len(server.seen) == 5 and "temperature is not supported" in said


def test_a_hanging_server_meets_the_timeout(make, serve):
    code, made, _, said = make(ROWS[:1], serve("hang").url, "--timeout", "0.3")
    assert code == 0 and len(made) == 1 and "1 x ReadTimeout" in said


def test_a_server_that_is_down_exits_with_75_names_its_address_and_shows_the_retries(make):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    code, _, _, said = make(ROWS, url, "--timeout_total", "0.2")
    assert code == TRY_LATER and f"{url}/v1" in said
    assert "trying again" in said and "--resume" in said


# ---- kills --------------------------------------------------------------------------------------

RUN = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import utils; from data import make_candidates; from test_candidates import distinct_vectors
make_candidates.load_embed = distinct_vectors
utils.run(make_candidates.main)
"""


@pytest.mark.parametrize("stop, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_killed_run_goes_on_without_asking_twice_for_a_finished_row(
        make, serve, tmp_path, stop, code):
    """Two rows are finished and two hang: 4 calls before the kill, 2 after it."""
    server, save_file = serve(ok(), ok(), "hang", "hang"), tmp_path / "killed.jsonl"
    prompts = write_jsonl(tmp_path / "in.jsonl", ROWS)
    flags = [str(flag) for flag in (
        "--input_file", prompts, "--save_file", save_file, "--model", "m", "--num_candidates", 4,
        "--base_url", server.url)]
    script = RUN.format(root=str(ROOT), tests=str(Path(__file__).parent))
    process = subprocess.Popen(
        [sys.executable, "-c", script, *flags, "--max_connections", "2"], cwd=tmp_path)

    def num_rows() -> int:
        return save_file.read_text().count("\n") if save_file.exists() else 0

    try:
        wait_for(lambda: len(server.seen) == 4 and num_rows() == 2, 60)
        process.send_signal(stop)
        assert process.wait(20) == code and num_rows() == 2, "it does not wait for what hangs"
    finally:
        process.kill()
    save_file.write_text(save_file.read_text() + '{"context": "Is a tom')  # cut while it wrote
    assert make(None, None, argv=[*flags, "--resume"])[0] == 0
    assert len(server.seen) == 4 + 2 and num_rows() == 4
