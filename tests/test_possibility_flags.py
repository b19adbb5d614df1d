"""Possibility exploration fine-tuning: what flags mean, one prompt for training and inference."""

from __future__ import annotations

import random

import pytest
from conftest import DIALOGUES, refused, write_jsonl
from training_cases import peft_flags, segments

from methods.possibility import inference, training
from modeling.prompts import build_prompt, encode_prompt
from trees import LIKELIHOOD

BOATS = {"prompt": "Name a boat.", "candidates": ["Gull", "Ada", "Tern", "Mole"]}


@pytest.mark.parametrize("row", [DIALOGUES[0], BOATS])
@pytest.mark.parametrize("words", [[], ["--no_ul"]])
def test_inference_shows_the_very_prompts_of_training(tokenizer, row, words):
    args = peft_flags(*words)
    tree = training.build_tree(row, tokenizer, args, random.Random(2))
    trained = {path[1].branch if args.numbered_prompts else None:
               [token for segment in path[:-1] for token in segment.input_ids]
               for path in segments(tree, LIKELIHOOD)}
    drawing = args.with_values(num_branches=9, max_new_tokens=10)
    asked = inference.decode_tree(row, tokenizer, drawing).root
    for child in asked.children:
        key = child.branch if args.numbered_prompts else None
        if key in trained:
            assert asked.input_ids + child.input_ids == trained.pop(key)
    assert not trained and len(asked.children) == 9


@pytest.mark.parametrize("row", [DIALOGUES[0], BOATS])
def test_an_untuned_model_is_asked_without_a_number_and_with_a_length(tokenizer, row):
    drawing = peft_flags().with_values(method="base", num_branches=3, max_new_tokens=9)
    root = inference.decode_tree(row, tokenizer, drawing).root
    prompt = encode_prompt(tokenizer, build_prompt(row, base=True))
    assert [root.input_ids + child.input_ids for child in root.children] == [prompt] * 3
    text = tokenizer.decode(prompt)
    assert "25 words" in text and "#" not in text


@pytest.mark.parametrize(("words", "method", "numbered", "replies"), [
    ("", "peft", True, 4),
    ("--no_ul", "otm", False, 4),
    ("--no_ul --numbered_prompts", "peft", True, 4),
    ("--no_ul --number", "peft", True, 4),
    ("--method otm", "otm", False, 4),
    ("--method otm --num_response_per_input 1", "oto", False, 1),
    ("--method oto", "oto", False, 1),
    ("--no_ul --num_response_per_input 1", "oto", False, 1),
])
def test_flags_come_to_one_method(words, method, numbered, replies):
    args = peft_flags(*words.split())
    assert (args.method, args.numbered_prompts, args.num_response_per_input) == \
        (method, numbered, replies)
    assert args.no_ul is (words != "")


@pytest.mark.parametrize(("words", "problem"), [
    ("--num_response_per_input 10",
     "--num_response_per_input 10 needs 10 distinct numbers, --max_pos_number is 9"),
    ("--no_numbered_prompts", "--no_numbered_prompts without --no_ul"),
    ("--no-number", "--no_numbered_prompts without --no_ul"),
    ("--method otm --numbered_prompts", "drop --numbered_prompts"),
    ("--method oto --num_response_per_input 2", "use --method otm"),
    ("--num_response_per_input 0", "--num_response_per_input 0 must be at least 1"),
    ("--ul_weight -0.5", "--ul_weight -0.5 must be at least 0"),
    ("--max_num_negatives_per_sample -1", "--max_num_negatives_per_sample -1 must be at least 0"),
])
def test_flags_that_contradict_each_other_are_refused(capsys, words, problem):
    assert problem in refused(capsys, 2, peft_flags, *words.split())


def test_rows_with_few_or_repeated_replies_are_counted(tmp_path, capsys):
    """Of the first three replies; the fourth of the second row repeats one, but is not used."""
    rows = [{"prompt": "Name a boat.", "candidates": ["Gull", "Ada"]},
            {"prompt": "Name a boat.", "candidates": ["Gull", "Ada", "Tern", "Ada"]},
            {"prompt": "Name a boat.", "candidates": ["Gull", "gull!", "Tern"]}]
    file = write_jsonl(tmp_path / "boats.jsonl", rows)
    args = peft_flags("--num_response_per_input", "3", "--train_file", str(file))
    assert training.load_rows(args) == rows
    said = capsys.readouterr().err
    assert "1 of 3 rows have fewer than 3 candidates" in said
    assert "1 of 3 rows repeat a candidate" in said
