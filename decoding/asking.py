"""Asking a model for several different replies in words, and reading its answers.

- list: one message asks for N replies, one a line;
- iterative: each message shows the replies so far and asks for one that says something else;
- verbalized: one message asks for N replies with their probabilities ("Verbalized Sampling",
  arXiv:2510.01171), from which N are drawn.

Differences from the paper: the replies of one answer are drawn without replacement, in an order
drawn by their probabilities, since N different responses are wanted and not one.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass, field

import utils
from decoding.replies import Drawn, Reply, clean_reply
from modeling.prompts import build_prompt, keep_latest, label_turns

# The hint that an untuned model gets in every prompt (modeling.prompts.build_prompt).
LENGTH = "at most 25 words"


def shown_turns(row: dict, max_words: int) -> list[str] | None:
    """The newest turns of a context that fit into max_words; None for a prompt."""
    return keep_latest(label_turns(row["context"]), max_words) if "context" in row else None


def _words_for(row: dict) -> tuple[str, str]:
    """What an answer to the row is called, one and several."""
    return ("reply", "replies") if "context" in row else ("answer", "answers")


def list_request(row: dict, turns: list[str] | None, number: int, taken: list[str],
                 length: str) -> str:
    """The message that asks for `number` answers to a row, unlike the `taken` ones.

    length: a sentence about how long they should be.
    """
    # Both words, because a retry may ask for a single one.
    one, several = _words_for(row)
    fresh = "new " if taken else ""
    return "\n\n".join([
        *opening(row, turns, taken),
        f"Write a list of {number} {fresh}{several if number > 1 else one}. Each must make sense "
        "on its own and say something else than every other one, not the same in other words. "
        f"{length} One a line, numbered, and nothing else."])


def next_request(row: dict, turns: list[str] | None, taken: list[str], length: str) -> str:
    """The message that asks for one more answer, unlike the `taken` ones."""
    one, _ = _words_for(row)
    return "\n\n".join([
        *opening(row, turns, taken),
        f"Write one more {one}. It must make sense on its own and say something else than all of "
        f"these, not the same in other words. {length} The {one} alone, and nothing else."])


def verbalized_request(row: dict, turns: list[str] | None, number: int, length: str) -> str:
    """The message that asks for `number` answers, each with its probability, in tags."""
    one, several = _words_for(row)
    return "\n\n".join([
        *opening(row, turns, []),
        f"Write {number} different {several}, and for each the probability, between 0 and 1, "
        f"that it is the one to come. {length} Put each into tags like this, and write nothing "
        "else:\n"
        f"<response><text>the {one}</text><probability>its probability</probability></response>"])


def opening(row: dict, turns: list[str] | None, taken: list[str]) -> list[str]:
    """The row as in any prompt, a sentence that many answers are good, and the replies so far."""
    _, several = _words_for(row)
    parts = [build_prompt(row, turns=turns), f"Many different {several} would be good here."]
    if taken:
        listed = "\n".join(f"- {text}" for text in taken)
        parts.append(f"These {several} are there already:\n{listed}")
    return parts


def _write_request(row: dict, turns: list[str] | None, taken: list[str], args) -> str:
    """The message that --decoding wants next, when the `taken` replies are there."""
    if args.decoding == "list":
        return list_request(row, turns, args.num_drawn - len(taken), taken,
                            f"Keep each short, {LENGTH}.")
    if args.decoding == "verbalized":
        return verbalized_request(row, turns, args.num_drawn, f"Keep each short, {LENGTH}.")
    # iterative: the first reply is asked for as in any prompt, having nothing yet to differ from.
    if not taken:
        return build_prompt(row, None, True, turns)
    return next_request(row, turns, taken, f"Keep it short, {LENGTH}.")


def _answer_tokens(args) -> int:
    """Tokens of one answer at most: it holds all replies, or one."""
    return args.max_new_tokens * (1 if args.decoding == "iterative" else args.num_drawn)


def fit_request(engine, row: dict, taken: list[str], args) -> tuple[str | None, int]:
    """The next message with the oldest turns dropped until it fits, and how many went.

    None if it never fits. A server does not tell how many tokens a message has: it refuses by
    itself what is too long.
    """
    turns = shown_turns(row, args.max_input_length)
    # Turns that the limit in words has cut already count as dropped, too.
    dropped = len(label_turns(row["context"])) - len(turns) if turns else 0
    while True:
        text = _write_request(row, turns, taken, args)
        tokens = engine.count_tokens(text)
        if tokens is None or tokens <= args.max_length - _answer_tokens(args):
            return text, dropped
        # A prompt and the newest turn are never cut: without them there is nothing to answer.
        if not turns or len(turns) == 1:
            return None, dropped
        turns, dropped = turns[1:], dropped + 1


@dataclass
class _Collected:
    """What a row's answers have given so far; weights: the probability that came with each text."""

    texts: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    cut: int = 0
    failed: int = 0
    asked: int = 0
    parsed: int = 0


def draw_in_words(engine, rows: list[dict], args, block: list[int]) -> list[Drawn]:
    """Ask for the replies of a block of rows, and again where replies are missing.

    --max_retries further rounds at most. A list is asked for greedily first, as published, and
    sampled afterwards.
    """
    collected = [_Collected() for _ in block]
    # Bounded, because a model that always writes the same line would be asked for ever.
    rounds = args.max_retries + (args.num_drawn if args.decoding == "iterative" else 1)
    for turn in range(rounds):
        requests = {place: fit_request(engine, rows[index], collected[place].texts, args)[0]
                    for place, index in enumerate(block)
                    if len(collected[place].texts) < args.num_drawn}
        # Earlier replies are part of a message and may leave no room for a further one.
        requests = {place: text for place, text in requests.items() if text}
        if not requests:
            break
        # A second greedy request with the same words would get the same answer.
        temperature = 0.0 if args.decoding == "list" and turn == 0 else args.temperature
        # Turn 0 is the seed of plain sampling, so rounds count from 1.
        seeds = [utils.row_seed(args.seed, block[place], turn + 1) for place in requests]
        places = list(requests)
        for asked in engine.ask(list(requests.values()), seeds, 1, _answer_tokens(args),
                                temperature):
            row = collected[places[asked.index]]
            if asked.replies:
                _read_answer(row, asked.replies[0], args)
            else:
                row.failed += 1
    if args.decoding == "verbalized":
        for index, row in zip(block, collected, strict=True):
            # From the row's number and not from the block, so that other blocks draw the same.
            rng = random.Random(f"{args.seed}-{index}")
            row.texts = draw_without_replacement(list(row.weights.items()), rng)[: args.num_drawn]
    return [Drawn(row.texts, row.tokens, row.cut, [], row.failed, row.asked, row.parsed)
            for row in collected]


def _read_answer(row: _Collected, reply: Reply, args) -> None:
    """Add what an answer holds to a row, and count what was asked for and could be read."""
    asked = args.num_drawn
    if args.decoding == "iterative":
        items, asked = [clean_reply(reply.text)], 1
        row.cut += reply.cut
    elif args.decoding == "list":
        items, asked = parse_list(reply.text, reply.cut), args.num_drawn - len(row.texts)
    else:
        pairs = parse_verbalized(reply.text)
        items = [text for text, _ in pairs]
        # "Yes." and "yes" are one reply, here as in the other decodings.
        kept = set(add_new(list(row.weights), items, len(row.weights) + len(items)))
        for text, probability in pairs:
            if text in kept:
                # The first probability counts: those of a later round belong to another list.
                row.weights.setdefault(text, probability)
    items = [item for item in items if item]
    row.tokens += reply.tokens
    row.asked += asked
    # More items than were asked for do not make up for a list that could not be read.
    row.parsed += min(asked, len(items))
    row.texts = add_new(row.texts, items, args.num_drawn)


# ---- reading lists ------------------------------------------------------------------------------

# What stands before an item: bullets and numbers such as "1.", "**2)**", "(3)", "#4:", "- 5.".
MARKER = re.compile(r"\A\s*(?:(?:[-+*•·–—]|\**[#(]?\d{1,3}(?:[.):]\)?|\s+-))\**(?:\s+|$))+")
# What may follow it: a short bold title with a colon, or a word such as "Option B:".
LABEL = re.compile(
    r"\A(?:\*\*[^*]{1,40}:\*\*|\*\*[^*]{1,40}\*\*:"
    r"|(?:answer|reply|response|option|candidate|version)\s*#?(?:\d+|[A-H])?\s*:)\s*",
    re.IGNORECASE)
# A first line such as "Sure, here are five replies", which is no reply.
PREAMBLE = re.compile(
    r"(?:sure|certainly|of course|absolutely|okay|here(?:'s| is| are)|below (?:is|are))\b"
    r".*\b(?:list|answers?|repl(?:y|ies)|responses?|options?)\b", re.IGNORECASE)
# Where a number begins an item on the same line: only behind the end of a sentence.
INLINE = re.compile(r"(?:^|(?<=[.!?\"”)]))\s*(?=\d{1,2}[.)]\s+\S)")
NO_ITEM = re.compile(r"\s*(?:```|#+\s|[\[\]]\s*$)")  # a code fence, a heading, a bracket alone


def parse_list(text: str, cut: bool = False) -> list[str]:
    """The items of a model's list, cleaned: numbered, bulleted, or one a line; quoted, bold, plain.

    Where half of the lines or more are marked as items, the others are talk around the list, but
    for indented ones, which go on with their item. cut: the answer ended at its token limit, so its
    last item is left out.
    """
    # Some servers leave the reasoning in the answer, maybe unfinished.
    text = re.sub(r"<think>.*?(?:</think>|\Z)", "", text, flags=re.DOTALL)
    if "\n" not in text.strip() and len(INLINE.findall(text)) > 1:
        text = INLINE.sub("\n", text)  # 1. One. 2. Two. 3. Three.
    lines = [line.rstrip() for line in text.split("\n") if line.strip() and not NO_ITEM.match(line)]
    marked = sum(bool(MARKER.match(line)) for line in lines)
    items: list[str] = []
    for number, line in enumerate(lines):
        plain = not MARKER.match(line)
        # Half is enough, because some models write a sentence of explanation below every item.
        if 2 * marked >= len(lines):
            if plain and items and line[0].isspace():
                items[-1] += " " + line.strip()
            if plain:
                continue
        elif line.endswith(":") or number == 0 and PREAMBLE.match(line):
            continue
        items.append(line)
    if cut:
        items = items[:-1]
    return [item for item in map(_clean_item, items) if item]


def _clean_item(text: str) -> str:
    """One item without its number, bullet, label, emphasis and quotes."""
    text = LABEL.sub("", MARKER.sub("", text, count=1).strip(), count=1)
    text = re.sub(r"\*\*(.+?)\*\*", r"\1", text).removesuffix("**").strip()
    if len(text) > 2 and text[0] == text[-1] and text[0] in "*_":
        text = text[1:-1].strip()
    text = clean_reply(text.removesuffix(",") if text.endswith(('",', "”,")) else text)
    # Once more, since a label may have stood inside the quotes.
    return LABEL.sub("", text, count=1)


def add_new(texts: list[str], items: list[str], number: int) -> list[str]:
    """`texts` and the items that are new to it, up to `number`, whatever case and outer marks."""
    known = {utils.normalise(text) for text in texts}
    for item in items:
        if len(texts) < number and utils.normalise(item) not in known:
            known.add(utils.normalise(item))
            texts = [*texts, item]
    return texts


RESPONSE = re.compile(
    r"<response>\s*<text>(.*?)</text>\s*"
    r"<probability>\s*([0-9.]+)\s*(%?)\s*</probability>\s*</response>", re.DOTALL)


def parse_verbalized(text: str) -> list[tuple[str, float]]:
    """(reply, probability) of every whole <response> with a number in (0, 1] or (0 %, 100 %]."""
    pairs = []
    for reply, number, percent in RESPONSE.findall(text):
        try:
            probability = float(number) / (100 if percent else 1)
        except ValueError:  # two points
            continue
        reply = _clean_item(reply)
        if reply and 0 < probability <= 1:
            pairs.append((reply, probability))
    return pairs


def draw_without_replacement(weighted: list[tuple[str, float]], rng: random.Random) -> list[str]:
    """All texts in random order, each next one in proportion to the weights that are left.

    Efraimidis and Spirakis (2006): sort by log(uniform) / weight.
    """
    keys = {text: math.log(rng.random()) / weight for text, weight in weighted}
    return sorted(keys, key=keys.get, reverse=True)
