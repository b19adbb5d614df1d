"""Lay a forest into one row of tokens, and cut such a row into parts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trees.tree import CONTEXT, Segment, Tree

Batch = dict[str, Tensor | int | list[Tree]]


def pack(trees: Iterable[Tree]) -> Batch:
    """Lay a forest into one row.

    Returns input_ids, position_ids (1, T); parent, last (T,), parent -1 at a tree's first token;
    and for the scored tokens: token, role, branch, row (S,) integers and weight (S,), where `token`
    is the index in the packed row, `branch` the label of the segment, `row` the index of the tree.
    num_rows is the number of trees, and `trees` are the trees themselves: a method's loss finds
    there what its own kind of tree carries.
    """
    trees = list(trees)
    input_ids, position, parent, last = [], [], [], []
    scored = []  # (token, role, weight, branch, row)

    def lay(segment: Segment, previous: int, depth: int, row: int) -> None:
        """Append a segment and what is below it; previous: the index of the token before it."""
        first = len(input_ids)
        for i, token in enumerate(segment.input_ids):
            weight = 1.0 if segment.weights is None else segment.weights[i]
            # A token of weight 0 stays in the row, because later tokens read it. It is not scored.
            if segment.role != CONTEXT and weight:
                scored.append((first + i, segment.role, weight, segment.branch, row))
            input_ids.append(token)
            position.append(depth + i)
            parent.append(previous if i == 0 else first + i - 1)
        # Placeholders: where a subtree ends is known only after its children are laid.
        last.extend([0] * len(segment.input_ids))
        indices = range(first, len(input_ids))
        end = indices[-1] if indices else previous  # a segment without tokens passes its parent on
        for child in segment.children:
            lay(child, end, depth + len(indices), row)
        for i in indices:  # only now is it known where the subtree ends
            last[i] = len(input_ids) - 1

    for row, tree in enumerate(trees):
        assert tree.root.role == CONTEXT, "a tree starts with its context"
        lay(tree.root, -1, 0, row)
    # zip of an empty list gives no columns at all, so a forest without scored tokens names five.
    token, role, weight, branch, row = zip(*scored, strict=True) if scored else ((),) * 5
    return {
        "input_ids": torch.tensor([input_ids]),
        "position_ids": torch.tensor([position]),
        "parent": torch.tensor(parent),
        "last": torch.tensor(last),
        # The types are named because torch reads an empty list as float32, which cannot index.
        "token": torch.tensor(token, dtype=torch.long),
        "role": torch.tensor(role, dtype=torch.long),
        "weight": torch.tensor(weight, dtype=torch.float32),
        "branch": torch.tensor(branch, dtype=torch.long),
        "row": torch.tensor(row, dtype=torch.long),
        "num_rows": len(trees),
        "trees": trees,
    }


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with its tensors on a device."""
    return {
        name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()
    }


def split(batch: Batch, max_leaves: int, max_tokens: int) -> list[Batch]:
    """Cut a packed row into rows of at most max_leaves leaves and max_tokens tokens each.

    A part has at least one leaf, however long. Every scored token is scored in exactly one part, so
    sums over the parts are sums over the whole. A part is a run of packed tokens and the ancestors
    of its first token: the packing is depth first, so an ancestor of a later token of the run
    stands in the run or is one of those.
    """
    last = batch["last"].tolist()
    ends = [i + 1 for i, end in enumerate(last) if end == i]  # a run ends after a leaf
    parts, start = [], 0
    while start < len(last):
        # An earlier token is an ancestor if its subtree reaches to this place.
        above = [j for j in range(start) if last[j] >= start]
        later = [end for end in ends if end > start][:max_leaves]
        fitting = [end for end in later if len(above) + end - start <= max_tokens]
        # Without the default, a single leaf above max_tokens would keep the loop from ending.
        end = max(fitting, default=later[0])
        parts.append(_take(batch, above, start, end))
        start = end
    return parts


def _take(batch: Batch, above: list[int], start: int, end: int) -> Batch:
    """The tokens `above` and those of [start, end) of a packed row; only the latter are scored."""
    device = batch["last"].device
    # Ascending, so that searchsorted turns an index of the whole row into one of the part.
    keep = torch.tensor([*above, *range(start, end)], device=device)
    parent = batch["parent"][keep]
    scored = (batch["token"] >= start) & (batch["token"] < end)
    # `row` keeps counting the trees of the whole, since sums are taken over all parts together.
    part = {name: batch[name][scored] for name in ("role", "weight", "branch", "row")}
    return part | {
        "input_ids": batch["input_ids"][:, keep],
        "position_ids": batch["position_ids"][:, keep],
        "parent": torch.searchsorted(keep, parent).where(parent >= 0, -1),
        # Where the part cuts a subtree short, it ends at its last kept token: right=True and - 1.
        "last": torch.searchsorted(keep, batch["last"][keep], right=True) - 1,
        "token": torch.searchsorted(keep, batch["token"][scored]),
        "num_rows": batch["num_rows"],
        "trees": batch["trees"],
    }
