"""The attention rule of a packed forest: token i sees token j if and only if j <= i <= last[j]."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def attention_mask(last: Tensor, implementation: str = "sdpa"):
    """The attention rule, as the boolean (1, 1, T, T) matrix of SDPA or, for flex_attention, as FlexAttention's BlockMask.

    True = may attend. FlexAttention never builds the matrix, so memory grows with T instead of T^2.
    """
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        length = len(last)
        return create_block_mask(mask_mod(last), None, None, length, length, device=last.device)
    index = torch.arange(len(last), device=last.device)
    query, key = index[:, None], index[None, :]
    return ((key <= query) & (query <= last[None, :]))[None, None]


def mask_mod(last: Tensor):
    """The attention rule in the form that FlexAttention compiles into its kernel."""

    def rule(batch, head, query, key):
        return (key <= query) & (query <= last[key])

    return rule


def sdpa_by_tree(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, tree_lengths: list[int] | None = None, **kwargs):
    """SDPA, tree by tree where a packed row says how long its trees are: no token attends to another tree.

    query (1, H, T, D) -> (1, T, H, D), as transformers has it. The cost falls from the square of all tokens to the sum
    of the trees' squares.
    """
    if tree_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs, start = [], 0
    for length in tree_lengths:
        own = slice(start, start + length)
        outputs.append(sdpa_attention_forward(
            module, query[:, :, own], key[:, :, own], value[:, :, own], attention_mask[:, :, own, own], **kwargs)[0])
        start += length
    return torch.cat(outputs, 1), None


AttentionInterface.register("sdpa_by_tree", sdpa_by_tree)
AttentionMaskInterface.register("sdpa_by_tree", sdpa_mask)
