"""How N responses are drawn. Every row's context is computed once and shared by its N branches.

- sample: one response per branch, from the filtered softmax; reproducible row by row;
- greedy: the most probable token at every step, one response per branch.

Both take plain, guided and mixed trees (mixtures.py); the branches of a mixed tree give one
response together. Beam searches are in beams.py. Token lists come back as [row][response], without
the end token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from decoding.mixtures import computed_trees, next_logits, num_responses
from trees import Branches, Tree


class GumbelNoise(LogitsProcessor):
    """Turns greedy choice into sampling: argmax(logits + Gumbel noise) is a draw from the softmax.

    generators: one per data row. Each row owns `per_row` successive sequences of the batch, so its
    draws depend on (seed, row, logits) and not on the rows that happen to share its batch.
    """

    def __init__(self, generators: list[torch.Generator], per_row: int):
        self.generators, self.per_row = generators, per_row

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V)
        shape = (self.per_row, scores.shape[-1])
        # Drawn on the CPU, so that a seed gives the same responses on every device.
        noise = torch.cat([torch.empty(shape).exponential_(generator=g) for g in self.generators])
        # -log of an exponential variate is a Gumbel variate. bf16 logits would have many ties.
        return scores.float() - noise.log().to(scores.device)


class TopNSigma(LogitsProcessor):
    """Keep tokens whose logit is within n standard deviations of the best (arXiv:2411.07641).

    It looks at the logits as the model gives them: the rule does not change with temperature.
    """

    def __init__(self, n: float):
        self.n = n

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V)
        cutoff = scores.amax(-1, keepdim=True) - self.n * scores.std(-1, keepdim=True)
        return scores.masked_fill(scores < cutoff, -torch.inf)


def sample(
    model,
    trees: list[Tree],
    seeds: list[int],
    pad_id: int,
    eos_id: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    top_n_sigma: float = 0.0,
) -> list[list[list[int]]]:
    """Draw one response per branch of every tree, or one per mixed tree.

    temperature > 0; top_p and typical_p in (0, 1], 1 is off; top_k = 0, top_n_sigma = 0 and
    min_p = 0 are off.
    """
    processors = warpers(temperature, top_p, top_k, min_p, typical_p, top_n_sigma)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # Last, because what the filters mask must stay at -inf, whatever the noise.
    processors.append(GumbelNoise(generators, num_responses(trees)))
    return complete(model, trees, pad_id, eos_id, max_new_tokens, processors)


def warpers(
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    top_n_sigma: float = 0.0,
) -> LogitsProcessorList:
    """The filters of sampling, in the library's order."""
    # The order changes the result: top_p, for one, counts the mass that top_k has left.
    processors = LogitsProcessorList()
    # Before the temperature, which would change the logits that the rule looks at.
    if top_n_sigma:
        processors.append(TopNSigma(top_n_sigma))
    processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    if typical_p < 1.0:
        processors.append(TypicalLogitsWarper(typical_p))
    return processors


def greedy(
    model, trees: list[Tree], pad_id: int, eos_id: int, max_new_tokens: int
) -> list[list[list[int]]]:
    """The most probable token at every step, one response per branch or one per mixed tree.

    Equal branches give equal responses.
    """
    return complete(model, trees, pad_id, eos_id, max_new_tokens, LogitsProcessorList())


def complete(
    model,
    trees: list[Tree],
    pad_id: int,
    eos_id: int,
    max_new_tokens: int,
    processors: LogitsProcessorList,
) -> list[list[list[int]]]:
    """Grow all branches by the token with the highest processed logit, until each has ended.

    The unconditional branches of guided trees are further rows of the batch, fed with the same
    tokens; so are all branches of a mixed tree.
    """
    branches = Branches(model, computed_trees(trees), pad_id)
    rows, n = len(trees), num_responses(trees)
    # copies is 2 for guided trees, whose unconditional branches are computed, too, else 1.
    copies, num_branches = len(branches.logits) // rows, branches.num_branches
    tokens = torch.empty((rows * n, 0), dtype=torch.long, device=branches.logits.device)
    ended = torch.zeros(rows * n, dtype=torch.bool, device=tokens.device)
    while tokens.shape[1] < max_new_tokens and not ended.all():
        # Fed here and not after the choice below: the last tokens would be computed for nothing.
        if tokens.shape[1]:
            # All branches of a mixed tree read the token that was chosen for them together.
            newest = tokens[:, -1].view(rows, n).expand(rows, num_branches)
            branches.feed(newest.repeat(copies, 1))
        scores = processors(tokens, next_logits(trees, branches.logits).flatten(0, 1))
        # A branch that has ended is fed pads until the others have ended, too.
        token = scores.argmax(-1).masked_fill(ended, pad_id)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        ended |= token == eos_id
    return cut_at_end(tokens, eos_id, rows)


def cut_at_end(tokens: Tensor, eos_id: int, num_rows: int) -> list[list[list[int]]]:
    """New tokens (rows x N, T) as lists [row][response], each up to its end token."""
    replies = [ids[: ids.index(eos_id)] if eos_id in ids else ids for ids in tokens.tolist()]
    per_row = len(replies) // num_rows
    return [replies[i : i + per_row] for i in range(0, len(replies), per_row)]
