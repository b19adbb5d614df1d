"""From rows to responses: rows become prompt trees or messages, once, and are answered in blocks.

A block is a list of row numbers. All that a row's responses depend on is the row and its number, so
a resumed run, which decodes the same blocks, draws the same responses.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import utils
from decoding import asking, beams, sampling, selection
from decoding.api import RunStopped
from decoding.mixtures import num_responses
from decoding.replies import Drawn, Reply
from decoding.table import DECODERS, draw_function, filters_of
from modeling.embedder import load_embedder
from modeling.prompts import refuse_special_tokens
from utils import TRY_LATER, USAGE, fail, info


class Job(NamedTuple):
    """draw answers a block of row numbers; truncated: contexts that lost their oldest turns."""

    draw: Callable[[list[int]], list[Drawn]]
    truncated: int


def prepare(engine, rows: list[dict], args, decode_tree: Callable, messages: Callable) -> Job:
    """Everything that can go wrong with a row goes wrong here, before the first one is answered.

    decode_tree and messages are the method's hooks.
    """
    decoder = DECODERS[args.decoding]
    if args.engine == "hf":
        # Only fields that become part of a prompt. What is special to a server is not known here.
        texts = [{key: row[key] for key in ("context", "prompt", "messages", "persona")
                  if key in row} for row in rows]
        refuse_special_tokens(texts, engine.tokenizer, args.test_file, args.new_tokens)
    if decoder.asks:
        # The first message of a row; later ones also hold replies and are fitted when written.
        requests = [asking.fit_request(engine, row, [], args) for row in rows]
        _refuse_long_rows([text for text, _ in requests], args)
        draw = partial(draw_function(args.decoding), engine, rows, args)
        return Job(draw, sum(lost > 0 for _, lost in requests))
    if args.engine != "hf":
        per_row = [messages(row, args) for row in rows]
        if None in per_row:
            fail(USAGE, f"method {args.method} does not work through a server", "--engine hf")
        return Job(partial(_draw_from_server, engine, per_row, args), 0)
    trees = [decode_tree(row, engine.tokenizer, args) for row in rows]
    _refuse_long_rows(trees, args)
    _compare_branches(trees[0], args)
    truncated = sum(tree.dropped_turns > 0 for tree in trees)
    return Job(partial(draw_function(args.decoding), engine, trees, args), truncated)


def _refuse_long_rows(prepared: list, args) -> None:
    """Die over rows that do not fit: None stands where a tree or message could not be made."""
    long = [number for number, item in enumerate(prepared, 1) if item is None]
    if long:
        fail(USAGE, f"{args.test_file}: row {long[0]} and {len(long) - 1} more do not fit into "
                    f"{args.max_length} tokens with {args.max_new_tokens} new ones",
             "shorten them, or raise --max_length")


def _compare_branches(tree, args) -> None:
    """Tell of fewer different prompts than branches, since equal ones give similar responses."""
    # The first tree stands for all, since the number of prompts follows from the flags.
    different = len({tuple(child.input_ids) for child in tree.root.children})
    if args.group_numbers == "per_group" and different == 1 < args.num_branches:
        fail(USAGE, f"--group_numbers per_group, but method {args.method} has one prompt for all "
                    "groups", "drop it")
    if 1 < different < args.num_branches:
        info(f"{args.num_branches} responses under {different} different prompts, "
             "which are used in turn")


# ---- a block of trees ---------------------------------------------------------------------------


def draw_sampling(engine, trees: list, args, block: list[int]) -> list[Drawn]:
    """num_drawn samples per row, one per branch and round; every round has a seed of its own."""
    forest = [trees[index] for index in block]
    # A plain tree gives a response per branch, a mixed tree one in all.
    at_once = num_responses(forest)
    turns = [engine.draw(sampling.sample, forest,
                         [utils.row_seed(args.seed, index, turn) for index in block],
                         args.max_new_tokens, temperature=args.temperature, **filters_of(args))
             for turn in range(math.ceil(args.num_drawn / at_once))]
    return [_drawn(sum(row, [])[: args.num_drawn], args) for row in zip(*turns, strict=True)]


def draw_greedy(engine, trees: list, args, block: list[int]) -> list[Drawn]:
    """The most probable response under each of a row's prompts."""
    drawn = engine.draw(sampling.greedy, [trees[index] for index in block], None,
                        args.max_new_tokens)
    return [_drawn(row, args) for row in drawn]


def draw_beam(engine, trees: list, args, block: list[int]) -> list[Drawn]:
    """The best beams of every row."""
    drawn = engine.draw(beams.beam, [trees[index] for index in block], None, args.max_new_tokens,
                        num_beams=args.num_beams, num_responses=args.num_drawn,
                        length_penalty=args.length_penalty)
    return [_drawn(row, args) for row in drawn]


def draw_diverse(engine, trees: list, args, block: list[int]) -> list[Drawn]:
    """The best beams of groups that avoid each other's tokens."""
    drawn = engine.draw(beams.diverse, [trees[index] for index in block], None,
                        args.max_new_tokens, num_beams=args.num_beams, num_responses=args.num_drawn,
                        length_penalty=args.length_penalty, num_groups=args.num_beam_groups,
                        diversity_penalty=args.diversity_penalty)
    return [_drawn(row, args) for row in drawn]


def _draw_from_server(engine, messages: list[list], args, block: list[int]) -> list[Drawn]:
    """The same prompts through a server: equal ones in one call, different ones one by one."""
    temperature = args.temperature if DECODERS[args.decoding].samples else 0.0
    # Methods without numbers repeat one message, so one call can ask for all its replies.
    first = messages[block[0]]
    if all(message == first[0] for message in first):
        jobs = [(place, index, messages[index][0], 0) for place, index in enumerate(block)]
        at_once = args.num_drawn
    else:
        jobs = [(place, index, messages[index][k], k) for place, index in enumerate(block)
                for k in range(args.num_drawn)]
        at_once = 1
    # Different messages of a row need different seeds: equal noise would make their replies alike.
    seeds = [utils.row_seed(args.seed, index) + k for _, index, _, k in jobs]
    replies: list[list[Reply]] = [[] for _ in jobs]
    for asked in engine.ask([message for _, _, message, _ in jobs], seeds, at_once,
                            args.max_new_tokens, temperature):
        # Calls finish in any order; each reply goes back to the job that it belongs to.
        replies[asked.index] = asked.replies
    rows: list[list[Reply]] = [[] for _ in block]
    for (place, *_), answered in zip(jobs, replies, strict=True):
        rows[place] += answered
    return [_drawn(row, args) for row in rows]


def _drawn(replies: list[Reply], args) -> Drawn:
    """Replies as a row's responses; what a server refused is missing from them and counted."""
    cut_at = [place for place, reply in enumerate(replies) if reply.cut]
    return Drawn([reply.text for reply in replies], sum(reply.tokens for reply in replies),
                 cut=len(cut_at), cut_at=cut_at, failed=args.num_drawn - len(replies))


# ---- all rows -----------------------------------------------------------------------------------


def answer_rows(rows: list[dict], job: Job, clean: Callable[[str], str], args, done: int,
                save_file: Path) -> dict:
    """Answer the rows after the first `done` and append each; returns how long that took.

    Blocks are cut by row number, so a resumed run decodes the very batches of an uninterrupted one.
    Returns seconds (a list, a number per row), tokens and responses.
    """
    # A finished run that is resumed needs no embedder, which takes seconds to load.
    embedder = load_embedder() if args.overgenerate and done < len(rows) else None
    # A server works on max_connections calls at a time, however small our own batches are.
    size = args.batch_size if args.engine == "hf" else max(args.batch_size, args.max_connections)
    speed = {"seconds": [], "tokens": 0, "responses": 0}
    # A block that was written in part is decoded again as a whole, because rounding depends on the
    # other rows of a batch.
    first = len(rows) if done >= len(rows) else done // size * size
    with tqdm(total=len(rows), initial=done, unit="row", desc=save_file.stem) as bar:
        for start in range(first, len(rows), size):
            block = list(range(start, min(start + size, len(rows))))
            began = time.time()
            answers = _answer_block(job, block)
            # Items of a list were cleaned when they were read.
            if not DECODERS[args.decoding].asks:
                answers = [row._replace(texts=[clean(text) for text in row.texts])
                           for row in answers]
            finished = [_finish_row(rows[index], answer, embedder, args)
                        for index, answer in zip(block, answers, strict=True)]
            speed["seconds"] += [(time.time() - began) / len(block)] * len(block)
            speed["tokens"] += sum(answer.tokens for answer in answers)
            speed["responses"] += sum(len(answer.texts) for answer in answers)
            new = [row for index, row in zip(block, finished, strict=True) if index >= done]
            utils.append_jsonl(save_file, new)
            bar.update(len(new))
    return speed


def _answer_block(job: Job, block: list[int]) -> list[Drawn]:
    """The responses of a block; the engine has tried smaller batches where memory ran out."""
    try:
        return job.draw(block)
    except RunStopped as stop:
        fail(stop.code, stop.what,
             "finished rows are kept; the same command with --resume goes on")
    except Exception as error:
        if not utils.is_out_of_memory(error):
            raise
        fail(TRY_LATER, f"out of memory in rows {block[0] + 1} to {block[-1] + 1}, even one at a "
                        "time", "--resume on a machine with more memory; or draw fewer or shorter "
                                "responses into another --save_file")


def _finish_row(row: dict, drawn: Drawn, embedder, args) -> dict:
    """The row with its responses, chosen if more were drawn, and what went wrong with them."""
    preds = drawn.texts
    # A row may come from another outs file, and then its warnings are about other responses.
    finished = {key: value for key, value in row.items() if key != "warnings"}
    problems = Counter()
    if embedder:
        # Empty responses cannot be chosen; they would look different from everything.
        full = [text for text in preds if text]
        vectors = embedder.encode([utils.text_of(row), *full])
        relevance = vectors[1:] @ vectors[0]
        wanted = min(args.num_response_per_input, len(full))
        chosen = selection.choose(args.select, vectors[1:], relevance, wanted, args.min_relevance)
        finished["drawn"] = preds
        # bool, because a sum of NumPy's own type cannot be written as JSON.
        problems["below_floor"] = sum(bool(relevance[i] < args.min_relevance) for i in chosen)
        preds = [full[i] for i in chosen]
    finished["preds"] = preds
    problems["empty"] = sum(not text for text in preds)
    problems["cut"], problems["failed"] = drawn.cut, drawn.failed
    problems["missing"] = args.num_response_per_input - len(preds)
    if any(problems.values()):
        finished["warnings"] = {name: count for name, count in problems.items() if count}
    if drawn.cut_at:
        finished["cut_at"] = drawn.cut_at
    if drawn.asked:
        finished["asked"], finished["parsed"] = drawn.asked, drawn.parsed
    return finished
