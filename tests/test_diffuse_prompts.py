"""Prompt files of method diffuse: what is read, what is refused, what ships."""

from __future__ import annotations

import math

import pytest
from conftest import ROOT, refused
from diffuse_cases import write_prompt

import train
from flags import Args
from methods.diffuse import prompts, training


@pytest.mark.parametrize(("changes", "problem"), [
    ({"requst": "x"}, 'key "requst" is unknown'),
    ({"request": ...}, 'field "request" is missing'),
    ({"request": " "}, '"request" must be a string with text'),
    ({"response": [1]}, '"response" must be a string or a list'),
    ({"response": ["a", "a"]}, "a prefix stands twice"),
    ({"targets": "{1}"}, '"targets" must be a list'),
    ({"targets": ["{1}", " "]}, "target 2 is empty"),
    ({"targets": ["{1}", "{2}", "{1}"]}, '"{1}" stands twice, as 1 and 3'),
    ({"weights": [1, 2]}, '"weights" has 2 numbers for 3 targets'),
    ({"weights": [1, -1, 2]}, "number 2 is -1"),
    ({"weights": [1, float("nan"), 2]}, "number 2 is nan"),
    ({"weights": [0, 0, 0]}, '"weights": all are 0'),
    ({"weights": [1, True, 1]}, '"weights" must be a list of numbers'),
    ({"eos": 1}, '"eos" must be true or false'),
])
def test_faults_of_a_prompt_file_are_refused_with_file_and_field(
        tmp_path, capsys, changes, problem):
    file = write_prompt(tmp_path / "p.json", **changes)
    message = refused(capsys, 2, prompts.read_prompt, file)
    assert str(file) in message and problem in message


@pytest.mark.parametrize(("text", "problem"), [
    (b'{"request": "a", "request": "b"}', "request"), (b'{"request": ', "not JSON"),
    (b"[1]", "must be one JSON object"), (b"\xff\xfe{}", "not UTF-8"),
    (b"[" * 100_000, "not JSON")])
def test_files_that_are_no_prompt_are_refused(tmp_path, capsys, text, problem):
    (tmp_path / "p.json").write_bytes(text)
    assert problem in refused(capsys, 2, prompts.read_prompt, tmp_path / "p.json")


def test_weights_are_normalised_and_uniform_by_default(tmp_path):
    weighted = prompts.read_prompt(write_prompt(tmp_path / "a.json", weights=[2, 1, 1]))
    assert weighted["weights"] == [0.5, 0.25, 0.25]
    plain = prompts.read_prompt(write_prompt(tmp_path / "b.json"))
    assert plain["weights"] == pytest.approx([1 / 3] * 3)


def test_a_prompt_file_becomes_a_row(tmp_path):
    file = write_prompt(tmp_path / "games" / "p.json", response="I take ", eos=False)
    assert prompts.read_prompt(file) == {
        "prompt": "Pick a number.", "response": ["I take "], "targets": ["{1}", "{2}", "{12}"],
        "weights": [1 / 3] * 3, "eos": False, "file": file.as_posix(), "task": "games"}


def test_folders_are_read_in_the_order_of_names_and_a_file_given_twice_counts_once(
        tmp_path, capsys):
    for name in ("b/z.json", "a/y.json", "a/x.json"):
        write_prompt(tmp_path / name)
    files = prompts.prompt_files([str(tmp_path), str(tmp_path / "a" / "y.json")])
    names = [file.relative_to(tmp_path).as_posix() for file in files]
    assert names == ["a/x.json", "a/y.json", "b/z.json"]
    (tmp_path / "empty").mkdir()
    message = refused(capsys, 2, prompts.prompt_files, [str(tmp_path / "empty")])
    assert "holds no *.json" in message


def test_leaving_a_task_out_trains_on_the_others_and_tests_on_it(tmp_path, capsys):
    for name in ("a/x.json", "a/y.json", "b/z.json", "t/w.json"):
        write_prompt(tmp_path / name)

    def tasks(leave_out=None, leave_in=None):
        args = Args(train_file=[str(tmp_path / "a"), str(tmp_path / "b")],
                    test_prompts=[str(tmp_path / "t")], leave_out=leave_out, leave_in=leave_in)
        return [[row["task"] for row in rows] for rows in prompts.read_prompts(args)]

    assert tasks() == [["a", "a", "b"], ["t"]]
    assert tasks(leave_out="a") == [["b"], ["t", "a", "a"]]
    assert tasks(leave_in="a") == [["a", "a"], ["t"]]
    message = refused(capsys, 2, tasks, None, "c")
    assert "--leave_in c: the training prompts are of the tasks a, b" in message


@pytest.mark.parametrize(("words", "name"), [
    ([], "fruit"), (["--leave_out", "a"], "fruit_without_a"),
    (["--leave_in", "b"], "fruit_only_b")])
def test_a_run_is_named_after_the_task_that_is_left_out_or_in(words, name):
    args = train.read_flags(["--method", "diffuse", "--train_prompts", "x",
                             "--exp_name", "fruit", *words])
    assert (args.exp_name, args.run_name) == ("fruit", name)


def test_flags_that_contradict_each_other_are_refused(capsys):
    for words, problem in (
        (["--leave_out", "a", "--leave_in", "b"], "--leave_out and --leave_in exclude each other"),
        (["--load_model"], "--load_model needs --ckpt_dir"),
        (["--gamma", "-1"], "--gamma -1 must be at least 0"),
    ):
        argv = ["--method", "diffuse", "--train_prompts", "x", *words]
        assert problem in refused(capsys, 2, train.read_flags, argv)


def test_a_prompt_without_targets_can_be_sampled_and_not_trained_on(tmp_path, capsys):
    file = write_prompt(tmp_path / "p.json", targets=[])
    args = train.read_flags(["--method", "diffuse", "--train_prompts", str(file)])
    message = refused(capsys, 2, training.load_rows, args)
    assert f'{file}: field "targets" is empty' in message and "--test_prompts" in message


def test_every_shipped_prompt_is_sound_and_every_config_parses(tokenizer):
    files = prompts.prompt_files([str(ROOT / "data" / "diffuse")])
    rows = [prompts.read_prompt(file) for file in files]
    assert len(rows) > 50 and sum(len(row["targets"]) for row in rows) > 2000
    for row in rows:
        sequences = training.target_sequences(row, tokenizer)
        assert len(sequences) == len(row["targets"]) * len(row["response"])
    for config in sorted((ROOT / "configs" / "diffuse").glob("*.yaml")):
        args = train.read_flags(["--config", str(config)])
        assert args.method == "diffuse"
        assert all((ROOT / path).exists() for path in args.train_file + args.test_prompts)


def test_the_binomial_that_ships_is_binomial():
    """C(10, k) 0.2^k 0.8^(10 - k), to the digits in the file."""
    row = prompts.read_prompt(ROOT / "data" / "diffuse" / "shapes" / "binomial_a.json")
    binomial = [math.comb(10, k) * 0.2**k * 0.8 ** (10 - k) for k in range(11)]
    assert row["weights"] == pytest.approx(binomial, abs=1e-7)
