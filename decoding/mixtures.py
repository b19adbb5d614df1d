"""Trees whose next token is chosen from several distributions.

- GuidedTree: classifier-free guidance, an extrapolation from an unconditional branch;
- MixedTree: all branches speak as one, which is the fusion of soft prompts.

`sampling.complete` asks the model for the branches of `computed_trees`, and `next_logits` makes of
their logits those from which tokens are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trees import Tree


@dataclass(kw_only=True)
class GuidedTree(Tree):
    """A tree for classifier-free guidance (Ho and Salimans, arXiv:2207.12598).

    uncond: the same branches without their condition. The next token's logits are
    z_uncond + guidance_scale * (z - z_uncond): 1 is the condition alone, 0 none of it.
    """

    uncond: Tree
    guidance_scale: float


@dataclass(kw_only=True)
class MixedTree(Tree):
    """A tree whose branches give one response together: each takes the token of their mixture.

    weights (N,), one a branch. kind "probs": the weighted mean of the branches' probabilities (the
    weights sum to 1); any other kind: the weighted sum of their logits.
    """

    weights: Tensor
    kind: str


def computed_trees(trees: list[Tree]) -> list[Tree]:
    """All trees that the model computes: these, then the unconditional ones of guided trees."""
    # All conditioned trees come first, since `guide` cuts the batch into two halves.
    return [*trees, *(tree.uncond for tree in trees if isinstance(tree, GuidedTree))]


def num_responses(trees: list[Tree]) -> int:
    """How many responses a tree of this forest gives at once."""
    # The first tree stands for all: next_logits refuses trees of different kinds.
    return 1 if isinstance(trees[0], MixedTree) else len(trees[0].root.children)


def next_logits(trees: list[Tree], logits: Tensor) -> Tensor:
    """The logits (rows, responses, V) from which tokens are chosen.

    logits (computed trees, N, V): what the model gives after the newest token of every branch.
    """
    # The kinds differ in the shape of their logits, so a forest must be of one kind.
    kinds = {type(tree) for tree in trees}
    assert len(kinds) == 1, f"trees of one kind are decoded together, got {kinds}"
    if isinstance(trees[0], GuidedTree):
        return guide(logits, [tree.guidance_scale for tree in trees])
    if isinstance(trees[0], MixedTree):
        weights = torch.stack([tree.weights for tree in trees]).to(logits.device)
        # One response a row; the axis stays, so that all kinds have the same shape.
        return mix(logits, weights, trees[0].kind)[:, None]
    return logits


def guide(logits: Tensor, guidance_scale: list[float]) -> Tensor:
    """Guided logits (rows, N, V), with one scale a row.

    logits (2 x rows, N, V): of the conditioned rows, then of the same rows without condition.
    """
    cond, uncond = logits.chunk(2)  # in the order of computed_trees
    scale = torch.tensor(guidance_scale, device=logits.device)[:, None, None]
    return uncond + scale * (cond - uncond)


def mix(logits: Tensor, weights: Tensor, kind: str) -> Tensor:
    """The logits (rows, V) of a mixture of branches: logits (rows, N, V), weights (rows, N)."""
    weights = weights[..., None]
    if kind == "probs":
        # In logs, where small probabilities do not vanish and the log of a weight of 0 is harmless.
        return (logits.log_softmax(-1) + weights.log()).logsumexp(1)
    return (weights * logits).sum(1)
