"""Log-probabilities of a packed forest's tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trees.attention import BY_TREE, attention_mask
from trees.packing import Batch, pack, split, to_device
from trees.tree import Tree, num_tokens, ordinary_rows


def score(model, batch: Batch) -> Tensor:
    """Log-probabilities (S,) in nats, float32, of a packed batch's scored tokens.

    The logits that predict token i stand at parent[i], so only the distinct parents of scored
    tokens are asked of the model (`logits_to_keep`), through its ordinary forward: wrappers such as
    DDP, FSDP and PEFT stay intact. The full (T, V) logits are never built.
    """
    logits, place = score_logits(model, batch)
    targets = batch["input_ids"][0, batch["token"]]
    # Not log_softmax(logits)[place, targets], which would hold a second matrix of shape (P, V).
    return logits[place, targets] - logits.logsumexp(-1)[place]


def score_logits(model, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits (P, V), float32, that predict the scored tokens, and a token's place (S,) in P.

    The last token of a leaf predicts nothing and no token sees it, so it is only a target and is
    not computed.
    """
    parents = batch["parent"][batch["token"]]
    # Siblings begin after the same token, so its logits are asked for once for all of them.
    positions, place = torch.unique(parents, return_inverse=True)  # (P,), (S,)
    # With nothing to score one position is computed all the same: DDP expects a gradient for every
    # parameter in every step.
    if not len(positions):
        positions = batch["parent"].new_zeros(1)
    # Tokens that no other token sees need no computation: they are the last ones of the leaves.
    last = batch["last"]
    inner = last != torch.arange(len(last), device=last.device)
    # This matters for the stand-in above only: what predicts a token has that token below it.
    inner[positions] = True
    rank = inner.cumsum(0) - 1  # a token's index among those computed
    implementation = extract_model_from_parallel(model).config._attn_implementation
    options = {}
    if implementation == BY_TREE:
        # A tree starts where a token has no parent. To attention, the children of a root without
        # tokens are trees of their own.
        starts = (batch["parent"][inner] == -1).nonzero().flatten().tolist()
        ends = [*starts[1:], int(inner.sum())]
        options["tree_lengths"] = [e - s for s, e in zip(starts, ends, strict=True)]
    logits = model(
        input_ids=batch["input_ids"][:, inner],
        position_ids=batch["position_ids"][:, inner],
        # `last` may name a token that was left out; its rank is that of the computed one before it.
        attention_mask=attention_mask(rank[last[inner]], implementation),
        logits_to_keep=rank[positions],
        use_cache=False,
        **options,
    ).logits[0].float()  # (P, V)
    return logits, place


def score_in_parts(model, batch: Batch, max_leaves: int, max_tokens: int) -> Tensor:
    """What `score` gives, in parts of at most max_leaves leaves and max_tokens tokens.

    With gradients each part is computed a second time on the way back, so that only one part at a
    time is in memory.
    """
    parts = split(batch, max_leaves, max_tokens)
    if len(parts) == 1:
        return score(model, batch)
    if not torch.is_grad_enabled():  # nothing to be computed again
        return torch.cat([score(model, part) for part in parts])
    # The reentrant variant would give no gradients: none of its inputs is a tensor that needs them.
    return torch.cat([checkpoint(score, model, part, use_reentrant=False) for part in parts])


class ScoredTree(NamedTuple):
    """What the model says about one tree's scored tokens, on the CPU, in the order of `pack`.

    logps (S,): log-probabilities in nats, float32 as the model gives them; sum them as `.double()`.
    role, weight, branch (S,): those of the segment that a token belongs to.
    token, last (S,): a token's index among the tree's tokens, and the last index of the subtree
    below it; where both are equal, the token ends a leaf.
    """

    logps: Tensor
    role: Tensor
    weight: Tensor
    branch: Tensor
    token: Tensor
    last: Tensor

    def branch_sums(self, num_branches: int) -> Tensor:
        """Log-probability of every branch 0 .. num_branches - 1, (num_branches,), float64."""
        return sum_by_row(self.logps.double(), self.branch, num_branches)

    def leaf_sums(self) -> tuple[Tensor, Tensor]:
        """Sequence log-probability of every leaf, root to end: (branch, sum), each (leaves,)."""
        return _path_sums(self.logps.double(), self.token, self.last, self.branch)


@torch.inference_mode()
def score_forest(
    model, forest: Iterable[Tree], max_tokens: int = 2000, max_leaves: int | None = None
) -> list[ScoredTree]:
    """Score a forest without gradients, one result a tree; the model's mode (eval) is the caller's.

    Trees are packed together up to max_tokens tokens a forward call. A tree with more tokens, or a
    pack with more than max_leaves leaves, is scored in parts. The forest is consumed block by
    block, so it may be a generator or a tqdm bar.
    """
    scored = []
    for block in _blocks(forest, max_tokens):
        batch = to_device(pack(block), model.device)
        # None means no bound, and a row never has more leaves than tokens.
        logps = score_in_parts(model, batch, max_leaves or len(batch["last"]), max_tokens)
        scored += _by_tree(logps, batch)
    return scored


def _blocks(forest: Iterable[Tree], max_tokens: int) -> Iterator[list[Tree]]:
    """Successive trees of at most max_tokens tokens together, at least one tree."""
    block, size = [], 0
    for tree in forest:
        tokens = num_tokens(tree)
        if block and size + tokens > max_tokens:
            yield block
            block, size = [], 0
        block.append(tree)
        size += tokens
    if block:
        yield block


def _by_tree(logps: Tensor, batch: Batch) -> list[ScoredTree]:
    """The log-probabilities (S,) of a packed batch, tree by tree."""
    # The packing is depth first, so the scored tokens of a tree are neighbours.
    columns = {name: batch[name].cpu() for name in ("role", "weight", "branch", "token", "row")}
    last = batch["last"].cpu()[columns["token"]]
    sizes = torch.bincount(columns["row"], minlength=batch["num_rows"]).tolist()
    parts = [column.split(sizes) for column in (
        logps.cpu(), columns["role"], columns["weight"], columns["branch"], columns["token"], last)]
    starts, start = [], 0  # where a tree begins in the packed row
    for tree in batch["trees"]:
        starts.append(start)
        start += num_tokens(tree)
    return [ScoredTree(*rest, token - start, last - start)
            for *rest, token, last, start in zip(*parts, starts, strict=True)]


def sum_by_row(values: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Sum values (S,) into their rows (num_rows,)."""
    return values.new_zeros(num_rows).index_add(0, row, values)


def leaf_sums(values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum the values (S,) of the scored tokens along the path to every leaf: (branch, sum).

    Both are (leaves,). With log-probabilities, the sum is the leaf's sequence log-probability under
    its prompt.
    """
    token = batch["token"]
    return _path_sums(values, token, batch["last"][token], batch["branch"])


def _path_sums(
    values: Tensor, token: Tensor, last: Tensor, branch: Tensor
) -> tuple[Tensor, Tensor]:
    """leaf_sums of tokens (S,) with the ends (S,) of their subtrees, by the attention rule."""
    leaf = (token == last).nonzero().flatten()
    # A scored token is on the path to a leaf exactly if the leaf may attend to it.
    on_path = (token[None, :] <= token[leaf][:, None]) & (token[leaf][:, None] <= last[None, :])
    return branch[leaf], (on_path.to(values.dtype) * values).sum(1)


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
    # At least float32; a float64 model, as the tests use for exact gradients, keeps its precision.
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    place = [(i, t) for i, row in enumerate(rows) for t in row["scored"]]
    sequence, token = torch.tensor(place, device=model.device).T
    return logps[sequence, token - 1, input_ids[sequence, token]]
