"""Possibility exploration fine-tuning: losses by hand, what a tree teaches, what is unlearnt."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from itertools import combinations

import pytest
import torch
from conftest import DIALOGUES, make_model, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from training_cases import peft_flags, segments

import trees
from methods.possibility import training
from modeling.prompts import build_prompt, encode_prompt
from training.trainer import build
from trees import LIKELIHOOD, UNLIKELIHOOD

LN = math.log


# ---- losses -------------------------------------------------------------------------------------


def test_unlikelihood_by_hand():
    """p = 1/4 (uniform over 4): ln(4/3). Logits (ln 3, 0): p = 3/4 gives ln 4 = 1.3863, p = 1/4
    gives 0.2877."""
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


def loss_of(model, forest, args, step=0):
    model.zero_grad()
    loss, parts = training.compute_loss(model, trees.pack(forest), args, step)
    loss.backward()
    return loss.item(), parts, torch.cat([p.grad.flatten() for p in model.parameters()])


def forest_of(rows, tokenizer, args):
    return [
        training.build_tree(row, tokenizer, args, random.Random(i)) for i, row in enumerate(rows)
    ]


def test_a_batch_of_four_equals_the_mean_of_four_batches_of_one(tokenizer, tiny_model):
    args = peft_flags()
    forest = forest_of(DIALOGUES, tokenizer, args)
    whole, _, gradient = loss_of(tiny_model, forest, args)
    single = [loss_of(tiny_model, [tree], args) for tree in forest]
    assert whole == pytest.approx(sum(s[0] for s in single) / 4, rel=1e-5)
    torch.testing.assert_close(gradient, sum(s[2] for s in single) / 4, rtol=1e-4, atol=1e-6)


def test_unlikelihood_sets_in_after_the_likelihood_only_steps_and_weight_0_equals_no_ul(
    tokenizer, tiny_model
):
    args = peft_flags("--likelihood_only_steps", "3")
    forest = forest_of(DIALOGUES[:1], tokenizer, args)
    before, parts, _ = loss_of(tiny_model, forest, args, step=2)
    after, _, _ = loss_of(tiny_model, forest, args, step=3)
    assert before == pytest.approx(parts["mle_loss"].item())
    assert after == pytest.approx(before + 0.5 * parts["ul_loss"].item(), rel=1e-5)
    weightless, _, _ = loss_of(tiny_model, forest, args.with_values(ul_weight=0), step=3)
    plain = peft_flags("--no_ul", "--numbered_prompts")
    without, _, _ = loss_of(tiny_model, forest_of(DIALOGUES[:1], tokenizer, plain), plain)
    assert weightless == pytest.approx(without, rel=1e-5)


def test_nothing_to_unlearn_gives_0_and_not_nan(tokenizer, tiny_model):
    """One reply: no negatives. Replies of stop words only: negatives without a marked token."""
    for replies in (["Yes."], ["And then?", "Or not so."]):
        row = {"context": "a\nb", "candidates": replies}
        forest = forest_of([row], tokenizer, peft_flags())
        loss, parts, _ = loss_of(tiny_model, forest, peft_flags())
        assert parts["ul_loss"] == 0 and math.isfinite(loss)


def test_the_model_learns_its_rows(tokenizer):
    """Twenty steps on two rows halve the likelihood loss of a random model."""
    model, args = make_model(len(tokenizer)), peft_flags()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    batch = trees.pack(forest_of(DIALOGUES[:2], tokenizer, args))
    for step in range(20):
        loss, parts = training.compute_loss(model, batch, args, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parts["mle_loss"].item())
    assert losses[-1] < losses[0] / 2


# ---- trees --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytelevel", "sentencepiece"])
def test_every_number_teaches_its_own_reply_to_the_end_and_unlearns_the_others(kind):
    tokenizer, args, row = make_tokenizer(kind), peft_flags(), DIALOGUES[0]
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
    assert not any(
        tokenizer.eos_token_id in path[2].input_ids for path in segments(tree, UNLIKELIHOOD)
    )


@pytest.mark.parametrize(("words", "negatives"), [([], 12), (["--no_ul"], 0)])
def test_likelihood_is_asked_of_every_reply_token_and_of_no_other(tokenizer, words, negatives):
    """With or without numbers, the four replies whole, with end tokens; nothing of a prompt."""
    tree = training.build_tree(DIALOGUES[1], tokenizer, peft_flags(*words), random.Random(0))
    batch = trees.pack([tree])
    replies = [
        tokenizer(reply)["input_ids"] + [tokenizer.eos_token_id]
        for reply in DIALOGUES[1]["candidates"]
    ]
    learnt = batch["token"][batch["role"] == LIKELIHOOD]
    assert batch["input_ids"][0, learnt].tolist() == sum(replies, [])
    assert len(segments(tree, UNLIKELIHOOD)) == negatives


def test_a_row_with_two_of_four_replies_teaches_two_and_both_ordered_pairs(tokenizer):
    row = {"context": "x\ny", "candidates": ["Buy apples", "Sell pears"]}
    tree = training.build_tree(row, tokenizer, peft_flags(), random.Random(0))
    assert len(tree.root.children) == 2
    assert len(segments(tree, LIKELIHOOD)) == len(segments(tree, UNLIKELIHOOD)) == 2


def test_a_repeat_of_the_right_reply_is_never_a_negative_and_gets_a_number_of_its_own(tokenizer):
    """Replies A, A, "a!", B: the first three are equal when normalised, so that of 12 pairs the 6
    with B remain."""
    row = {
        "context": "x\ny",
        "candidates": ["Buy apples", "Buy apples", "buy  apples!", "Sell pears"],
    }
    tree = training.build_tree(row, tokenizer, peft_flags(), random.Random(1))
    assert len({child.branch for child in tree.root.children}) == 4
    pairs = [(0, 3), (1, 3), (2, 3), (3, 0), (3, 1), (3, 2)]
    assert sorted(training.draw_negatives(row["candidates"], 99, random.Random(0))) == pairs
    five = peft_flags("--max_num_negatives_per_sample", "5")
    capped = training.build_tree(row, tokenizer, five, random.Random(1))
    assert [len(segments(t, UNLIKELIHOOD)) for t in (tree, capped)] == [6, 5]


def test_distinct_words_spare_what_the_context_and_the_right_reply_say(tokenizer):
    """Context "My cat", replies "Black cats purr" and "Black dogs bark, cat". As published, each
    number unlearns all words of the other reply. distinct spares "Black", which the right reply
    has, and "cat", which the context has."""
    row = {"context": "x\nMy cat", "candidates": ["Black cats purr", "Black dogs bark, cat"]}

    def unlearnt(ul_words):
        args = peft_flags("--ul_words", ul_words)
        tree = training.build_tree(row, tokenizer, args, random.Random(0))
        marked = {}
        for path in segments(tree, UNLIKELIHOOD):
            reply = row["candidates"][path[2].branch]
            offsets = tokenizer(reply, return_offsets_mapping=True)["offset_mapping"]
            starts = [
                start + (reply[start] == " ")
                for (start, _), w in zip(offsets, path[2].weights, strict=True)
                if w
            ]
            marked[path[2].branch] = [re.match(r"\w+", reply[s:])[0] for s in starts]
        return marked

    assert unlearnt("content") == {
        0: ["Black", "cats", "purr"],
        1: ["Black", "dogs", "bark", "cat"],
    }
    assert unlearnt("distinct") == {0: ["cats", "purr"], 1: ["dogs", "bark"]}


def test_numbers_depend_on_seed_epoch_and_row_alone_and_are_fresh_every_epoch(tokenizer):
    """450 epochs of 4 numbers are 1,800 draws over 9: 200 each, standard deviation 13."""

    def numbers(epoch, seed="1"):
        args = peft_flags("--seed", seed)
        tree = build(training, DIALOGUES[0], 0, epoch, tokenizer, args)
        return tuple(child.branch for child in tree.root.children)

    assert numbers(3) == numbers(3) != numbers(3, seed="2")
    assert len({numbers(epoch) for epoch in range(20)}) > 15
    counts = Counter(number for epoch in range(450) for number in numbers(epoch))
    assert set(counts) == set(range(1, 10)) and all(140 < c < 260 for c in counts.values())


def test_random_replies_are_other_ones_every_epoch_and_the_same_ones_after_a_resume(tokenizer):
    """Two of four candidates an epoch: over 40 epochs all six pairs come up."""
    row, args = DIALOGUES[0], peft_flags(
        "--replies", "random", "--num_response_per_input", "2", "--no_ul")

    def learnt(epoch: int) -> list[str]:
        tree = build(training, row, 0, epoch, tokenizer, args)
        replies = [path[-1] for path in trees.walk(tree.root) if path[-1].role == LIKELIHOOD]
        return [tokenizer.decode(segment.input_ids[:-1]) for segment in replies]

    epochs = [learnt(epoch) for epoch in range(40)]
    assert {frozenset(pair) for pair in epochs} == {
        frozenset(pair) for pair in combinations(row["candidates"], 2)}
    assert epochs == [learnt(epoch) for epoch in range(40)], "a function of (seed, epoch, row)"


def test_the_first_replies_are_taken_without_touching_the_random_numbers(tokenizer):
    """The published recipe's numbers must not depend on how many candidates a row has."""
    row, args = DIALOGUES[0], peft_flags("--num_response_per_input", "3")
    longer = {**row, "candidates": [*row["candidates"], "A fifth one."]}
    first, second = (
        [path[-1].input_ids for path in trees.walk(
            build(training, own, 0, 0, tokenizer, args).root)] for own in (row, longer))
    assert first == second


def test_too_long_drops_the_oldest_turns_and_never_a_reply(tokenizer):
    turns = [f"Old turn number {i} about a train." for i in range(8)] + ["Last?"]
    row = {**DIALOGUES[0], "context": "\n".join(turns)}
    whole, tree, nothing = (
        training.build_tree(row, tokenizer, peft_flags("--max_length", length), random.Random(0))
        for length in ("500", "250", "40")
    )
    text = tokenizer.decode(tree.root.input_ids)
    assert whole.dropped_turns == 0 < tree.dropped_turns < 9
    assert "Person A: Last?" in text and "number 0" not in text
    assert text.count("Old turn") == 8 - tree.dropped_turns
    for path in segments(tree, LIKELIHOOD):
        assert sum(len(s.input_ids) for s in path) <= 250
        assert tokenizer.decode(path[-1].input_ids[:-1]) == row["candidates"][path[-1].branch]
    assert nothing is None


# ---- which words are unlearnt -------------------------------------------------------------------

SENTENCES = [
    "I don't think the 12 zebras would eat strawberries, do they?",
    "Café 7 was closed; try well-known places.",
    "Because of that, it isn't 1984 again.",
    "Run!",
    "12 élan-rich cafés",
    "It’s 10:30, the naïve aren’t up.",
]


def marked_words(text, tokenizer) -> list[str]:
    """The words whose first character the marked tokens hold."""
    ids, marks = training.content_words(text, tokenizer)
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    words = list(training.WORD.finditer(text))
    return [
        next(w[0] for w in words if w.start() < end and w.end() > start)
        for (start, end), mark in zip(spans, marks, strict=True)
        if mark
    ]


def test_content_words_by_hand(tokenizer):
    """I, don't, the, would, do, they are function words; punctuation is no word; digits count."""
    assert marked_words(SENTENCES[0], tokenizer) == ["think", "12", "zebras", "eat", "strawberries"]
    first, *rest = training.content_words("strawberries", tokenizer)[1]
    assert first == 1 and rest and not any(rest), "the first token of a word alone"


WORDS = {
    "the": 0,
    "And": 0,
    "don't": 0,
    "it’s": 0,
    "she'll": 0,
    "...": 0,
    "cats": 1,
    "1984": 1,
    "well-known": 1,
}


@given(st.lists(st.sampled_from(sorted(WORDS)), max_size=8))
@settings(deadline=None)
def test_every_content_word_is_marked_once_and_a_function_word_never(tokenizer, chosen):
    assert marked_words(" ".join(chosen), tokenizer) == [word for word in chosen if WORDS[word]]


@pytest.mark.parametrize("kind", ["bytelevel", "sentencepiece"])
def test_a_marked_token_holds_letters_or_digits_and_never_a_space_alone(kind):
    """SentencePiece writes "12 cats" as ▁ 1 2 ▁c ats: the mark belongs to 1, not to the lone ▁."""
    tokenizer = make_tokenizer(kind)
    for text in SENTENCES:
        ids, marks = training.content_words(text, tokenizer)
        marked = [i for i, mark in zip(ids, marks, strict=True) if mark]
        pieces = tokenizer.convert_ids_to_tokens(marked)
        assert all(piece.strip("▁Ġ") for piece in pieces), f"{text!r}: {pieces}"


@pytest.mark.parametrize("text", SENTENCES)
def test_byte_level_and_sentencepiece_tokenizers_unlearn_the_same_words(text):
    a, b = (marked_words(text, make_tokenizer(kind)) for kind in ("bytelevel", "sentencepiece"))
    assert a == b and a


def test_the_embedded_tokenizer_unlearns_the_same_words(embedded, tokenizer):
    for text in SENTENCES:
        assert marked_words(text, embedded[1]) == marked_words(text, tokenizer)
