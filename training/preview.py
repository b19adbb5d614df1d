"""What the rows of a run become, before a model is loaded."""

from __future__ import annotations

import math
from collections import Counter

import trees
from training.trainer import build
from trees import CONTEXT, LIKELIHOOD, UNLIKELIHOOD, Segment
from utils import USAGE, fail

SIGNS = {CONTEXT: " ", LIKELIHOOD: "+", UNLIKELIHOOD: "-"}
EXAMPLES = 2


def rows_that_fit(method, rows: list[dict], tokenizer, args) -> tuple[list[dict], Counter]:
    """The rows that give a tree, and counts of them and of their tokens; exits if there are none.

    How many rows lost turns or do not fit is printed.
    """
    kept, counts = [], Counter()
    for index, row in enumerate(rows):
        tree = build(method, row, index, 0, tokenizer, args)
        if tree is None:
            counts["dropped"] += 1
            continue
        kept.append(row)
        counts["rows"] += 1
        counts["truncated"] += tree.dropped_turns > 0
        counts["tree_tokens"] += trees.num_tokens(tree)
        # What ordinary rows would cost: every row of a batch is as long as the longest.
        counts["padded_tokens"] += math.prod(trees.padded_shape(tree))
    if counts["dropped"] or counts["truncated"]:
        print(f"{counts['truncated']} rows lost their oldest turns, "
              f"{counts['dropped']} rows do not fit and are dropped")
    if not kept:
        fail(USAGE, f"{args.train_file}: no row fits into --max_length {args.max_length}",
             "raise --max_length")
    return kept, counts


def print_examples(method, rows: list[dict], tokenizer, args) -> None:
    """Print the first trees, a line a segment: + is likelihood, - unlikelihood of ‹tokens›."""
    for index, row in enumerate(rows[:EXAMPLES]):
        tree = build(method, row, index, 0, tokenizer, args)
        print(f"\n---- row {index + 1} ----")
        for path in trees.walk(tree.root):
            print(_line(path[-1], tokenizer))
        tokens, (count, longest) = trees.num_tokens(tree), trees.padded_shape(tree)
        padded = count * longest
        print(f"tree {tokens} tokens, padded rows {count} x {longest} = {padded}: "
              f"{padded / tokens:.1f} times")


def _line(segment: Segment, tokenizer) -> str:
    """A segment as text behind its sign; scored tokens with a weight of their own in ‹ ›."""
    tokens = [tokenizer.decode([token]) for token in segment.input_ids]
    # Marked are only words that were picked out; in a likelihood every token counts.
    weights = segment.weights or [0.0] * len(tokens)
    text = "".join(f"‹{token}›" if weight else token
                   for token, weight in zip(tokens, weights, strict=True))
    # A prompt is shown with its line breaks, a reply on one line.
    return f"{SIGNS[segment.role]} " + (
        text if segment.role == CONTEXT else text.replace("\n", "\\n"))
