"""The benchmarks run through on the tiny model, count tokens rightly, and end with a JSON line; no time is tested."""

from __future__ import annotations

import json

import pytest
from conftest import DIALOGUES, command, write_jsonl


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory):
    """Sixty contexts, enough to join them into long ones."""
    rows = [{**DIALOGUES[i % 4], "context": f"{i}. " + DIALOGUES[i % 4]["context"]} for i in range(240)]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


def run(what: str, tiny_dir, rows, tmp_path) -> dict:
    done = command("benchmarks/speed.py", what, "--model_name", tiny_dir, "--train_file", rows, "--num_contexts", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_training_is_compared_at_equal_losses(tiny_dir, many_rows, tmp_path):
    result = run("train", tiny_dir, many_rows, tmp_path)
    assert result["loss_difference"] < 1e-5 and result["ratio"] > 0 and result["flop_share"] > 0
    assert result["padded_tokens"] > 3 * result["tree_tokens"]
    assert [line["value"] for line in result["growth"]] == [2, 4, 8, 100, 200, 400, 800, 1, 2, 4]


def test_decoding_is_compared_and_shared_prompts_are_counted(tiny_dir, many_rows, tmp_path):
    """Five copies of nearly equal prompts: almost five times the tokens."""
    result = run("decode", tiny_dir, many_rows, tmp_path)
    assert result["shared_prefill_ratio"] > 0 and result["diverse_over_beam"] > 0
    assert 4.5 < result["prompt_tokens_without_sharing"] / result["prompt_tokens"] < 5
    assert len(result["growth"]) == 11


def test_a_trie_of_targets_is_compared_at_equal_losses(tiny_dir, many_rows, tmp_path):
    """100 targets of about 4 tokens behind a request of 40 and more: more than ten times the tokens as rows."""
    result = run("diffuse", tiny_dir, many_rows, tmp_path)
    assert result["loss_difference"] < 1e-5 and result["targets"] == 100 and result["ratio"] > 0
    assert result["padded_tokens"] > 10 * result["tokens"] and [line["targets"] for line in result["growth"]] == [10, 50, 200]
