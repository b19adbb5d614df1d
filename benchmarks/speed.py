"""How fast the toolkit is, each time against a faithful baseline in the same run.

    python benchmarks/speed.py train       a training step: prompt trees against padded rows
    python benchmarks/speed.py decode      drawing responses: shared prefill against copied prompts, diverse beams against beams
    python benchmarks/speed.py diffuse     a step on 100 targets: one token trie against a padded row per target
    python benchmarks/speed.py judge       judging through a server, against the ideal rate of its connections

Prints tables, and as its last line one JSON object. Cost: minutes each; on an idle machine, or the figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import utils

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, imports the toolkit

import torch  # noqa: E402
from measure import about_the_run  # noqa: E402
from speed_decode import measure_decoding  # noqa: E402
from speed_diffuse import measure_diffuse  # noqa: E402
from speed_judge import measure_judging  # noqa: E402
from speed_train import measure_training  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "decode", "diffuse", "judge"])
    parser.add_argument("--model_name", default=utils.EMBEDDED)
    parser.add_argument("--train_file", default="data/train_dialogs_1k.jsonl")
    parser.add_argument("--num_contexts", type=int, default=6, help="contexts of the main comparison of train (default: 6)")
    flags = parser.parse_args()
    torch.manual_seed(0)
    if flags.what == "train":
        result = measure_training(flags.model_name, flags.train_file, flags.num_contexts)
    elif flags.what == "decode":
        result = measure_decoding(flags.model_name, flags.train_file)
    elif flags.what == "diffuse":
        result = measure_diffuse(flags.model_name)
    else:
        result = measure_judging()
    print(json.dumps(result | about_the_run()))


if __name__ == "__main__":
    main()
