"""Rows, flags and runs of method delia that several test files share."""

from __future__ import annotations

import json

import pytest
from conftest import write_jsonl

import train
from flags import Args, parse_flags
from modeling.models import base_fingerprint

JSON = '{"thought": "It is so.", "label": "correct"}'


def talk(*contents: str, system: str | None = None) -> dict:
    """A row of messages by user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content}
             for i, content in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


TASK = [talk("Is the sea wet? Use <sep>.", JSON),
        talk("Is the cat dry? Use <sep>.", JSON.replace("correct", "error")),
        talk("Is the train red? Not in <sep>.", "No, it is wrong."),
        talk("Is tea hot?", "Yes, that is right.")]
QUERIES = [f"What did {who} say on day {day}?"
           for who in ("Grandma", "the man", "uncle") for day in range(1, 9)]
CACHE = [talk(query, f"On that day {i} cats sat on the board.") for i, query in enumerate(QUERIES)]


@pytest.fixture(scope="session")
def files(tmp_path_factory, tiny_dir):
    """(folder, task file, cache file) with a manifest of the tiny model."""
    folder = tmp_path_factory.mktemp("delia")
    manifest = {"weights": base_fingerprint(str(tiny_dir))}
    (folder / "cache.json").write_text(json.dumps(manifest))
    return (folder, write_jsonl(folder / "task.jsonl", TASK),
            write_jsonl(folder / "cache.jsonl", CACHE))


def flags(files, tiny_dir, out, *more) -> list[str]:
    """A command of train.py on the tiny model: two rows a step, no warm-up."""
    return ["--method", "delia", "--model_name", str(tiny_dir), "--train_file", str(files[1]),
            "--diverse_file", str(files[2]), "--new_tokens", "<sep>", "--output_dir", str(out),
            "--lora_r", "4", "--learning_rate", "1e-2", "--lr_warmup_steps", "0",
            "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1",
            "--loss_steps", "1", *more]


def without_cache(argv: list[str]) -> list[str]:
    """The same command without --diverse_file."""
    place = argv.index("--diverse_file")
    return argv[:place] + argv[place + 2:]


def settings(**more) -> Args:
    """The default flags of training, and others in their place."""
    return parse_flags(train.build_parser("delia"), ["--train_file", "x"]).with_values(**more)


@pytest.fixture(scope="session")
def runs(files, tiny_dir, tmp_path_factory):
    """Three runs of two passes over the task.

    zero: ratio 0 with a cache; plain: the same without one; two: ratio 2, stratified.
    """
    out = tmp_path_factory.mktemp("runs")

    def run(name: str, *more: str) -> list[str]:
        return flags(files, tiny_dir, out, "--exp_name", name, "--num_train_epochs", "2",
                     "--lora_dropout", "0.0", *more)

    train.main(run("zero", "--diverse_ratio", "0"))
    train.main(without_cache(run("plain", "--diverse_ratio", "0")))
    train.main(run("two", "--diverse_ratio", "2", "--mix", "stratified"))
    return out
