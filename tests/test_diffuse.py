"""infer.py with method diffuse: both modes, and how the model of a run is found."""

from __future__ import annotations

import json

import pytest
from conftest import refused
from diffuse_cases import write_prompt

import infer
import train
from methods.diffuse import inference

pytest_plugins = ["diffuse_cases"]  # its fixtures


def test_both_modes_name_themselves_and_draw_exactly_as_many_as_asked(sampled):
    """150 replies in batches of 40: 4 prefills, no remainder lost."""
    for file, mode in zip(sampled, ("untuned", "lora"), strict=True):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert [len(row["preds"]) for row in rows] == [150, 150]
        assert all(row["mode"] == mode for row in rows)
        summary = json.loads(file.with_suffix(".json").read_text())
        assert summary["settings"]["mode"] == mode
        assert summary["settings"]["method"] == "diffuse"


def test_sampling_without_a_mode_or_a_checkpoint_is_refused(diffuse_config, capsys):
    argv = ["--method", "diffuse", "--config", str(diffuse_config)]
    message = refused(capsys, 2, infer.main, [*argv, "--save_file", "x.jsonl"])
    assert "--mode" in message and "untuned" in message
    message = refused(capsys, 2, infer.main, [*argv, "--mode", "lora", "--exp_name", "none"])
    assert "holds no whole checkpoint" in message


@pytest.mark.parametrize("with_config", [False, True])
def test_the_next_command_samples_all_prompts_of_the_run(with_config, tmp_path, diffuse_config):
    """Flags beside a config replace what stands in it, also in the command that follows."""
    for name in ("a", "b"):
        write_prompt(tmp_path / name / "x.json")
    argv = ["--method", "diffuse", "--train_prompts", f"{tmp_path}/a", "--test_prompts",
            f"{tmp_path}/b", *(["--config", str(diffuse_config)] if with_config else [])]
    trained_with = train.read_flags(argv)
    command = inference.next_command(trained_with, tmp_path)
    command[command.index("lora")] = "untuned"  # nothing was trained
    args = infer.read_flags(command)
    rows = inference.load_rows(args.with_values(named_prompts=True), {})
    assert [(row["task"], row["split"]) for row in rows] == [("a", "train"), ("b", "test")]
