"""What the tests of training share: a command for the tiny model, and what a checkpoint holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import train
import trees
from flags import Args

TINY = ["--lora_target_modules", "q_proj", "v_proj", "--lora_r", "4", "--lora_dropout", "0.1",
        "--learning_rate", "1e-2", "--max_steps", "-1", "--save_steps", "4", "--loss_steps", "2",
        "--gradient_accumulation_steps", "2"]


def command_for(model_dir, train_file, out: Path, *more: str) -> list[str]:
    """Flags of train.py for a short run of peft; later ones win."""
    return ["--model_name", str(model_dir), "--train_file", str(train_file),
            "--output_dir", str(out), *TINY, *more]


def peft_flags(*words: str) -> Args:
    """The flags of a command of train.py, for rows and trees without a run."""
    return train.read_flags(["--train_file", "x", "--max_length", "500",
                             "--max_input_length", "300", *words])


def train_whole(model_dir, train_file, out: Path) -> Path:
    """A run of 5 epochs over 4 rows, never interrupted.

    20 micro-steps, two to an update, saved every 4: check_4, check_8 ... check_20.
    """
    train.main(command_for(model_dir, train_file, out, "--exp_name", "whole",
                           "--num_train_epochs", "5"))
    return out / "whole"


def digest(checkpoint: Path) -> str:
    """A hash of the adapter's bytes."""
    return hashlib.sha256((checkpoint / "adapter_model.safetensors").read_bytes()).hexdigest()


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def read_run(checkpoint: Path) -> dict:
    """run.json of a checkpoint."""
    return json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))


def segments(tree, role: int) -> list[tuple]:
    """The paths from the root to every segment of a role."""
    return [path for path in trees.walk(tree.root) if path[-1].role == role]
