"""Prompt trees: one context, computed once, with all its continuations packed into one row.

A tree is a context with branches: a few prompt endings, under each a few responses. `pack` walks a
forest depth first and lays all tokens in one row. Every token knows its predecessor (`parent`), the
position it would have in an ordinary row (`position_ids`) and the last index of the subtree below it
(`last`). Token i may attend to token j if and only if

    j <= i <= last[j]

which holds exactly when j lies on the path from the root of i's tree to i. That comparison keeps
branches and packed trees apart, so per-token log-probabilities equal those of padded rows to
rounding, and each shared token is computed once.

Shapes: T packed tokens, S scored tokens, P distinct positions whose logits are needed, V vocabulary.
"""

from trees.attention import attention_mask, mask_mod, sdpa_by_tree  # noqa: F401
from trees.growing import Branches, left_pad, prefill  # noqa: F401
from trees.packing import pack, split, take  # noqa: F401
from trees.scoring import leaf_sums, score, score_forest, score_in_parts, score_logits, score_rows, sum_by_row  # noqa: F401
from trees.tree import (  # noqa: F401
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
