"""The one prompt builder: which turns stay, what a reply ends with, what data may not contain."""

from __future__ import annotations

import pytest
from conftest import DIALOGUES, make_tokenizer, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.prompts import (
    build_prompt,
    count_words,
    end_of_turn,
    fit_prompts,
    keep_latest,
    label_turns,
    refuse_special_tokens,
)

WORDS = st.lists(st.text("abcé", min_size=1, max_size=4), min_size=1, max_size=6)
SPOKEN = st.lists(WORDS.map(" ".join), min_size=1)


def test_the_last_turn_is_always_person_a():
    turns = ["Person A: Is a tomato a fruit?", "Person B: Only in botany.", "Person A: Why?"]
    assert label_turns("Is a tomato a fruit?\nOnly in botany.\nWhy?") == turns
    assert label_turns(["Only in botany.", "Why?"]) == turns[1:]


@pytest.mark.parametrize(("budget", "kept"), [
    (15, ["Person A: one two", "Person B: three", "Person A: four five six"]),
    (14, ["Person B: three", "Person A: four five six"]),
    (10, ["Person B: three", "Person A: four five six"]),
    (9, ["Person A: four five six"]),
    (5, ["Person A: five six"]),
    (1, ["Person A: six"]),
])
def test_the_newest_turns_stay_to_the_word(budget, kept):
    """'Person', 'A', ':' are 3 words, so the turns have 5, 4 and 6: 15, or 10 without the first."""
    assert keep_latest(label_turns("one two\nthree\nfour five six"), budget) == kept


@settings(deadline=None)
@given(SPOKEN, st.integers(1, 40))
def test_what_is_kept_is_a_suffix_and_never_empty(spoken, budget):
    kept = keep_latest(turns := label_turns(spoken), budget)
    assert kept[:-1] == turns[-len(kept):-1]
    assert len(kept[-1]) > len("Person A: ")
    assert turns[-1].endswith(kept[-1].removeprefix("Person A: "))
    assert count_words("\n".join(kept)) <= max(budget, 4)


def test_all_prompts_of_a_row_lose_the_same_oldest_turns(tokenizer):
    """Digits are tokens, so prompt 10 is one longer than prompt 1.

    Where it just does not fit, both lose a turn.
    """
    row = DIALOGUES[0]
    (short, long), dropped = fit_prompts(row, [1, 10], tokenizer, 1000, 1000)
    assert (len(long), dropped) == (len(short) + 1, 0)
    assert fit_prompts(row, [1, 10], tokenizer, 1000, len(long)) == ([short, long], 0)
    prompts, dropped = fit_prompts(row, [1, 10], tokenizer, 1000, len(short))
    assert dropped == 1 and len(prompts) == 2
    rest = "\n\nPerson B: Only in a botany class.\nPerson A: Then why"
    for text in map(tokenizer.decode, prompts):
        assert "Is a tomato" not in text and rest in text
    assert fit_prompts(row, [1, 10], tokenizer, 1000, 9) == ([], 3)
    assert fit_prompts({"prompt": "Name a fruit."}, [1], tokenizer, 1000, 9) == ([], 0)


def test_a_newest_turn_without_its_start_counts_as_a_dropped_turn(tokenizer):
    """'Person A: Then why is it in my salad?' has 11 words; 10 leave it alone, without 'Then'."""
    prompts, dropped = fit_prompts(DIALOGUES[0], [None], tokenizer, 10, 1000)
    assert dropped == 3
    assert "\n\nPerson A: why is it in my salad?\n" in tokenizer.decode(prompts[0])


def test_a_reply_ends_with_the_token_of_its_template_not_with_eos():
    # the eos of Llama 3's base and of many fine-tunes is not the end of a turn
    tokenizer = make_tokenizer("bytelevel")
    tokenizer.eos_token = "<unk>"
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id


@pytest.mark.parametrize("mark", ["<|im_end|>", "[TOOL]"])
def test_a_row_that_contains_a_special_or_added_token_is_named(capsys, mark):
    tokenizer = make_tokenizer("bytelevel")
    tokenizer.add_tokens(["[TOOL]"])
    rows = [{"context": "I <3 |im_end| [really].", "candidates": ["1 < 2"]}]
    assert refuse_special_tokens(rows, tokenizer, "talk.jsonl") is None
    rows.append({"context": "Hi.", "candidates": ["Ho.", f"Hm.{mark}\nuser"]})
    message = refused(capsys, 2, refuse_special_tokens, rows, tokenizer, "talk.jsonl")
    assert f"talk.jsonl: row 2 contains the special token {mark}" in message
    assert refuse_special_tokens(rows, tokenizer, "talk.jsonl", [mark]) is None


def test_a_request_whose_answers_can_be_checked_gets_no_second_instruction():
    """The untuned model is asked as the tuned one is: "Answer with the name only." stands alone."""
    request = "Name a bird. Answer with the name only."
    for ruler in ({"answers": [["crow"]]}, {"rule": {"type": "integer", "min": 1, "max": 9}}):
        assert build_prompt({"prompt": request, **ruler}, base=True) == request
    assert build_prompt({"prompt": request}, base=True).endswith("Answer, in at most 25 words.")
