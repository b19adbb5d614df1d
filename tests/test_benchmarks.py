"""The benchmarks run through on the tiny model and count tokens rightly; no time is tested."""

from __future__ import annotations

import json

import pytest
from conftest import DIALOGUES, ROOT, refused, write_jsonl

from benchmarks import named, speed, unchanged
from utils import USAGE


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory):
    """240 contexts, enough to join them into long ones."""
    rows = [{**DIALOGUES[i % 4], "context": f"{i}. " + DIALOGUES[i % 4]["context"]}
            for i in range(240)]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


@pytest.fixture
def run(tiny_dir, many_rows, capsys):
    """Run a comparison on the tiny model: the JSON object of its last line."""

    def measure(what: str) -> dict:
        speed.main([what, "--model_name", str(tiny_dir), "--train_file", str(many_rows),
                    "--num_contexts", "2"])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return measure


def test_training_is_compared_at_equal_losses(run):
    result = run("train")
    assert result["loss_difference"] < 1e-5 and result["ratio"] > 0 and result["flop_share"] > 0
    assert result["padded_tokens"] > 3 * result["tree_tokens"]
    assert [line["value"] for line in result["growth"]] == [2, 4, 8, 100, 200, 400, 800, 1, 2, 4]
    assert {"device", "torch", "threads"} <= set(result)


def test_decoding_is_compared_and_shared_prompts_are_counted(run):
    """Five copies of nearly equal prompts: almost five times the tokens."""
    result = run("decode")
    assert result["shared_prefill_ratio"] > 0 and result["diverse_over_beam"] > 0
    assert 4.5 < result["prompt_tokens_without_sharing"] / result["prompt_tokens"] < 5
    assert len(result["growth"]) == 11


def test_a_trie_of_targets_is_compared_at_equal_losses(run):
    """100 targets of about 4 tokens after a request of 40 or more: over ten times the tokens."""
    result = run("diffuse")
    assert result["loss_difference"] < 1e-5 and result["targets"] == 100 and result["ratio"] > 0
    assert result["padded_tokens"] > 10 * result["tokens"]
    assert [line["targets"] for line in result["growth"]] == [10, 50, 200]


def test_an_unknown_comparison_is_refused(capsys):
    assert "invalid choice: 'infer'" in refused(capsys, USAGE, speed.main, ["infer"])


# ---- unchanged ----------------------------------------------------------------------------------


def test_every_way_to_draw_has_a_run_after_the_one_that_trains_its_model():
    names = [run.name for run in unchanged._all_runs()]
    assert len(set(names)) == len(names)
    methods = ("peft", "otm", "diffuse", "delia", "spt", "control")
    trained = [f"{method}/weights" for method in methods]
    assert [name for name in names if name.endswith("/weights")] == trained
    for name in names:
        system = name.partition("/")[0]
        assert system == "base" or names.index(f"{system}/weights") <= names.index(name)
    chosen = [run.name for run in unchanged._chosen_runs("spt/beam")]
    assert chosen == ["spt/weights", "spt/beam"], "the model is trained for a single run as well"


def test_the_hash_of_a_run_is_the_same_twice_and_another_for_another_seed(tmp_path):
    """A short run of this checkout on a model that is hardly trained: all texts are hashed."""
    unchanged._write_data(tmp_path)
    unchanged.PRETRAINING_STEPS, steps = 2, unchanged.PRETRAINING_STEPS
    try:
        unchanged._make_model(tmp_path / "base")
    finally:
        unchanged.PRETRAINING_STEPS = steps
    [run] = unchanged._chosen_runs("base/top")
    first = unchanged._carry_out(run, ROOT, tmp_path)
    assert first[1].startswith("15 texts, ")  # 5 rows, 3 responses each
    (tmp_path / run.output).unlink()
    assert unchanged._carry_out(run, ROOT, tmp_path) == first
    (tmp_path / run.output).unlink()
    seeded = run._replace(argv=[*run.argv, "--seed", "1"])
    assert unchanged._carry_out(seeded, ROOT, tmp_path)[0] != first[0]


def test_a_run_that_fails_says_why_in_place_of_a_hash(tmp_path):
    run = unchanged.Run("base/x", ["infer.py"], "outs/x.jsonl", "preds")
    digest, what = unchanged._carry_out(run, ROOT, tmp_path)
    assert digest.startswith("failed: error: the following arguments are required") and not what


def test_a_right_answer_is_named_as_whole_words_and_the_longest_one_counts(tmp_path, capsys):
    answers = [["rye"], ["sea bass", "Sea-Bass"], ["bass"], ["ox"]]
    assert named.named_answer("It is a sea bass!", answers) == 1
    assert named.named_answer("A BASS.", answers) == 2
    assert named.named_answer("a bassoon, an ox", answers) is None
    rows = [{"prompt": "?", "answers": answers, "preds": ["a bass", "the bass", "sea-bass", "no"]},
            {"prompt": "?", "rule": {"kind": "integer"}, "preds": ["1", "2", "3", "4"]}]
    file = write_jsonl(tmp_path / "x.jsonl", rows)
    named.main([str(file)])
    assert "1 rows; 2.00 different" in (printed := capsys.readouterr().out)
    assert "75% of the replies" in printed
