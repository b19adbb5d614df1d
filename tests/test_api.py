"""api.py: addresses are normalised, errors are read for what they mean, and only what may pass is tried again."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest
import servers
from servers import BAD, FOUR, error, listed, ok

import api

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
    server = serve(ok(usage={"total_tokens": 31}))
    assert ask(server) == (listed(*FOUR), "served-1", "stop", 31)
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


def test_openai_itself_needs_a_key_and_a_key_has_no_spaces(monkeypatch):
    for key, code in (("", 3), ("sk a", 2)):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(SystemExit) as stop:
            api.connect("https://api.openai.com", timeout=5)
        assert stop.value.code == code
