"""data/make_candidates.py: lists are parsed, rows are made once, and every fault of a server has its way out."""

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
from types import SimpleNamespace

import numpy as np
import pytest
import servers
from conftest import DIALOGUES, ROOT, write_jsonl
from servers import FOUR, error, listed, ok, wait_for

import utils
from data import make_candidates
from decoding import asking
from modeling.prompts import build_prompt

ROWS = [{"context": row["context"]} for row in DIALOGUES]
serve, real_server = servers.serve, servers.real_server
KEY = "sk-not-a-real-key-42"


def distinct_vectors():
    """An embedder for which every two texts are unlike."""
    index: dict[str, int] = {}
    return lambda texts: np.eye(256)[[index.setdefault(text, len(index)) for text in texts]]


@pytest.fixture
def make(tmp_path, monkeypatch, capsys):
    """make(rows, url, *flags) runs the script: exit code, made rows, rejected rows, all that was printed."""
    monkeypatch.setattr(make_candidates, "load_embed", distinct_vectors)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    save_file = tmp_path / "mine.jsonl"

    def run(rows: list[dict] | None, url: str | None, *flags, argv: list[str] | None = None):
        if rows is not None:
            write_jsonl(tmp_path / "prompts.jsonl", rows)
        base = ["--input_file", str(tmp_path / "prompts.jsonl"), "--save_file", str(save_file), "--model", "m",
                "--num_candidates", "4", "--max_backoff", "0.01", "--max_connections", "1"]
        code = 0
        try:
            make_candidates.main(argv or [*base, *(["--base_url", url] if url else []), *map(str, flags)])
        except SystemExit as stop:
            code = stop.code
        files = [save_file, tmp_path / "mine.rejected.jsonl"]
        made, rejected = ([json.loads(s) for s in p.read_text().splitlines()] if p.exists() else [] for p in files)
        return code, made, rejected, "".join(capsys.readouterr())

    return run


@pytest.mark.parametrize("text, items", [
    ("1. One fine day.\n2) Two of them.\n(3) Three?", ["One fine day.", "Two of them.", "Three?"]),
    ("- One fine day.\n* Two of them.\n• Three?", ["One fine day.", "Two of them.", "Three?"]),
    ('1. "One fine day."\n2. “Two of them.”', ["One fine day.", "Two of them."]),
    ("**1.** One fine day.\n**2. Two of them.**\n3. **Three?**", ["One fine day.", "Two of them.", "Three?"]),
    ("1. **Warm:** One fine day.\n2. Reply 2: Two of them.", ["One fine day.", "Two of them."]),
    ("Here are two replies:\n\n1. One fine day.\n2. Two.\n\nTell me if you want more!", ["One fine day.", "Two."]),
    ("Sure, here are some replies.\nOne fine day.\nTwo of them.\nThree?", ["One fine day.", "Two of them.", "Three?"]),
    ("One fine day.\nTwo of them.", ["One fine day.", "Two of them."]),
    ("One fine day.\n- Two of them.\nThree of\u2028us.", ["One fine day.", "Two of them.", "Three of us."]),
    ("1. One fine day,\n   all day.\n2. Two.", ["One fine day, all day.", "Two."]),
    ("1. Person B: One fine day.\n2. Possibility #2: Two.", ["One fine day.", "Two."]),
    ('```json\n[\n  "One fine day.",\n  "Two of them."\n]\n```', ["One fine day.", "Two of them."]),
    ("<think>1. A draft.</think>\n1. One fine day.", ["One fine day."]),
    ("3.5 stars from me.\n9 lives are enough.", ["3.5 stars from me.", "9 lives are enough."]),
    ("1.\n2. \n", []), ("", []),
])
def test_a_list_is_parsed_into_its_items(text, items):
    assert asking.parse_list(text) == items


def test_an_answer_cut_at_its_token_limit_loses_its_last_item():
    assert asking.parse_list("1. One fine day.\n2. Two of", cut=True) == ["One fine day."]


@pytest.mark.parametrize("text, why", [
    ("Ask the cook about that.", None), ("Ask the cook.", "too short"), ("no " * 41, "too long"),
    ("Person A: so you say that?", "speaker label"), ("then why is it in my salad", "repeats the request"),
    ("Write what Person B says next.", "repeats the request"), ("?! ... !!", "no words"),
])
def test_a_candidate_has_4_to_40_words_and_is_neither_label_nor_echo(text, why):
    args = SimpleNamespace(min_words=4, max_words=40, max_input_length=300)
    message = make_candidates.list_message(ROWS[0], 4, [], args)
    assert make_candidates.check_item(text, ROWS[0], message, args) == why


def test_candidates_above_the_cosine_or_equal_after_normalising_are_left_out():
    """Against (1, 0): cosine 0.6 stays, 0.95 goes; the text that is equal but for its case goes unmeasured."""
    found, vectors = ["Tea."], [np.array([1.0, 0.0])]
    new = {"Tee.": [0.95, 0.3122], "Rain.": [0.6, 0.8], "tea": [0.0, 1.0], "Wind.": [-1.0, 0.0]}
    args = SimpleNamespace(max_cosine=0.9, num_candidates=2)
    embed = lambda texts: np.array([new[text] for text in texts])  # noqa: E731
    why = list(make_candidates.add_new(found, vectors, list(new), embed, args))
    assert found == ["Tea.", "Rain."] and why == ["nearly equal", "equal", "not needed"]


def test_the_embedder_tells_two_wordings_of_one_reply_from_another_reply(embedder, monkeypatch):
    monkeypatch.setattr(utils, "load_embedder", lambda: embedder)
    vectors = make_candidates.load_embed()(["I love pizza very much.", "I love pizza so much.", "My train is late."])
    assert vectors[0] @ vectors[1] > 0.9 > vectors[0] @ vectors[2] and vectors[0] @ vectors[0] == pytest.approx(1)


def test_further_rounds_show_what_is_there_and_ask_for_the_rest(make, serve):
    server = serve(ok(listed(FOUR[0], FOUR[0].upper(), "Short one.")), ok(listed(*FOUR[1:3])), ok(listed(*FOUR)))
    code, [row], _, _ = make(ROWS[:1], server.url)
    first, second, third = (body["messages"][0]["content"] for _, _, body in server.seen)
    assert code == 0 and row["candidates"] == FOUR and row["made"]["rounds"] == 3
    assert row["made"]["dropped"] == {"equal": 4, "too short": 1}, "FOUR[0] twice, then three in the last round"
    assert first.startswith(build_prompt(ROWS[0])) and "list of 4 replies" in first
    assert f"- {FOUR[0]}\n\n" in second and "list of 5 new replies" in second, "3 missing and 2 to spare"
    assert all(f"- {text}\n" in third for text in FOUR[:3]) and server.seen[2][2]["temperature"] > 0


def test_a_row_below_min_candidates_is_rejected_never_padded_and_candidates_it_has_count(make, serve):
    three = ["Trust the man, boards lie.", "Let us shout at 4.", "Take my bus instead."]
    rows = [ROWS[0], {**ROWS[1], "candidates": three}]
    code, made, rejected, said = make(rows, serve(*[ok(listed(FOUR[0]))] * 5).url, "--max_rounds", 3)
    assert [row["candidates"] for row in made] == [[*three, FOUR[0]]]
    assert [row["candidates"] for row in rejected] == [[FOUR[0]]] and "1 rows rejected" in said and code == 0
    assert rejected[0]["made"]["problem"] == "fewer than 4 candidates after 3 rounds"


def test_a_context_shown_without_its_oldest_turns_is_counted(make, serve):
    server = serve()
    code, made, _, said = make(ROWS[:2], server.url, "--max_input_length", 12)
    assert code == 0 and "2 contexts were shown without their oldest turns" in said
    assert made[0]["context"] == ROWS[0]["context"], "in full"
    assert "Then why is it in my salad?" in str(server.seen[0]) and "Is a tomato a fruit?" not in str(server.seen[0])


def test_more_rejected_rows_than_allowed_exit_with_4(make, serve):
    assert make(ROWS[:1], serve(ok("No.")).url, "--max_rounds", 1)[0] == 4


def test_a_refused_key_stops_the_run_at_once_keeps_rows_and_is_never_shown(make, serve, monkeypatch, tmp_path):
    server = serve(ok(), error(401, f"Incorrect API key provided: {KEY}"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    code, made, _, said = make(ROWS, server.url + "/v1/")
    assert code == 5 and len(made) == 1 and len(server.seen) == 2 and "401" in said and "--resume" in said
    assert server.seen[0][:2] == ("/v1/chat/completions", f"Bearer {KEY}")
    assert not any(KEY in text for text in [said, *(p.read_text() for p in tmp_path.iterdir())])


@pytest.mark.parametrize("fault", [error(403), error(404, "The model m does not exist"), error(402),
                                   error(429, code="insufficient_quota"), error(429, type="insufficient_quota")])
def test_access_model_and_quota_faults_are_not_retried_and_exit_with_5(make, serve, fault):
    server = serve(fault)
    code, _, _, said = make(ROWS[:1], server.url, "--max_connections", 3)
    assert code == 5 and len(server.seen) == 1 and f"HTTP {fault[0]}" in said and "--model" in said


def test_retry_after_is_honoured_and_retries_are_counted(make, serve, monkeypatch):
    waits = []
    monkeypatch.setattr(api.time, "sleep", waits.append)
    code, made, _, said = make(ROWS[:1], serve(*[error(429, headers={"Retry-After": "2"})] * 3).url)
    assert code == 0 and len(made) == 1 and waits == [2.0, 2.0, 2.0] and "3 x HTTP 429" in said


def test_a_wait_beyond_the_deadline_exits_with_75_and_its_resume_line_works(make, serve):
    server = serve(ok(), error(429, headers={"Retry-After": "3600"}))
    code, made, _, said = make(ROWS, server.url)
    assert code == 75 and len(made) == 1 and "asks to wait 3600 s" in said
    line = re.search(r"go on with: python data/make_candidates.py (.*)", said)[1]
    code, made, _, _ = make(None, None, argv=shlex.split(line))
    assert code == 0 and [row["context"] for row in made] == [row["context"] for row in ROWS]
    assert len(server.seen) == 2 + 3, "the finished row is not asked for again"


def test_a_row_that_always_fails_is_rejected_after_five_tries_and_tried_again_by_resume(make, serve):
    server = serve(*[error(500, "this row breaks me")] * 5)
    code, made, rejected, said = make(ROWS, server.url)
    assert code == 0 and len(made) == 3 and len(server.seen) == 5 + 3 and "1 x HTTP 500: this row breaks me" in said
    assert rejected[0]["context"] == ROWS[0]["context"] and "this row breaks me" in rejected[0]["made"]["problem"]
    code, made, rejected, _ = make(None, server.url, "--resume")
    assert code == 0 and len(server.seen) == 9 and not rejected
    assert [row["context"] for row in made] == [row["context"] for row in ROWS], "in the order of the input"


def test_a_server_that_fails_or_refuses_every_row_stops_the_run(make, serve, tmp_path):
    rows = [{"prompt": f"Name fruit number {i}"} for i in range(9)]
    server = serve(*[error(503)] * 99)
    assert make(rows, server.url)[0] == 75 and len(server.seen) == 5 * 5
    server = serve(*[error(400, "temperature is not supported")] * 99)
    code, _, _, said = make(rows, server.url)
    assert code == 5 and len(server.seen) == 5 and "temperature is not supported" in said


def test_a_hanging_server_meets_the_timeout(make, serve):
    server = serve("hang")
    code, made, _, said = make(ROWS[:1], server.url, "--timeout", "0.3")
    assert code == 0 and len(made) == 1 and "1 x ReadTimeout" in said


def test_a_server_that_is_down_exits_with_75_names_its_address_and_shows_the_retries(make):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    code, _, _, said = make(ROWS, url, "--timeout_total", "0.2")
    assert code == 75 and f"{url}/v1" in said and "trying again" in said and "--resume" in said


def test_a_dry_run_calls_nothing_and_shows_the_first_request(make, serve):
    server = serve()
    code, made, _, said = make(ROWS, server.url, "--dry_run")
    assert code == 0 and not made and not server.seen
    assert "4 rows, 4 to 16 calls" in said and "list of 4 replies" in said


def test_an_existing_file_other_settings_and_other_rows_are_refused_and_equal_rows_made_once(make, serve, tmp_path):
    url, prompts = serve().url, tmp_path / "prompts.jsonl"
    assert len(make([*ROWS[:2], ROWS[0]], url)[1]) == 2
    for flags, says in (([], "already there"), (["--resume", "--limit", "1"], "mine.jsonl:2"),
                        (["--resume", "--temperature", "0.5"], "--temperature 0.7, now it is 0.5")):
        code, made, _, said = make(None, url, *flags)
        assert code == 2 and says in said and len(made) == 2
    assert "overwrite" in make(None, url, "--input_file", prompts.rename(prompts.with_name("mine.json")))[3]


def test_the_output_has_the_order_of_the_input_whichever_row_is_done_first(make, serve):
    def slow(body: dict) -> tuple:
        time.sleep(0.3)
        return ok()

    code, made, _, _ = make(ROWS, serve(slow).url, "--max_connections", "4")
    assert code == 0 and [row["context"] for row in made] == [row["context"] for row in ROWS]


RUN = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import utils; from data import make_candidates; from test_make_candidates import distinct_vectors
make_candidates.load_embed = distinct_vectors
utils.run(make_candidates.main)
"""


@pytest.mark.parametrize("stop, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_killed_run_goes_on_without_asking_twice_for_a_finished_row(make, serve, tmp_path, stop, code):
    """Two rows are finished and two hang: 4 calls before the kill, 2 after it."""
    server, save_file = serve(ok(), ok(), "hang", "hang"), tmp_path / "killed.jsonl"
    prompts = write_jsonl(tmp_path / "in.jsonl", ROWS)
    flags = ["--input_file", prompts, "--save_file", save_file, "--model", "m", "--num_candidates", 4,
             "--base_url", server.url]
    script = RUN.format(root=str(ROOT), tests=str(Path(__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, flags), "--max_connections", "2"], cwd=tmp_path)
    try:
        wait_for(lambda: len(server.seen) == 4 and save_file.exists() and save_file.read_text().count("\n") == 2, 60)
        process.send_signal(stop)
        assert process.wait(5) == code and save_file.read_text().count("\n") == 2
    finally:
        process.kill()
    save_file.write_text(save_file.read_text() + '{"context": "Is a tom')  # as if cut while it wrote
    assert make(None, None, argv=[*map(str, flags), "--resume"])[0] == 0
    assert len(server.seen) == 4 + 2 and len(save_file.read_text().splitlines()) == 4


def test_a_local_model_makes_rows_that_depend_on_the_seed_alone(make, tiny_dir, tmp_path):
    flags = ("--model", tiny_dir, "--num_candidates", "1", "--max_tokens", "400", "--temperature", "3")
    files = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    assert [make([{"prompt": "Name a fruit"}], None, *flags, "--save_file", file)[0] for file in files] == [0, 0]
    assert files[0].read_bytes() == files[1].read_bytes() and len(json.loads(files[0].read_text())["candidates"]) == 1


def test_a_real_server_makes_a_row(make, real_server):
    url, folder = real_server
    code, made, rejected, said = make([{"prompt": "Name a colour of the rainbow."}], url, "--model", folder,
                                      "--num_candidates", "1", "--max_tokens", "48")
    assert code == 0, (said, rejected)
    assert made[0]["candidates"][0].strip() and folder in made[0]["made"]["model"] and made[0]["made"]["tokens"] > 20
