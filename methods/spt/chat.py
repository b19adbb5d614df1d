"""Talk to a model with a persona in the terminal: infer.py --method spt --interactive.

You are Person A. Commands: exit (or Ctrl-D) leaves; clear forgets the dialogue and keeps the persona; r reads the persona file
again and takes its next person, with a new dialogue; save appends persona and dialogue to --save_file. Anything else is said.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import utils
from methods.spt import personas
from utils import USAGE, fail

HELP = "exit: leave; clear: forget the dialogue; r: reload the persona, the file's next one; save: keep the dialogue"


def main(args) -> None:
    """The loop: a line is a command or Person A's turn; every reply is followed by the prompt that gave it and all scores."""
    import infer

    if not args.test_file:
        fail(USAGE, "--interactive takes its personas from --test_file", "such as data/spt/test.jsonl")
    people = personas_in(personas.read(args.test_file))
    save_file = Path(args.save_file or f"outs/chat_{datetime.now():%Y-%m-%d-%H%M}.jsonl")
    if args.prompts == "all" or args.num_response_per_input > 1:
        fail(USAGE, "--interactive gives one reply at a time", "--prompts chosen, sampled or fused")
    engine, run = infer.load_engine(args)
    person, turns, used = 0, [], []
    show(people[person])
    while True:
        try:
            said = input("you: ").strip()
        except EOFError:
            print()
            return
        if said == "exit":
            return
        if said == "clear":
            turns, used = [], []
            print("(the dialogue is forgotten)")
        elif said == "r":
            people = personas_in(personas.read(args.test_file))
            person, turns, used = (person + 1) % len(people), [], []
            show(people[person])
        elif said == "save":
            if not turns:
                print("(there is nothing to save yet)")
                continue
            save_file.parent.mkdir(parents=True, exist_ok=True)
            utils.append_jsonl(save_file, [{"persona": people[person], "turns": turns, "prompts": used, "weights": run["weights"]}])
            print(f"(saved to {save_file})")
        elif said:
            row = {"persona": people[person], "context": "\n".join([*turns, said])}
            answer, truncated = infer.plan(engine, [row], args)
            text = answer([0])[0]["texts"][0]
            args.seed += 1  # the same words may be answered differently the next time
            if not text:
                print("(no reply; say it differently)")
                continue
            turns += [said, text]
            used += row["prompts"]
            print(f"them: {text}\n[{describe(row, args)}{'; the oldest turns were dropped' if truncated else ''}]")


def personas_in(rows: list[dict]) -> list[list[str]]:
    """The different personas of a file, in its order."""
    return [list(p) for p in dict.fromkeys(tuple(row["persona"]) for row in rows)]


def show(persona: list[str]) -> None:
    print("\n".join(["", "You talk to:", *(f"  {sentence}" for sentence in persona or ["(nobody in particular)"]), HELP]))


def describe(row: dict, args) -> str:
    """Which prompt spoke, and the retriever's scores."""
    scores = " ".join(f"{score:.3f}" for score in row["scores"])
    who = "all prompts together" if args.prompts == "fused" else f"prompt {row['prompts'][0]}"
    return f"{who}; scores {scores}"
