"""How N responses are drawn. Every row's context is computed once and shared by its N branches.

| function            | what it draws                                                                        |
| sample              | one response per branch, from the filtered softmax; reproducible row by row          |
| greedy              | the most probable token at every step, one response per branch                       |
| beam                | the best N of B beams under one prompt                                               |
| diverse             | diverse beam search: G groups of beams that avoid each other's tokens                |
| diverse_beam_search | the search alone, for anybody's `model.generate(custom_generate=diverse_beam_search)` |

Token lists come back as [row][response], without the end token.
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

from decoding.mixtures import fusion_of, guide
from trees import Branches, Tree


class GumbelNoise(LogitsProcessor):
    """Turns greedy choice into sampling: argmax(logits + Gumbel noise) is a draw from the softmax.

    generators: one per data row; each row owns `num_branches` successive sequences of the batch, so a
    row's draws depend on (seed, row, logits) and not on the rows that happen to share its batch.
    """

    def __init__(self, generators: list[torch.Generator], num_branches: int):
        self.generators, self.num_branches = generators, num_branches

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V)
        shape = (self.num_branches, scores.shape[-1])
        noise = torch.cat([torch.empty(shape).exponential_(generator=g) for g in self.generators])
        return scores.float() - noise.log().to(scores.device)


class TopNSigma(LogitsProcessor):
    """Keep tokens whose logit is within n standard deviations of the best (Tang et al., arXiv:2411.07641).

    Logits as the model gives them: the rule does not change with temperature.
    """

    def __init__(self, n: float):
        self.n = n

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V)
        floor = scores.amax(-1, keepdim=True) - self.n * scores.std(-1, keepdim=True)
        return scores.masked_fill(scores < floor, -torch.inf)


def sample(model, trees: list[Tree], seeds: list[int], pad_id: int, eos_id: int, max_new_tokens: int,
           temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0,
           typical_p: float = 1.0, top_n_sigma: float = 0.0) -> list[list[list[int]]]:
    """Draw one response per branch of every tree.

    temperature > 0; top_p and typical_p in (0, 1], 1 is off; top_k = 0, top_n_sigma = 0 and min_p = 0 are off.
    """
    processors = warpers(temperature, top_p, top_k, min_p, typical_p, top_n_sigma)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    processors.append(GumbelNoise(generators, len(trees[0].root.children)))
    return complete(model, trees, pad_id, eos_id, max_new_tokens, logits_processor=processors)


def warpers(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, typical_p: float = 1.0,
            top_n_sigma: float = 0.0) -> LogitsProcessorList:
    """The filters of sampling, in the library's order."""
    processors = LogitsProcessorList()
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


def greedy(model, trees: list[Tree], pad_id: int, eos_id: int, max_new_tokens: int) -> list[list[list[int]]]:
    """The most probable token at every step, one response per branch; equal branches give equal responses."""
    return complete(model, trees, pad_id, eos_id, max_new_tokens)


def fused_greedy(model, trees: list[Tree], pad_id: int, eos_id: int, max_new_tokens: int) -> list[list[list[int]]]:
    """One response per tree, each token the most probable one in the mixture of its branches.

    A tree's note holds the `weights` (N,) and the `kind` of its mixture.
    """
    return [own[:1] for own in complete(model, trees, pad_id, eos_id, max_new_tokens, LogitsProcessorList([fusion_of(trees)]))]


def fused_sample(model, trees: list[Tree], seeds: list[int], pad_id: int, eos_id: int, max_new_tokens: int,
                 **filters) -> list[list[list[int]]]:
    """One response per tree, drawn from the mixture of its branches, which all take the same token."""
    generators, n = [torch.Generator().manual_seed(seed) for seed in seeds], len(trees[0].root.children)
    one_draw = GumbelNoise(generators, 1)
    processors = LogitsProcessorList([fusion_of(trees), *warpers(**filters)])
    processors.append(lambda ids, scores: one_draw(ids, scores[::n]).repeat_interleave(n, 0))
    return [own[:1] for own in complete(model, trees, pad_id, eos_id, max_new_tokens, processors)]


def complete(model, trees: list[Tree], pad_id: int, eos_id: int, max_new_tokens: int,
             logits_processor: LogitsProcessorList | None = None) -> list[list[list[int]]]:
    """Grow all branches by the token with the highest processed logit, until each has ended.

    Twins are further rows of the same batch, fed with the same tokens.
    """
    twins = [tree.twin for tree in trees if tree.twin]
    assert len(twins) in (0, len(trees)), "either all trees have a twin or none"
    branches = Branches(model, trees + twins, pad_id)
    rows, n = len(trees), branches.num_branches
    tokens = torch.empty((rows * n, 0), dtype=torch.long, device=branches.logits.device)
    ended = torch.zeros(rows * n, dtype=torch.bool, device=tokens.device)
    while tokens.shape[1] < max_new_tokens and not ended.all():
        if tokens.shape[1]:
            branches.feed(tokens[:, -1].view(rows, n).repeat(len(branches.logits) // rows, 1))
        scores = guide(branches.logits, [tree.guidance for tree in trees]) if twins else branches.logits
        scores = scores.flatten(0, 1)
        if logits_processor:
            scores = logits_processor(tokens, scores)
        tokens = torch.cat([tokens, scores.argmax(-1).masked_fill(ended, pad_id)[:, None]], dim=1)
        ended |= tokens[:, -1] == eos_id
    return cut_at_end(tokens, eos_id, rows)


def cut_at_end(tokens: Tensor, eos_id: int, num_rows: int) -> list[list[list[int]]]:
    """New tokens (rows x N, T) as lists [row][response], each without its end token and what follows it."""
    replies = [ids[: ids.index(eos_id)] if eos_id in ids else ids for ids in tokens.tolist()]
    per_row = len(replies) // num_rows
    return [replies[i : i + per_row] for i in range(0, len(replies), per_row)]
