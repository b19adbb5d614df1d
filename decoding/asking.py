"""Asking a model for several different replies in words, and reading its answers.

- list: one message asks for N replies, one a line;
- iterative: each message shows the replies so far and asks for one that says something else;
- verbalized: one message asks for N replies with their probabilities ("Verbalized Sampling",
  arXiv:2510.01171), from which N are drawn.

Differences from the paper: the replies of one answer are drawn without replacement, in an order drawn by
their probabilities, since N different responses are wanted and not one.
"""

from __future__ import annotations

import math
import random
import re

import utils
from decoding.replies import clean_reply
from modeling.prompts import build_prompt, keep_latest, label_turns

LENGTH = "at most 25 words"  # the hint that an untuned model gets in every prompt


def shown_turns(row: dict, max_words: int) -> list[str] | None:
    """The newest turns of a context that fit into max_words; None for a prompt."""
    return keep_latest(label_turns(row["context"]), max_words) if "context" in row else None


def words_for(row: dict) -> tuple[str, str]:
    """What an answer to the row is called, one and several."""
    return ("reply", "replies") if "context" in row else ("answer", "answers")


def list_request(row: dict, turns: list[str] | None, number: int, taken: list[str], length: str) -> str:
    """The message that asks for `number` answers to a row, unlike the `taken` ones; length: a sentence about it."""
    one, several = words_for(row)
    fresh = "new " if taken else ""
    return "\n\n".join([
        *opening(row, turns, taken),
        f"Write a list of {number} {fresh}{several if number > 1 else one}. Each must make sense on its own "
        f"and say something else than every other one, not the same in other words. {length} "
        "One a line, numbered, and nothing else."])


def next_request(row: dict, turns: list[str] | None, taken: list[str], length: str) -> str:
    """The message that asks for one more answer, unlike the `taken` ones."""
    one, _ = words_for(row)
    return "\n\n".join([
        *opening(row, turns, taken),
        f"Write one more {one}. It must make sense on its own and say something else than all of these, not the "
        f"same in other words. {length} The {one} alone, and nothing else."])


def verbalized_request(row: dict, turns: list[str] | None, number: int, length: str) -> str:
    """The message that asks for `number` answers, each with its probability, in tags."""
    one, several = words_for(row)
    return "\n\n".join([
        *opening(row, turns, []),
        f"Write {number} different {several}, and for each the probability, between 0 and 1, that it is the one to "
        f"come. {length} Put each into tags like this, and write nothing else:\n"
        f"<response><text>the {one}</text><probability>its probability</probability></response>"])


def opening(row: dict, turns: list[str] | None, taken: list[str]) -> list[str]:
    """The row as every prompt shows it, that there is more than one answer, and those that are there."""
    _, several = words_for(row)
    parts = [build_prompt(row, turns=turns), f"Many different {several} would be good here."]
    if taken:
        parts.append(f"These {several} are there already:\n" + "\n".join(f"- {text}" for text in taken))
    return parts


def write_request(row: dict, turns: list[str] | None, taken: list[str], args) -> str:
    """The message that --decoding wants next, when the `taken` replies are there."""
    if args.decoding == "list":
        return list_request(row, turns, args.num_drawn - len(taken), taken, f"Keep each short, {LENGTH}.")
    if args.decoding == "verbalized":
        return verbalized_request(row, turns, args.num_drawn, f"Keep each short, {LENGTH}.")
    if not taken:
        return build_prompt(row, None, True, turns)
    return next_request(row, turns, taken, f"Keep it short, {LENGTH}.")


def answer_tokens(args) -> int:
    """Tokens of one answer at most: it holds all replies, or one."""
    return args.max_new_tokens * (1 if args.decoding == "iterative" else args.num_drawn)


def fit_request(engine, row: dict, taken: list[str], args) -> tuple[str | None, int]:
    """The next message with the oldest turns dropped until it fits, and how many went; None if it never fits."""
    turns = shown_turns(row, args.max_input_length)
    dropped = len(label_turns(row["context"])) - len(turns) if turns else 0
    while True:
        text = write_request(row, turns, taken, args)
        if args.max_length is None or engine.count_tokens(text) <= args.max_length - answer_tokens(args):
            return text, dropped
        if not turns or len(turns) == 1:
            return None, dropped
        turns, dropped = turns[1:], dropped + 1


def answer(engine, rows: list[dict], block: list[int], args) -> list[dict]:
    """Ask for a block of row numbers, and again where replies are missing, at most --max_retries times more.

    A list is asked for greedily first, as published, and sampled afterwards. Returns per row a dict: texts
    (num_drawn at most), tokens, cut, failed (calls without an answer), and asked and parsed (replies).
    """
    found = [{"texts": [], "tokens": 0, "cut": 0, "failed": 0, "asked": 0, "parsed": 0} for _ in block]
    weights: list[dict[str, float]] = [{} for _ in block]
    for turn in range(args.max_retries + (args.num_drawn if args.decoding == "iterative" else 1)):
        requests = {}
        for place, index in enumerate(block):
            taken = found[place]["texts"]
            if len(taken) < args.num_drawn:
                requests[place], _ = fit_request(engine, rows[index], taken, args)
        requests = {place: text for place, text in requests.items() if text}  # earlier replies may leave no room
        if not requests:
            break
        temperature = 0.0 if args.decoding == "list" and turn == 0 else args.temperature
        seeds = [utils.row_seed(args.seed, block[place], turn + 1) for place in requests]
        replies = engine.ask(list(requests.values()), seeds, 1, answer_tokens(args), temperature)
        for place, reply in zip(requests, replies, strict=True):
            if reply:
                read_answer(found[place], weights[place], reply[0], args)
            else:
                found[place]["failed"] += 1
    if args.decoding == "verbalized":
        for index, row, own in zip(block, found, weights, strict=True):
            order = draw_without_replacement(list(own.items()), random.Random(f"{args.seed}-{index}"))
            row["texts"] = order[: args.num_drawn]
    return found


def read_answer(row: dict, weights: dict[str, float], reply, args) -> None:
    """Add what an answer holds to a row's texts, and count the replies that were asked for and could be read."""

    asked = args.num_drawn
    if args.decoding == "iterative":
        items, asked = [clean_reply(reply.text)], 1
        row["cut"] += reply.cut
    elif args.decoding == "list":
        items, asked = parse_list(reply.text, reply.cut), args.num_drawn - len(row["texts"])
    else:
        pairs = parse_verbalized(reply.text)
        items = [text for text, _ in pairs]
        for text, probability in pairs:
            weights.setdefault(text, probability)
    items = [item for item in items if item]
    row["tokens"] += reply.tokens
    row["asked"] += asked
    row["parsed"] += min(asked, len(items))
    row["texts"] = add_new(row["texts"], items, args.num_drawn)


MARKER = re.compile(r"\A\s*(?:(?:[-+*•·–—]|\**[#(]?\d{1,3}(?:[.):]\)?|\s+-))\**(?:\s+|$))+")
LABEL = re.compile(r"\A(?:\*\*[^*]{1,40}:\*\*|\*\*[^*]{1,40}\*\*:"
                   r"|(?:answer|reply|response|option|candidate|version)\s*#?(?:\d+|[A-H])?\s*:)\s*", re.IGNORECASE)
PREAMBLE = re.compile(r"(?:sure|certainly|of course|absolutely|okay|here(?:'s| is| are)|below (?:is|are))\b"
                      r".*\b(?:list|answers?|repl(?:y|ies)|responses?|options?)\b", re.IGNORECASE)
INLINE = re.compile(r"(?:^|(?<=[.!?\"”)]))\s*(?=\d{1,2}[.)]\s+\S)")
NO_ITEM = re.compile(r"\s*(?:```|#+\s|[\[\]]\s*$)")  # a code fence, a heading, a bracket alone


def parse_list(text: str, cut: bool = False) -> list[str]:
    """The items of a model's list, cleaned: numbered, bulleted, or one a line; quoted or bold or plain.

    Where half of the lines or more are marked as items, the others are talk around the list, but for
    indented ones, which go on with their item. cut: the answer ended at its token limit, so its last item
    is left out.
    """
    text = re.sub(r"<think>.*?(?:</think>|\Z)", "", text, flags=re.DOTALL)  # reasoning that a server leaves in
    if "\n" not in text.strip() and len(INLINE.findall(text)) > 1:
        text = INLINE.sub("\n", text)  # 1. One. 2. Two. 3. Three.
    lines = [line.rstrip() for line in text.split("\n") if line.strip() and not NO_ITEM.match(line)]
    marked = sum(bool(MARKER.match(line)) for line in lines)
    items: list[str] = []
    for number, line in enumerate(lines):
        plain = not MARKER.match(line)
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
    return [item for item in map(clean_item, items) if item]


def clean_item(text: str) -> str:
    """One item without its number, bullet, label, emphasis and quotes."""

    text = LABEL.sub("", MARKER.sub("", text, count=1).strip(), count=1)
    text = re.sub(r"\*\*(.+?)\*\*", r"\1", text).removesuffix("**").strip()
    if len(text) > 2 and text[0] == text[-1] and text[0] in "*_":
        text = text[1:-1].strip()
    text = clean_reply(text.removesuffix(",") if text.endswith(('",', "”,")) else text)
    return LABEL.sub("", text, count=1)


def add_new(found: list[str], items: list[str], number: int) -> list[str]:
    """`found` with the items that it lacks, up to `number`; the same words in another case are no new item."""
    known = {utils.normalise(text) for text in found}
    for item in items:
        if len(found) < number and utils.normalise(item) not in known:
            known.add(utils.normalise(item))
            found = [*found, item]
    return found


RESPONSE = re.compile(r"<response>\s*<text>(.*?)</text>\s*<probability>\s*([0-9.]+)\s*(%?)\s*</probability>\s*</response>",
                      re.DOTALL)


def parse_verbalized(text: str) -> list[tuple[str, float]]:
    """(reply, probability) of every whole <response>; one without a number in (0, 1], or 100 %, is left out."""
    found = []
    for reply, number, percent in RESPONSE.findall(text):
        try:
            probability = float(number) / (100 if percent else 1)
        except ValueError:  # two points
            continue
        reply = clean_item(reply)
        if reply and 0 < probability <= 1:
            found.append((reply, probability))
    return found


def draw_without_replacement(weighted: list[tuple[str, float]], rng: random.Random) -> list[str]:
    """All texts in an order drawn by their weights: each next one in proportion to the weights that are left."""
    keys = {text: math.log(rng.random()) / weight for text, weight in weighted}  # Efraimidis and Spirakis, 2006
    return sorted(keys, key=keys.get, reverse=True)
