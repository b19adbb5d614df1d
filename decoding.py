"""How N responses are drawn. Every row's context is computed once and shared by its N branches.

Sampling is exact and reproducible per row: noise comes from a generator of each row's own, so a row's
replies depend on (seed, row, logits) and not on the rows that happen to share its batch.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trees import Tree, prefill


class GumbelNoise(LogitsProcessor):
    """Turns greedy choice into sampling: argmax(logits + Gumbel noise) is a draw from the softmax.

    generators: one per data row; each row owns `num_branches` successive sequences of the batch.
    """

    def __init__(self, generators: list[torch.Generator], num_branches: int):
        self.generators, self.num_branches = generators, num_branches

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V)
        shape = (self.num_branches, scores.shape[-1])
        noise = torch.cat([torch.empty(shape).exponential_(generator=g) for g in self.generators])
        return scores.float() - noise.log().to(scores.device)


def sample(model, trees: list[Tree], seeds: list[int], pad_id: int, eos_id: int, max_new_tokens: int,
           temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> list[list[list[int]]]:
    """Draw one response per branch of every tree; returns token ids [row][branch] without the end token.

    temperature > 0; top_p in (0, 1], 1 is off; top_k = 0 is off; min_p in [0, 1), 0 is off.
    """
    num_branches = len(trees[0].root.children)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    processors.append(GumbelNoise(generators, num_branches))
    return complete(model, trees, processors, pad_id, eos_id, max_new_tokens)


@torch.inference_mode()
def complete(model, trees: list[Tree], processors: LogitsProcessorList, pad_id: int, eos_id: int,
             max_new_tokens: int) -> list[list[list[int]]]:
    """Run `generate` on the branches of several trees after one shared prefill of their contexts."""
    input_ids, attention_mask, cache = prefill(model, trees, pad_id)
    out = model.generate(
        input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache,
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos_id, pad_token_id=pad_id
        ),
        logits_processor=processors,
    )
    new = out[:, input_ids.shape[1] :].tolist()
    replies = [ids[: ids.index(eos_id)] if eos_id in ids else ids for ids in new]
    num_branches = len(trees[0].root.children)
    return [replies[i : i + num_branches] for i in range(0, len(replies), num_branches)]


SPEAKER = re.compile(r"^\s*(?:\**Person [AB](?:'s (?:next )?(?:reply|response))?\**\s*:\**|Possibility(?: number)? #?\d+\s*:)\s*", re.I)
NEXT_SPEAKER = re.compile(r"\s*\n+\s*\**(?:Person [AB])\**\s*:.*", re.S)
QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'"})


def clean_reply(text: str) -> str:
    """A reply without speaker labels, outer quotes and line breaks; what it says stays untouched.

    Text from the point where the model starts to speak for the other person is cut. Brackets, dashes,
    emoji and every script are kept. The result may be empty; callers count that.
    """
    text = SPEAKER.sub("", text.translate(QUOTES))
    text = " ".join(NEXT_SPEAKER.sub("", text).split())
    if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        text = text[1:-1].strip()
    return text
