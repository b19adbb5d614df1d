"""Prompt trees: one context, computed once, with all its continuations packed into one row.

A tree is a context with branches: a few prompt endings, under each a few responses. `pack` walks a
forest depth first and lays all tokens in one row. Every token knows its predecessor (`parent`), the
position it would have in an ordinary row (`position_ids`) and the last index of the subtree below
it (`last`). Token i may attend to token j if and only if

    j <= i <= last[j]

which holds exactly when j lies on the path from the root of i's tree to i. That comparison keeps
branches and packed trees apart, so per-token log-probabilities equal those of padded rows to
rounding, and each shared token is computed once.

    tree.py       segments, trees, tries of targets; the same tree as ordinary rows
    packing.py    a forest as one row of tensors, and such a row cut into parts
    attention.py  the rule as a matrix, as FlexAttention's BlockMask, and tree by tree in SDPA
    scoring.py    log-probabilities of a forest's tokens, with gradients or without
    growing.py    several trees that are decoded together

Shapes: T packed tokens, S scored tokens, P distinct positions whose logits are needed, V
vocabulary.
"""

# register() is left out: importing this package must not change transformers. Whoever loads a model
# takes it from trees.attention and calls it there.
from trees.attention import attention_mask, mask_mod
from trees.growing import Branches, left_pad, prefill
from trees.packing import pack, split, to_device
from trees.scoring import (
    ScoredTree,
    leaf_sums,
    score,
    score_forest,
    score_in_parts,
    score_logits,
    score_rows,
    sum_by_row,
)
from trees.tree import (
    CONTEXT,
    LIKELIHOOD,
    UNLIKELIHOOD,
    Segment,
    Tree,
    branch_prompts,
    num_tokens,
    ordinary_rows,
    padded_shape,
    prefix_clash,
    target_trie,
    walk,
)

# Spelt out, so that ruff can tell a re-export from an import that nothing uses (F401).
__all__ = [
    "CONTEXT",
    "LIKELIHOOD",
    "UNLIKELIHOOD",
    "Branches",
    "ScoredTree",
    "Segment",
    "Tree",
    "attention_mask",
    "branch_prompts",
    "leaf_sums",
    "left_pad",
    "mask_mod",
    "num_tokens",
    "ordinary_rows",
    "pack",
    "padded_shape",
    "prefill",
    "prefix_clash",
    "score",
    "score_forest",
    "score_in_parts",
    "score_logits",
    "score_rows",
    "split",
    "sum_by_row",
    "target_trie",
    "to_device",
    "walk",
]
