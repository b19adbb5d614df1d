"""Segments and trees: what one data row teaches or asks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

# The role of a segment's tokens in a loss: plain numbers, because `pack` makes a tensor of them.
CONTEXT, LIKELIHOOD, UNLIKELIHOOD = 0, 1, 2


@dataclass
class Segment:
    """A run of tokens with children.

    role: CONTEXT tokens carry no loss; the others are scored.
    weights: one number a token, or None for 1 everywhere; tokens of weight 0 are not scored.
    branch: the caller's label of this segment (a possibility number, the index of a response).
    """

    input_ids: list[int]
    role: int = CONTEXT
    weights: list[float] | None = None
    branch: int = -1
    children: list[Segment] = field(default_factory=list)


@dataclass
class Tree:
    """What one data row teaches or asks: its root segment, and how many turns did not fit.

    A root without tokens makes its children trees of their own that belong to one row. A method or
    decoder that needs more beside a tree derives a dataclass from this one (kw_only=True).
    """

    root: Segment
    dropped_turns: int = 0


def walk(segment: Segment, above: tuple[Segment, ...] = ()) -> Iterator[tuple[Segment, ...]]:
    """Yield the path from the root to every segment, depth first, parents before children."""
    path = (*above, segment)
    yield path
    for child in segment.children:
        yield from walk(child, path)


def branch_prompts(prompts: list[list[int]], branches: list[int] | None = None) -> Segment:
    """A segment of the tokens that all prompts share, with one child per prompt for its own rest.

    A single prompt, or equal prompts without labels, need no children.
    """
    shared = min(len(p) for p in prompts)
    for column in range(shared):
        if any(p[column] != prompts[0][column] for p in prompts):
            shared = column
            break
    if branches is None:
        assert all(p == prompts[0] for p in prompts), "different prompts need branch labels"
        return Segment(prompts[0])
    # Every branch keeps a token of its own, because the logits of its first new token stand there.
    shared = min(shared, min(len(p) for p in prompts) - 1)
    ends = [Segment(p[shared:], branch=b) for p, b in zip(prompts, branches, strict=True)]
    return Segment(prompts[0][:shared], children=ends)


def prefix_clash(sequences: list[list[int]]) -> tuple[int, int] | None:
    """Indices (i, j) of a sequence that equals or starts another one; None if prefix-free."""
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    # In sorted order, the sequences that start with sequence i follow it at once, so comparing
    # neighbours is enough.
    for i, j in zip(order, order[1:], strict=False):
        if sequences[j][: len(sequences[i])] == sequences[i]:
            return i, j
    return None


def target_trie(sequences: list[list[int]], weights: list[float]) -> list[Segment]:
    """Sequences of a target distribution as scored segments in which a common prefix stands once.

    A token's weight is the sum of the weights of the sequences through it, so the sum of
    -weight * logp over all tokens is -sum_y w(y) log p(y). The segment in which sequence i ends is
    a leaf with branch i. Raises ValueError unless the sequences are prefix-free: an inner node
    cannot end a sequence, and probabilities would overlap.
    """
    clash = prefix_clash(sequences)
    if clash:
        # trees/ knows no files; a caller that does asks prefix_clash first and names the place.
        raise ValueError(f"sequence {clash[0] + 1} equals or starts sequence {clash[1] + 1}")

    def grow(members: list[int], start: int) -> list[Segment]:
        """The segments of sequences that agree up to start, one per next token."""
        # All members have a token here, since one that had ended would be a clash. A dict keeps the
        # order of insertion, so the same targets give the same tree.
        by_token: dict[int, list[int]] = {}
        for i in members:
            by_token.setdefault(sequences[i][start], []).append(i)
        segments = []
        for group in by_token.values():
            first, end = sequences[group[0]], start + 1
            # A segment goes on as long as the whole group agrees.
            while end < len(first) and all(sequences[i][end] == first[end] for i in group):
                end += 1
            is_leaf = len(group) == 1
            segments.append(Segment(
                input_ids=first[start:end],
                role=LIKELIHOOD,
                weights=[sum(weights[i] for i in group)] * (end - start),
                branch=group[0] if is_leaf else -1,
                children=[] if is_leaf else grow(group, end),
            ))
        return segments

    return grow(list(range(len(sequences))), 0)


def num_tokens(tree: Tree) -> int:
    """Tokens that a tree holds."""
    return sum(len(path[-1].input_ids) for path in walk(tree.root))


def padded_shape(tree: Tree) -> tuple[int, int]:
    """(rows, tokens of the longest) of the same tree as ordinary rows, one per leaf."""
    leaves = [path for path in walk(tree.root) if not path[-1].children]
    lengths = [sum(len(part.input_ids) for part in path) for path in leaves]
    return len(lengths), max(lengths)


def ordinary_rows(tree: Tree) -> list[dict]:
    """The same tree as ordinary rows, one per scored segment, each with a context of its own.

    Each row has input_ids (list), scored (indices into the row), weight (lists), role and branch.
    """
    rows = []
    # One row per scored segment and not per leaf: the row of a leaf would score the segments above
    # it again for every leaf below them.
    for path in walk(tree.root):
        segment = path[-1]
        if segment.role == CONTEXT:
            continue
        prefix = [t for part in path[:-1] for t in part.input_ids]
        weights = segment.weights or [1.0] * len(segment.input_ids)
        keep = [i for i, w in enumerate(weights) if w]
        rows.append({
            "input_ids": prefix + segment.input_ids,
            "scored": [len(prefix) + i for i in keep],
            "weight": [weights[i] for i in keep],
            "role": segment.role,
            "branch": segment.branch,
        })
    return rows
