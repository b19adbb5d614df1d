"""Texts, labels and a trained checkpoint of method control that several test files share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import DIALOGUES, make_model, make_tokenizer, write_jsonl

import train
from flags import Args
from methods.control import attributes

SCHEMA = {
    "toxicity": {"values": ["nontoxic", "toxic"], "thresholds": [0.5],
                 "scorer": "alt-profanity-check", "version": "1.9.1"},
    "sentiment": {"values": ["neg", "neu", "pos"], "thresholds": [-0.05, 0.05],
                  "scorer": "vaderSentiment", "version": "3.3.2"}}
ROW = {"text": "I love this day.", "values": {"toxicity": "nontoxic", "sentiment": "pos"}}
DOCUMENTS = [{"texts": row["candidates"] + row["context"].split("\n")} for row in DIALOGUES] + [
    {"text": "I love this lovely day! It is great, says Dr. No. This is an awful, terrible mess. "
             "123. Is it not sad?"},
    {"texts": ["What a wonderful, happy surprise.", "You are a stupid fool and I hate you.",
               "The bus leaves at nine."]}]
TRAIN = ["--method", "control", "--train_file", "data/train.jsonl", "--model_name", "tiny",
         "--max_length", "120", "--lora_r", "2", "--learning_rate", "1e-2",
         "--num_train_epochs", "4", "--per_device_train_batch_size", "8",
         "--attributes", "sentiment"]


def arguments(**changes) -> Args:
    """The flags of training that the hooks look at."""
    return Args(**{
        "schema": SCHEMA, "attributes": list(SCHEMA), "max_length": 64, "from_scratch": False,
        "lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "load_in_4bit": False,
        "gradient_checkpointing": False, "lora_target_modules": ["q_proj", "v_proj"], **changes})


def with_spare(count: int):
    """The tiny tokenizer with so many reserved tokens; their rows are there, as in a real model."""
    tokenizer = make_tokenizer("bytelevel")
    spare = [f"<|reserved_special_token_{i}|>" for i in range(count)]
    tokenizer.add_special_tokens({"additional_special_tokens": spare})
    return tokenizer


def labelled(texts: list[str]) -> tuple[list[dict], dict]:
    """The rows and the schema of some texts; half of them count as toxic."""
    schema, scores = {}, [{} for _ in texts]
    for name in ("toxicity", "sentiment"):
        attribute = attributes.ATTRIBUTES[name]
        scorer, version = attributes.load_scorer(attribute.scorer)
        for own, score in zip(scores, scorer(texts), strict=True):
            own[name] = score
        given = ("q0.5",) if name == "toxicity" else attribute.thresholds
        thresholds = attributes.resolve_thresholds(name, given, [own[name] for own in scores])
        schema[name] = {"values": list(attribute.values), "thresholds": thresholds,
                        "scorer": attribute.scorer, "version": version}
    rows = [{"text": text, "values": attributes.values_of(own, schema)}
            for text, own in zip(texts, scores, strict=True)]
    return rows, schema


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with data, the tiny model, and a checkpoint that train.py has made of both."""
    folder = tmp_path_factory.mktemp("control")
    texts = [text for document in DOCUMENTS for text in document.get("texts", [])]
    rows, schema = labelled(texts)
    rows[0]["unconditioned"] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        tokenizer = make_tokenizer("bytelevel")
        make_model(len(tokenizer)).save_pretrained("tiny")
        tokenizer.save_pretrained("tiny")
        Path("data").mkdir()
        write_jsonl(folder / "data" / "train.jsonl", rows)
        Path("data/manifest.json").write_text(json.dumps({"schema": schema}))
        train.main([*TRAIN, "--exp_name", "sen"])
    return folder


@pytest.fixture
def in_folder(trained, monkeypatch) -> Path:
    """The checkpoint, in whose folder the test runs."""
    monkeypatch.chdir(trained)
    return next((trained / "checkpoints" / "sen").glob("check_*"))
