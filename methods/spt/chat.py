"""Talk to a model with a persona in the terminal: infer.py --method spt --interactive.

You are Person A. Commands: exit (or Ctrl-D) leaves; clear forgets the dialogue and keeps the
persona; r reads the persona file again and takes its next person, with a new dialogue; save appends
persona and dialogue to --save_file. Anything else is what you say.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import utils
from methods.spt import personas
from utils import USAGE

HELP = ("exit: leave; clear: forget the dialogue; r: reload the personas, take the next one; "
        "save: keep the dialogue")
Answer = Callable[[dict, int], tuple[dict, str, bool]]


def talk(answer: Answer, args, weights: str | None) -> None:
    """The loop: a line is a command or Person A's turn.

    answer(row, turn) gives the row with its soft prompts and scores, a reply, and whether the
    oldest turns were dropped. Every reply is followed by the prompt that gave it and all scores.
    Words that cannot be answered, such as a special token, are refused, and the chat goes on.
    """
    people = _personas_in(personas.read(args.test_file))
    save_file = Path(args.save_file or f"outs/chat_{datetime.now():%Y-%m-%d-%H%M}.jsonl")
    person, asked = 0, 0
    turns, prompts = [], []  # of this dialogue
    _show(people[person])
    while True:
        try:
            line = input("you: ").strip()
        except EOFError:
            print()
            return
        if line == "exit":
            return
        if line == "clear":
            turns, prompts = [], []
            print("(the dialogue is forgotten)")
        elif line == "r":
            # the file is read again, since it may have been edited; it may have fewer people now
            people = _personas_in(personas.read(args.test_file))
            person, turns, prompts = (person + 1) % len(people), [], []
            _show(people[person])
        elif line == "save":
            # a dialogue may be saved again as it grows: each line holds all of it so far
            _save(save_file, {"persona": people[person], "turns": turns, "soft_prompts": prompts,
                              "weights": weights})
        elif line:
            # a turn is a line: clean_reply has taken the line breaks out of replies
            context = "\n".join([*turns, line])
            try:
                row, text, dropped = answer({"persona": people[person], "context": context}, asked)
            except SystemExit as stop:
                if stop.code != USAGE:
                    raise
                # utils.fail has said why; in a chat, that is no reason to lose the dialogue
                print("(that cannot be answered; say it differently, or clear)")
                continue
            # an empty reply counts, too: the same words draw from another seed when said again
            asked += 1
            if not text:
                print("(no reply; say it differently)")
                continue
            # speakers are counted from the last turn, so a turn without an answer would swap them
            turns += [line, text]
            prompts += row["soft_prompts"]
            note = "; the oldest turns were dropped" if dropped else ""
            print(f"them: {text}\n[{_describe(row, args.soft_prompt)}{note}]")


def _personas_in(rows: list[dict]) -> list[list[str]]:
    """The different personas of a file, in its order."""
    # a file has a row for every reply, so each persona stands in many rows
    return [list(persona) for persona in dict.fromkeys(tuple(row["persona"]) for row in rows)]


def _save(save_file: Path, dialogue: dict) -> None:
    if not dialogue["turns"]:
        print("(there is nothing to save yet)")
        return
    save_file.parent.mkdir(parents=True, exist_ok=True)
    utils.append_jsonl(save_file, [dialogue])
    print(f"(saved to {save_file})")


def _show(persona: list[str]) -> None:
    lines = [f"  {sentence}" for sentence in persona or ["(nobody in particular)"]]
    print("\n".join(["", "You talk to:", *lines, HELP]))


def _describe(row: dict, soft_prompt: str) -> str:
    """Which prompt spoke, and the retriever's scores."""
    scores = " ".join(f"{score:.3f}" for score in row["scores"])
    speaker = "all prompts together" if soft_prompt == "fused" else \
        f"prompt {row['soft_prompts'][0]}"
    return f"{speaker}; scores {scores}"
