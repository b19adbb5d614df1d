"""What the tests of eval.py share: rows, files of responses, and the script on the tiny model."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from conftest import DIALOGUES, write_jsonl

from scoring import sources

script = importlib.import_module("eval")  # a built-in has the same name

# 12 rows: enough for the local judge to set its threshold
ROWS = [{**row, "context": f"{row['context']} ({i})"} for i in range(3) for row in DIALOGUES]


@pytest.fixture
def score(monkeypatch, embedder, tiny_dir):
    """score(files, save_file, *flags): eval.py with the tiny model as its local judge's base.

    Everything is the real thing, the judge's calibration too; only the embedder is loaded already.
    Returns the summary that was written.
    """
    monkeypatch.setattr(sources, "load_embedder", lambda: embedder)

    def run(files, save_file: Path, *flags) -> dict:
        script.main(["--eval_file", *map(str, files), "--save_file", str(save_file),
                     "--judge_model", str(tiny_dir), *map(str, flags)])
        return json.loads(save_file.with_suffix(".json").read_text(encoding="utf-8"))

    return run


@pytest.fixture
def outs(tmp_path) -> Path:
    """Two systems over the same rows: echo repeats one good reply, varied gives two references."""
    folder = tmp_path / "outs"
    folder.mkdir()
    write_jsonl(folder / "echo.jsonl",
                [{**row, "preds": [row["candidates"][0]] * 3} for row in ROWS])
    write_jsonl(folder / "varied.jsonl",
                [{**row, "preds": [*row["candidates"][:2], ""]} for row in ROWS])
    (folder / "echo.json").write_text('{"seconds_per_row": 0.5}')
    return folder


def drawn_by(path: Path, method: str, rows: list[dict], **settings) -> Path:
    """A file of responses as infer.py leaves it, drawn from a server by a method."""
    settings = {"method": method, "engine": "openai", "model_name_or_path": "m", **settings}
    path.with_suffix(".json").write_text(json.dumps({"settings": settings}))
    return write_jsonl(path, rows)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
