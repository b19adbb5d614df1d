"""Beam search and diverse beam search under one shared prefill.

Diverse beam search is Vijayakumar et al., arXiv:1610.02424. Token for token it gives what
transformers 4.55.4 gave for num_beam_groups and diversity_penalty, before they left the library.

Shapes: R rows, B beams a row in G groups of `size` beams, T tokens so far, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput

from decoding.sampling import cut_at_end
from trees import Tree, prefill

# The score of a masked beam, as in the library. In the first step all beams of a group are
# identical, so all but one are masked.
NEVER = -1e9


def beam(
    model,
    trees: list[Tree],
    pad_id: int,
    eos_id: int,
    max_new_tokens: int,
    num_beams: int,
    num_responses: int,
    length_penalty: float = 1.0,
) -> list[list[list[int]]]:
    """The best num_responses of num_beams beams under the only branch of every tree, best first."""
    return _search(
        model, trees, pad_id, eos_id, max_new_tokens, length_penalty,
        copies=num_beams,
        num_beams=num_beams,
        num_return_sequences=num_responses,
    )


def diverse(
    model,
    trees: list[Tree],
    pad_id: int,
    eos_id: int,
    max_new_tokens: int,
    num_beams: int,
    num_groups: int,
    num_responses: int,
    diversity_penalty: float = 5.0,
    length_penalty: float = 1.0,
) -> list[list[list[int]]]:
    """The best num_responses beams of a diverse beam search for every tree, best first.

    A tree has one branch, for all groups, or num_groups branches, one for each. num_beams is a
    multiple of both.
    """
    search = partial(
        diverse_beam_search,
        num_beam_groups=num_groups,
        diversity_penalty=diversity_penalty,
        ready_beams=num_beams,
    )
    # All beams come back, best first: to `generate` this is a search with one beam a sequence.
    responses = _search(
        model, trees, pad_id, eos_id, max_new_tokens, length_penalty,
        copies=num_beams // len(trees[0].root.children),
        custom_generate=search,
    )
    return [row[:num_responses] for row in responses]


@torch.inference_mode()
def _search(
    model,
    trees: list[Tree],
    pad_id: int,
    eos_id: int,
    max_new_tokens: int,
    length_penalty: float,
    copies: int,
    num_beams: int = 1,
    num_return_sequences: int = 1,
    **options,
) -> list[list[list[int]]]:
    """Run `generate` after one shared prefill, with `copies` sequences for every branch.

    The library's own beam search (num_beams > 1) repeats the ids that it is given num_beams times,
    though not a cache: so the cache has all sequences, and of their ids it gets one in num_beams.
    """
    input_ids, attention_mask, cache = prefill(model, trees, pad_id, copies)
    sequences = model.generate(
        input_ids=input_ids[::num_beams],
        attention_mask=attention_mask[::num_beams],
        past_key_values=cache,
        # A fresh one: what a checkpoint's own sets (sampling, penalties) would change the search.
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
            num_beams=num_beams,
            num_return_sequences=num_return_sequences,
            length_penalty=length_penalty,
        ),
        **options,
    )
    return cut_at_end(sequences[:, input_ids.shape[1] :], eos_id, len(trees))


def diverse_beam_search(
    model,
    input_ids: Tensor,
    logits_processor=None,
    stopping_criteria=None,
    generation_config=None,
    num_beam_groups: int | None = None,
    diversity_penalty: float = 5.0,
    ready_beams: int | None = None,
    **model_kwargs,
):
    """Diverse beam search as a decoding loop for `generate`.

        model.generate(**inputs, num_beams=6, num_return_sequences=6, max_new_tokens=30,
                       custom_generate=diverse_beam_search, num_beam_groups=3,
                       diversity_penalty=1.0)

    The B beams of a prompt form G groups (num_beam_groups, by default B of one beam each). At every
    step the groups choose in turn; a token costs a group diversity_penalty nats for every time that
    earlier groups of this prompt took it at this step (Hamming diversity), and the lowered scores
    are what adds up.

    input_ids (R x B, T), as `generate` passes them. ready_beams: B, for a caller whose input_ids
    hold B sequences a row already (maybe different ones); all B are returned then.
    Returns sequences (R x num_return_sequences, T + new), best first within a row, or with
    return_dict_in_generate also sequences_scores. Raises ValueError if G does not divide B or the
    penalty is not > 0.
    """
    num_beams = ready_beams or generation_config.num_beams
    num_groups = num_beam_groups or num_beams
    if num_beams % num_groups or num_groups < 1:
        raise ValueError(
            f"num_beams {num_beams} must be a multiple of num_beam_groups {num_groups}"
        )
    if not diversity_penalty > 0:
        raise ValueError(f"diversity_penalty {diversity_penalty} must be above 0")
    beams = _Beams(input_ids, num_beams, num_groups, generation_config)
    # Private, as is the update of model_kwargs below. But only these helpers of `generate` know how
    # a model continues from a cache that already holds the context.
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        origin = beams.step(outputs.logits[:, -1], diversity_penalty, logits_processor)
        # None stands for the scores, which the criteria of `generate` do not read here.
        if beams.done() or bool(stopping_criteria(beams.input_ids, None).all()):
            break
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        if num_beams > num_groups:  # a group of one beam always continues itself
            model_kwargs["past_key_values"].reorder_cache(origin)
        inputs = model.prepare_inputs_for_generation(
            beams.input_ids, next_sequence_length=1, **model_kwargs
        )
        outputs = model(**inputs, return_dict=True)
    return beams.best(num_beams if ready_beams else generation_config.num_return_sequences)


class _Option(NamedTuple):
    """A continuation: the summed score, the beam of the group that it continues, and the token."""

    score: float
    beam: int
    token: int


class _Beams:
    """The running beams of all rows, and what each group has finished.

    input_ids (R x B, T): the running sequences. scores (R, G, size): their summed
    log-probabilities.
    """

    def __init__(
        self, input_ids: Tensor, num_beams: int, num_groups: int, config: GenerationConfig
    ):
        self.input_ids, self.config = input_ids, config
        self.start = input_ids.shape[1]  # new tokens begin here
        self.shape = input_ids.shape[0] // num_beams, num_groups, num_beams // num_groups
        num_rows, num_groups, size = self.shape
        eos = config._eos_token_tensor
        self.eos_ids = [] if eos is None else eos.tolist()
        self.pad_id = int(config._pad_token_tensor)
        self.groups = [
            [_Group(size, self.eos_ids, self.pad_id, self.start, config) for _ in range(num_groups)]
            for _ in range(num_rows)
        ]
        self.scores = torch.full(self.shape, NEVER, device=input_ids.device)
        self.scores[:, :, 0] = 0.0

    def step(self, logits: Tensor, penalty: float, logits_processor) -> Tensor:
        """Add a token to every beam, given logits (R x B, V); the groups of a row choose in turn.

        Returns for every new beam (R x B,) the old beam that it continues.
        """
        device = self.input_ids.device
        logps = logits.float().log_softmax(-1).to(device).view(*self.shape, -1)
        # Counted anew in every step: only tokens at the same place are avoided, as in the paper.
        taken = torch.zeros_like(logps[:, 0, 0])  # (R, V): how often earlier groups took a token
        origin, token = torch.zeros((2, *self.shape), dtype=torch.long, device=device)
        for g in range(self.shape[1]):
            # The first group is free. What adds up are the lowered scores, as in the library.
            if g:
                logps[:, g] -= penalty * taken[:, None]
            scores = logps[:, g]
            # Processors get all beams, because some hold a number per sequence of the whole batch.
            if logits_processor:
                every = logits_processor(self.input_ids, logps.flatten(0, 2))
                scores = every.view_as(logps)[:, g]
            choice = self._choose(g, (scores + self.scores[:, g, :, None]).flatten(1))
            # A group that is done takes pads, and these count as taken: so they did in the library.
            self.scores[:, g], origin[:, g], token[:, g] = choice.unbind(-1)
            taken.scatter_add_(1, token[:, g], torch.ones_like(self.scores[:, g]))
        # From a beam's place in its group to its place in the batch.
        num_rows, num_groups, size = self.shape
        origin += torch.arange(num_rows * num_groups, device=device).view(num_rows, -1, 1) * size
        origin = origin.flatten()
        self.input_ids = torch.cat([self.input_ids[origin], token.view(-1, 1)], dim=1)
        return origin

    def _choose(self, g: int, scores: Tensor) -> Tensor:
        """Let group g of every row choose by scores (R, size x V): (R, size, 3), see _Option."""
        size = self.shape[2]
        ids = self.input_ids.view(*self.shape, -1)[:, g]  # (R, size, T)
        vocabulary = scores.shape[1] // size
        # Each beam could end in every end token, and `size` others must be left.
        best, place = scores.topk(max(2, 1 + len(self.eos_ids)) * size)
        chosen = []
        for row, (row_scores, row_places) in enumerate(
            zip(best.tolist(), place.tolist(), strict=True)
        ):
            options = [
                _Option(score, *divmod(p, vocabulary))
                for score, p in zip(row_scores, row_places, strict=True)
            ]
            chosen.append(self.groups[row][g].advance(options, ids[row]))
        # float64 is exact for float32 scores and for token ids alike.
        return torch.tensor(chosen, dtype=torch.float64)

    def done(self) -> bool:
        return all(group.done for row in self.groups for group in row)

    def best(self, num_returned: int):
        """The best finished sequences of every row, as `generate` returns them."""
        tails = self.input_ids.view(*self.shape, -1)
        sequences, scores = [], []
        for row, groups in enumerate(self.groups):
            for g, group in enumerate(groups):
                group.finish(tails[row, g], self.scores[row, g].tolist())
            # Stable, ascending, reversed: of equal scores the last comes first, as in the library.
            finished = sorted(
                (pair for group in groups for pair in group.finished), key=lambda pair: pair[0]
            )
            for score, sequence in finished[::-1][:num_returned]:
                scores.append(score)
                sequences.append(sequence)
        # One end token, where there is room for it, and pads up to the longest sequence.
        length = min(max(map(len, sequences)) + 1, self.config.max_length)
        end = self.eos_ids[:1] or [self.pad_id]
        padded = [(ids + end + [self.pad_id] * length)[:length] for ids in sequences]
        sequences = torch.tensor(padded, device=self.input_ids.device)
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateBeamDecoderOnlyOutput(
            sequences=sequences, sequences_scores=torch.tensor(scores)
        )


class _Group:
    """What one group of beams of one prompt has finished: at most `size` sequences with scores.

    A score is the sum of the lowered log-probabilities over
    (new tokens, end token included) ** length_penalty.
    """

    def __init__(
        self, size: int, eos_ids: list[int], pad_id: int, start: int, config: GenerationConfig
    ):
        self.size, self.eos_ids, self.pad_id, self.start = size, eos_ids, pad_id, start
        self.length_penalty, self.early_stopping = config.length_penalty, config.early_stopping
        self.max_new_tokens = config.max_length - start
        self.finished: list[tuple[float, list[int]]] = []
        self.done = False

    def advance(self, options: list[_Option], ids: Tensor) -> list[_Option]:
        """Take `size` of the options, best first, for the next step; ids (size, T) are the beams.

        Beams that end go to `finished`.
        """
        if self.done:  # its beams stay in the batch until the last group is done
            return [_Option(0.0, 0, self.pad_id)] * self.size
        length = ids.shape[1] + 1 - self.start
        chosen: list[_Option] = []
        for rank, option in enumerate(options):
            if option.token not in self.eos_ids:
                chosen.append(option)
            # An end that is not among the best `size` options is not worth keeping.
            elif rank < self.size:
                self._add(option.score, ids[option.beam].tolist(), length)
            if len(chosen) == self.size:
                break
        # A group is done when no running beam can end better than its worst finished one.
        if len(self.finished) == self.size:
            attainable = options[0].score / self._best_length(length) ** self.length_penalty
            self.done = self.early_stopping is True or self._worst() >= attainable
        return chosen

    def finish(self, ids: Tensor, scores: list[float]) -> None:
        """End the search: running beams (size, T) count as finished, unless the group was done."""
        if not self.done:
            for sequence, score in zip(ids.tolist(), scores, strict=True):
                self._add(score, sequence, len(sequence) - self.start)

    def _best_length(self, length: int) -> int:
        """The length at which a running beam could score best; "never" looks ahead."""
        # Otherwise the present length stands for all later ones: a rule of thumb of the library.
        looks_ahead = self.early_stopping == "never" and self.length_penalty > 0.0
        return self.max_new_tokens if looks_ahead else length

    def _add(self, score: float, sequence: list[int], length: int) -> None:
        """Keep a sequence if it is among the best `size`."""
        score /= length**self.length_penalty
        if len(self.finished) < self.size or score > self._worst():
            self.finished.append((score, sequence))
            if len(self.finished) > self.size:
                self.finished.remove(min(self.finished, key=lambda pair: pair[0]))

    def _worst(self) -> float:
        return min(score for score, _ in self.finished)
