"""One folder per paper, the only place where its name is known.

Every folder has the same four files, and in them the same functions in the same order: flags.py,
training.py, inference.py, evaluation.py. A step that a method leaves as it is is a visible line
(`order_rows = defaults.shuffled`).
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

METHODS = {  # --method, and the folder of its paper
    "peft": "possibility",
    "otm": "possibility",
    "oto": "possibility",
    "base": "possibility",
    "diffuse": "diffuse",
    "spt": "spt",
    "delia": "delia",
    "control": "control",
}


def load(method: str, part: str) -> ModuleType:
    """A method's flags, training, inference or evaluation; all but the first import torch."""
    return import_module(f"methods.{METHODS[method]}.{part}")
