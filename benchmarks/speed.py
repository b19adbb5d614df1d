"""How fast the toolkit is, each time against a faithful baseline in the same run.

    python -m benchmarks.speed train     a training step: prompt trees against padded rows
    python -m benchmarks.speed decode    drawing responses: shared prefill against copied prompts,
                                         diverse beam search against beam search
    python -m benchmarks.speed diffuse   a step on 100 targets: a token trie against a padded row
                                         per target
    python -m benchmarks.speed judge     judging through a server, against the ideal rate of its
                                         connections

Prints tables, and as its last line one JSON object. Each takes minutes. Run it on an idle machine:
other work on the same cores makes the figures meaningless.
"""

from __future__ import annotations

import json

import torch

import utils
from benchmarks.measure import about_the_run
from benchmarks.speed_decode import measure_decoding
from benchmarks.speed_diffuse import measure_diffuse
from benchmarks.speed_judge import measure_judging
from benchmarks.speed_train import measure_training
from flags import Args, FlagParser, parse_flags, positive_int

COMPARISONS = {
    "train": lambda args: measure_training(args.model_name, args.train_file, args.num_contexts),
    "decode": lambda args: measure_decoding(args.model_name, args.train_file),
    "diffuse": lambda args: measure_diffuse(args.model_name),
    "judge": lambda args: measure_judging(),
}


def read_flags(argv: list[str] | None) -> Args:
    """The flags of a command."""
    parser = FlagParser(prog="-m benchmarks.speed", description=__doc__)
    parser.add_argument("what", choices=list(COMPARISONS))
    parser.add_argument("--model_name", default=utils.EMBEDDED,
                        help="a model folder or hub id (default: %(default)s)")
    parser.add_argument("--train_file", default="data/train_dialogs_1k.jsonl",
                        help="rows of train and decode (default: %(default)s)")
    parser.add_argument("--num_contexts", type=positive_int, default=6,
                        help="contexts of the main comparison of train (default: %(default)s)")
    return parse_flags(parser, argv)


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    torch.manual_seed(0)
    result = COMPARISONS[args.what](args)
    print(json.dumps(result | about_the_run()))


if __name__ == "__main__":
    utils.run(main)
