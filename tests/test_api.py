"""api.py: addresses are normalised, errors are read for what they mean, and only what may pass is tried again."""

from __future__ import annotations

import threading
import time
from email.utils import formatdate

import pytest
import servers
from servers import BAD, FOUR, error, listed, ok

from decoding import api

serve = servers.serve
KEY = "sk-not-a-real-key-42"
HELLO = [{"role": "user", "content": "Hello?"}]


@pytest.fixture
def ask(monkeypatch):
    """ask(server, seconds) is one call with its repeats; waits are noted in ask.waits, not slept."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(server, seconds: float = 60):
        client = api.connect(server.url, timeout=5)
        return api.retrying(lambda: api.chat(client, "m", HELLO, 9, temperature=0.5), time.monotonic() + seconds)

    run.waits = []
    monkeypatch.setattr(api.time, "sleep", run.waits.append)
    return run


@pytest.mark.parametrize("given, used", [
    ("http://h:1", "http://h:1/v1"), ("http://h:1/", "http://h:1/v1"), ("http://h:1/v1/", "http://h:1/v1"),
    ("https://h/api/v1", "https://h/api/v1"), ("http://h/v1/chat/completions", "http://h/v1"),
    ("https://h/v1beta/openai/", "https://h/v1beta/openai"), ("h:1", 2), ("http://me:word@h/v1", 2), ("http://h:x", 2),
])
def test_an_address_is_normalised_or_refused(given, used, capsys):
    if used == 2:
        with pytest.raises(SystemExit, match="2"):
            api.normalise_url(given)
        assert "word" not in capsys.readouterr().err.replace("password", "")
    else:
        assert api.normalise_url(given) == used


def test_a_call_sends_what_it_is_given_and_returns_what_is_served(serve, ask):
    server = serve(ok(usage={"total_tokens": 31, "completion_tokens": 12}))
    assert ask(server) == (listed(*FOUR), "served-1", "stop", 31, 12)
    body = {"model": "m", "messages": HELLO, "max_tokens": 9, "temperature": 0.5}
    assert server.seen == [("/v1/chat/completions", f"Bearer {KEY}", body)]


@pytest.mark.parametrize("fault", BAD.values(), ids=BAD)
def test_bad_answers_are_asked_for_again(serve, ask, fault):
    server = serve(fault, fault)
    assert ask(server).served_model == "served-1" and len(server.seen) == 3 and len(ask.waits) == 2


@pytest.mark.parametrize("fault", BAD.values(), ids=BAD)
def test_a_call_that_is_always_answered_badly_fails_after_five_tries_but_not_for_ever(serve, ask, fault):
    server = serve(*[fault] * 6)
    with pytest.raises(api.Failed) as failed:
        ask(server)
    assert len(server.seen) == 5 and failed.value.args[1] is True


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_cannot_be_served_fails_at_once_and_for_ever(serve, ask, status):
    server = serve(error(status, "too many tokens"))
    with pytest.raises(api.Failed) as failed:
        ask(server)
    assert failed.value.args == (failed.value.args[0], False) and "too many tokens" in failed.value.args[0]
    assert len(server.seen) == 1


def test_waits_are_random_up_to_a_limit_that_doubles(serve, ask, monkeypatch):
    monkeypatch.setattr(api.random, "uniform", lambda low, high: high)
    ask(serve(*[error(429)] * 8), seconds=1000)
    assert ask.waits == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("value, seconds", [("2", 2), ("0.5", 0.5), ("-3", 0), ("soon", 0), ("nan", 0)])
def test_retry_after_is_read(value, seconds):
    assert api.retry_after({"retry-after": value}) == seconds and api.retry_after({}) == 0


def test_retry_after_may_be_a_date():
    assert 28 <= api.retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) <= 30


def test_a_bug_is_no_fault_of_the_server():
    with pytest.raises(ZeroDivisionError):
        api.retrying(lambda: 1 / 0, time.monotonic() + 60)


def test_keys_are_cut_out_of_messages(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "hush-hush")
    said = "hush-hush sk-abc123def Bearer xyz http://me:word@host task-1"
    assert api.redact(said) == "[key] [key] Bearer [key] http://[key]@host task-1"


def test_keys_of_every_provider_and_of_key_files_are_cut_out(monkeypatch, tmp_path):
    monkeypatch.setenv("TOGETHER_API_KEY", "shush-shush")
    path = tmp_path / "keys"
    path.write_text("OPENAI_API_KEY=quiet-now\n")
    path.chmod(0o600)
    assert api.read_key("OPENAI_API_KEY", path) == "quiet-now" and api.read_key("TOGETHER_API_KEY", path) == "shush-shush"
    said = f"shush-shush quiet-now tgp_v1_abc {'0123456789' * 5} https://h/{'a' * 39}"
    assert api.redact(said) == f"[key] [key] [key] [key] https://h/{'a' * 39}"


@pytest.mark.parametrize("mode, refused", [(0o600, False), (0o400, False), (0o640, True), (0o604, True), (0o777, True)])
def test_a_key_file_is_for_its_owner_alone(tmp_path, mode, refused, capsys):
    path = tmp_path / "keys"
    path.write_text("# mine\nOPENAI_API_KEY = secret-1 \n")
    path.chmod(mode)
    if not refused:
        assert api.read_key("OPENAI_API_KEY", path) == "secret-1"
        return
    with pytest.raises(SystemExit, match="2"):
        api.read_key("OPENAI_API_KEY", path)
    said = capsys.readouterr().err
    assert f"mode {mode:o}" in said and "chmod 600" in said and "secret-1" not in said


def test_a_key_file_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        api.read_key("OPENAI_API_KEY", tmp_path / "none")
    assert "none is not a file" in capsys.readouterr().err


@pytest.mark.parametrize("provider, url, key", [
    ("openai", "https://api.openai.com", None), ("together", "https://api.together.xyz/v1", None),
    ("together", "http://127.0.0.1:1", "none"), ("openai", "https://api.together.xyz", "none"),
])
def test_only_a_providers_own_address_needs_its_key(monkeypatch, provider, url, key, capsys):
    for _, name in api.PROVIDERS.values():
        monkeypatch.delenv(name, raising=False)
    if key:
        assert api.connect(url, 5, provider).api_key == key
        return
    with pytest.raises(SystemExit, match="3"):
        api.connect(url, 5, provider)
    assert f"{api.PROVIDERS[provider][1]} is not set" in capsys.readouterr().err


def test_no_provider_is_sent_the_key_of_another(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "one")
    monkeypatch.setenv("TOGETHER_API_KEY", "two")
    assert [api.connect("http://h", 5, provider).api_key for provider in ("openai", "together")] == ["one", "two"]


@pytest.mark.parametrize("fault, kind", [
    (BAD["blank"], "empty"), (BAD["content null"], "filtered"), (BAD["500"], "http_error"), (BAD["half a body"], "http_error"),
    (BAD["no choices"], "http_error"), ("hang", "timeout"), (error(422), "http_error"),
    (ok("", choices=[{"message": {"content": ""}, "finish_reason": "length"}]), "truncated"),
])
def test_what_failed_is_told_by_kind(serve, monkeypatch, fault, kind):
    monkeypatch.setattr(api, "MAX_BAD_ANSWERS", 1)
    client = api.connect(serve(fault).url, timeout=0.3)
    with pytest.raises(api.Failed) as failed:
        api.retrying(lambda: api.chat(client, "m", HELLO, 9), time.monotonic() + 5)
    assert api.kind(failed.value.__cause__) == kind


@pytest.mark.parametrize("num_threads", [1, 3, 50])
def test_work_is_done_once_for_every_item_on_as_many_threads_as_asked(num_threads):
    threads = set()

    def double(item):
        threads.add(threading.get_ident())
        time.sleep(0.01)
        return 2 * item

    assert sorted(api.work(double, list(range(12)), num_threads)) == [2 * i for i in range(12)]
    assert len(threads) <= num_threads and (num_threads == 1) == (threads == {threading.get_ident()})


def test_an_error_starts_no_more_work_and_keeps_what_ends_in_time():
    """Item 0 fails while 1 is in flight for 0.2 s and 2 for 5 s; 3 is never started."""
    started, results, begin = [], [], time.monotonic()

    def call(item):
        started.append(item)
        time.sleep([0.1, 0.2, 5][item])
        return item if item else 1 / 0

    with pytest.raises(ZeroDivisionError):
        for result in api.work(call, [0, 1, 2, 3], 3, grace=0.5):
            results.append(result)
    assert sorted(started) == [0, 1, 2] and time.monotonic() - begin < 2
    assert results == [1]


def test_a_caller_that_stops_listening_stops_the_work():
    started = []

    def call(item):
        started.append(item)
        time.sleep(0.05)

    for _ in api.work(call, list(range(100)), 2):
        break
    time.sleep(0.2)
    assert len(started) <= 5


def test_openai_itself_needs_a_key_and_a_key_has_no_spaces(monkeypatch):
    for key, code in (("", 3), ("sk a", 2)):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(SystemExit) as stop:
            api.connect("https://api.openai.com", timeout=5)
        assert stop.value.code == code
