"""Forests that the tests of decoding draw from: three dialogues, with or without numbers."""

from __future__ import annotations

from conftest import DIALOGUES

from modeling.prompts import encode_prompt
from trees import Tree, branch_prompts

PAD = 0


def numbered(tokenizer, row: dict, numbers: list[int]) -> list[list[int]]:
    """The prompts of a row, one a number."""
    return [encode_prompt(tokenizer, f"{row['context']}\npossibility number #{k}")
            for k in numbers]


def forest_of(tokenizer, branches: int = 1) -> list[Tree]:
    numbers = list(range(1, branches + 1))
    return [Tree(branch_prompts(numbered(tokenizer, row, numbers), numbers))
            for row in DIALOGUES[:3]]
