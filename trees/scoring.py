"""Log-probabilities of a packed forest's tokens."""

from __future__ import annotations

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor

from trees.attention import attention_mask
from trees.packing import split
from trees.tree import Tree, ordinary_rows


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


def score_forest(model, forest: list) -> tuple[dict, object]:
    """The packed batch of a forest on the model's device, and the log-probabilities (S,) of its scored tokens."""
    import torch

    import trees

    batch = {name: v.to(model.device) if torch.is_tensor(v) else v for name, v in trees.pack(forest).items()}
    with torch.inference_mode():
        return batch, trees.score(model, batch)
