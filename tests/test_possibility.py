"""Possibility exploration fine-tuning: losses by hand, what a tree teaches, one prompt for training and inference."""

from __future__ import annotations

import argparse
import math
import random
import re
from collections import Counter

import pytest
import torch
from conftest import DIALOGUES, make_model, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trees import possibility_args

import train
import trees
from methods.possibility import flags, inference, training
from modeling.prompts import build_prompt, encode_prompt
from trees import LIKELIHOOD, UNLIKELIHOOD

LN = math.log


# ---- losses -------------------------------------------------------------------------------------


def test_unlikelihood_by_hand():
    """p = 1/4 (uniform over 4): ln(4/3). Logits (ln 3, 0): p = 3/4 gives ln 4 = 1.3863, p = 1/4 gives 0.2877."""
    logps = torch.tensor([LN(1 / 4), LN(3 / 4), LN(1 / 4)])
    want = torch.tensor([LN(4 / 3), LN(4), LN(4 / 3)])
    torch.testing.assert_close(training.unlikelihood(logps), want)


def test_unlikelihood_of_a_certain_token_is_clamped_and_gives_no_gradient():
    logp = torch.tensor([0.0, -1e-9], requires_grad=True)
    loss = training.unlikelihood(logp)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.full((2,), -LN(1e-6)))
    assert logp.grad.tolist() == [0, 0]


def test_a_step_against_the_unlikelihood_gradient_lowers_the_marked_token():
    logits = torch.zeros(5, requires_grad=True)
    training.unlikelihood(logits.log_softmax(-1)[2:3]).sum().backward()
    after = (logits - 0.5 * logits.grad).softmax(-1)
    assert after[2] < 0.2 and all(after[i] > 0.2 for i in (0, 1, 3, 4))


def test_means_are_taken_within_rows_and_then_over_rows():
    """Row 0: (1 + 3) / 2 = 2, row 1: 5, row 2 has nothing chosen and counts 0: 7 / 3."""
    values, row = torch.tensor([1.0, 3, 5, 100]), torch.tensor([0, 0, 1, 2])
    chosen = torch.tensor([True, True, True, False])
    assert training.mean_by_row(values, row, chosen, 3).item() == pytest.approx(7 / 3)


def loss_of(model, forest, args):
    model.zero_grad()
    loss, parts = training.compute_loss(model, trees.pack(forest), args)
    loss.backward()
    return loss.item(), parts, torch.cat([p.grad.flatten() for p in model.parameters()])


def forest_of(rows, tokenizer, args):
    return [training.build_tree(row, tokenizer, args, random.Random(i)) for i, row in enumerate(rows)]


def test_a_batch_of_four_equals_the_mean_of_four_batches_of_one(tokenizer, tiny_model):
    args = possibility_args()
    forest = forest_of(DIALOGUES, tokenizer, args)
    whole, _, gradient = loss_of(tiny_model, forest, args)
    single = [loss_of(tiny_model, [tree], args) for tree in forest]
    assert whole == pytest.approx(sum(s[0] for s in single) / 4, rel=1e-5)
    torch.testing.assert_close(gradient, sum(s[2] for s in single) / 4, rtol=1e-4, atol=1e-6)


def test_unlikelihood_sets_in_after_warmup_and_weight_0_equals_no_ul(tokenizer, tiny_model):
    args = possibility_args(warmup_steps=3, micro_step=2)
    forest = forest_of(DIALOGUES[:1], tokenizer, args)
    before, parts, _ = loss_of(tiny_model, forest, args)
    args.micro_step = 3
    after, _, _ = loss_of(tiny_model, forest, args)
    assert before == pytest.approx(parts["mle_loss"].item())
    assert after == pytest.approx(before + 0.5 * parts["ul_loss"].item(), rel=1e-5)
    args.ul_weight = 0
    plain = possibility_args(no_ul=True, number=True)
    assert loss_of(tiny_model, forest, args)[0] == pytest.approx(
        loss_of(tiny_model, forest_of(DIALOGUES[:1], tokenizer, plain), plain)[0], rel=1e-5)


def test_nothing_to_unlearn_gives_0_and_not_nan(tokenizer, tiny_model):
    """One reply only: no negatives. Replies of stop words only: negatives without a marked token."""
    for replies in (["Yes."], ["And then?", "Or not so."]):
        forest = forest_of([{"context": "a\nb", "candidates": replies}], tokenizer, possibility_args())
        loss, parts, _ = loss_of(tiny_model, forest, possibility_args())
        assert parts["ul_loss"] == 0 and math.isfinite(loss)


# ---- trees --------------------------------------------------------------------------------------


def segments(tree, role):
    return [path for path in trees.walk(tree.root) if path[-1].role == role]


@pytest.mark.parametrize("kind", ["bytelevel", "sentencepiece"])
def test_every_number_teaches_its_own_reply_to_the_end_and_unlearns_the_others(kind):
    tokenizer, args, row = make_tokenizer(kind), possibility_args(), DIALOGUES[0]
    tree = training.build_tree(row, tokenizer, args, random.Random(5))
    numbers = [child.branch for child in tree.root.children]
    assert len(set(numbers)) == 4 and all(1 <= n <= 9 for n in numbers)
    for number, path in zip(numbers, segments(tree, LIKELIHOOD), strict=True):
        prompt = path[0].input_ids + path[1].input_ids
        assert path[1].branch == number
        assert prompt == encode_prompt(tokenizer, build_prompt(row, number))
        assert path[2].input_ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
        assert tokenizer.decode(path[2].input_ids[:-1]).strip() == row["candidates"][path[2].branch]
    pairs = {(path[1].branch, path[2].branch) for path in segments(tree, UNLIKELIHOOD)}
    assert pairs == {(numbers[i], j) for i in range(4) for j in range(4) if i != j}
    assert all(tokenizer.eos_token_id not in path[2].input_ids for path in segments(tree, UNLIKELIHOOD))


@pytest.mark.parametrize("changes", [{}, {"no_ul": True}])
def test_likelihood_is_asked_of_every_reply_token_and_of_no_other(tokenizer, changes):
    """With or without numbers the four replies and their end tokens, first token included, nothing of a prompt."""
    tree = training.build_tree(DIALOGUES[1], tokenizer, possibility_args(**changes), random.Random(0))
    batch = trees.pack([tree])
    replies = [tokenizer(reply)["input_ids"] + [tokenizer.eos_token_id] for reply in DIALOGUES[1]["candidates"]]
    assert batch["input_ids"][0, batch["token"][batch["role"] == LIKELIHOOD]].tolist() == sum(replies, [])
    assert len(segments(tree, UNLIKELIHOOD)) == (0 if changes else 12)


def test_a_row_with_two_of_four_replies_teaches_two_and_both_ordered_pairs(tokenizer):
    row = {"context": "x\ny", "candidates": ["Buy apples", "Sell pears"]}
    tree = training.build_tree(row, tokenizer, possibility_args(), random.Random(0))
    assert len(tree.root.children) == len(segments(tree, LIKELIHOOD)) == len(segments(tree, UNLIKELIHOOD)) == 2


def test_a_repeat_of_the_right_reply_is_never_a_negative_and_gets_a_number_of_its_own(tokenizer):
    """Replies A, A, "a!", B: the first three are equal after normalising, so only the 6 pairs with B remain of 12."""
    row = {"context": "x\ny", "candidates": ["Buy apples", "Buy apples", "buy  apples!", "Sell pears"]}
    tree = training.build_tree(row, tokenizer, possibility_args(), random.Random(1))
    assert len({child.branch for child in tree.root.children}) == 4
    pairs = [(0, 3), (1, 3), (2, 3), (3, 0), (3, 1), (3, 2)]
    assert sorted(training.draw_negatives(row["candidates"], 99, random.Random(0))) == pairs
    capped = training.build_tree(row, tokenizer, possibility_args(max_num_negatives_per_sample=5), random.Random(1))
    assert [len(segments(t, UNLIKELIHOOD)) for t in (tree, capped)] == [6, 5]


def test_distinct_words_spare_what_the_context_and_the_right_reply_say(tokenizer):
    """Context "My cat", replies "Black cats purr" and "Black dogs bark, cat". Published, each number unlearns all words of the
    other reply; distinct, "Black" is spared, since the right reply has it, and "cat", since the context does."""
    row = {"context": "x\nMy cat", "candidates": ["Black cats purr", "Black dogs bark, cat"]}

    def unlearnt(ul_words):
        tree = training.build_tree(row, tokenizer, possibility_args(ul_words=ul_words), random.Random(0))
        marked = {}
        for path in segments(tree, UNLIKELIHOOD):
            reply = row["candidates"][path[2].branch]
            offsets = tokenizer(reply, return_offsets_mapping=True)["offset_mapping"]
            starts = [start + (reply[start] == " ") for (start, _), w in zip(offsets, path[2].weights, strict=True) if w]
            marked[path[2].branch] = [re.match(r"\w+", reply[s:])[0] for s in starts]
        return marked

    assert unlearnt("content") == {0: ["Black", "cats", "purr"], 1: ["Black", "dogs", "bark", "cat"]}
    assert unlearnt("distinct") == {0: ["cats", "purr"], 1: ["dogs", "bark"]}


def test_numbers_depend_on_seed_epoch_and_row_alone_and_are_fresh_every_epoch(tokenizer):
    args = possibility_args(seed=1)

    def numbers(epoch, seed=1):
        args.seed = seed
        tree = train.build(possibility, DIALOGUES[0], 0, epoch, tokenizer, args)
        return tuple(child.branch for child in tree.root.children)

    assert numbers(3) == numbers(3) and len({numbers(e) for e in range(20)}) > 15 and numbers(3) != numbers(3, seed=2)
    counts = Counter(n for e in range(450) for n in numbers(e))  # 1,800 draws over 9 numbers: 200 each, sd 13
    assert set(counts) == set(range(1, 10)) and all(140 < c < 260 for c in counts.values())


def test_too_long_drops_the_oldest_turns_and_never_a_reply(tokenizer):
    row = {**DIALOGUES[0], "context": "\n".join([f"Old turn number {i} about a train." for i in range(8)] + ["Last?"])}
    args = possibility_args()
    whole = training.build_tree(row, tokenizer, args, random.Random(0))
    args.max_length = 250
    tree = training.build_tree(row, tokenizer, args, random.Random(0))
    text = tokenizer.decode(tree.root.input_ids)
    assert whole.dropped_turns == 0 < tree.dropped_turns < 9 and "Person A: Last?" in text and "number 0" not in text
    assert text.count("Old turn") == 8 - tree.dropped_turns
    for path in segments(tree, LIKELIHOOD):
        assert sum(len(s.input_ids) for s in path) <= 250
        assert tokenizer.decode(path[-1].input_ids[:-1]) == row["candidates"][path[-1].branch]
    args.max_length = 40
    assert training.build_tree(row, tokenizer, args, random.Random(0)) is None


# ---- which words are unlearnt -------------------------------------------------------------------

SENTENCES = [
    "I don't think the 12 zebras would eat strawberries, do they?", "Café 7 was closed; try well-known places.",
    "Because of that, it isn't 1984 again.", "Run!", "12 élan-rich cafés", "It’s 10:30, the naïve aren’t up.",
]


def marked_words(text, tokenizer) -> list[str]:
    """The words whose first character the marked tokens hold."""
    ids, marks = training.content_words(text, tokenizer)
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    words = list(training.WORD.finditer(text))
    return [next(w[0] for w in words if w.start() < end and w.end() > start)
            for (start, end), mark in zip(spans, marks, strict=True) if mark]


def test_content_words_by_hand(tokenizer):
    """I, don't, the, would, do, they are function words; punctuation is no word; digits count."""
    assert marked_words(SENTENCES[0], tokenizer) == ["think", "12", "zebras", "eat", "strawberries"]
    first, *rest = training.content_words("strawberries", tokenizer)[1]
    assert first == 1 and rest and not any(rest), "the first token of a word alone"


WORDS = {"the": 0, "And": 0, "don't": 0, "it’s": 0, "she'll": 0, "...": 0, "cats": 1, "1984": 1, "well-known": 1}


@given(st.lists(st.sampled_from(sorted(WORDS)), max_size=8))
@settings(deadline=None)
def test_every_content_word_is_marked_once_and_a_function_word_never(tokenizer, chosen):
    assert marked_words(" ".join(chosen), tokenizer) == [word for word in chosen if WORDS[word]]


@pytest.mark.parametrize("kind", ["bytelevel", "sentencepiece"])
def test_a_marked_token_holds_letters_or_digits_and_never_a_space_alone(kind):
    """SentencePiece writes "12 cats" as ▁ 1 2 ▁c ats: the mark belongs to 1, a lone ▁ says nothing of the word."""
    tokenizer = make_tokenizer(kind)
    for text in SENTENCES:
        ids, marks = training.content_words(text, tokenizer)
        pieces = tokenizer.convert_ids_to_tokens([i for i, mark in zip(ids, marks, strict=True) if mark])
        assert all(piece.strip("▁Ġ") for piece in pieces), f"{text!r}: {pieces}"


@pytest.mark.parametrize("text", SENTENCES)
def test_byte_level_and_sentencepiece_tokenizers_unlearn_the_same_words(text):
    a, b = (marked_words(text, make_tokenizer(kind)) for kind in ("bytelevel", "sentencepiece"))
    assert a == b and a


def test_the_embedded_tokenizer_unlearns_the_same_words(embedded, tokenizer):
    assert [marked_words(t, embedded[1]) for t in SENTENCES] == [marked_words(t, tokenizer) for t in SENTENCES]


# ---- prompts and flags --------------------------------------------------------------------------

BOATS = {"prompt": "Name a boat.", "candidates": ["Gull", "Ada", "Tern", "Mole"]}


@pytest.mark.parametrize("row", [DIALOGUES[0], BOATS])
@pytest.mark.parametrize("changes", [{}, {"no_ul": True}])
def test_inference_shows_the_very_prompts_of_training(tokenizer, row, changes):
    args = possibility_args(**changes)
    args.method = flags.settle_method(args)
    tree = training.build_tree(row, tokenizer, args, random.Random(2))
    trained = {path[1].branch if args.number else None: [t for s in path[:-1] for t in s.input_ids]
               for path in segments(tree, LIKELIHOOD)}
    args.num_branches, args.max_new_tokens = 9, 10
    asked = inference.decode_tree(row, tokenizer, args).root
    for child in asked.children:
        key = child.branch if args.number else None
        if key in trained:
            assert asked.input_ids + child.input_ids == trained.pop(key)
    assert not trained and len(asked.children) == 9


@pytest.mark.parametrize("row", [DIALOGUES[0], BOATS])
def test_an_untuned_model_is_asked_without_a_number_and_with_a_length(tokenizer, row):
    args = possibility_args()
    vars(args).update(method="base", num_branches=3, max_new_tokens=9)
    root = inference.decode_tree(row, tokenizer, args).root
    want = encode_prompt(tokenizer, build_prompt(row, base=True))
    assert [root.input_ids + child.input_ids for child in root.children] == [want] * 3
    assert "25 words" in tokenizer.decode(want) and "#" not in tokenizer.decode(want)


@pytest.mark.parametrize(("changes", "method", "number"), [
    ({}, "peft", True), ({"no_ul": True}, "otm", False), ({"no_ul": True, "number": True}, "peft", True),
    ({"method": "otm"}, "otm", False), ({"method": "oto"}, "oto", False),
    ({"no_ul": True, "num_response_per_input": 1}, "oto", False),
])
def test_flags_settle_on_one_method(changes, method, number):
    args = argparse.Namespace(method="peft", no_ul=False, number=None, num_response_per_input=None, max_pos_number=9,
                              max_num_negatives_per_sample=30, ul_weight=0.5)
    vars(args).update(changes)
    assert flags.settle_method(args) == method and args.number is number


@pytest.mark.parametrize(("changes", "said"), [
    ({"num_response_per_input": 10}, "--num_response_per_input 10 needs 10 distinct numbers, --max_pos_number is 9"),
    ({"number": False}, "--no_number without --no_ul"), ({"method": "otm", "number": True}, "drop --number"),
    ({"method": "oto", "num_response_per_input": 2}, "use --method otm"), ({"num_response_per_input": 0}, "at least 1"),
    ({"ul_weight": -0.5}, "at least 0"), ({"max_num_negatives_per_sample": -1}, "at least 0"),
])
def test_flags_that_contradict_each_other_are_refused(capsys, changes, said):
    with pytest.raises(SystemExit) as stop:
        possibility_args(**changes)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_the_model_learns_its_rows(tokenizer):
    """Twenty steps on two rows halve the likelihood loss of a random model."""
    model, args = make_model(len(tokenizer)), possibility_args()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(20):
        loss, parts = training.compute_loss(model, trees.pack(forest_of(DIALOGUES[:2], tokenizer, args)), args)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parts["mle_loss"].item())
    assert losses[-1] < losses[0] / 2
