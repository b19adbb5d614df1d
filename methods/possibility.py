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
from argparse import BooleanOptionalAction

import utils

# trees imports torch, so it is imported where it is used: --help must answer in half a second.

WORD = re.compile(r"\w+(?:[-'’]\w+)*")
MIN_COMPLEMENT = 1e-6  # floor of 1 - p in the unlikelihood, as published; below it the gradient is 0


def add_args(group) -> None:
    group.add_argument("--num_response_per_input", type=int,
                       help="replies per context, the first n of its candidates (default: 4, oto 1)")
    group.add_argument("--max_pos_number", type=int, default=9,
                       help="possibility numbers are drawn from 1..M (default: %(default)s)")
    group.add_argument("--max_num_negatives_per_sample", type=int, default=50,
                       help="wrong (number, reply) pairs per context at most (default: %(default)s)")
    group.add_argument("--ul_weight", type=float, default=0.5,
                       help="weight of the unlikelihood loss (default: %(default)s)")
    group.add_argument("--ul_words", choices=["content", "distinct"], default="content",
                       help="content: unlearn the content words of the other replies, as published (default); "
                            "distinct: only those that neither the context nor the right reply has")
    group.add_argument("--no_ul", action="store_true",
                       help="no unlikelihood, and no number unless --number is given (as published)")
    group.add_argument("--number", action=BooleanOptionalAction,
                       help="put the possibility number into the prompt (default: unless --no_ul)")
    group.add_argument("--warmup_steps", type=int, default=-1,
                       help="micro-steps of likelihood only, before unlikelihood sets in (-1: none)")


def load_rows(args) -> list[dict]:
    """Read the training rows and settle what the flags leave open; prints counts of odd rows."""
    args.method = settle_method(args)
    rows = utils.load_rows(args.train_file)
    n = args.num_response_per_input
    fewer = sum(len(row["candidates"]) < n for row in rows)
    equal = sum(len({utils.normalise(c) for c in row["candidates"][:n]}) < len(row["candidates"][:n])
                for row in rows)
    if fewer:
        utils.note(f"note: {fewer} of {len(rows)} rows have fewer than {n} candidates; all they have is used")
    if equal:
        utils.note(f"note: {equal} of {len(rows)} rows repeat a candidate; a repeat is never a negative")
    return rows


def settle_method(args) -> str:
    """Resolve --method, --no_ul, --number and the number of replies; returns the method that results."""
    if args.method in ("otm", "oto"):
        if args.number:
            utils.die(2, f"--method {args.method} has no number in its prompt", "drop --number, or use --method peft")
        args.no_ul = True
    if args.number is None:
        args.number = not args.no_ul
    if args.num_response_per_input is None:
        args.num_response_per_input = 1 if args.method == "oto" else 4
    n = args.num_response_per_input
    if n < 1:
        utils.die(2, f"--num_response_per_input {n} must be at least 1")
    if args.max_num_negatives_per_sample < 0 or args.ul_weight < 0:
        utils.die(2, f"--max_num_negatives_per_sample {args.max_num_negatives_per_sample} and --ul_weight "
                  f"{args.ul_weight} must be at least 0", "--no_ul switches unlikelihood off")
    if args.number and n > args.max_pos_number:
        utils.die(2, f"--num_response_per_input {n} needs {n} distinct numbers, --max_pos_number is {args.max_pos_number}",
                  f"raise --max_pos_number to {n} or more")
    if not args.no_ul and not args.number:
        utils.die(2, "--no_number without --no_ul: replies could not be told apart", "add --no_ul")
    if args.method == "oto" and n > 1:
        utils.die(2, f"--method oto learns one reply per context, --num_response_per_input is {n}", "use --method otm")
    if args.number:
        return "peft"
    return "oto" if n == 1 else "otm"


prepare_model = utils.add_lora


def build_tree(row: dict, tokenizer, args, rng: random.Random):
    """A context; under it one branch per number; under that the number's own reply and the others'.

    Segments of replies carry the index of the reply as `branch`. None if the row does not fit.
    """
    from trees import LIKELIHOOD, UNLIKELIHOOD, Segment, Tree, branch_prompts

    replies = row["candidates"][: args.num_response_per_input]
    eos = utils.end_of_turn(tokenizer)
    encoded = [content_words(reply, tokenizer) for reply in replies]
    room = args.max_length - max(len(ids) for ids, _ in encoded) - 1
    numbers = rng.sample(range(1, args.max_pos_number + 1), len(replies)) if args.number else [None]
    prompts, dropped = utils.fit_prompts(row, numbers, tokenizer, args.max_input_length, room)
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
    import trees

    return loss_of(trees.score(model, batch), batch, args)


def loss_of(logps, batch: dict, args):
    """The loss from the log-probabilities (S,) of a packed batch's scored tokens."""
    import trees

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
    import trees

    sums = trees.sum_by_row(values * chosen, row, num_rows)
    counts = trees.sum_by_row(chosen.to(values.dtype), row, num_rows)
    return (sums / counts.clamp(min=1)).mean()


def decode_tree(row: dict, tokenizer, args):
    """A row's context with num_branches prompts: a number each for peft, the same prompt for the others."""
    from trees import Tree, branch_prompts

    prompts, dropped = utils.fit_prompts(row, numbers_of(args), tokenizer, args.max_input_length,
                                         args.max_length - args.max_new_tokens, args.method == "base")
    if not prompts:
        return None
    return Tree(branch_prompts(prompts, list(range(1, args.num_branches + 1))), dropped)


def decode_messages(row: dict, args) -> list[str]:
    """The same prompts as user messages, for a server."""
    turns = utils.keep_latest(utils.label_turns(row["context"]), args.max_input_length) if "context" in row else None
    return [utils.build_prompt(row, number, args.method == "base", turns) for number in numbers_of(args)]


def numbers_of(args) -> list[int | None]:
    """Possibility numbers 1, 2, ... for peft, from 1 again after the largest trained one; None for the others."""
    return [i % args.max_pos_number + 1 if args.method == "peft" else None for i in range(args.num_branches)]
