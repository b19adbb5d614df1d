"""The attention rule of a packed forest: token i sees token j if and only if j <= i <= last[j]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_TREE = "sdpa_by_tree"  # the name under which transformers knows sdpa_by_tree


def register() -> None:
    """Make `sdpa_by_tree` known to transformers; to be called before a model is set to use it."""
    AttentionInterface.register(BY_TREE, sdpa_by_tree)
    # generate passes a 2-D mask. transformers turns it into the 4-D mask of an attention only under
    # names that have a mask function.
    AttentionMaskInterface.register(BY_TREE, sdpa_mask)


def attention_mask(last: Tensor, implementation: str = "sdpa"):
    """The attention rule as the boolean (1, 1, T, T) matrix of SDPA; True means may attend.

    For flex_attention it is a BlockMask: the matrix is never built, so memory grows with T instead
    of T^2.
    """
    if implementation == "flex_attention":
        length = len(last)
        # None for batch and heads: one rule holds for all of them.
        return create_block_mask(mask_mod(last), None, None, length, length, device=last.device)
    index = torch.arange(len(last), device=last.device)
    query, key = index[:, None], index[None, :]
    return ((key <= query) & (query <= last[None, :]))[None, None]


def mask_mod(last: Tensor):
    """The attention rule in the form that FlexAttention compiles into its kernel."""

    def rule(batch, head, query, key):
        return (key <= query) & (query <= last[key])

    return rule


def sdpa_by_tree(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    tree_lengths: list[int] | None = None,
    **kwargs,
):
    """SDPA, tree by tree where a packed row says how long its trees are.

    No token attends to another tree, so the cost falls from the square of all tokens to the sum of
    the trees' squares. query (1, H, T, D) -> output (1, T, H, D), as in transformers.
    """
    if tree_lengths is None:  # a padded batch or one with a cache: there are no trees to tell apart
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # pack lays the trees one after the other, so a tree is a slice of the row.
    outputs, start = [], 0
    for length in tree_lengths:
        tree = slice(start, start + length)
        # Only the block of this tree is cut out of the mask: outside of it nothing may attend.
        output, _ = sdpa_attention_forward(
            module,
            query[:, :, tree],
            key[:, :, tree],
            value[:, :, tree],
            attention_mask[:, :, tree, tree],
            **kwargs,
        )
        outputs.append(output)
        start += length
    # None stands for the attention weights, which SDPA does not return.
    return torch.cat(outputs, 1), None
