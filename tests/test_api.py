"""Servers: names and addresses, what an error means, and that only what may pass is tried again.

A scripted server stands behind the packages of both providers, so what they do differently shows.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from email.utils import formatdate

import pytest
import servers
from conftest import ROOT, refused
from servers import BAD, FOUR, error, listed, ok

from decoding import api, providers
from decoding.replies import Reply
from utils import MISSING, REFUSED, TRY_LATER, USAGE

serve = servers.serve
KEY = "sk-not-a-real-key-42"
HELLO = [{"role": "user", "content": "Hello?"}]


@pytest.fixture(params=providers.PROVIDERS)
def provider(request, monkeypatch) -> str:
    """Each provider in turn, with a key."""
    monkeypatch.setenv(providers.PROVIDERS[request.param][1], KEY)
    return request.param


@pytest.fixture
def ask(provider, monkeypatch):
    """ask(server, seconds) is one call with its repeats; waits are kept in ask.waits, not slept."""

    def run(server, seconds: float = 60) -> Reply:
        client = providers.connect(provider, server.url, timeout=5)
        [reply] = api.retrying(lambda: api.complete(client, "m", HELLO, 9, temperature=0.5),
                               time.monotonic() + seconds)
        return reply

    run.waits = []
    monkeypatch.setattr(api.time, "sleep", run.waits.append)
    return run


# ---- names, addresses and keys ------------------------------------------------------------------


@pytest.mark.parametrize("text, provider, model", [
    ("hf:smollm2", "hf", "smollm2"),
    ("hf:checkpoints/a:b/check_3/", "hf", "checkpoints/a:b/check_3/"),
    ("openai:gpt-4o", "openai", "gpt-4o"), ("openai:llama3:8b", "openai", "llama3:8b"),
    ("together:meta-llama/Llama-3-70b-chat-hf", "together", "meta-llama/Llama-3-70b-chat-hf"),
])
def test_one_grammar_names_a_model_and_who_runs_it(text, provider, model):
    spec = providers.parse_spec(text)
    assert spec == (provider, model) and spec.name == text


@pytest.mark.parametrize("text", ["gpt-4o", "mistral:7b", "openai:", "openai: ", ":m", "", "hf"])
def test_a_name_without_provider_or_model_is_refused_with_the_flag(text, capsys):
    said = refused(capsys, USAGE, providers.parse_spec, text, "--asker")
    assert f'--asker "{text}" is not PROVIDER:MODEL' in said and "together:MODEL" in said


def test_a_flag_may_take_some_providers_alone(capsys):
    said = refused(capsys, USAGE, providers.parse_spec, "hf:m", "--judge1", ("openai", "together"))
    assert '--judge1 "hf:m"' in said and "one of openai:MODEL, together:MODEL" in said


@pytest.mark.parametrize("given, used", [
    ("http://h:1", "http://h:1/v1"), ("http://h:1/", "http://h:1/v1"),
    ("http://h:1/v1/", "http://h:1/v1"), ("https://h/api/v1", "https://h/api/v1"),
    ("http://h/v1/chat/completions", "http://h/v1"),
    ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
])
def test_an_address_is_normalised(given, used):
    assert providers.normalise_url(given) == used


@pytest.mark.parametrize("url", [
    "h:1", "http://me:word@h/v1", "http://h:x", "http://h?a=1", "ftp://h"])
def test_what_is_not_a_plain_address_is_refused_without_its_password(url, capsys):
    said = refused(capsys, USAGE, providers.normalise_url, url)
    assert "word" not in said.replace("password", "")


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_key_file_of_its_owner_is_read(tmp_path, mode):
    path = tmp_path / "keys"
    path.write_text("# mine\nOPENAI_API_KEY = secret-1 \n")
    path.chmod(mode)
    assert providers.read_key("OPENAI_API_KEY", path) == "secret-1"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o777])
def test_a_key_file_that_others_can_read_is_refused(tmp_path, mode, capsys):
    path = tmp_path / "keys"
    path.write_text("OPENAI_API_KEY = secret-1 \n")
    path.chmod(mode)
    said = refused(capsys, USAGE, providers.read_key, "OPENAI_API_KEY", path)
    assert f"mode {mode:o}" in said and "chmod 600" in said and "secret-1" not in said


def test_a_key_file_that_is_not_there_is_named(tmp_path, capsys):
    said = refused(capsys, USAGE, providers.read_key, "OPENAI_API_KEY", tmp_path / "none")
    assert "none is not a file" in said


@pytest.mark.parametrize("name, url, key", [
    ("openai", "https://api.openai.com", None), ("together", "https://api.together.xyz/v1", None),
    ("openai", None, None), ("together", None, None),
    ("together", "http://127.0.0.1:1", "none"), ("openai", "https://api.together.xyz", "none"),
])
def test_only_a_providers_own_address_needs_its_key(monkeypatch, name, url, key, capsys):
    for _, variable in providers.PROVIDERS.values():
        monkeypatch.delenv(variable, raising=False)
    if key:
        assert providers.connect(name, url).api_key == key
    else:
        said = refused(capsys, MISSING, providers.connect, name, url)
        assert f"{providers.PROVIDERS[name][1]} is not set" in said


def test_a_key_with_a_space_is_refused_before_it_is_sent(monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk a")
    assert "OPENAI_API_KEY holds a space" in refused(capsys, USAGE, providers.connect, "openai")


def test_no_provider_is_sent_the_key_of_another(monkeypatch, serve):
    monkeypatch.setenv("OPENAI_API_KEY", "one")
    monkeypatch.setenv("TOGETHER_API_KEY", "two")
    server = serve()
    for name in ("openai", "together"):
        api.complete(providers.connect(name, server.url), "m", HELLO, 9)
    assert [header for _, header, _ in server.seen] == ["Bearer one", "Bearer two"]


def test_keys_are_cut_out_of_messages(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "hush-hush")
    said = "hush-hush sk-abc123def Bearer xyz http://me:word@host task-1"
    assert providers.redact(said) == "[key] [key] Bearer [key] http://[key]@host task-1"


def test_keys_of_every_provider_and_of_key_files_are_cut_out(monkeypatch, tmp_path):
    monkeypatch.setenv("TOGETHER_API_KEY", "shush-shush")
    path = tmp_path / "keys"
    path.write_text("OPENAI_API_KEY=quiet-now\n")
    path.chmod(0o600)
    assert providers.read_key("OPENAI_API_KEY", path) == "quiet-now"
    said = f"shush-shush quiet-now tgp_v1_abc {'0123456789' * 5} https://h/{'a' * 39}"
    assert providers.redact(said) == f"[key] [key] [key] [key] https://h/{'a' * 39}"


def test_a_reply_loses_the_keys_of_this_run_and_keeps_everything_else(serve, ask):
    """Replies are data: a hash in one is a text of the model's, only our own key is none."""
    text = f"You sent {KEY}; the commit is {'0123456789' * 4}, and sk-learn-it is a library."
    assert ask(serve(ok(text))).text == text.replace(KEY, "[key]")


# ---- one call -----------------------------------------------------------------------------------


def test_a_call_sends_what_it_is_given_and_returns_what_is_served(serve, ask):
    server = serve(ok(usage={"total_tokens": 31, "completion_tokens": 12}))
    assert ask(server) == Reply(listed(*FOUR), 12, False, "stop", "served-1", 31)
    body = {"model": "m", "messages": HELLO, "max_tokens": 9, "temperature": 0.5}
    assert server.seen == [("/v1/chat/completions", f"Bearer {KEY}", body)]


def test_fields_beyond_the_package_reach_the_server_as_they_are(serve, provider):
    """As the published judge sends top_k: in extra_body, which both packages unfold."""
    server, form = serve(), {"type": "json_object"}
    api.complete(providers.connect(provider, server.url), "m", HELLO, 9, n=2, seed=3,
                 response_format=form, extra_body={"top_k": 50, "min_p": 0.1})
    body = server.seen[0][2]
    assert (body["n"], body["seed"], body["top_k"], body["min_p"]) == (2, 3, 50, 0.1)
    assert body["response_format"] == form


def test_several_texts_share_the_tokens_of_their_call_and_empty_ones_are_left_out(serve, provider):
    texts = [("Yes.", "stop"), (" ", "stop"), ("No", "length")]
    choices = [{"index": i, "message": {"content": text}, "finish_reason": reason}
               for i, (text, reason) in enumerate(texts)]
    server = serve(ok(choices=choices, usage={"total_tokens": 40, "completion_tokens": 12}))
    replies = api.complete(providers.connect(provider, server.url), "m", HELLO, 9, n=3)
    assert [(reply.text, reply.tokens, reply.cut) for reply in replies] == [
        ("Yes.", 4, False), ("No", 4, True)]


@pytest.mark.parametrize("fault", BAD.values(), ids=BAD)
def test_bad_answers_are_asked_for_again(serve, ask, fault):
    server = serve(fault, fault)
    assert ask(server).served_model == "served-1"
    assert len(server.seen) == 3 and len(ask.waits) == 2


@pytest.mark.parametrize("fault", BAD.values(), ids=BAD)
def test_a_call_that_is_always_answered_badly_fails_after_five_tries_but_not_for_ever(
        serve, ask, fault):
    server = serve(*[fault] * 6)
    with pytest.raises(api.CallFailed) as failed:
        ask(server)
    assert len(server.seen) == 5 and failed.value.transient is True


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_cannot_be_served_fails_at_once_and_for_ever(serve, ask, status):
    server = serve(error(status, "too many tokens"))
    with pytest.raises(api.CallFailed) as failed:
        ask(server)
    assert failed.value.transient is False and len(server.seen) == 1
    assert failed.value.what == f"HTTP {status}: too many tokens"


@pytest.mark.parametrize("fault, what", [
    (error(401, f"Incorrect API key provided: {KEY}"),
     "HTTP 401, key refused: Incorrect API key provided: [key]"),
    (error(402, "pay"), "HTTP 402, payment required: pay"),
    (error(403, "not you"), "HTTP 403, access denied: not you"),
    (error(404, "no model m"), "HTTP 404, no such model or address: no model m"),
    (error(429, "broke", code="insufficient_quota"), "HTTP 429, the quota is used up: broke"),
    (error(429, "broke", type="insufficient_quota"), "HTTP 429, the quota is used up: broke"),
])
def test_what_the_provider_refuses_stops_the_run_at_once(serve, ask, fault, what):
    server = serve(fault)
    with pytest.raises(api.RunStopped) as stop:
        ask(server)
    assert (stop.value.code, stop.value.what) == (REFUSED, what) and len(server.seen) == 1


def test_a_server_that_cannot_be_reached_or_asks_to_wait_too_long_stops_the_run_for_now(
        serve, ask, provider):
    with pytest.raises(api.RunStopped) as stop:
        ask(serve(error(429, headers={"Retry-After": "3600"})))
    assert stop.value.code == TRY_LATER and "asks to wait 3600 s" in stop.value.what
    client = providers.connect(provider, "http://127.0.0.1:9")
    with pytest.raises(api.RunStopped) as stop:
        api.retrying(lambda: api.complete(client, "m", HELLO, 9), time.monotonic() - 1)
    assert stop.value.code == TRY_LATER and stop.value.what.startswith("ConnectError")


@pytest.mark.parametrize("fault, kind", [
    (BAD["blank"], "empty"), (BAD["content null"], "filtered"), (BAD["500"], "http_error"),
    (BAD["half a body"], "http_error"), (BAD["no choices"], "http_error"), ("hang", "timeout"),
    (error(422), "http_error"),
    (ok("", choices=[{"message": {"content": ""}, "finish_reason": "length"}]), "truncated"),
])
def test_failures_are_counted_by_kind(serve, provider, monkeypatch, fault, kind):
    monkeypatch.setattr(api, "MAX_BAD_ANSWERS", 1)
    client = providers.connect(provider, serve(fault).url, timeout=0.3)
    with pytest.raises(api.CallFailed) as failed:
        api.retrying(lambda: api.complete(client, "m", HELLO, 9), time.monotonic() + 5)
    assert failed.value.kind == kind


def test_waits_are_random_up_to_a_limit_that_doubles(serve, ask, monkeypatch):
    monkeypatch.setattr(api.random, "uniform", lambda low, high: high)
    ask(serve(*[error(429)] * 8), seconds=1000)
    assert ask.waits == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("value, seconds", [
    ("2", 2), ("0.5", 0.5), ("-3", 0), ("soon", 0), ("nan", 0)])
def test_retry_after_is_read(value, seconds):
    assert api.retry_after({"retry-after": value}) == seconds and api.retry_after({}) == 0


def test_retry_after_may_be_a_date():
    in_30_s = formatdate(time.time() + 30, usegmt=True)
    assert 28 <= api.retry_after({"retry-after": in_30_s}) <= 30


def test_a_bug_is_no_fault_of_the_server():
    with pytest.raises(ZeroDivisionError):
        api.retrying(lambda: 1 / 0, time.monotonic() + 60)


# ---- many calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 3, 50])
def test_work_is_done_once_for_every_item_on_as_many_threads_as_asked(num_threads):
    threads = set()

    def double(item):
        threads.add(threading.get_ident())
        time.sleep(0.01)
        return 2 * item

    assert sorted(api.work(double, list(range(12)), num_threads)) == [2 * i for i in range(12)]
    assert len(threads) <= num_threads
    assert (num_threads == 1) == (threads == {threading.get_ident()})


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


def test_flags_that_name_models_do_not_wait_for_torch_or_a_providers_package():
    code = ("import sys; from decoding import providers; providers.parse_spec('openai:m')\n"
            "sys.exit(bool({'torch', 'openai', 'together'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_key_that_holds_another_one_is_hidden_whole(monkeypatch):
    """The shorter one taken out first would leave the ends of the longer one."""
    monkeypatch.setattr(providers, "_KEYS_READ", {"tomato-soup", "sk-tomato-soup-42"})
    assert providers.hide_keys("the key sk-tomato-soup-42 is wrong") == "the key [key] is wrong"
