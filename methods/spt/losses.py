"""The losses of selective prompt tuning, as functions of tensors."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


def by_prompt(values: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
    """Values (S, ...) of scored tokens as (K, N, ...), a column per response token, and its row (N,).

    A row's response stands under every prompt, token for token, in the order of the packing.
    """
    order = torch.argsort(batch["branch"], stable=True)
    count = int(batch["branch"].max()) + 1
    return values[order].unflatten(0, (count, -1)), batch["row"][order][: len(order) // count]


def mean_nll(logps: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Mean negative log-probability (B, K) in nats per token of a row's response under every prompt; logps (K, N)."""
    sums = logps.new_zeros(num_rows, len(logps)).index_add(0, row, -logps.T)
    return sums / torch.bincount(row, minlength=num_rows)[:, None].clamp(min=1)


def selection_loss(nll: Tensor, log_h: Tensor, tau_gold: float = 1.0, noise: float = 0.0) -> Tensor:
    """KL(g || h), mean over rows, with g = softmax(-nll / tau_gold); nll, log_h (B, K). No gradient flows into nll.

    noise: standard deviation of what is added to the logits of g (added to g itself, it could make it negative).
    """
    target = -nll.detach() / tau_gold
    if noise:
        target = target + noise * torch.randn_like(target)
    log_g = target.log_softmax(-1)
    return (log_g.exp() * (log_g - log_h)).sum(-1).mean()


def fusion_loss(logps: Tensor, log_h: Tensor, row: Tensor) -> Tensor:
    """Mean of -log sum_k h[k] p_k(token) over tokens; logps (K, N), log_h (B, K), row (N,)."""
    return -(logps + log_h[row].T).logsumexp(0).mean()


def logit_fusion_loss(logits: Tensor, weights: Tensor, targets: Tensor, row: Tensor) -> Tensor:
    """Mean cross entropy of sum_k weights[k] logits_k; logits (K, N, W), weights (B, K), targets and row (N,)."""
    return F.cross_entropy(torch.einsum("knw,nk->nw", logits, weights[row]), targets)


def contrastive_loss(scores: Tensor, texts: list[str], threshold: float = 20.0) -> Tensor:
    """Mean over the pairs of rows: 1 - cos of their scores where the texts are alike, else max(0, cos).

    Alike: symmetric BLEU above the threshold. 0 for a single row. Since scores have K entries and are positive, at most K
    rows can be unlike each other at no loss.
    """
    pairs = [(i, j) for i in range(len(texts)) for j in range(i)]
    if not pairs:
        return scores.sum() * 0
    first, second = torch.tensor(pairs, device=scores.device).T
    alike = [1.0 if similarity(*sorted((texts[i], texts[j]))) > threshold else -1.0 for i, j in pairs]
    return F.cosine_embedding_loss(scores[first], scores[second], torch.tensor(alike, device=scores.device))


@lru_cache(maxsize=1_000_000)
def similarity(a: str, b: str) -> float:
    """Mean of the sentence BLEU of two texts against each other, 0 to 100 (sacrebleu)."""
    from sacrebleu import sentence_bleu

    return (sentence_bleu(a, [b]).score + sentence_bleu(b, [a]).score) / 2
