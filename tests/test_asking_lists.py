"""What a model writes when it is asked for a list, and the items that are read from it."""

from __future__ import annotations

import pytest

from decoding import asking


@pytest.mark.parametrize("text, items", [
    ("1. One fine day.\n2) Two of them.\n(3) Three?", ["One fine day.", "Two of them.", "Three?"]),
    ("- One fine day.\n* Two of them.\n• Three?", ["One fine day.", "Two of them.", "Three?"]),
    ('1. "One fine day."\n2. “Two of them.”', ["One fine day.", "Two of them."]),
    ("**1.** One fine day.\n**2. Two of them.**\n3. **Three?**",
     ["One fine day.", "Two of them.", "Three?"]),
    ("1. **Warm:** One fine day.\n2. Reply 2: Two of them.", ["One fine day.", "Two of them."]),
    ("Here are two replies:\n\n1. One fine day.\n2. Two.\n\nTell me if you want more!",
     ["One fine day.", "Two."]),
    ("Sure, here are some replies.\nOne fine day.\nTwo of them.\nThree?",
     ["One fine day.", "Two of them.", "Three?"]),
    ("One fine day.\nTwo of them.", ["One fine day.", "Two of them."]),
    ("One fine day.\n- Two of them.\nThree of\u2028us.",
     ["One fine day.", "Two of them.", "Three of us."]),
    ("1. One fine day,\n   all day.\n2. Two.", ["One fine day, all day.", "Two."]),
    ("1. Person B: One fine day.\n2. Possibility #2: Two.", ["One fine day.", "Two."]),
    ('```json\n[\n  "One fine day.",\n  "Two of them."\n]\n```', ["One fine day.", "Two of them."]),
    ("<think>1. A draft.</think>\n1. One fine day.", ["One fine day."]),
    ("3.5 stars from me.\n9 lives are enough.", ["3.5 stars from me.", "9 lives are enough."]),
    ("1.\n2. \n", []), ("", []),
])
def test_a_list_is_parsed_into_its_items(text, items):
    assert asking.parse_list(text) == items


def test_an_answer_cut_at_its_token_limit_loses_its_last_item():
    assert asking.parse_list("1. One fine day.\n2. Two of", cut=True) == ["One fine day."]
