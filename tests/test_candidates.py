"""One row of one-to-many data: what is asked, which items become candidates, what is counted."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import DIALOGUES
from servers import FOUR, listed

from data import candidates, make_candidates
from decoding.api import CallFailed
from decoding.engines import Asked
from decoding.replies import Reply
from flags import Args
from modeling.prompts import build_prompt

ROW = {"context": DIALOGUES[0]["context"]}
ARGS = Args(model="m", num_candidates=4, min_candidates=4, max_rounds=4, max_cosine=0.9,
            min_words=4, max_words=40, temperature=0.7, max_tokens=1024, max_input_length=300,
            seed=42)


def distinct_vectors():
    """An embedder for which every two texts are unlike."""
    index: dict[str, int] = {}
    return lambda texts: np.eye(256)[[index.setdefault(text, len(index)) for text in texts]]


class Scripted:
    """Gives its answers one by one: texts, Replies or CallFaileds; keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, message: str, seed: int) -> Asked:
        self.asked.append((message, seed))
        answer = self.answers.pop(0)
        if isinstance(answer, CallFailed):
            return Asked(0, [], answer)
        reply = answer if isinstance(answer, Reply) else Reply(answer, 5, False, total_tokens=20)
        return Asked(0, [reply])


def make(row: dict, ask, **changes) -> dict:
    args = ARGS.with_values(**changes)
    return candidates.make_row(row, candidates.row_key(row, args), ask, distinct_vectors(), args)


# ---- which items are kept -----------------------------------------------------------------------


@pytest.mark.parametrize("text, why", [
    ("Ask the cook about that.", None), ("Ask the cook.", "too short"),
    ("no " * 41, "too long"), ("Person A: so you say that?", "speaker label"),
    ("then why is it in my salad", "repeats the request"),
    ("Write what Person B says next.", "repeats the request"), ("?! ... !!", "no words"),
])
def test_a_candidate_has_4_to_40_words_and_is_neither_label_nor_echo(text, why):
    message = candidates.list_message(ROW, 4, [], ARGS)
    assert candidates.check_item(text, ROW, message, ARGS) == why


def test_a_candidate_of_a_prompt_may_have_any_length():
    row = {"prompt": "Name a fruit."}
    message = candidates.list_message(row, 4, [], ARGS)
    assert candidates.check_item("A fig.", row, message, ARGS) is None
    assert candidates.check_item("fig " * 99, row, message, ARGS) is None


def test_candidates_above_the_cosine_or_equal_after_normalising_are_left_out():
    """Against (1, 0): cosine 0.6 stays, 0.95 goes; equal but for its case goes unmeasured."""
    kept, vectors = ["Tea."], [np.array([1.0, 0.0])]
    new = {"Tee.": [0.95, 0.3122], "Rain.": [0.6, 0.8], "tea": [0.0, 1.0], "Wind.": [-1.0, 0.0]}

    def embed(texts):
        return np.array([new[text] for text in texts])

    args = ARGS.with_values(num_candidates=2)
    why = list(candidates.add_different(kept, vectors, list(new), embed, args))
    assert kept == ["Tea.", "Rain."] and why == ["nearly equal", "equal", "not needed"]


def test_the_embedder_tells_two_wordings_of_one_reply_from_another_reply(embedder, monkeypatch):
    monkeypatch.setattr(make_candidates, "load_embedder", lambda: embedder)
    one, same, other = make_candidates.load_embed()(
        ["I love pizza very much.", "I love pizza so much.", "My train is late."])
    assert one @ same > 0.9 > one @ other and one @ one == pytest.approx(1)


# ---- rounds -------------------------------------------------------------------------------------


def test_further_rounds_show_what_is_there_and_ask_for_the_rest():
    ask = Scripted(listed(FOUR[0], FOUR[0].upper(), "Short one."), listed(*FOUR[1:3]),
                   listed(*FOUR))
    row = make(ROW, ask)
    (first, _), (second, _), (third, _) = ask.asked
    assert row["candidates"] == FOUR and row["made"]["rounds"] == 3
    assert row["made"]["dropped"] == {"equal": 4, "too short": 1}, "1, then 3 in the last round"
    assert first.startswith(build_prompt(ROW)) and "list of 4 replies" in first
    assert f"- {FOUR[0]}\n\n" in second
    assert "list of 5 new replies" in second, "3 are missing, and 2 to spare"
    assert all(f"- {text}\n" in third for text in FOUR[:3])


def test_every_round_of_every_row_has_a_seed_of_its_own():
    asks = [Scripted("1. No.", "1. No.") for _ in range(2)]
    for row, ask in zip([ROW, {"prompt": "Name a fruit."}], asks, strict=True):
        make(row, ask, max_rounds=2)
    assert len({seed for ask in asks for _, seed in ask.asked}) == 4


def test_what_a_row_took_is_in_the_row():
    answer = Reply(listed(*FOUR), 30, True, "length", "served-1", 99)
    made = make(ROW, Scripted(answer), num_candidates=3, min_candidates=2)["made"]
    assert len(made.pop("key")) == 16
    assert made == {"model": "served-1", "rounds": 1, "tokens": 99,
                    "dropped": {"cut at --max_tokens": 1}}
    assert make(ROW, Scripted(listed(*FOUR)))["made"]["model"] == "m", "a local model has no other"


@pytest.mark.parametrize("transient, kind", [(True, "passing"), (False, "lasting")])
def test_a_failed_call_ends_the_rounds_and_says_whether_it_may_pass(transient, kind):
    made = make(ROW, Scripted(listed(FOUR[0]), CallFailed("HTTP 500: no", transient)))
    assert made["candidates"] == FOUR[:1] and made["made"]["rounds"] == 1
    assert (made["made"]["problem"], made["made"]["failed"]) == ("HTTP 500: no", kind)


def test_a_rows_key_hashes_the_row_and_what_its_candidates_depend_on_as_it_always_did():
    """Else --resume would refuse the files of earlier versions."""
    key = candidates.row_key(ROW, ARGS)
    assert key == "0da5c3cf5d3efbc6"
    assert candidates.row_key(ROW, ARGS.with_values(max_connections=9, engine="openai:m")) == key
    assert candidates.row_key(ROW, ARGS.with_values(seed=1)) != key
