"""Decode several trees together, each context computed once."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from trees.tree import Tree


class Branches:
    """The branches of several trees while they grow together, each context in the cache only once.

    A row of the batch is a tree: its context, then the ends of its prompts, then a token of every
    branch per step. A branch's token sees its context and its own branch; `owner` says which
    branch a cached token belongs to. Copying the context for every branch would cost N times the
    cache, read and moved at every step.
    logits (rows, N, V), float32, are those that follow the newest token of every branch.
    """

    CONTEXT, NOBODY = -1, -2  # owners: visible to every branch, and padding

    @torch.inference_mode()
    def __init__(self, model, trees: list[Tree], pad_id: int):
        self.model, self.num_branches = model, _num_branches(trees)
        device, rows = model.device, len(trees)
        contexts = [tree.root.input_ids for tree in trees]
        context_ids, context_mask = left_pad(contexts, pad_id, device)
        ends = [child.input_ids for tree in trees for child in tree.root.children]
        end_ids, end_mask = left_pad(ends, pad_id, device)  # (rows x N, E)
        width = end_ids.shape[1]
        self.cache = DynamicCache()
        # Roots without tokens leave nothing to share, as with soft prompts, which stand before the
        # message; and a model cannot run zero tokens.
        if context_ids.shape[1]:
            self.cache = model(
                input_ids=context_ids,
                attention_mask=context_mask,
                # Pads get position 0: -1 is no row of a learned position table such as GPT-2's.
                position_ids=(context_mask.cumsum(-1) - 1).clamp(min=0),
                past_key_values=self.cache,
                # Not 0, which means the logits of all positions; those of a context are not needed.
                logits_to_keep=1,
                use_cache=True,
            ).past_key_values
        # (rows, cached tokens)
        self.owner = torch.where(context_mask.bool(), self.CONTEXT, self.NOBODY)
        self.branch = torch.arange(self.num_branches, device=device)
        lengths = context_mask.sum(-1, keepdim=True)  # (rows, 1)
        # A branch goes on where the tokens of its own context end, not where the padded row ends.
        position = lengths.repeat_interleave(self.num_branches, 0) + end_mask.cumsum(-1) - 1
        owner = torch.where(end_mask.bool(), self.branch.repeat(rows)[:, None], self.NOBODY)
        # The ends of a row lie side by side, `width` columns each, padded on the left, so the last
        # column of each holds the newest token of its branch.
        last = torch.arange(1, self.num_branches + 1, device=device) * width - 1
        self.next_position = lengths + end_mask.sum(-1).view(rows, -1)  # (rows, N)
        self.logits = self._forward(
            end_ids.view(rows, -1),
            position.clamp(min=0).view(rows, -1),
            owner.view(rows, -1),
            self.branch.repeat_interleave(width),
            last,
        )

    def feed(self, tokens: Tensor) -> None:
        """Add a token to every branch: tokens (rows, N)."""
        owner = self.branch.expand_as(tokens)
        # keep = 0 keeps all logits: each of the N tokens is the newest of its branch.
        self.logits = self._forward(tokens, self.next_position, owner, self.branch, 0)
        self.next_position = self.next_position + 1

    @torch.inference_mode()
    def _forward(
        self, input_ids: Tensor, position_ids: Tensor, owner: Tensor, branch: Tensor, keep
    ) -> Tensor:
        """Run q new tokens a row; owner (rows, q): whose they are, branch (q,): what they see."""
        cached = self.owner.shape[1]
        self.owner = torch.cat([self.owner, owner], dim=1)
        column = torch.arange(self.owner.shape[1], device=owner.device)
        seen = self.owner[:, None] == self.CONTEXT
        seen = seen | (self.owner[:, None] == branch[:, None])  # (rows, q, keys)
        # Within one call the order of columns is the order of time, as in any causal mask.
        mask = seen & (column <= cached + torch.arange(len(branch), device=owner.device)[:, None])
        return self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask[:, None],
            past_key_values=self.cache,
            logits_to_keep=keep,
            use_cache=True,
        ).logits.float()


def prefill(
    model, trees: list[Tree], pad_id: int, copies: int = 1
) -> tuple[Tensor, Tensor, DynamicCache]:
    """Compute the contexts of several trees once and give each branch its own copy of the cache.

    Returns input_ids and attention_mask (B, L) of all B = rows x branches x copies sequences and
    the key/value cache of their contexts, ready for
    `model.generate(input_ids, attention_mask=, past_key_values=)`.
    Contexts and branch ends are left-padded apart, so a sequence may have pads in its middle; they
    are masked, and positions count real tokens only. All trees must have the same number of
    branches.
    """
    num_branches = _num_branches(trees)
    context_ids, context_mask = left_pad([t.root.input_ids for t in trees], pad_id, model.device)
    cache = model(
        input_ids=context_ids,
        attention_mask=context_mask,
        position_ids=(context_mask.cumsum(-1) - 1).clamp(min=0),
        logits_to_keep=1,
        use_cache=True,
    ).past_key_values
    # Copied after the forward call: a context is computed once, however many sequences follow it.
    cache.batch_repeat_interleave(num_branches * copies)
    ends = [child.input_ids for tree in trees for child in tree.root.children]
    end_ids, end_mask = left_pad(ends, pad_id, model.device)
    row = torch.arange(len(trees), device=model.device).repeat_interleave(num_branches)
    input_ids = torch.cat([context_ids[row], end_ids], 1)
    attention_mask = torch.cat([context_mask[row], end_mask], 1)
    return (
        input_ids.repeat_interleave(copies, 0),
        attention_mask.repeat_interleave(copies, 0),
        cache,
    )


def left_pad(rows: list[list[int]], pad_id: int, device) -> tuple[Tensor, Tensor]:
    """Token rows of different lengths as (B, L) input_ids and attention_mask, padded left."""
    length = max(len(row) for row in rows)
    padding = [length - len(row) for row in rows]
    ids = [[pad_id] * pad + row for pad, row in zip(padding, rows, strict=True)]
    mask = [[0] * pad + [1] * (length - pad) for pad in padding]
    return (
        torch.tensor(ids, dtype=torch.long, device=device),
        torch.tensor(mask, dtype=torch.long, device=device),
    )


def _num_branches(trees: list[Tree]) -> int:
    """The number of branches, which is the same for all trees that are decoded together."""
    counts = {len(tree.root.children) for tree in trees}
    assert len(counts) == 1 and counts != {0}, f"branches must match, got {counts}"
    return counts.pop()
