"""Method spt: the losses by hand, and the retriever."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spt_cases import ROWS, prepared, spt_args

from methods.spt import training
from methods.spt.losses import (
    by_prompt,
    contrastive_loss,
    fusion_loss,
    logit_fusion_loss,
    mean_nll,
    selection_loss,
    similarity,
)
from modeling.softprompts import Retriever, soft_prompts

# ---- losses by hand -----------------------------------------------------------------------------


def test_selection_loss_by_hand():
    """nll (ln 3, 0) gives g = (1/4, 3/4); h = (1/2, 1/2): KL = 1/4 ln(1/2) + 3/4 ln(3/2).

    At tau 1/2, g = (1/10, 9/10).
    """
    nll = torch.tensor([[math.log(3), 0.0]], requires_grad=True)
    log_h = torch.full((1, 2), -math.log(2), requires_grad=True)
    loss = selection_loss(nll, log_h)
    assert loss.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    loss.backward()
    assert nll.grad is None and log_h.grad is not None, "nll is a target, no path for gradients"
    colder = selection_loss(nll, log_h, 0.5).item()
    assert colder == pytest.approx(0.1 * math.log(0.2) + 0.9 * math.log(1.8))


def test_noise_on_the_selection_target_keeps_it_a_distribution():
    """Noise of size 50 on probabilities of 1/4 would make most of them negative.

    On logits the loss stays finite and positive: the KL from four equal ones is at most ln 4.
    """
    torch.manual_seed(0)
    nll, log_h = torch.ones(8, 4), torch.full((8, 4), -math.log(4))
    losses = [selection_loss(nll, log_h, noise=50.0).item() for _ in range(20)]
    assert all(0 < loss <= math.log(4) + 1e-5 for loss in losses)


def test_fusion_loss_by_hand():
    """One row, h = (1/4, 3/4), token probabilities (1/2, 1/6) and (1, 0.2): mixtures 1/4, 0.4."""
    logps = torch.tensor([[0.5, 1.0], [1 / 6, 0.2]]).log()
    loss = fusion_loss(logps, torch.tensor([[0.25, 0.75]]).log(), torch.tensor([0, 0]))
    assert loss.item() == pytest.approx(-(math.log(0.25) + math.log(0.4)) / 2)


def test_logit_fusion_by_hand():
    """Weights 2 and 1 on logits (ln 2, 0) and (0, ln 4): the sum (2 ln 2, ln 4) is even.

    So each of the two tokens has 1/2.
    """
    logits = torch.tensor([[[math.log(2), 0.0]], [[0.0, math.log(4)]]])
    loss = logit_fusion_loss(
        logits, torch.tensor([[2.0, 1.0]]), torch.tensor([1]), torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(2))


def test_contrastive_loss_by_hand():
    """Rows 1 and 2 say the same: 1 - cos 45. Rows 1 and 3 differ, cos 0; 2 and 3 differ, cos 45."""
    scores, c = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), math.sqrt(0.5)
    texts = ["I drive a big red train."] * 2 + ["Nobody ever swims here, they say."]
    loss = contrastive_loss(scores, texts)
    assert loss.item() == pytest.approx((1 - c + 0 + c) / 3, abs=1e-6)
    assert contrastive_loss(scores[:1], texts[:1]).item() == 0


@given(st.text("ab c", max_size=12), st.text("ab c", max_size=12))
@settings(deadline=None, max_examples=30)
def test_similarity_does_not_depend_on_the_order(a, b):
    assert similarity(a, b) == similarity(b, a)


def test_scored_tokens_are_sorted_by_prompt_and_averaged_by_row():
    """Two rows of 1 and 2 tokens under two prompts, packed row by row and prompt by prompt.

    Row 0: -1 under prompt 0, -2 under 1. Row 1: (-3, -5) under 0: mean 4; (-4, -8) under 1: 6.
    """
    logps = torch.tensor([-1.0, -2.0, -3.0, -5.0, -4.0, -8.0])
    branch = torch.tensor([0, 1, 0, 0, 1, 1])
    row = torch.tensor([0, 0, 1, 1, 1, 1])
    sorted_logps, sorted_row = by_prompt(logps, branch), by_prompt(row, branch)
    assert sorted_logps.tolist() == [[-1, -3, -5], [-2, -4, -8]]
    assert sorted_row.tolist() == [[0, 1, 1]] * 2
    assert mean_nll(sorted_logps, sorted_row[0], 2).tolist() == [[1, 2], [4, 6]]


# ---- retriever ----------------------------------------------------------------------------------


def test_scores_follow_the_published_softplus():
    """Cosine -1 -> 0.0000, 0 -> 0.0693, above 0.1 the identity."""
    retriever = Retriever(4)
    retriever.head.weight.data, retriever.head.bias.data = torch.eye(4), torch.zeros(4)
    axis, across = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    prompts = torch.stack([axis, -axis, across])[:, None]
    mask = torch.ones(1, 1, dtype=torch.bool)
    scores = retriever(prompts, axis[None, None], mask, torch.zeros(4))
    assert scores[0].tolist() == pytest.approx([1.0, 4.5e-6, math.log(2) / 10], abs=1e-4)


@pytest.mark.parametrize("kind", ["linear", "transformer"])
@pytest.mark.parametrize("heads", ["shared", "separate"])
def test_scores_do_not_depend_on_padding_or_on_the_other_rows(tokenizer, kind, heads):
    model, _ = prepared(tokenizer, "--retriever", kind, "--heads", heads)
    soft, contexts = soft_prompts(model), [[5, 6], list(range(7, 40)), [9, 8, 7]]
    together = soft.scores(contexts)
    alone = torch.cat([soft.scores([context]) for context in contexts])
    assert torch.allclose(together, alone, atol=1e-6) and together.std() > 1e-4
    other = soft.scores([contexts[1][::-1][:5]])
    assert not torch.allclose(soft.scores([contexts[1]]), other, atol=1e-4)


def test_contexts_are_told_apart_by_what_they_do_not_share(tokenizer):
    """Three contexts share 30 tokens and differ in two.

    Their scores differ ten times as much once their mean is subtracted.
    """
    model, _ = prepared(tokenizer)
    soft, shared = soft_prompts(model), [5] * 15 + list(range(60, 75))
    contexts = [shared + [k, k + 9] for k in (100, 200, 300)]
    soft.centre.zero_()
    before = soft.scores(contexts).std(0).mean()
    soft.centre_on(contexts)
    assert soft.scores(contexts).std(0).mean() > 10 * before
    mean = soft.words(torch.tensor(contexts)).mean((0, 1))
    assert torch.allclose(soft.centre, mean, atol=1e-6)


def test_a_preference_that_all_contexts_share_is_learnt_for_contexts_never_seen(tokenizer):
    """40 random contexts, for all of which prompt 2 is best.

    Of deviations from their mean alone no linear map has one sign, so new contexts would be given
    the opposite; with the mean beside them, prompt 2 is chosen for new ones too.
    """
    model, _ = prepared(tokenizer, "--K", "2", "--heads", "separate")
    soft, rng = soft_prompts(model), random.Random(0)
    contexts = [[rng.randrange(60, 400) for _ in range(12)] for _ in range(60)]
    soft.centre_on(contexts[:40])
    optimizer = torch.optim.AdamW(soft.retriever.parameters(), lr=1e-3)
    nll = torch.tensor([[1.0, 0.5]] * 40)
    for _ in range(60):
        selection_loss(nll, soft.choice(soft.scores(contexts[:40])), 0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert soft.scores(contexts[40:]).argmax(-1).float().mean() > 0.9


def test_the_retriever_never_sees_the_reply(tokenizer):
    """Another reply changes nothing that the losses of the retriever are given."""
    args = spt_args()
    first, second = (training.build_tree(ROWS[0] | {"response": text}, tokenizer, args, None)
                     for text in ("Ask my cat.", "Never."))
    assert first.root != second.root
    assert (first.retrieval_ids, first.about) == (second.retrieval_ids, second.about)
    seen = tokenizer.decode(first.retrieval_ids)
    assert seen == "\n".join([*ROWS[0]["persona"], ROWS[0]["context"]])
