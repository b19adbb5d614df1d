"""Guidance and mixtures of branches, against plain forward passes without a cache."""

from __future__ import annotations

import pytest
import torch
from conftest import DIALOGUES
from decoding_cases import PAD, forest_of, numbered

from decoding.mixtures import GuidedTree, MixedTree, guide, mix, next_logits
from decoding.sampling import greedy, sample
from modeling.prompts import encode_prompt
from trees import Segment, Tree, branch_prompts


def test_guided_logits_by_hand():
    """z = 1 + g (3 - 1): 1 at g = 0, 3 at 1, 5 at 2."""
    logits = torch.tensor([[[3.0]], [[3.0]], [[3.0]], [[1.0]], [[1.0]], [[1.0]]])
    assert guide(logits, [0.0, 1.0, 2.0]).flatten().tolist() == [1.0, 3.0, 5.0]


def test_mixed_logits_by_hand():
    """Weights 1/4 and 3/4 mix the probabilities (1/2, 1/2) and (1/6, 5/6) to (1/4, 3/4).

    Weights 2 and 1 add the logits (1, 0) and (0, 5) up to (2, 5).
    """
    logits = torch.tensor([[[0.5, 0.5], [1 / 6, 5 / 6]]]).log()
    mixed = mix(logits, torch.tensor([[0.25, 0.75]]), "probs").exp()
    torch.testing.assert_close(mixed, torch.tensor([[0.25, 0.75]]))
    logits = torch.tensor([[[1.0, 0.0], [0.0, 5.0]]])
    assert mix(logits, torch.tensor([[2.0, 1.0]]), "logits_raw").tolist() == [[2.0, 5.0]]


def by_hand(model, prompts: list[list[int]], combine, new: int) -> list[int]:
    """Greedy choice after several prompts that are followed by the same tokens; no cache."""
    tokens: list[int] = []
    with torch.no_grad():
        for _ in range(new):
            rows = [model(torch.tensor([ids + tokens])).logits[0, -1] for ids in prompts]
            tokens.append(int(combine(torch.stack(rows)).argmax()))
    return tokens


def test_greedy_guidance_equals_two_plain_forward_passes_a_step(tiny_model, tokenizer):
    """Two branches a row, each with a prompt without its number, at scale 2."""
    forest, want = [], []
    for row in DIALOGUES[:3]:
        cond = numbered(tokenizer, row, [3, 10])
        uncond = encode_prompt(tokenizer, row["context"])
        without = Tree(branch_prompts([uncond] * 2, [1, 2]))
        tree = GuidedTree(branch_prompts(cond, [1, 2]), uncond=without, guidance_scale=2.0)
        forest.append(tree)
        want.append([by_hand(tiny_model, [prompt, uncond], lambda z: z[1] + 2 * (z[0] - z[1]), 6)
                     for prompt in cond])
    assert greedy(tiny_model, forest, PAD, -1, 6) == want


def test_guidance_of_one_is_the_condition_and_of_zero_none_of_it(tiny_model, tokenizer):
    cond, uncond = forest_of(tokenizer, 2), forest_of(tokenizer, 3)
    for tree in uncond:
        tree.root.children = tree.root.children[1:]

    def guided(scale: float) -> list[Tree]:
        return [GuidedTree(tree.root, uncond=other, guidance_scale=scale)
                for tree, other in zip(cond, uncond, strict=True)]

    seeds = [4, 5, 6]
    assert sample(tiny_model, guided(1.0), seeds, PAD, 1, 8) == \
        sample(tiny_model, cond, seeds, PAD, 1, 8)
    assert sample(tiny_model, guided(0.0), seeds, PAD, 1, 8) == \
        sample(tiny_model, uncond, seeds, PAD, 1, 8)


@pytest.mark.parametrize("kind", ["probs", "logits_raw"])
def test_a_mixed_tree_writes_one_response_that_all_its_branches_read(kind, tiny_model, tokenizer):
    """Three prompts a row that share their start or nothing; by hand, token by token."""
    weights = torch.tensor([0.2, 0.3, 0.5])

    def combine(logits):
        if kind == "probs":
            return (weights[:, None] * logits.softmax(-1)).sum(0)
        return (weights[:, None] * logits).sum(0)

    prompts = [numbered(tokenizer, row, [1, 10, 3]) for row in DIALOGUES[:3]]
    want = [[by_hand(tiny_model, branches, combine, 6)] for branches in prompts]
    shared = [branch_prompts(branches, [1, 2, 3]) for branches in prompts]
    apart = [Segment([], children=[Segment(ids, branch=k) for k, ids in enumerate(branches)])
             for branches in prompts]
    for roots in (shared, apart):
        forest = [MixedTree(root, weights=weights, kind=kind) for root in roots]
        assert greedy(tiny_model, forest, PAD, -1, 6) == want


def test_a_mixed_sample_is_the_row_s_own_whatever_shares_its_batch(tiny_model, tokenizer):
    """And a mixture of one prompt with itself is that prompt's own sample."""
    weights, seeds = torch.tensor([0.25, 0.75]), [7, 8, 9]
    forest = [MixedTree(tree.root, weights=weights, kind="probs")
              for tree in forest_of(tokenizer, 2)]
    together = sample(tiny_model, forest, seeds, PAD, 1, 8, temperature=0.8, top_p=0.9)
    assert [len(row) for row in together] == [1, 1, 1]
    alone = [sample(tiny_model, [tree], [seed], PAD, 1, 8, temperature=0.8, top_p=0.9)[0]
             for tree, seed in zip(forest, seeds, strict=True)]
    assert alone == together
    prompt = encode_prompt(tokenizer, "Is a tomato a fruit?")
    twice = MixedTree(branch_prompts([prompt] * 2, [1, 2]), weights=weights, kind="probs")
    once = Tree(branch_prompts([prompt], [1]))
    assert sample(tiny_model, [twice], [7], PAD, 1, 8) == sample(tiny_model, [once], [7], PAD, 1, 8)


def test_trees_of_two_kinds_are_not_decoded_together(tiny_model):
    plain = Tree(branch_prompts([[5, 6]], [1]))
    guided = GuidedTree(plain.root, uncond=plain, guidance_scale=2.0)
    with pytest.raises(AssertionError, match="trees of one kind"):
        next_logits([plain, guided], torch.zeros(3, 1, 4))
