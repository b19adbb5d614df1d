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

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

CONTEXT, LIKELIHOOD, UNLIKELIHOOD = 0, 1, 2  # the role of a segment's tokens in a loss


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
    """What one data row teaches or asks: the root segment, how many turns did not fit, and what else is to be known.

    A root without tokens makes its children trees of their own that belong to one row.
    twin: the same branches without what they are asked for; the next token's logits are twin + guidance * (own - twin).
    note: whatever a method's loss or decoding wants to know of the row.
    """

    root: Segment
    dropped_turns: int = 0
    twin: Tree | None = None
    guidance: float = 1.0
    note: object = None


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
    shared = min(shared, min(len(p) for p in prompts) - 1)  # every branch keeps a token of its own
    ends = [Segment(p[shared:], branch=b) for p, b in zip(prompts, branches, strict=True)]
    return Segment(prompts[0][:shared], children=ends)


def prefix_clash(sequences: list[list[int]]) -> tuple[int, int] | None:
    """Indices (i, j) of a sequence that equals or starts another one, or None if the set is prefix-free."""
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    for i, j in zip(order, order[1:], strict=False):  # what starts with sequence i follows it at once
        if sequences[j][: len(sequences[i])] == sequences[i]:
            return i, j
    return None


def target_trie(sequences: list[list[int]], weights: list[float]) -> list[Segment]:
    """Sequences of a target distribution as scored segments in which every common prefix stands once.

    A token's weight is the sum of the weights of the sequences through it, so the sum of -weight * logp over all
    tokens is -sum_y w(y) log p(y). The segment in which sequence i ends is a leaf with branch i. Raises ValueError
    unless the sequences are prefix-free: an inner node cannot end a sequence, and probabilities would overlap.
    """
    clash = prefix_clash(sequences)
    if clash:
        raise ValueError(f"sequence {clash[0] + 1} equals or starts sequence {clash[1] + 1}")

    def grow(members: list[int], start: int) -> list[Segment]:
        """The segments of sequences that agree up to start, one per next token."""
        by_token: dict[int, list[int]] = {}
        for i in members:
            by_token.setdefault(sequences[i][start], []).append(i)
        segments = []
        for group in by_token.values():
            first, end = sequences[group[0]], start + 1
            while end < len(first) and all(sequences[i][end] == first[end] for i in group):
                end += 1
            weight, is_leaf = sum(weights[i] for i in group), len(group) == 1
            segments.append(Segment(first[start:end], LIKELIHOOD, [weight] * (end - start), group[0] if is_leaf else -1,
                                    [] if is_leaf else grow(group, end)))
        return segments

    return grow(list(range(len(sequences))), 0)


def num_tokens(tree: Tree) -> int:
    """Tokens that a tree holds."""
    return sum(len(path[-1].input_ids) for path in walk(tree.root))


def padded_shape(tree: Tree) -> tuple[int, int]:
    """(rows, tokens of the longest) of the same tree as ordinary rows, one from the root to every leaf."""
    lengths = [sum(len(part.input_ids) for part in path) for path in walk(tree.root) if not path[-1].children]
    return len(lengths), max(lengths)


def pack(trees: Iterable[Tree]) -> dict[str, Tensor | int]:
    """Lay a forest into one row.

    Returns input_ids, position_ids (1, T); parent, last (T,), parent -1 at a tree's first token; and
    for the scored tokens: token, role, branch, row (S,) integers and weight (S,), where `token` is
    the index in the packed row, `branch` the label of the segment and `row` the index of the tree.
    num_rows is the number of trees, notes are theirs.
    """
    trees = list(trees)
    input_ids, position, parent, last = [], [], [], []
    scored = []  # (token, role, weight, branch, row)

    def lay(segment: Segment, previous: int, depth: int, row: int) -> None:
        first = len(input_ids)
        for i, token in enumerate(segment.input_ids):
            weight = 1.0 if segment.weights is None else segment.weights[i]
            if segment.role != CONTEXT and weight:
                scored.append((first + i, segment.role, weight, segment.branch, row))
            input_ids.append(token)
            position.append(depth + i)
            parent.append(previous if i == 0 else first + i - 1)
        last.extend([0] * len(segment.input_ids))
        own = range(first, len(input_ids))
        end = own[-1] if own else previous
        for child in segment.children:
            lay(child, end, depth + len(own), row)
        for i in own:
            last[i] = len(input_ids) - 1

    for row, tree in enumerate(trees):
        assert tree.root.role == CONTEXT, "a tree starts with its context"
        lay(tree.root, -1, 0, row)
    token, role, weight, branch, row = zip(*scored, strict=True) if scored else ((),) * 5
    return {
        "input_ids": torch.tensor([input_ids]),
        "position_ids": torch.tensor([position]),
        "parent": torch.tensor(parent),
        "last": torch.tensor(last),
        "token": torch.tensor(token, dtype=torch.long),
        "role": torch.tensor(role, dtype=torch.long),
        "weight": torch.tensor(weight, dtype=torch.float32),
        "branch": torch.tensor(branch, dtype=torch.long),
        "row": torch.tensor(row, dtype=torch.long),
        "num_rows": len(trees),
        "notes": [tree.note for tree in trees],
    }


def split(batch: dict[str, Tensor | int], max_leaves: int, max_tokens: int) -> list[dict[str, Tensor | int]]:
    """Cut a packed row into rows of at most max_leaves leaves and max_tokens tokens (at least one leaf each).

    Every scored token is scored in exactly one part, so sums over the parts are sums over the whole. A part is a run
    of packed tokens and the ancestors of its first token: the packing is depth first, so an ancestor of a later token
    of the run stands in the run or is one of those.
    """
    last = batch["last"].tolist()
    ends = [i + 1 for i, end in enumerate(last) if end == i]  # a run ends after a leaf
    parts, start = [], 0
    while start < len(last):
        above = [j for j in range(start) if last[j] >= start]
        later = [end for end in ends if end > start][:max_leaves]
        end = max((end for end in later if len(above) + end - start <= max_tokens), default=later[0])
        parts.append(take(batch, above, start, end))
        start = end
    return parts


def take(batch: dict[str, Tensor | int], above: list[int], start: int, end: int) -> dict[str, Tensor | int]:
    """The part of a packed row with the tokens `above` and those of [start, end), of which the latter are scored."""
    device = batch["last"].device
    keep = torch.tensor([*above, *range(start, end)], device=device)
    parent, scored = batch["parent"][keep], (batch["token"] >= start) & (batch["token"] < end)
    part = {name: batch[name][scored] for name in ("role", "weight", "branch", "row")}
    return part | {
        "input_ids": batch["input_ids"][:, keep],
        "position_ids": batch["position_ids"][:, keep],
        "parent": torch.searchsorted(keep, parent).where(parent >= 0, -1),
        "last": torch.searchsorted(keep, batch["last"][keep], right=True) - 1,
        "token": torch.searchsorted(keep, batch["token"][scored]),
        "num_rows": batch["num_rows"],
    }


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


def score(model, batch: dict[str, Tensor | int]) -> Tensor:
    """Log-probabilities (S,) in nats, float32, of a packed batch's scored tokens.

    The logits that predict token i stand at parent[i], so only the distinct parents of scored tokens
    are asked of the model (`logits_to_keep`), through its ordinary forward: wrappers such as DDP,
    FSDP and PEFT stay intact. The full (T, V) logits are never built.
    """
    logits, place = score_logits(model, batch)
    targets = batch["input_ids"][0, batch["token"]]
    return logits[place, targets] - logits.logsumexp(-1)[place]


def score_logits(model, batch: dict[str, Tensor | int]) -> tuple[Tensor, Tensor]:
    """The logits (P, V), float32, that predict a packed batch's scored tokens, and the place (S,) of each token's logits.

    The last token of a leaf predicts nothing and nothing sees it, so it is only a target and not computed.
    """
    parents = batch["parent"][batch["token"]]
    positions, place = torch.unique(parents, return_inverse=True)  # (P,), (S,)
    if not len(positions):  # nothing to score; keep the graph, so that DDP sees every parameter
        positions = batch["parent"].new_zeros(1)
    last = batch["last"]
    inner = last != torch.arange(len(last), device=last.device)
    inner[positions] = True
    rank = inner.cumsum(0) - 1  # a token's index among those computed
    implementation = extract_model_from_parallel(model).config._attn_implementation
    own = {}
    if implementation == "sdpa_by_tree":
        starts = (batch["parent"][inner] == -1).nonzero().flatten().tolist()
        own["tree_lengths"] = [end - start for start, end in zip(starts, [*starts[1:], int(inner.sum())], strict=True)]
    logits = model(
        input_ids=batch["input_ids"][:, inner],
        position_ids=batch["position_ids"][:, inner],
        attention_mask=attention_mask(rank[last[inner]], implementation),
        logits_to_keep=rank[positions],
        use_cache=False,
        **own,
    ).logits[0].float()  # (P, V)
    return logits, place


def score_in_parts(model, batch: dict[str, Tensor | int], max_leaves: int, max_tokens: int) -> Tensor:
    """What `score` gives, in parts of at most max_leaves leaves and max_tokens tokens.

    With gradients each part is computed a second time on the way back, so that one part at a time is in memory.
    """
    from torch.utils.checkpoint import checkpoint

    parts = split(batch, max_leaves, max_tokens)
    if len(parts) == 1:
        return score(model, batch)
    return torch.cat([checkpoint(score, model, part, use_reentrant=False) for part in parts])


def sum_by_row(values: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Sum values (S,) into their rows (num_rows,)."""
    return values.new_zeros(num_rows).index_add(0, row, values)


def leaf_sums(values: Tensor, batch: dict[str, Tensor | int]) -> tuple[Tensor, Tensor]:
    """Sum the values (S,) of the scored tokens along the path to every leaf: (branch, sum), each (leaves,).

    With log-probabilities, the sum is the leaf's sequence log-probability under its prompt.
    """
    token = batch["token"]
    last = batch["last"][token]
    leaf = (token == last).nonzero().flatten()
    on_path = (token[None, :] <= token[leaf][:, None]) & (token[leaf][:, None] <= last[None, :])  # the attention rule
    return batch["branch"][leaf], (on_path.to(values.dtype) * values).sum(1)


def ordinary_rows(tree: Tree) -> list[dict]:
    """The same tree as ordinary rows, one per scored segment, each with a context of its own.

    Each row has input_ids (list), scored (indices into the row), weight (lists), role and branch.
    """
    rows = []
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


def score_rows(model, forest: list[Tree], pad_id: int = 0) -> Tensor:
    """What `score` gives, computed the usual way: copied contexts, right padding, all logits.

    The slow reference of the tests and the baseline of the speed benchmark. Returns (S,), in nats.
    """
    rows = [row for tree in forest for row in ordinary_rows(tree)]
    length = max(len(row["input_ids"]) for row in rows)
    padding = [length - len(row["input_ids"]) for row in rows]
    ids = [row["input_ids"] + [pad_id] * pad for row, pad in zip(rows, padding, strict=True)]
    input_ids = torch.tensor(ids, device=model.device)  # (B, L)
    mask = torch.tensor([[1] * (length - pad) + [0] * pad for pad in padding], device=model.device)
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits  # (B, L, V)
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    place = [(i, t) for i, row in enumerate(rows) for t in row["scored"]]
    sequence, token = torch.tensor(place, device=model.device).T
    return logps[sequence, token - 1, input_ids[sequence, token]]


class Branches:
    """The branches of several trees while they grow together, each context in the cache once and for all.

    A row of the batch is a tree: its context, then the ends of its prompts, then a token of every branch per
    step. A branch's token sees its context and its own branch; `owner` says whose a cached token is. Copying
    the context for every branch would cost N times the cache, read and moved at every step.
    logits (rows, N, V), float32, are those that follow the newest token of every branch.
    """

    CONTEXT, NOBODY = -1, -2  # owners: visible to every branch, and padding

    @torch.inference_mode()
    def __init__(self, model, trees: list[Tree], pad_id: int):
        from transformers import DynamicCache

        self.model, self.num_branches = model, len(trees[0].root.children)
        assert self.num_branches and all(len(tree.root.children) == self.num_branches for tree in trees), "branches must match"
        context_ids, context_mask = left_pad([tree.root.input_ids for tree in trees], pad_id, model.device)
        ends = [child.input_ids for tree in trees for child in tree.root.children]
        end_ids, end_mask = left_pad(ends, pad_id, model.device)  # (rows x N, E)
        width = end_ids.shape[1]
        self.cache = DynamicCache()
        if context_ids.shape[1]:  # roots without tokens leave nothing to share
            self.cache = model(
                input_ids=context_ids, attention_mask=context_mask, position_ids=(context_mask.cumsum(-1) - 1).clamp(min=0),
                past_key_values=self.cache, logits_to_keep=1, use_cache=True).past_key_values
        self.owner = torch.where(context_mask.bool(), self.CONTEXT, self.NOBODY)  # (rows, cached tokens)
        self.branch = torch.arange(self.num_branches, device=model.device)
        lengths = context_mask.sum(-1, keepdim=True)  # (rows, 1)
        position = (lengths.repeat_interleave(self.num_branches, 0) + end_mask.cumsum(-1) - 1).clamp(min=0)
        owner = torch.where(end_mask.bool(), self.branch.repeat(len(trees))[:, None], self.NOBODY)
        last = torch.arange(1, self.num_branches + 1, device=model.device) * width - 1
        self.next_position = lengths + end_mask.sum(-1).view(len(trees), -1)  # (rows, N)
        rows = len(trees)
        self.logits = self.forward(end_ids.view(rows, -1), position.view(rows, -1), owner.view(rows, -1),
                                   self.branch.repeat_interleave(width), last)

    def feed(self, tokens: Tensor) -> None:
        """Add a token to every branch: tokens (rows, N)."""
        self.logits = self.forward(tokens, self.next_position, self.branch.expand_as(tokens), self.branch, 0)
        self.next_position = self.next_position + 1

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, position_ids: Tensor, owner: Tensor, branch: Tensor, keep) -> Tensor:
        """Run q new tokens a row; owner (rows, q) is whose they are, branch (q,) whose tokens they see."""
        cached = self.owner.shape[1]
        self.owner = torch.cat([self.owner, owner], dim=1)
        column = torch.arange(self.owner.shape[1], device=owner.device)
        seen = (self.owner[:, None] == self.CONTEXT) | (self.owner[:, None] == branch[:, None])  # (rows, q, keys)
        mask = seen & (column <= cached + torch.arange(len(branch), device=owner.device)[:, None])
        return self.model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask[:, None], past_key_values=self.cache,
            logits_to_keep=keep, use_cache=True).logits.float()


def prefill(model, trees: list[Tree], pad_id: int, copies: int = 1) -> tuple[Tensor, Tensor, object]:
    """Compute the contexts of several trees once and hand each branch its own copy of the cache.

    Returns input_ids and attention_mask (B, L) of all B = rows x branches x copies sequences and the key/value
    cache of their contexts, ready for `model.generate(input_ids, attention_mask=, past_key_values=)`.
    Contexts and branch ends are left-padded apart, so a sequence may have pads in its middle; they are
    masked, and positions count real tokens only. All trees must have the same number of branches.
    """
    contexts = [tree.root.input_ids for tree in trees]
    ends = [[child.input_ids for child in tree.root.children] for tree in trees]
    num_branches = len(ends[0])
    assert num_branches and all(len(e) == num_branches for e in ends), "branches must match"
    device = model.device
    context_ids, context_mask = left_pad(contexts, pad_id, device)
    cache = model(
        input_ids=context_ids,
        attention_mask=context_mask,
        position_ids=(context_mask.cumsum(-1) - 1).clamp(min=0),
        logits_to_keep=1,
        use_cache=True,
    ).past_key_values
    cache.batch_repeat_interleave(num_branches * copies)
    end_ids, end_mask = left_pad([e for row in ends for e in row], pad_id, device)
    row = torch.arange(len(trees), device=device).repeat_interleave(num_branches)
    input_ids, attention_mask = torch.cat([context_ids[row], end_ids], 1), torch.cat([context_mask[row], end_mask], 1)
    return input_ids.repeat_interleave(copies, 0), attention_mask.repeat_interleave(copies, 0), cache


def left_pad(rows: list[list[int]], pad_id: int, device) -> tuple[Tensor, Tensor]:
    """Token rows of different lengths as (B, L) input_ids and attention_mask, padded on the left."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (length - len(row)) + row for row in rows], dtype=torch.long, device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], dtype=torch.long, device=device)
    return ids, mask
