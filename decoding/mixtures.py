"""Several branches that speak as one: fusion of soft prompts, and classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
)

from trees import Tree


class Fusion(LogitsProcessor):
    """Makes the branches of a row one voice: their logits are mixed, and each branch gets the mixture.

    weights (rows, N); kind probs: log of the weighted mean of probabilities; else the weighted sum of logits.
    """

    def __init__(self, weights: Tensor, kind: str):
        self.weights, self.kind = weights, kind

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V)
        rows = scores.view(*self.weights.shape, -1)
        weights = self.weights[..., None].to(scores.device)
        if self.kind == "probs":
            mixed = (rows.log_softmax(-1) + weights.log()).logsumexp(1)
        else:
            mixed = (weights * rows).sum(1)
        return mixed.repeat_interleave(rows.shape[1], 0)


def fusion_of(trees: list[Tree]) -> Fusion:
    return Fusion(torch.stack([tree.note["weights"] for tree in trees]), trees[0].note["kind"])


def guide(logits: Tensor, guidance: list[float]) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, arXiv:2207.12598) on next-token logits.

    logits (2 x rows, N, V): of the conditioned rows, then of their unconditioned twins. Returns (rows, N, V),
    z_un + g (z_c - z_un), with one g per row: 1 is the condition alone, 0 none of it.
    """
    conditioned, plain = logits.chunk(2)
    return plain + torch.tensor(guidance, device=logits.device)[:, None, None] * (conditioned - plain)
