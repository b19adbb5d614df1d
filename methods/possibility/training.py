"""Possibility exploration fine-tuning: methods peft, otm, oto, and base (an untuned model).

"Possibility exploration fine-tuning", arXiv:2412.03343 (Interspeech 2025). The prompt asks for
possibility number #k. With K numbers k_1..k_n drawn for the n replies of a context,

    L = L_MLE + ul_weight * L_UL
    L_MLE = mean of -log p(token | context, k_i)          over the tokens of reply i, end token included
    L_UL  = mean of -log(1 - p(token | context, k_i))     over the content words of the replies j != i

so number k_i learns its own reply and unlearns the replies of the other numbers.

| method | replies per context | number in the prompt | unlikelihood |
| peft   | n                   | yes                  | yes          |
| otm    | n                   | no                   | no           |
| oto    | 1                   | no                   | no           |

Differences from the paper's code:
- The context is used as it is, once (a prompt tree), and whole batches are used; a batch's loss is the
  mean of its contexts' losses, so that a batch of 4 equals 4 accumulated batches of 1.
- Contexts are shuffled every epoch and numbers drawn afresh; both depend on (seed, epoch, row) only.
- Too long: the oldest turns go, never the reply.
- Likelihood starts at the first token of the reply (not one token early) and ends with the template's
  own end-of-turn token.
- Unlikelihood falls on the first token of every content word, found by character offsets, so that
  byte-level BPE and SentencePiece penalise the same words; stop words are scikit-learn's list.
- A reply equal to the right one is never a negative, and equal replies still get numbers of their own.
- Nothing penalised gives an unlikelihood of 0, not nan; rows with fewer replies than asked are used.
- `--ul_words distinct` leaves alone the words that the right reply and the context share with a wrong reply:
  unlearning the topic that all replies have costs coherence (README).
- A number without unlikelihood (`--no_ul --number`) and unlikelihood's reverse can be measured.
"""

from __future__ import annotations

import random
import re

import trees
import utils
from methods.possibility.flags import settle_method
from modeling.adapters import add_lora
from modeling.prompts import end_of_turn, fit_prompts
from training import rows as training_rows
from utils import info

WORD = re.compile(r"\w+(?:[-'’]\w+)*")
MIN_COMPLEMENT = 1e-6  # floor of 1 - p in the unlikelihood, as published; below it the gradient is 0


def load_rows(args) -> list[dict]:
    """Read the training rows and settle what the flags leave open; prints counts of odd rows."""
    args.method = settle_method(args)
    rows = training_rows.load_rows(args.train_file)
    n = args.num_response_per_input
    fewer = sum(len(row["candidates"]) < n for row in rows)
    equal = sum(len({utils.normalise(c) for c in row["candidates"][:n]}) < len(row["candidates"][:n])
                for row in rows)
    if fewer:
        info(f"{fewer} of {len(rows)} rows have fewer than {n} candidates; all they have is used")
    if equal:
        info(f"{equal} of {len(rows)} rows repeat a candidate; a repeat is never a negative")
    return rows


prepare_model = add_lora


def build_tree(row: dict, tokenizer, args, rng: random.Random):
    """A context; under it one branch per number; under that the number's own reply and the others'.

    Segments of replies carry the index of the reply as `branch`. None if the row does not fit.
    """
    from trees import LIKELIHOOD, UNLIKELIHOOD, Segment, Tree, branch_prompts

    replies = row["candidates"][: args.num_response_per_input]
    eos = end_of_turn(tokenizer)
    encoded = [content_words(reply, tokenizer) for reply in replies]
    room = args.max_length - max(len(ids) for ids, _ in encoded) - 1
    numbers = rng.sample(range(1, args.max_pos_number + 1), len(replies)) if args.number else [None]
    prompts, dropped = fit_prompts(row, numbers, tokenizer, args.max_input_length, room)
    if not prompts:
        return None
    root = branch_prompts(prompts, numbers if args.number else None)
    ends = root.children or [root] * len(replies)
    for index, (ids, _) in enumerate(encoded):
        ends[index].children.append(Segment([*ids, eos], LIKELIHOOD, branch=index))
    if not args.no_ul:
        for index, other in draw_negatives(replies, args.max_num_negatives_per_sample, rng):
            ids, onsets = encoded[other]
            if args.ul_words == "distinct":
                ids, onsets = content_words(replies[other], tokenizer, words_of(row.get("prompt") or row["context"], replies[index]))
            ends[index].children.append(Segment(ids, UNLIKELIHOOD, onsets, branch=other))
    return Tree(root, dropped)


def draw_negatives(replies: list[str], limit: int, rng: random.Random) -> list[tuple[int, int]]:
    """Ordered pairs (number's own reply i, another reply j) to unlearn, at most limit, in random order.

    A reply equal to the right one is never a negative.
    """
    plain = [utils.normalise(reply) for reply in replies]
    pairs = [(i, j) for i in range(len(replies)) for j in range(len(replies)) if plain[i] != plain[j]]
    rng.shuffle(pairs)
    return pairs[:limit]


def words_of(*texts: str) -> set[str]:
    """The words of some texts, without case."""
    return {word.casefold() for text in texts for word in WORD.findall(text)}


def content_words(reply: str, tokenizer, skip: set[str] = frozenset()) -> tuple[list[int], list[float]]:
    """Token ids of a reply, and 1.0 at the first token of every content word that is not in `skip`, 0.0 elsewhere.

    Words are found in the text and mapped to tokens by character offsets, so the same words are
    marked whatever the tokenizer does with spaces and digits. The end token is never marked.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    encoding = tokenizer(reply, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoding["offset_mapping"]]
    pieces = tokenizer.convert_ids_to_tokens(encoding["input_ids"])
    blank = [not piece.strip("▁Ġ") for piece in pieces]  # SentencePiece's space before digits is no onset
    marks = [0.0] * len(ends)
    for word in WORD.finditer(reply):
        if word[0].casefold() in skip:
            continue
        plain = word[0].casefold().replace("’", "'")  # don't, I'm, it's: function words as well
        if plain.endswith("n't") or plain.split("'")[0] in ENGLISH_STOP_WORDS:
            continue
        first = next((i for i, end in enumerate(ends) if end > word.start() and not blank[i]), None)
        if first is not None:
            marks[first] = 1.0
    return encoding["input_ids"], marks


def compute_loss(model, batch: dict, args):
    """Likelihood + ul_weight * unlikelihood in nats: token means within a context, then the mean of contexts."""

    return loss_of(trees.score(model, batch), batch, args)


def loss_of(logps, batch: dict, args):
    """The loss from the log-probabilities (S,) of a packed batch's scored tokens."""

    row, num_rows = batch["row"], batch["num_rows"]
    mle = mean_by_row(-logps, row, batch["role"] == trees.LIKELIHOOD, num_rows)
    ul = mean_by_row(unlikelihood(logps), row, batch["role"] == trees.UNLIKELIHOOD, num_rows)
    weight = 0.0 if args.no_ul or args.micro_step < args.warmup_steps else args.ul_weight
    return mle + weight * ul, {"mle_loss": mle.detach(), "ul_loss": ul.detach()}


def unlikelihood(logps):
    """-log(1 - p) per token (Welleck et al., arXiv:1908.04319, eq. 6) from log p, with 1 - p >= 1e-6."""
    return -(-logps.expm1()).clamp(min=MIN_COMPLEMENT).log()


def mean_by_row(values, row, chosen, num_rows: int):
    """Mean over rows of the mean of each row's chosen values; a row with none counts as 0, not nan."""

    sums = trees.sum_by_row(values * chosen, row, num_rows)
    counts = trees.sum_by_row(chosen.to(values.dtype), row, num_rows)
    return (sums / counts.clamp(min=1)).mean()
