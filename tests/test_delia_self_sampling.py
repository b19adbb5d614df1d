"""Method delia: the model's own answers, the cache of diverse rows."""

from __future__ import annotations

import json

import pytest
from conftest import refused, write_jsonl
from delia_cases import QUERIES, files, flags  # noqa: F401
from servers import error, ok, serve  # noqa: F401

import infer
import train
from methods.delia import self_sampling
from modeling.models import base_fingerprint


def sample(model, out, *more) -> None:
    """Draw a cache from the queries beside it."""
    model = ["--model_name_or_path", str(model)] if model else []
    infer.main(["--method", "delia", "--self_sample", "--max_new_tokens", "8", "--batch_size", "2",
                "--test_file", str(out.parent / "queries.jsonl"), "--save_file", str(out),
                *model, *more])


@pytest.fixture
def queries(tmp_path):
    return write_jsonl(tmp_path / "queries.jsonl",
                       [{"query": query, "answer": f"It was {i}."}
                        for i, query in enumerate(QUERIES[:5])])


def test_self_sampling_asks_again_after_the_reference_with_published_settings(
        tiny_dir, queries, tmp_path, monkeypatch):
    drawn = []

    def draw(model, forest, **options):
        drawn.append(options)
        return [[[65] * options["max_new_tokens"]] for _ in forest]

    monkeypatch.setattr("decoding.sampling.sample", draw)
    sample(tiny_dir, tmp_path / "cache.jsonl", "--max_new_tokens", "3")
    assert drawn[0]["temperature"] == 0.7 and drawn[0]["top_p"] == 0.95
    first = json.loads((tmp_path / "cache.draws.jsonl").read_text().splitlines()[0])
    roles, contents = zip(*[(turn["role"], turn["content"]) for turn in first["messages"]],
                          strict=True)
    assert roles == ("system", "user", "assistant", "user")
    assert contents[1:] == (QUERIES[0], "It was 0.", QUERIES[0])
    assert json.loads((tmp_path / "cache.json").read_text())["counts"]["truncated"] == 5
    assert (tmp_path / "cache.jsonl").read_text() == ""


@pytest.mark.parametrize(("more", "expected"), [
    ([], (0.7, 0.95, 512)),
    (["--temperature", "1.2", "--max_new_tokens", "9"], (1.2, 0.95, 9)),
])
def test_published_settings_of_self_sampling_give_way_to_flags(more, expected):
    args = infer.read_flags(["--method", "delia", "--self_sample", "--test_file", "q.jsonl",
                             "--save_file", "outs/none/cache.jsonl", *more])
    assert (args.temperature, args.top_p, args.max_new_tokens) == expected


def test_self_samples_make_a_cache_that_training_takes_and_a_cut_run_ends_with_the_same(
        tiny_dir, tokenizer, queries, files, tmp_path, monkeypatch):  # noqa: F811
    """The tiny model never ends by itself, so what it draws is given here, by the row's seed."""

    def draw(model, forest, seeds, **options):
        return [[tokenizer(f"Answer {seed % 9973}.", add_special_tokens=False)["input_ids"]]
                for seed in seeds]

    def written() -> tuple[bytes, bytes]:
        return cache.read_bytes(), draws.read_bytes()

    monkeypatch.setattr("decoding.sampling.sample", draw)
    cache, draws = tmp_path / "cache.jsonl", tmp_path / "cache.draws.jsonl"
    sample(tiny_dir, cache, "--max_new_tokens", "64")
    whole = written()
    rows = [json.loads(line) for line in whole[0].splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == QUERIES[:5]
    assert all(len(row["messages"]) == 2 for row in rows)
    manifest = json.loads((tmp_path / "cache.json").read_text())
    assert manifest["weights"] == base_fingerprint(str(tiny_dir))
    assert manifest["counts"]["kept"] == 5
    draws.write_bytes(whole[1][: len(whole[1]) // 2])
    sample(tiny_dir, cache, "--max_new_tokens", "64", "--resume")
    assert written() == whole
    train.main(flags(files, tiny_dir, tmp_path, "--diverse_file", str(cache),
                     "--diverse_ratio", "1", "--dry_run"))


def test_answers_that_are_cut_empty_refusals_or_repeats_are_left_out_and_counted():
    """Seven answers to one query: kept are the first and the reference's own words (copied)."""
    answers = ["By boat.", "BY BOAT", " ", "I'm sorry, but I can't help.", "It goes on and",
               "As an AI model, I do", "On foot."]
    draws = [{"prompt": "How?", "answer": "On foot", "preds": answers, "cut_at": [4],
              "warnings": {"missing": 2}}]
    rows, counts = self_sampling.keep_answers(draws)
    assert [row["messages"][1]["content"] for row in rows] == ["By boat.", "On foot."]
    assert counts == {"drawn": 7, "missing": 2, "truncated": 1, "empty": 1, "refused": 2,
                      "duplicate": 1, "kept": 2, "copied": 1}


@pytest.mark.parametrize(("text", "is_refusal"), [
    ("I'm sorry you lost your keys; call a locksmith? No: I am sorry to hear that.", True),
    ("Sorry is a card game.", False), ("The AI says no.", False),
    ("Unfortunately, it rains.", False),
])
def test_not_every_sorry_is_a_refusal(text, is_refusal):
    assert bool(self_sampling.REFUSAL.match(text)) == is_refusal


def test_a_server_gets_all_four_turns_and_its_cache_has_no_fingerprint(
        serve, queries, tmp_path):  # noqa: F811
    server = serve(ok("By boat."), error(400, "content policy"), then=ok("On foot, I think."))
    with pytest.raises(SystemExit) as stop:  # one query was refused
        sample(None, tmp_path / "cache.jsonl", "--engine", "openai:m", "--base_url", server.url,
               "--max_connections", "1")
    assert stop.value.code == 4
    body = server.seen[0][2]
    assert [turn["role"] for turn in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["temperature"] == 0.7 and body["top_p"] == 0.95
    manifest = json.loads((tmp_path / "cache.json").read_text())
    assert manifest["weights"] is None and manifest["counts"]["missing"] == 1
    assert manifest["counts"]["kept"] == 2 and manifest["counts"]["duplicate"] == 2


@pytest.mark.parametrize(("row", "more", "problem"), [
    ({"query": "Why?"}, [], 'queries.jsonl:1: field "answer" must be a string with text'),
    ({"query": "Why?", "answer": "So."}, ["--decoding", "greedy"],
     "--self_sample draws from the model as it is"),
    ({"query": "Why?", "answer": "So."}, ["--save_file", "cache.txt"], "must end in .jsonl"),
])
def test_self_sampling_refuses_what_cannot_work(tiny_dir, tmp_path, capsys, row, more, problem):
    write_jsonl(tmp_path / "queries.jsonl", [row])
    assert problem in refused(capsys, 2, sample, tiny_dir, tmp_path / "cache.jsonl", *more)


def test_a_cache_that_is_there_is_not_overwritten(tiny_dir, queries, tmp_path, capsys):
    (tmp_path / "cache.jsonl").write_text("precious\n")
    said = refused(capsys, 2, sample, tiny_dir, tmp_path / "cache.jsonl")
    assert "is already there" in said
    assert (tmp_path / "cache.jsonl").read_text() == "precious\n"
