"""One-to-one rows from one-to-many ones: each of the first n candidates becomes a row.

    python -m data.build_oto

The one-to-one baseline then sees as many (context, reply) pairs as one-to-many training does, which
is how the paper compares the two.
"""

from __future__ import annotations

import json

import utils
from flags import Args, FlagParser, parse_flags, positive_int


def build_parser() -> FlagParser:
    parser = FlagParser(prog="-m data.build_oto", description=__doc__)
    parser.add_argument("--input_file", default="data/train_dialogs_1k.jsonl",
                        help="one-to-many rows (default: %(default)s)")
    parser.add_argument("--save_file", default="data/train_dialogs_4k.jsonl",
                        help="where the one-to-one rows go (default: %(default)s)")
    parser.add_argument("--num_candidates", type=positive_int, default=4,
                        help="candidates taken of each row (default: 4)")
    return parser


def read_flags(argv: list[str] | None) -> Args:
    """The flags of a command."""
    return parse_flags(build_parser(), argv)


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    rows = utils.read_jsonl(args.input_file, utils.check_row)
    pairs = [{**row, "candidates": [reply]}
             for row in rows for reply in row["candidates"][: args.num_candidates]]
    lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
    utils.atomic_write(args.save_file, "".join(lines))
    print(f"{len(rows)} rows -> {len(pairs)} one-to-one rows in {args.save_file}")
    # one micro-step a pair is one pass, as published
    print(f"next: python train.py --method oto --train_file {args.save_file} "
          f"--max_steps {len(pairs)}")


if __name__ == "__main__":
    utils.run(main)
