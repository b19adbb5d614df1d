"""Training of possibility exploration fine-tuning: likelihood of a reply, unlikelihood of others.

Shapes: S scored tokens of a packed batch.
"""

from __future__ import annotations

import random
import re

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor

import trees
import utils
from methods import defaults
from modeling.adapters import add_lora
from modeling.prompts import end_of_turn, fit_prompts
from training import rows as training_rows
from trees import LIKELIHOOD, UNLIKELIHOOD, Segment, Tree, branch_prompts
from utils import info

WORD = re.compile(r"\w+(?:[-'’]\w+)*")
MIN_COMPLEMENT = 1e-6  # of 1 - p in the unlikelihood, as published; below it the gradient is 0


def load_rows(args) -> list[dict]:
    """The training rows; prints how many have too few or repeated candidates."""
    rows = training_rows.load_rows(args.train_file)[: args.limit]
    n = args.num_response_per_input
    replies = [row["candidates"][:n] for row in rows]
    fewer = sum(len(some) < n for some in replies)
    repeated = sum(len({utils.normalise(reply) for reply in some}) < len(some) for some in replies)
    if fewer:
        info(f"{fewer} of {len(rows)} rows have fewer than {n} candidates; all they have is used")
    if repeated:
        info(f"{repeated} of {len(rows)} rows repeat a candidate; a repeat is never a negative")
    return rows


prepare_tokenizer = defaults.leave_as_is


def prepare_model(model, tokenizer, rows: list[dict], args):
    """A LoRA adapter."""
    return add_lora(model, args)


describe = defaults.lora_settings


def build_tree(row: dict, tokenizer, args, rng: random.Random) -> Tree | None:
    """A context; under it one branch per number; under that the number's reply and the others'.

    Segments of replies carry the index of the reply as `branch`. None if the row does not fit.
    """
    replies = _choose_replies(row["candidates"], args, rng)
    encoded = [content_words(reply, tokenizer) for reply in replies]
    room = args.max_length - max(len(ids) for ids, _ in encoded) - 1  # 1 for the end of turn
    # numbers are drawn before the negatives: the order is part of "same seed, same tree"
    numbers = [None]
    if args.numbered_prompts:
        numbers = rng.sample(range(1, args.max_pos_number + 1), len(replies))
    prompts, dropped = fit_prompts(row, numbers, tokenizer, args.max_input_length, room)
    if not prompts:
        return None
    root = branch_prompts(prompts, numbers if args.numbered_prompts else None)
    ends = root.children or [root] * len(replies)  # without numbers all replies follow one prompt
    end = end_of_turn(tokenizer)
    for index, (ids, _) in enumerate(encoded):
        ends[index].children.append(Segment([*ids, end], LIKELIHOOD, branch=index))
    pairs = [] if args.no_ul else draw_negatives(replies, args.max_num_negatives_per_sample, rng)
    for index, other in pairs:
        ids, marks = encoded[other]
        if args.ul_words == "distinct":
            # what the right reply says, too, would be learnt and unlearnt at once
            shared = _words(utils.text_of(row), replies[index])
            ids, marks = content_words(replies[other], tokenizer, shared)
        ends[index].children.append(Segment(ids, UNLIKELIHOOD, marks, branch=other))
    return Tree(root, dropped)


def compute_loss(model, batch: dict, args, step: int) -> tuple[Tensor, dict]:
    """Likelihood + ul_weight * unlikelihood in nats; the latter after --likelihood_only_steps."""
    likelihood_only = args.no_ul or step < args.likelihood_only_steps
    ul_weight = 0.0 if likelihood_only else args.ul_weight
    return possibility_loss(trees.score(model, batch), batch, ul_weight)


order_rows = defaults.shuffled
parameter_groups = defaults.one_rate
after_pass = defaults.no_figures
save = defaults.save_adapter


# ---- what is unlearnt ---------------------------------------------------------------------------


def _choose_replies(candidates: list[str], args, rng: random.Random) -> list[str]:
    """The replies of a row that this epoch learns.

    rng depends on (seed, epoch, row) alone, so that --replies random shows other replies in every
    epoch and the same ones again after a resume.
    """
    count = min(args.num_response_per_input, len(candidates))
    # "first" must not draw from rng: the numbers of the published recipe come from it
    return rng.sample(candidates, count) if args.replies == "random" else candidates[:count]


def draw_negatives(replies: list[str], limit: int, rng: random.Random) -> list[tuple[int, int]]:
    """Ordered pairs (a number's own reply i, another reply j) to unlearn, at most limit, shuffled.

    A reply equal to the right one is never a negative.
    """
    plain = [utils.normalise(reply) for reply in replies]
    indices = range(len(replies))
    pairs = [(i, j) for i in indices for j in indices if plain[i] != plain[j]]
    rng.shuffle(pairs)
    return pairs[:limit]


def _words(*texts: str) -> set[str]:
    """The words of some texts, case-folded."""
    return {word.casefold() for text in texts for word in WORD.findall(text)}


def content_words(
    reply: str, tokenizer, skip: set[str] = frozenset()
) -> tuple[list[int], list[float]]:
    """Token ids of a reply, and 1.0 at the first token of every content word, 0.0 elsewhere.

    Words are found in the text and mapped to tokens by character offsets, so the same words are
    marked whatever the tokenizer does with spaces and digits. Words in `skip` (case-folded) are not
    marked.
    """
    encoding = tokenizer(reply, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoding["offset_mapping"]]
    pieces = tokenizer.convert_ids_to_tokens(encoding["input_ids"])
    # SentencePiece writes the space before digits as a token: it is not the start of the number
    blank = [not piece.strip("▁Ġ") for piece in pieces]
    marks = [0.0] * len(ends)
    for word in WORD.finditer(reply):
        if word[0].casefold() in skip or _is_function_word(word[0]):
            continue
        start = word.start()
        first = next((i for i, end in enumerate(ends) if end > start and not blank[i]), None)
        if first is not None:
            marks[first] = 1.0
    return encoding["input_ids"], marks


def _is_function_word(word: str) -> bool:
    """Whether a word is on scikit-learn's list of stop words, or such a word contracted."""
    plain = word.casefold().replace("’", "'")  # the list has neither don't nor I'm nor it's
    return plain.endswith("n't") or plain.split("'")[0] in ENGLISH_STOP_WORDS


# ---- losses -------------------------------------------------------------------------------------


def possibility_loss(logps: Tensor, batch: dict, ul_weight: float) -> tuple[Tensor, dict]:
    """The loss of a packed batch from its scored tokens' log-probabilities (S,), in nats.

    Both parts are means over the tokens of a context, then over contexts, so that a batch of 4
    equals 4 accumulated batches of 1.
    """
    row, num_rows = batch["row"], batch["num_rows"]
    mle = mean_by_row(-logps, row, batch["role"] == LIKELIHOOD, num_rows)
    ul = mean_by_row(unlikelihood(logps), row, batch["role"] == UNLIKELIHOOD, num_rows)
    return mle + ul_weight * ul, {"mle_loss": mle.detach(), "ul_loss": ul.detach()}


def unlikelihood(logps: Tensor) -> Tensor:
    """-log(1 - p) per token (Welleck et al., arXiv:1908.04319, eq. 6) from log p."""
    return -(-logps.expm1()).clamp(min=MIN_COMPLEMENT).log()


def mean_by_row(values: Tensor, row: Tensor, chosen: Tensor, num_rows: int) -> Tensor:
    """Mean over rows of the mean of each row's chosen values; a row with none counts as 0.

    values, row, chosen: (S,).
    """
    sums = trees.sum_by_row(values * chosen, row, num_rows)
    counts = trees.sum_by_row(chosen.to(values.dtype), row, num_rows)
    return (sums / counts.clamp(min=1)).mean()
