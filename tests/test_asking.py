"""Lists, replies one after the other, and replies with probabilities.

What is asked, and how answers are read.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from conftest import DIALOGUES

from decoding import asking
from decoding.engines import Asked
from decoding.replies import Drawn, Reply
from flags import Args

ROW = DIALOGUES[0]


class Scripted:
    """An engine that gives prepared answers, one a call, and remembers what it was asked."""

    def __init__(self, *answers: str, cut: bool = False):
        self.answers, self.cut, self.seen = list(answers), cut, []

    def count_tokens(self, message: str) -> int:
        return len(message)

    def ask(self, messages, seeds, number, max_new_tokens, temperature):
        for index, (message, seed) in enumerate(zip(messages, seeds, strict=True)):
            self.seen.append((message, seed, temperature))
            text = self.answers.pop(0) if self.answers else ""
            yield Asked(index, [] if text == "refused" else [Reply(text, 7, self.cut)])


def flags(decoding: str, **changes) -> Args:
    return Args(
        decoding=decoding,
        num_drawn=3,
        max_retries=2,
        temperature=0.8,
        seed=1,
        max_new_tokens=10,
        max_input_length=100,
        max_length=10_000,
    ).with_values(**changes)


def ask(engine, decoding: str, **changes) -> Drawn:
    [row] = asking.draw_in_words(engine, [ROW], flags(decoding, **changes), [0])
    return row


def test_a_list_is_asked_for_greedily_and_what_is_missing_again_by_sampling():
    """Two of three at first.

    The second request shows them, asks for one, and gets two, of which one is old.
    """
    engine = Scripted("1. Yes.\n2. No.", "- no.\n- Maybe.")
    row = ask(engine, "list")
    assert row.texts == ["Yes.", "No.", "Maybe."] and (row.asked, row.parsed, row.tokens) == (
        4,
        3,
        14,
    )
    (first, _, greedy), (second, _, sampled) = engine.seen
    assert (
        "list of 3 replies" in first
        and "list of 1 new reply" in second
        and "- Yes.\n- No." in second
    )
    assert (greedy, sampled) == (0.0, 0.8) and all(
        turn in first for turn in ROW["context"].split("\n")
    )


def test_a_list_that_never_fills_ends_with_what_it_got_after_the_retries():
    """One reply, then the same one for ever: 1 + 2 calls, with three seeds of their own."""
    engine = Scripted(*["1. Yes."] * 9)
    assert ask(engine, "list").texts == ["Yes."]
    assert len(engine.seen) == 3 and len({seed for _, seed, _ in engine.seen}) == 3


def test_a_refused_call_is_counted_and_the_others_go_on():
    row = ask(Scripted("refused", "1. Yes.\n2. No.\n3. Maybe."), "list")
    assert row.texts == ["Yes.", "No.", "Maybe."] and row.failed == 1


def test_each_turn_shows_the_earlier_replies_and_repeats_do_not_count():
    """Four turns for three replies, since the third repeats the first in another case."""
    engine = Scripted("Yes.", "No.", "YES.", "Person B: Maybe.")
    assert ask(engine, "iterative").texts == ["Yes.", "No.", "Maybe."]
    shown = [
        [text for text in ("- Yes.", "- No.") if text in message] for message, _, _ in engine.seen
    ]
    assert shown == [[], ["- Yes."], ["- Yes.", "- No."], ["- Yes.", "- No."]]


def test_turns_stop_when_the_earlier_replies_leave_no_room():
    """300 characters of room.

    The first request fits without its oldest turns, the one that shows a long reply does not.
    """
    engine = Scripted("A long reply. " * 40, "No.")
    assert len(ask(engine, "iterative", max_length=310).texts) == 1 and len(engine.seen) == 1


def test_the_oldest_turns_go_until_a_request_fits():
    text, dropped = asking.fit_request(Scripted(), ROW, [], flags("iterative", max_length=160))
    assert (
        dropped == 1
        and "Then why is it in my salad?" in text
        and "Is a tomato a fruit?" not in text
    )
    assert asking.fit_request(Scripted(), ROW, [], flags("iterative", max_length=60)) == (None, 2)


def tagged(text: str, probability: str) -> str:
    return f"<response><text>{text}</text><probability>{probability}</probability></response>"


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        (tagged("Yes.", "0.5") + "\n" + tagged('"No."', "0.25"), [("Yes.", 0.5), ("No.", 0.25)]),
        ("Sure!\n" + tagged("Yes.", "40%") + " and so on", [("Yes.", 0.4)]),
        (tagged("Yes.", " 1 "), [("Yes.", 1.0)]),
        (tagged("Yes.", "0"), []),
        (tagged("Yes.", "1.5"), []),
        (tagged("Yes.", "high"), []),
        (tagged("Yes.", "0.1.2"), []),
        (tagged("Yes.", "-0.3"), []),
        (tagged("  ", "0.3"), []),
        ("1. Yes. (0.3)", []),
        ("<response><text>Yes.", []),
        (tagged("One\nline.", "0.3"), [("One line.", 0.3)]),
        (tagged("Yes.", "300%"), []),
    ],
)
def test_only_whole_responses_with_a_probability_are_read(answer, want):
    assert asking.parse_verbalized(answer) == want


def test_replies_are_drawn_by_their_probabilities_without_replacement():
    """Weights 6, 3, 1 of 10. First place: 0.6, 0.3, 0.1. Order (6, 3, 1): 0.6 x 3/4 = 0.45.

    20,000 draws, each within 0.015.
    """
    weighted, rng = [("a", 0.6), ("b", 0.3), ("c", 0.1)], random.Random(0)
    orders = [tuple(asking.draw_without_replacement(weighted, rng)) for _ in range(20_000)]
    firsts = Counter(order[0] for order in orders)
    for text, p in weighted:
        assert abs(firsts[text] / 20_000 - p) < 0.015
    assert abs(orders.count(("a", "b", "c")) / 20_000 - 0.45) < 0.015 and all(
        len(set(order)) == 3 for order in orders
    )


def test_a_verbalized_row_counts_what_could_be_read_and_is_the_same_for_one_seed():
    """Three asked, two whole ones read; the second answer brings two more, so all are there.

    4 of 6.
    """
    answers = [
        tagged("Yes.", "0.5") + tagged("No.", "0.2") + tagged("Hm.", "?"),
        tagged("Maybe.", "0.1") + tagged("Why?", "0.1"),
    ]
    row = ask(Scripted(*answers), "verbalized")
    assert len(row.texts) == 3 and set(row.texts) <= {"Yes.", "No.", "Maybe.", "Why?"}
    assert (row.asked, row.parsed) == (6, 4)
    assert ask(Scripted(*answers), "verbalized") == row


@pytest.mark.parametrize(
    ("answer", "items"),
    [
        ("1. Yes. 2. No. 3. Maybe.", ["Yes.", "No.", "Maybe."]),
        ("I have 2 cats. They are 3.", ["I have 2 cats. They are 3."]),
        (
            "- We met at 9. It rained.\n- My answer: no.",
            ["We met at 9. It rained.", "My answer: no."],
        ),
    ],
)
def test_numbers_part_a_list_on_one_line_and_stay_where_they_are_said(answer, items):
    assert asking.parse_list(answer) == items


def test_a_verbalized_reply_in_another_spelling_is_no_new_one():
    """Three asked for; "yes" repeats "Yes.", so one of three is missing after all rounds."""
    said = [f"<response><text>{text}</text><probability>0.3</probability></response>"
            for text in ("Yes.", "yes", "No.")]
    row = ask(Scripted(*["".join(said)] * 3), "verbalized")
    assert sorted(row.texts) == ["No.", "Yes."]
