"""The controls of a coherence judge: what they are made of, and when a judge passes."""

from __future__ import annotations

from collections import Counter

import pytest
from conftest import DIALOGUES

from scoring import controls

NAMES = ["repeated turn", "scrambled", "context words", "spliced", "shuffled", "references"]
FRUIT = {"prompt": "Name a sour fruit, please.", "candidates": ["A lemon is quite sour."]}
TOOL = {"prompt": "Which tool drives nails?", "candidates": ["You want a hammer there."]}


def test_the_controls_of_a_task_are_made_of_its_words_and_of_the_other_rows_reference():
    """Two rows, so the only other reference is the other row's."""
    [(row, texts), _] = controls.make([FRUIT, TOOL], 9)
    assert row is FRUIT and list(texts) == NAMES
    assert texts["repeated turn"] == "Name a sour fruit, please."
    assert texts["references"] == "A lemon is quite sour."
    assert texts["shuffled"] == "You want a hammer there."
    scrambled, drawn = texts["scrambled"], texts["context words"]
    assert scrambled != "A lemon is quite sour." and drawn != FRUIT["prompt"]
    assert Counter(scrambled.split()) == Counter("A lemon is quite sour.".split())
    assert Counter(drawn.split()) == Counter(FRUIT["prompt"].split())
    put_in = Counter(texts["spliced"].split()) - Counter("You want a hammer there.".split())
    assert sum(put_in.values()) == 2 and set(put_in) <= {"sour", "fruit"}, "words of content"


def test_the_repeated_turn_of_a_dialogue_is_its_last_one_and_context_words_are_of_all_turns():
    [(_, texts), *_] = controls.make(DIALOGUES, 4)
    assert texts["repeated turn"] == "Then why is it in my salad?"
    words = texts["context words"].split()
    assert len(words) == 12
    assert not Counter(words) - Counter(DIALOGUES[0]["context"].split())
    assert texts["shuffled"] in {row["candidates"][0] for row in DIALOGUES[1:]}


def test_rows_without_references_give_the_controls_that_need_none():
    rows = [{"context": row["context"]} for row in DIALOGUES]
    assert all(list(texts) == ["repeated turn", "context words"]
               for _, texts in controls.make(rows, 4))
    assert controls.make([{"prompt": ""}], 4) == [({"prompt": ""}, {})]
    assert list(controls.of_row({"prompt": "Name a fruit."}, [])) == ["repeated turn"], "too short"


def test_what_is_right_by_a_rows_own_references_is_no_control():
    """A response of several rows is not another's, and a turn that is a reference is accepted."""
    shared = {"context": "Well?\nSo be it then.", "response": "So be it then."}
    [(_, texts), _] = controls.make([shared, {**shared, "context": "No?\nYes."}], 4)
    assert "shuffled" not in texts and "spliced" not in texts and "repeated turn" not in texts
    assert texts["references"] == "So be it then."


def test_each_prompt_is_asked_about_once_and_choices_depend_on_the_seed_and_the_row_alone():
    rows = [{**row, "context": f"{i} {row['context']}"} for i in range(5) for row in DIALOGUES]
    probes = controls.make([row for row in rows for _ in range(3)], 6)
    assert len({row["context"] for row, _ in probes}) == 6
    places = [rows.index(row) for row, _ in probes]
    assert places == sorted(places) and places[-1] > 6, "spread over the file, in its order"
    assert probes == controls.make(rows, 6) != controls.make(rows, 6, seed=1)
    everything = {row["context"]: texts for row, texts in controls.make(rows, 99)}
    assert len(everything) == 20
    assert all(everything[row["context"]] == texts for row, texts in probes)


def test_shares_are_of_the_texts_with_a_verdict_and_others_are_counted():
    """Repeated turns: yes, no, unscored, so half of three; no reference is scored."""
    probes = [({}, {"repeated turn": "a", "references": "b"}), ({}, {"repeated turn": "c"}),
              ({}, {"repeated turn": "d"})]
    verdicts = [{"a": {"coherent": True}, "b": {"coherent": None}}, {"c": {"coherent": False}},
                {"d": {"coherent": None}}]
    assert controls.count(probes, verdicts) == {
        "repeated turn": {"accepted": 0.5, "asked": 3, "unscored": 1},
        "references": {"accepted": None, "asked": 1, "unscored": 1}}


@pytest.mark.parametrize(("shares", "wrong"), [
    ({"repeated turn": 0.1, "scrambled": 0.0, "references": 0.8}, []),
    ({"repeated turn": 0.0}, []),
    ({"repeated turn": 0.11, "references": 1.0}, ["repeated turn"]),
    ({"repeated turn": 0.0, "references": 0.79}, ["references"]),
    ({"repeated turn": None, "scrambled": 0.0}, ["repeated turn"]),
    ({"scrambled": 0.6, "spliced": 1.0, "references": 0.0}, ["scrambled", "spliced", "references"]),
])
def test_a_judge_passes_with_at_most_a_tenth_of_each_control_and_four_fifths_of_the_references(
        shares, wrong):
    assert controls.failed(shares) == wrong and controls.passes(shares) == (not wrong)


def test_without_any_control_no_judge_passes():
    assert not controls.passes({}) and not controls.passes({"references": 1.0})
    assert controls.describe({}) == {
        "controls": {}, "failed": [], "trusted": False,
        "reason": "no control of the judge can be made of these rows"}


def test_the_reason_names_every_control_with_its_share():
    counted = {"repeated turn": {"accepted": 1.0, "asked": 12},
               "scrambled": {"accepted": 0.05, "asked": 20},
               "context words": {"accepted": 0.125, "asked": 8},
               "shuffled": {"accepted": None, "asked": 3, "unscored": 3},
               "references": {"accepted": 0.4, "asked": 20}}
    described = controls.describe(counted)
    assert described["controls"] == counted and not described["trusted"]
    assert described["reason"] == (
        "the judge accepts 100 % of repeated turns, 12.5 % of random words of the prompt, only "
        "40 % of the references and gives no verdict on other rows' references")
    assert controls.describe({"repeated turn": {"accepted": 0.0, "asked": 2}}) == {
        "controls": {"repeated turn": {"accepted": 0.0, "asked": 2}}, "failed": [],
        "trusted": True}
