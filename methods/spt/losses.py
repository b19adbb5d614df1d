"""The losses of selective prompt tuning, as functions of tensors.

Shapes: B rows, K prompts, N response tokens of all rows, S = K * N scored tokens, W vocabulary.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from sacrebleu import sentence_bleu
from torch import Tensor
from torch.nn import functional as F


def by_prompt(values: Tensor, branch: Tensor) -> Tensor:
    """Values (S, ...) of scored tokens as (K, N, ...): a line per prompt, a column per token.

    branch: (S,) the prompt of every token. Each response stands under every prompt, token for
    token, so a stable sort by prompt aligns the columns.
    """
    count = int(branch.max()) + 1
    return values[torch.argsort(branch, stable=True)].unflatten(0, (count, -1))


def mean_nll(logps: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Mean negative log-probability (B, K) of a row's response under every prompt.

    In nats per token. logps: (K, N) in nats. row: (N,) the row of every token.
    """
    sums = logps.new_zeros(num_rows, len(logps)).index_add(0, row, -logps.T)
    # the floor of 1 guards a row without tokens, though every reply has at least its end token
    return sums / torch.bincount(row, minlength=num_rows)[:, None].clamp(min=1)


def selection_loss(nll: Tensor, log_h: Tensor, tau_gold: float = 1.0, noise: float = 0.0) -> Tensor:
    """KL(g || h), mean over rows, with g = softmax(-nll / tau_gold); no gradient flows into nll.

    nll, log_h: (B, K). noise: standard deviation of what is added to the logits of g (added to g
    itself, it could make it negative).
    """
    target = -nll.detach() / tau_gold  # the model teaches the retriever, not the other way round
    if noise:
        target = target + noise * torch.randn_like(target)
    log_g = target.log_softmax(-1)
    return (log_g.exp() * (log_g - log_h)).sum(-1).mean()


def fusion_loss(logps: Tensor, log_h: Tensor, row: Tensor) -> Tensor:
    """Mean of -log sum_k h[k] p_k(token) over tokens; logps (K, N), log_h (B, K), row (N,)."""
    # the sum is taken in logs: a product of h and p may be too small for a float
    return -(logps + log_h[row].T).logsumexp(0).mean()


def logit_fusion_loss(logits: Tensor, weights: Tensor, targets: Tensor, row: Tensor) -> Tensor:
    """Mean cross entropy of sum_k weights[k] logits_k.

    logits: (K, N, W). weights: (B, K). targets, row: (N,).
    """
    # this mixes logits, not probabilities, so the weights need not sum to 1 (raw scores do not)
    return F.cross_entropy(torch.einsum("knw,nk->nw", logits, weights[row]), targets)


def contrastive_loss(scores: Tensor, texts: list[str], threshold: float = 20.0) -> Tensor:
    """Mean over the pairs of rows: 1 - cos of their scores where similar, else max(0, cos).

    scores: (B, K). texts: B of them, similar if their symmetric BLEU is above the threshold. A
    single row has no pair and a loss of 0. Since scores have K entries and are positive, at most K
    rows can be unlike each other without a loss.
    """
    pairs = [(i, j) for i in range(len(texts)) for j in range(i)]
    if not pairs:
        return scores.sum() * 0  # in the graph, so that DDP sees a gradient of every parameter
    first, second = torch.tensor(pairs, device=scores.device).T
    # sorted, since similarity is symmetric: each pair is in the cache once
    similar = [1.0 if similarity(*sorted((texts[i], texts[j]))) > threshold else -1.0
               for i, j in pairs]
    # the published margin is 0, which is also the default of torch
    return F.cosine_embedding_loss(
        scores[first], scores[second], torch.tensor(similar, device=scores.device))


@lru_cache(maxsize=1_000_000)
def similarity(a: str, b: str) -> float:
    """Mean of the sentence BLEU of two texts against each other, 0 to 100 (sacrebleu)."""
    # BLEU depends on the direction; the paper's code takes the one that row order happens to give
    return (sentence_bleu(a, [b]).score + sentence_bleu(b, [a]).score) / 2
