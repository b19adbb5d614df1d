"""infer.py with method diffuse: both modes, and how the model of a run is found."""

from __future__ import annotations

import json

from conftest import refused

import infer

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
