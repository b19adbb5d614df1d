"""How many right answers are named anywhere in a reply, beside those that are the whole reply.

    python -m benchmarks.named outs/demo_base.jsonl outs/demo_tuned.jsonl

eval.py counts a reply that is a right answer; one that wraps it in a sentence is wrong there. So a
model may gain by learning the form alone. This counts the longest right answer of three letters or
more that stands in the reply as whole words. It errs to the other side (a "bird of prey" names a
bird, "Thomas Edison" names the novelist Edison), so the truth lies between the two figures. Rows
with a rule instead of answers are left out.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from statistics import mean

MIN_LETTERS = 3


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("eval_file", nargs="+", help="outs/X.jsonl of rows with answers")
    for file in parser.parse_args(argv).eval_file:
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row.get("answers")]
        named = [[named_answer(reply, row["answers"]) for reply in row["preds"]] for row in rows]
        different = mean(len(set(row) - {None}) for row in named)
        share = mean(answer is not None for row in named for answer in row)
        print(f"{file}: {len(rows)} rows; {different:.2f} different right answers a row are named "
              f"in a reply; {share:.0%} of the replies name one")


def named_answer(reply: str, answers: list[list[str]]) -> int | None:
    """The index of the longest answer, by any of its spellings, that the reply names."""
    words = plain(reply)
    found = [(len(name), index) for index, names in enumerate(answers) for name in names
             if len(name) >= MIN_LETTERS and plain(name) in words]
    return max(found)[1] if found else None


def plain(text: str) -> str:
    """Words in lower case with a space on each side, so that `in` finds whole words only."""
    words = re.findall(r"[^\W_]+", text.lower())
    return f" {' '.join(words)} "


if __name__ == "__main__":
    main()
