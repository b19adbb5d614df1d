"""The two kinds of engines: what they yield, count and refuse, and when a server ends the run."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import servers
import torch
from conftest import refused
from servers import error, ok

from decoding import api, engines, providers, sampling
from decoding.api import RunStopped
from decoding.engines import Local, Server
from decoding.mixtures import GuidedTree
from decoding.providers import Spec
from modeling.checkpoints import load_checkpoint
from modeling.prompts import encode_prompt
from trees import Tree, branch_prompts
from utils import MISSING, REFUSED, TRY_LATER, USAGE

serve = servers.serve
PROMPTS = ["Is a tomato a fruit?", "My train leaves at nine.", "The cat sat on my keyboard again."]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(api.random, "uniform", lambda low, high: 0.0)


def choices(*texts: str) -> tuple:
    """A 200 with a choice for every text, 4 tokens each."""
    return ok(usage={"completion_tokens": 4 * len(texts), "total_tokens": 50}, choices=[
        {"index": i, "message": {"content": text}, "finish_reason": "stop"}
        for i, text in enumerate(texts)])


def echo(body: dict) -> tuple:
    """As many choices as asked, each naming the message's newest turn, its place and the seed."""
    text = body["messages"][-1]["content"].split("Person A: ")[-1].split("\n")[0]
    return choices(*(f"{text} {i} {body.get('seed')}" for i in range(body.get("n", 1))))


def one_by_one(body: dict) -> tuple:
    """A server that does not know n."""
    return echo({**body, "n": 1})


# ---- a model behind a server --------------------------------------------------------------------


@pytest.fixture(params=providers.PROVIDERS)
def connect(request, monkeypatch):
    """connect(server, **options): an engine, through the package of each provider in turn."""
    for _, key in providers.PROVIDERS.values():
        monkeypatch.setenv(key, "not-a-real-key")

    def run(server, **options) -> Server:
        options = {"timeout": 5.0, "max_connections": 2} | options
        return Server(Spec(request.param, "m"), server.url, **options)

    return run


def ask(engine, messages=PROMPTS, seeds=(10, 20, 30), n=1, temperature=0.7, **fields):
    """What became of each message, by its index."""
    asked = list(engine.ask(list(messages), seeds and list(seeds[: len(messages)]), n, 16,
                            temperature, **fields))
    assert sorted(result.index for result in asked) == list(range(len(messages)))
    return {result.index: result for result in asked}


def texts(asked) -> list[str]:
    return [reply.text for reply in asked.replies]


def test_a_server_that_honours_n_is_asked_once_a_message(serve, connect):
    server = serve(then=echo)
    sampling_filters = {"top_p": 0.9, "top_k": 0, "min_p": 0.1, "typical_p": 1.0}
    engine = connect(server, sampling=sampling_filters)
    asked = ask(engine, n=3)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, (10, 20, 30), strict=True)):
        assert texts(asked[i]) == [f"{prompt} {k} {seed}" for k in range(3)]
        assert asked[i].failure is None and asked[i].replies[0].tokens == 4
    bodies = [body for _, _, body in server.seen]
    assert len(bodies) == 3
    for body in bodies:
        assert set(body) == {"model", "messages", "max_tokens", "temperature", "seed", "n", "top_p",
                             "min_p"}
        assert (body["n"], body["top_p"], body["min_p"], body["temperature"]) == (3, 0.9, 0.1, 0.7)
    assert engine.figures() == {"served_models": ["served-1"], "retries": {}}


def test_a_server_without_n_is_asked_for_each_reply_and_that_is_said_once(serve, connect, capsys):
    """One reply a message comes with n; the two missing ones have the next seeds."""
    server = serve(then=one_by_one)
    engine = connect(server)
    asked = ask(engine, n=3)
    assert texts(asked[1]) == [f"{PROMPTS[1]} 0 {seed}" for seed in (20, 21, 22)]
    assert len(server.seen) == 9 and len({body["seed"] for _, _, body in server.seen}) == 9
    ask(engine, n=2)
    assert len(server.seen) == 9 + 6, "n is not tried again"
    assert capsys.readouterr().err.count("gives one reply a call (no n)") == 1


def test_replies_stand_in_the_order_of_their_seeds_whichever_call_ends_first(serve, connect):
    def late_first(body: dict) -> tuple:
        time.sleep(0.2 if body["seed"] == 10 else 0)
        return echo(body)

    engine = connect(serve(then=late_first), max_connections=3)
    engine._takes_n = False
    asked = ask(engine, PROMPTS[:1], n=3)
    assert texts(asked[0]) == [f"{PROMPTS[0]} 0 {seed}" for seed in (10, 11, 12)]


def test_a_message_may_be_a_list_of_turns_and_a_server_is_sent_no_seed_unless_it_is_given(
        serve, connect):
    server, turns = serve(then=echo), [{"role": "system", "content": "Be brief."},
                                       {"role": "user", "content": "Hello?"}]
    form = {"type": "json_object"}
    asked = ask(connect(server, sampling={"top_p": 0.5}), [turns], seeds=None, temperature=0.0,
                response_format=form)
    assert texts(asked[0]) == ["Hello? 0 None"]
    [(_, _, body)] = server.seen
    assert body == {"model": "m", "messages": turns, "max_tokens": 16, "temperature": 0.0,
                    "response_format": form}, "the most probable reply needs no top_p"


def test_results_come_as_they_finish(serve, connect):
    def hang_first(body: dict) -> tuple | str:
        return "hang" if body["messages"][0]["content"] == PROMPTS[0] else echo(body)

    engine = connect(serve(then=hang_first), max_connections=3)
    results = engine.ask(PROMPTS, [1, 2, 3], 1, 16, 0.7)
    assert {next(results).index, next(results).index} == {1, 2}


def test_a_server_does_not_tell_how_many_tokens_a_message_has(serve, connect):
    engine = connect(serve())
    assert engine.count_tokens("Hello?") is None and engine.limit is None


@pytest.mark.parametrize("trouble", ["429", "500", "half", "reset"])
def test_trouble_that_passes_is_waited_out_counted_and_told_once(serve, connect, capsys, trouble):
    answers = {"429": error(429, headers={"Retry-After": "0"}), "500": error(500)}
    bad = answers.get(trouble, trouble)
    engine = connect(serve(bad, bad, then=echo), max_connections=1)
    asked = ask(engine)
    assert [asked[i].retries for i in range(3)] == [2, 0, 0]
    assert sum(engine.figures()["retries"].values()) == 2 and not engine.failed
    assert capsys.readouterr().err.count("trying again in") == 1


def test_a_refused_message_has_no_reply_and_says_why_and_the_others_have_theirs(serve, connect):
    """It is refused with n, and three times alone."""
    def picky(body: dict) -> tuple:
        refuses = body["messages"][0]["content"] == PROMPTS[1]
        return error(400, "content policy") if refuses else echo(body)

    server = serve(then=picky)
    engine = connect(server)
    asked = ask(engine, n=3)
    assert [len(asked[i].replies) for i in range(3)] == [3, 0, 3]
    assert asked[1].failure.what == "HTTP 400: content policy"
    assert asked[1].failure.transient is False and asked[0].failure is None
    assert engine.failed == Counter({"HTTP 400: content policy": 3}) and len(server.seen) == 6


def test_a_transient_failure_stops_a_run_whose_rows_are_written_only_once(serve, connect):
    server = serve(then=error(500, "sick"))
    engine = connect(server, max_connections=1)
    with pytest.raises(RunStopped) as stop:
        ask(engine)
    assert stop.value.code == TRY_LATER and len(server.seen) == api.MAX_BAD_ANSWERS
    assert stop.value.what == f"{engine.name} at {server.url}/v1: HTTP 500: sick"


def test_a_tolerant_caller_gets_the_failure_and_the_other_messages(serve, connect):
    server = serve(*[error(500, "sick")] * api.MAX_BAD_ANSWERS, then=echo)
    asked = ask(connect(server, max_connections=1, tolerant=True))
    assert [len(asked[i].replies) for i in range(3)] == [0, 1, 1]
    failure = asked[0].failure
    assert (failure.what, failure.transient, failure.kind) == ("HTTP 500: sick", True, "http_error")
    assert asked[0].retries == api.MAX_BAD_ANSWERS - 1


@pytest.mark.parametrize("fault, code, calls", [
    (error(500), TRY_LATER, 5 * api.MAX_BAD_ANSWERS), (error(400), REFUSED, 5)])
def test_five_failed_calls_in_a_row_stop_a_run_that_allows_four(serve, connect, fault, code, calls):
    server = serve(then=fault)
    engine = connect(server, max_connections=1, tolerant=True, max_failed=5)
    with pytest.raises(RunStopped) as stop:
        ask(engine, [f"Message {i}" for i in range(9)], seeds=None)
    assert stop.value.code == code and "5 calls failed in a row" in stop.value.what
    assert len(server.seen) == calls


def test_refused_messages_do_not_stop_a_server_that_has_answered_one(serve, connect):
    engine = connect(serve(echo, then=error(400)), max_connections=1, max_failed=5)
    asked = ask(engine, [f"Message {i}" for i in range(9)], seeds=None)
    assert [len(asked[i].replies) for i in range(9)] == [1] + [0] * 8


def test_replies_that_are_filtered_or_empty_are_no_sign_of_a_server_that_is_down(serve, connect):
    filtered = ok(choices=[{"message": {"content": ""}, "finish_reason": "content_filter"}])
    engine = connect(serve(then=filtered), max_connections=1, tolerant=True, max_failed=2)
    asked = ask(engine)
    assert [asked[i].failure.kind for i in range(3)] == ["filtered"] * 3


@pytest.mark.parametrize("fault, what", [
    (error(401), "key refused"), (error(404, "no model m"), "no such model or address: no model m"),
    (error(429, headers={"Retry-After": "3600"}), "asks to wait 3600 s")])
def test_what_stops_every_call_stops_the_run_and_names_model_and_address(
        serve, connect, fault, what):
    server = serve(fault)
    engine = connect(server, max_connections=1, tolerant=True)
    with pytest.raises(RunStopped) as stop:
        ask(engine)
    assert what in stop.value.what and len(server.seen) == 1
    assert stop.value.what.startswith(f"{engine.name} at {server.url}/v1: ")


# ---- a model of this machine --------------------------------------------------------------------


@pytest.fixture
def local(tiny_model, tokenizer) -> Local:
    return Local(tiny_model, tokenizer, {"method": "base"}, {"top_k": 20}, batch_size=2)


def test_a_local_model_draws_what_sampling_draws_from_the_same_seeds(local):
    """Three messages in batches of two; each message's replies are those of a tree of its own."""
    asked = ask(local, n=2)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, (10, 20, 30), strict=True)):
        ids = encode_prompt(local.tokenizer, prompt)
        tree = Tree(branch_prompts([ids] * 2, [0, 1]))
        [drawn] = sampling.sample(local.model, [tree], [seed], local.pad_id, local.eos_id, 16,
                                  temperature=0.7, top_k=20)
        assert texts(asked[i]) == [local.tokenizer.decode(new, skip_special_tokens=True)
                                   for new in drawn]
        for reply, new in zip(asked[i].replies, drawn, strict=True):
            assert (reply.tokens, reply.total_tokens) == (len(new), len(ids) + len(new))
            assert reply.cut == (len(new) == 16)
            assert reply.finish_reason == ("length" if reply.cut else "stop")


def test_temperature_0_takes_the_most_probable_reply_and_needs_no_seed(local):
    first, second = (ask(local, PROMPTS[:1], seeds=None, n=2, temperature=0.0) for _ in range(2))
    assert texts(first[0]) == texts(second[0]) and len(set(texts(first[0]))) == 1
    assert texts(ask(local, PROMPTS[:1], seeds=None, temperature=0.0,
                     response_format={"type": "json_object"})[0]) == texts(first[0])[:1]


def test_a_message_that_does_not_fit_fails_and_the_others_are_answered(local):
    """The tiny model has 1024 positions, of which 16 are for the reply."""
    asked = ask(local, [PROMPTS[0], "word " * 1200, PROMPTS[2]])
    assert [len(asked[i].replies) for i in range(3)] == [1, 0, 1]
    assert not asked[1].failure.transient and "1008 fit" in asked[1].failure.what
    assert local.failed == Counter({asked[1].failure.what: 1}) and local.limit == 1024


def test_a_local_model_counts_the_tokens_of_a_message_or_turns(local):
    ids = encode_prompt(local.tokenizer, "Hello?")
    assert local.count_tokens("Hello?") == len(ids)
    assert local.count_tokens([{"role": "user", "content": "Hello?"}]) == len(ids)


def test_out_of_memory_halves_the_forest_with_the_same_seeds(local, capsys):
    calls = []

    def draw(model, forest, seeds, **options):
        calls.append(seeds)
        if len(forest) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sampling.sample(model, forest, seeds, **options)

    forest = [Tree(branch_prompts([encode_prompt(local.tokenizer, p)], [0])) for p in PROMPTS]
    at_once = local.draw(sampling.sample, forest, [1, 2, 3], 8, temperature=1.0)
    assert local.draw(draw, forest, [1, 2, 3], 8, temperature=1.0) == at_once
    assert calls == [[1, 2, 3], [1], [2, 3]]
    assert "out of memory with 3 rows, trying 1 (same seeds)" in capsys.readouterr().err


def test_a_tree_that_does_not_fit_alone_and_other_errors_are_raised(local):
    def full(model, forest, **options):
        raise torch.OutOfMemoryError(f"CUDA out of memory with {len(forest)}")

    tree = Tree(branch_prompts([[1, 2, 3]], [0]))
    with pytest.raises(torch.OutOfMemoryError, match="with 1"):
        local.draw(full, [tree, tree], None, 8)
    with pytest.raises(ZeroDivisionError):
        local.draw(lambda *args, **options: 1 / 0, [tree, tree], None, 8)


def test_shared_prompt_tokens_are_counted_with_the_unconditional_ones(local):
    """Two branches: 5 shared and 2 + 2 of their own, as copies 2 x 7. Without condition 3 + 2.

    Three beams under one prompt of 4 + 1 tokens: its end is repeated, its root shared.
    """
    def draw(model, forest, **options):
        return [[[5]] * 2 for _ in forest]

    uncond = Tree(branch_prompts([[1, 2, 3, 7], [1, 2, 3, 8]], [0, 1]))
    tree = GuidedTree(branch_prompts([[1, 2, 3, 4, 5, 7, 7], [1, 2, 3, 4, 5, 8, 8]], [0, 1]),
                      uncond=uncond, guidance_scale=2.0)
    local.draw(draw, [tree], None, 8)
    assert local.figures() == {"prefill_tokens": 5 + 4 + 3 + 2,
                               "prefill_tokens_without_sharing": 14 + 8}
    local.prefilled.clear()
    local.draw(draw, [Tree(branch_prompts([[1, 2, 3, 4, 7]], [0]))], None, 8, num_beams=3)
    assert local.prefilled == {"shared": 4 + 3, "copied": 3 * 5}


# ---- which engine -------------------------------------------------------------------------------


def test_a_name_gives_a_local_model_with_what_its_checkpoint_says(tiny_dir):
    engine = engines.load_engine(f"hf:{tiny_dir}", batch_size=3, sampling={"top_p": 0.5})
    assert isinstance(engine, Local) and engine.name == f"hf:{tiny_dir}"
    assert engine.run == load_checkpoint(str(tiny_dir))[2] and engine.limit == 1024
    assert (engine.batch_size, engine.sampling) == (3, {"top_p": 0.5})


def test_a_name_gives_a_server_or_says_which_key_is_missing(monkeypatch, capsys):
    for _, key in providers.PROVIDERS.values():
        monkeypatch.delenv(key, raising=False)
    engine = engines.load_engine("together:a/b", "http://127.0.0.1:9", max_connections=3)
    assert isinstance(engine, Server) and engine.url == "http://127.0.0.1:9/v1"
    assert (engine.name, engine.model, engine.max_connections) == ("together:a/b", "a/b", 3)
    said = refused(capsys, MISSING, engines.load_engine, "openai:gpt-4o")
    assert "OPENAI_API_KEY is not set" in said


@pytest.mark.parametrize("spec, url, says", [
    ("gpt-4o", None, "is not PROVIDER:MODEL"),
    ("hf:smollm2", "http://h", "does nothing with the local model hf:smollm2")])
def test_a_name_that_cannot_work_is_refused(spec, url, says, capsys):
    assert says in refused(capsys, USAGE, engines.load_engine, spec, url)
