"""One-to-one rows from one-to-many ones: each of the first n candidates as a row of its own.

    python data/build_oto.py

The one-to-one baseline then sees as many (context, reply) pairs as one-to-many training, as published.
"""

from __future__ import annotations

import argparse
import json

import utils


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_file", default="data/train_dialogs_1k.jsonl")
    parser.add_argument("--save_file", default="data/train_dialogs_4k.jsonl")
    parser.add_argument("--num_candidates", type=int, default=4, help="candidates taken of each row (default: 4)")
    args = parser.parse_args(argv)
    rows = utils.read_jsonl(args.input_file, utils.check_row)
    pairs = [{**row, "candidates": [reply]} for row in rows for reply in row["candidates"][: args.num_candidates]]
    utils.atomic_write(args.save_file, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    print(f"{len(rows)} rows -> {len(pairs)} one-to-one rows in {args.save_file}\nnext: python train.py --method oto "
          f"--train_file {args.save_file} --max_steps {len(pairs)}")


if __name__ == "__main__":
    main()
