"""Beam search and diverse beam search under one shared prefill."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
)
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput

from decoding.sampling import cut_at_end
from trees import Tree, prefill

NEVER = -1e9  # the score of beams that must not be taken: at first all beams of a group are one


def beam(model, trees: list[Tree], pad_id: int, eos_id: int, max_new_tokens: int, num_beams: int, num_responses: int,
         length_penalty: float = 1.0) -> list[list[list[int]]]:
    """The best num_responses of num_beams beams under the only branch of every tree, best first."""
    return search(model, trees, pad_id, eos_id, max_new_tokens, num_beams, length_penalty, num_beams=num_beams,
                  num_return_sequences=num_responses)


def diverse(model, trees: list[Tree], pad_id: int, eos_id: int, max_new_tokens: int, num_beams: int, num_groups: int,
            num_responses: int, diversity_penalty: float = 5.0, length_penalty: float = 1.0) -> list[list[list[int]]]:
    """The best num_responses beams of a diverse beam search for every tree, best first.

    A tree has one branch, for all groups, or num_groups branches, one for each. num_beams is a multiple of both.
    """
    how = partial(diverse_beam_search, num_beam_groups=num_groups, diversity_penalty=diversity_penalty, ready_beams=num_beams)
    copies = num_beams // len(trees[0].root.children)
    out = search(model, trees, pad_id, eos_id, max_new_tokens, copies, length_penalty, custom_generate=how)
    return [replies[:num_responses] for replies in out]


@torch.inference_mode()
def search(model, trees: list[Tree], pad_id: int, eos_id: int, max_new_tokens: int, copies: int, length_penalty: float,
           num_beams: int = 1, num_return_sequences: int = 1, **options) -> list[list[list[int]]]:
    """Run `generate` after one shared prefill, with `copies` beams for every branch.

    The library's own beam search (num_beams > 1) copies the inputs that it is given, though not a cache.
    """
    input_ids, attention_mask, cache = prefill(model, trees, pad_id, copies)
    out = model.generate(
        input_ids=input_ids[::num_beams], attention_mask=attention_mask[::num_beams], past_key_values=cache,
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos_id, pad_token_id=pad_id, num_beams=num_beams,
            num_return_sequences=num_return_sequences, length_penalty=length_penalty),
        **options)
    return cut_at_end(out[:, input_ids.shape[1] :], eos_id, len(trees))


def diverse_beam_search(model, input_ids: Tensor, logits_processor=None, stopping_criteria=None, generation_config=None,
                        num_beam_groups: int | None = None, diversity_penalty: float = 5.0,
                        ready_beams: int | None = None, **model_kwargs):
    """Diverse beam search (Vijayakumar et al., arXiv:1610.02424) as a decoding loop for `generate`.

        model.generate(**inputs, num_beams=6, num_return_sequences=6, max_new_tokens=30,
                       custom_generate=diverse_beam_search, num_beam_groups=3, diversity_penalty=1.0)

    The B beams of a prompt form G groups (num_beam_groups, by default B of one beam each). At every step the
    groups choose in turn; a token costs a group diversity_penalty nats for every time that earlier groups of
    this prompt took it at this step (Hamming diversity), and the lowered scores are what adds up. Token for
    token what transformers 4.55.4 gave for num_beam_groups and diversity_penalty, before it left the library.

    input_ids (rows x B, T), as `generate` hands them over. ready_beams: B, for a caller whose input_ids hold
    B sequences a row already (maybe different ones); all B are returned then.
    Returns sequences (rows x num_return_sequences, T + new), best first within a row, or with
    return_dict_in_generate also sequences_scores. Raises ValueError if G does not divide B or the penalty is not > 0.
    """
    num_beams = ready_beams or generation_config.num_beams
    num_groups = num_beam_groups or num_beams
    if num_beams % num_groups or num_groups < 1:
        raise ValueError(f"num_beams {num_beams} must be a multiple of num_beam_groups {num_groups}")
    if not diversity_penalty > 0:
        raise ValueError(f"diversity_penalty {diversity_penalty} must be above 0")
    size, num_rows, start = num_beams // num_groups, input_ids.shape[0] // num_beams, input_ids.shape[1]
    pad_id = int(generation_config._pad_token_tensor)
    eos_ids = [] if generation_config._eos_token_tensor is None else generation_config._eos_token_tensor.tolist()
    groups = [[Group(size, generation_config) for _ in range(num_groups)] for _ in range(num_rows)]

    running = torch.full((num_rows, num_groups, size), NEVER, device=input_ids.device)
    running[:, :, 0] = 0.0
    first_beam = torch.arange(num_rows, device=input_ids.device)[:, None] * num_beams  # of every row
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        logps = outputs.logits[:, -1].float().log_softmax(-1).to(input_ids.device)
        logps = logps.view(num_rows, num_groups, size, -1)
        ids = input_ids.view(num_rows, num_groups, size, -1)
        taken = torch.zeros_like(logps[:, 0, 0])  # (rows, V): how often earlier groups took each token at this step
        origin, token = torch.zeros((2, num_rows, num_groups, size), dtype=torch.long, device=input_ids.device)
        for g in range(num_groups):
            if g:
                logps[:, g] -= diversity_penalty * taken[:, None]
            scores = logps[:, g]
            if logits_processor:  # some hold a number per sequence of the whole batch
                scores = logits_processor(input_ids, logps.flatten(0, 2)).view_as(logps)[:, g]
            scores = (scores + running[:, g, :, None]).flatten(1)  # (rows, size x V)
            best, place = scores.topk(max(2, 1 + len(eos_ids)) * size)
            chosen = []
            for row, (row_scores, row_places) in enumerate(zip(best.tolist(), place.tolist(), strict=True)):
                options = [(score, *divmod(p, logps.shape[-1])) for score, p in zip(row_scores, row_places, strict=True)]
                chosen.append(groups[row][g].advance(options, ids[row, g], eos_ids, pad_id, start))
            step = torch.tensor(chosen, dtype=torch.float64)  # (rows, size, 3), exact for float32 scores and for ids
            running[:, g], origin[:, g], token[:, g] = step.unbind(-1)
            taken.scatter_add_(1, token[:, g], torch.ones_like(running[:, g]))
        origin += torch.arange(num_groups, device=origin.device)[:, None] * size
        origin = (origin.flatten(1) + first_beam).flatten()
        input_ids = torch.cat([input_ids[origin], token.view(-1, 1)], dim=1)
        if all(group.done for row in groups for group in row) or bool(stopping_criteria(input_ids, None).all()):
            break
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        if size > 1:  # a group of one beam goes on with itself
            model_kwargs["past_key_values"].reorder_cache(origin)
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        outputs = model(**inputs, return_dict=True)

    num_returned = num_beams if ready_beams else generation_config.num_return_sequences
    sequences, scores = [], []
    for row, tails, totals in zip(groups, input_ids.view(num_rows, num_groups, size, -1), running.tolist(), strict=True):
        for group, tail, total in zip(row, tails, totals, strict=True):
            group.finish(tail, total, start)
        found = sorted((pair for group in row for pair in group.found), key=lambda pair: pair[0])
        for score, sequence in found[::-1][:num_returned]:
            scores.append(score)
            sequences.append(sequence)
    length = min(max(map(len, sequences)) + 1, generation_config.max_length)
    end = eos_ids[:1] or [pad_id]
    padded = [(s + end + [pad_id] * length)[:length] for s in sequences]
    sequences = torch.tensor(padded, device=input_ids.device)
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=torch.tensor(scores))


class Group:
    """What one group of beams of one prompt has found: at most `size` finished sequences with their scores.

    A score is the sum of the lowered log-probabilities over (new tokens, end token included) ** length_penalty.
    """

    def __init__(self, size: int, config: GenerationConfig):
        self.size, self.length_penalty, self.early_stopping = size, config.length_penalty, config.early_stopping
        self.max_length = config.max_length
        self.found: list[tuple[float, list[int]]] = []
        self.done = False

    def advance(self, options: list[tuple[float, int, int]], ids: Tensor, eos_ids: list[int], pad_id: int, start: int):
        """Take the best options (score, beam, token), best first; ids (size, T) are the beams so far.

        Returns `size` lists of score, beam and token for the next step; finished beams go to `found`.
        """
        if self.done:
            return [[0.0, 0, pad_id]] * self.size
        length = ids.shape[1] + 1 - start
        chosen = []
        for rank, (score, origin, token) in enumerate(options):
            if token not in eos_ids:
                chosen.append([score, origin, token])
            elif rank < self.size:  # an end that is not among the best `size` is not worth keeping
                self.add(score, ids[origin].tolist(), length)
            if len(chosen) == self.size:
                break
        if len(self.found) == self.size:
            attainable = options[0][0] / self.best_length(length, start) ** self.length_penalty
            self.done = self.early_stopping is True or self.worst() >= attainable
        return chosen

    def best_length(self, length: int, start: int) -> int:
        """The length at which a running beam could score best; early_stopping="never" looks ahead."""
        ahead = self.early_stopping == "never" and self.length_penalty > 0.0
        return self.max_length - start if ahead else length

    def add(self, score: float, sequence: list[int], length: int) -> None:
        """Keep a sequence if it is among the best `size`."""
        score /= length**self.length_penalty
        if len(self.found) < self.size or score > self.worst():
            self.found.append((score, sequence))
            if len(self.found) > self.size:
                self.found.remove(min(self.found, key=lambda pair: pair[0]))

    def worst(self) -> float:
        return min(score for score, _ in self.found)

    def finish(self, ids: Tensor, scores: list[float], start: int) -> None:
        """The search is over: running beams (size, T) count as they are, unless the group was done before."""
        if not self.done:
            for sequence, score in zip(ids.tolist(), scores, strict=True):
                self.add(score, sequence, len(sequence) - start)
