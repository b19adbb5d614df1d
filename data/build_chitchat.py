"""Build a human one-to-many set: what many people answered to the same 34 opening prompts.

    pip install --no-deps -r requirements-models.txt
    python -m data.build_chitchat

Source: the Chit Chat Challenge (BYU Perception, Control and Cognition Lab, MIT), from the wheel
`chitchat-dataset`. Every conversation answers an opening prompt; its first turn is one reply.
Replies are filtered (the printed table has a count for each filter) and split BY PROMPT, since a
prompt that stands in two splits would leak its answers. The opening prompt is a turn by Person A,
so each row has a `context` of one turn:

    python -m data.check data/chitchat/*.jsonl --min_turns 1 --min_words 3 --max_words 60 \\
        --max_cosine 1

Near duplicates stay (--max_cosine 1), because people do give nearly equal answers. Writes
train.jsonl, val.jsonl, test.jsonl and manifest.json.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

import utils
from data.check_report import spread
from flags import Args, FlagParser, parse_flags
from modeling.embedder import load_embedder
from scoring import checks
from utils import MISSING, fail

MIN_WORDS, MAX_WORDS = 3, 60
MIN_COSINE = 0.15  # of prompt and reply; below it people mostly talk past the prompt
VAL_PROMPTS, TEST_PROMPTS = 3, 7  # the other 24 train
FILTERS = {  # in this order; a reply counts under the first filter that drops it
    "no prompt": "the conversation has no opening prompt",
    "greeting": "nothing but greetings",
    "length": f"not {MIN_WORDS} to {MAX_WORDS} words",
    "speaker label": "contains a speaker label",
    "personal data": "an e-mail address, phone number, URL or card-like number",
    "profanity": f"alt-profanity-check score of {checks.MAX_PROFANITY} or more",
    "prompt again": "asks the prompt's question back, in its own words",
    "duplicate": "equals an earlier reply to the prompt, after normalising",
    "off topic": f"MiniLM cosine of prompt and reply is {MIN_COSINE} or less",
}
NOTES = (
    "Written by students of one US university (Brigham Young University) in 2018: young, mostly "
    "American and often Latter-day Saint voices, with their places, films and habits. It is no "
    "sample of people at large. Several chat messages of one turn are joined by spaces. The "
    "profanity score is biased against identity terms, so the filter may drop harmless replies. "
    "About one in five replies that the off-topic filter drops would be a fair answer with a "
    "far-off subject, so the set is a little less diverse than what people said."
)
# Possessive (*+), because the outer group matches "there" and the like as well: with two ways to
# read every word, a failing match would take exponential time.
WHO = r"(?:every|any|some)(?: )?(?:one|body)"
YOUR_DAY = r"your\ (?:day|night|week|evening|morning)"
GREETING = re.compile(rf"""(?:(?:
    h+e+l+o+ | h+i+(?:ya)? | h+e+y+(?:[ -]?[oa]+)? | y+o+ | howdy | hola | greetings | sup
    | (?:there|all|again|friend|guys|dude)
    | good\ (?:morning|afternoon|evening|day|night) | wh?at'?s?\ up | wass?up
    | how(?:'?s|\ is|\ are|\ have)?\ (?:it|you|ya|things|life|everything|{YOUR_DAY})
      (?:\ been)?(?:\ (?:going|doing))? | today | tonight | this\ (?:morning|evening)
    | (?:is\ )?{WHO}(?:\ (?:out|there|here|home|on))*+
    | are\ you\ (?:still\ )?(?:out\ )?there | are\ you\ here
    | nice\ to\ meet\ you | my\ name\ is\ \w+
)(?:[\s.,!?:;()]+|$))+""", re.VERBOSE)


# ---- replies ------------------------------------------------------------------------------------


def read_replies() -> Iterator[tuple[str, str]]:
    """(prompt, first turn) of every conversation in the set's order; the prompt may be empty."""
    try:
        import chitchat_dataset  # a wheel of requirements-models.txt, which need not be installed
    except ImportError:
        fail(MISSING, "the chitchat data set is not installed",
             "pip install --no-deps -r requirements-models.txt")
    for conversation in chitchat_dataset.Dataset().values():
        messages = " ".join(message["text"] for message in conversation["messages"][0])
        yield " ".join(conversation.get("prompt", "").split()), " ".join(messages.split())


def is_greeting(text: str) -> bool:
    """Whether a reply says nothing beyond hello, how are you, is anybody there."""
    return GREETING.fullmatch(utils.normalise(text).replace("’", "'")) is not None


def _repeats_prompt(prompt: str, reply: str) -> bool:
    """Whether a reply is a question that uses no word beyond those of the prompt."""
    polite = {"hello", "hey", "hi", "so", "there"}
    known = set(re.findall(r"\w+", prompt.casefold())) | polite
    return "?" in reply and set(re.findall(r"\w+", reply.casefold())) <= known


def _why_dropped(prompt: str, reply: str, profanity: float, seen: set[str]) -> str | None:
    """The first filter that a reply fails, or None; the off-topic filter comes later.

    seen: the normalised replies to the prompt so far.
    """
    if not prompt:
        return "no prompt"
    if is_greeting(reply):
        return "greeting"
    if not MIN_WORDS <= len(reply.split()) <= MAX_WORDS:
        return "length"
    if checks.SPEAKER_LABEL.search(reply):
        return "speaker label"
    if checks.find_personal_data(reply):
        return "personal data"
    if profanity >= checks.MAX_PROFANITY:
        return "profanity"
    if _repeats_prompt(prompt, reply):
        return "prompt again"
    if utils.normalise(reply) in seen:
        return "duplicate"
    return None


def filter_replies(
    replies: list[tuple[str, str]], embedder
) -> tuple[dict[str, list[str]], Counter]:
    """The usable replies of every prompt, and how many each filter dropped."""
    kept: dict[str, list[str]] = defaultdict(list)
    seen: dict[str, set[str]] = defaultdict(set)
    dropped: Counter = Counter()
    scores = checks.profanity_scores([reply for _, reply in replies])
    if scores is None:
        fail(MISSING, "the profanity filter is not installed",
             "pip install alt-profanity-check==1.9.1")
    for (prompt, reply), profanity in zip(replies, scores, strict=True):
        if reason := _why_dropped(prompt, reply, profanity, seen[prompt]):
            dropped[reason] += 1
        else:
            kept[prompt].append(reply)
            seen[prompt].add(utils.normalise(reply))
    # last, because embedding takes longer than all other filters together
    on_topic = _keep_on_topic(kept, embedder)
    dropped["off topic"] = sum(map(len, kept.values())) - sum(map(len, on_topic.values()))
    return on_topic, dropped


def _keep_on_topic(replies: dict[str, list[str]], embedder) -> dict[str, list[str]]:
    """The replies to every prompt whose embedding is near the prompt's."""
    # sorted: the manifest's counts and files must not depend on the order of the conversations
    prompts = sorted(replies)
    prompt_vectors = checks.embed(prompts, embedder, "prompts")
    texts = [reply for prompt in prompts for reply in replies[prompt]]
    vectors = checks.embed(texts, embedder, "replies")
    on_topic, start = {}, 0
    for prompt, vector in zip(prompts, prompt_vectors, strict=True):
        cosines = vectors[start : start + len(replies[prompt])] @ vector
        start += len(replies[prompt])
        on_topic[prompt] = [reply for reply, cosine in zip(replies[prompt], cosines, strict=True)
                            if cosine > MIN_COSINE]
    return on_topic


# ---- splits and files ---------------------------------------------------------------------------


def split_prompts(prompts: list[str], seed: int) -> dict[str, list[str]]:
    """Prompts by split, each in exactly one; depends on the set of prompts and the seed alone."""
    prompts = sorted(prompts)
    random.Random(seed).shuffle(prompts)
    held_out = TEST_PROMPTS + VAL_PROMPTS
    return {"train": prompts[held_out:], "val": prompts[TEST_PROMPTS:held_out],
            "test": prompts[:TEST_PROMPTS]}


def _write_splits(
    out_dir: Path, candidates: dict[str, list[str]], splits: dict[str, list[str]]
) -> dict:
    """Write a JSONL file per split; returns counts and hashes for the manifest."""
    described = {}
    for split, prompts in splits.items():
        rows = [{"context": prompt, "candidates": candidates[prompt]} for prompt in prompts]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        utils.atomic_write(out_dir / f"{split}.jsonl", text)
        sizes = [len(candidates[prompt]) for prompt in prompts]
        described[split] = {"file": f"{split}.jsonl", "rows": len(rows), "candidates": sum(sizes),
                            "candidates_per_row": spread(sizes), "sha256": utils.sha256(text)}
    return described


def _print_table(num_conversations: int, dropped: Counter, splits: dict) -> None:
    """What each filter dropped, and what is left."""
    table = Table(title="chitchat: first replies to the opening prompts", title_justify="left")
    table.add_column("")
    table.add_column("replies", justify="right")
    table.add_column("why")
    table.add_row("conversations", f"{num_conversations:,}", "")
    for name, why in FILTERS.items():
        table.add_row(name, f"- {dropped[name]:,}", why)
    table.add_section()
    for name, split in splits.items():
        table.add_row(name, f"{split['candidates']:,}", f"{split['rows']} prompts")
    Console(width=max(100, Console().width)).print(table)


def build_parser() -> FlagParser:
    parser = FlagParser(prog="-m data.build_chitchat", description=__doc__)
    parser.add_argument("--out_dir", default="data/chitchat",
                        help="where the files go (default: data/chitchat)")
    parser.add_argument("--seed", type=int, default=0, help="of the split by prompt (default: 0)")
    return parser


def read_flags(argv: list[str] | None) -> Args:
    """The flags of a command."""
    return parse_flags(build_parser(), argv)


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    replies = list(read_replies())
    candidates, dropped = filter_replies(replies, load_embedder())
    splits = split_prompts(list(candidates), args.seed)
    out_dir = Path(args.out_dir)
    described = _write_splits(out_dir, candidates, splits)
    manifest = {
        "source": "Chit Chat Challenge, wheel chitchat-dataset",
        "version": version("chitchat-dataset"), "licence": "MIT",
        "copyright": "Copyright (c) 2019 Perception, Control and Cognition Lab",
        "made_by": "data/build_chitchat.py", "seed": args.seed, "conversations": len(replies),
        "filters": {name: {"dropped": dropped[name], "rule": why}
                    for name, why in FILTERS.items()},
        "splits": described, "notes": NOTES,
    }
    # last, so that a manifest never describes files that are not there
    utils.atomic_write(out_dir / "manifest.json",
                       json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    _print_table(len(replies), dropped, described)
    counts = {name: dropped[name] for name in FILTERS}
    print(json.dumps({"dropped": counts, "splits": described}))


if __name__ == "__main__":
    utils.run(main)
