"""Does a model trained on some distributions answer other requests more diversely? Leave one task out, for every task.

    python benchmarks/diffuse_transfer.py --config configs/diffuse/all.yaml --n_iters 3 --learning_rate 1e-3

For each task: train on the prompts of all others, draw replies to its own prompts before and after, and compare. What
is there already is kept, so an interrupted run goes on. Prints a table, and as its last line one JSON object. Cost: on
2 cores about an hour with the defaults, most of it in the replies of the untuned model, which seldom ends early.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from importlib import import_module
from pathlib import Path

from methods.diffuse import prompts
from scoring import statistics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, imports the toolkit

from measure import about_the_run, table  # noqa: E402

import infer  # noqa: E402
import train  # noqa: E402
from flags import parse_flags  # noqa: E402

FIGURES = ("kl", "entropy", "coverage", "covered", "valid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/diffuse/all.yaml", help="a config of method diffuse with several tasks")
    parser.add_argument("--tasks", nargs="+", help="tasks to leave out (default: every one of the config)")
    parser.add_argument("--n_iters", type=int, default=3, help="passes over the prompts (default: 3)")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--n_generations", type=int, default=250, help="replies per prompt (default: 250)")
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--out_dir", type=Path, default=Path("outs/diffuse_transfer"))
    flags = parser.parse_args()
    config = parse_flags(train.build_parser, ["--config", flags.config])
    tasks = flags.tasks or sorted({row["task"] for row in prompts.read_prompts(config)[0]})
    with contextlib.redirect_stdout(sys.stderr):
        found = {task: leave_out(task, flags) for task in tasks}
    lines = {task: compare(*systems) for task, systems in found.items()}
    shown = [[task, str(line["prompts"]), *(f"{line[f]['before']:.2f} → {line[f]['after']:.2f}" for f in FIGURES),
              "{:+.2f} [{:.2f}, {:.2f}]".format(*line["entropy"]["difference"][:3])] for task, line in lines.items()]
    table(f"left out, before → after; means over prompts of {flags.n_generations} replies; entropy and its difference in nats",
          ["task", "prompts", *FIGURES, "difference"], shown)
    print(json.dumps({"tasks": lines} | about_the_run()))


def leave_out(task: str, flags) -> tuple[dict, dict]:
    """Figures per prompt of the untuned model and of the one trained on the other tasks."""
    where = ["--config", flags.config, "--leave_out", task, "--output_dir", str(flags.out_dir / "checkpoints"), "--exp_name", "loo"]
    train.main([*where, "--n_iters", str(flags.n_iters), "--learning_rate", str(flags.learning_rate), "--resume"])
    files = [flags.out_dir / f"{task}_{mode}.jsonl" for mode in ("untuned", "lora")]
    for file in files:
        infer.main(["--method", "diffuse", *where, "--mode", file.stem.rsplit("_")[-1], "--split", "test", "--resume",
                    "--n_generations", str(flags.n_generations), "--max_new_tokens", str(flags.max_new_tokens),
                    "--save_file", str(file)])
    save_file = flags.out_dir / f"{task}.json"
    import_module("eval").main(["--eval_file", *map(str, files), "--save_file", str(save_file)])
    systems = json.loads(save_file.read_text(encoding="utf-8"))["systems"]
    return tuple(systems[file.stem]["prompts"] for file in files)


def compare(before: dict, after: dict) -> dict:
    """Means over prompts of every figure, and the paired difference with a 95 % interval over prompts.

    Where no reply could be read, there is one answer, none: entropy 0.
    """
    line = {"prompts": len(before)}
    for figure in FIGURES:
        pair = [[value[0] if isinstance(value := own.get(figure), list) else value or 0.0 for own in system.values()]
                for system in (before, after)]
        line[figure] = {"before": sum(pair[0]) / len(before), "after": sum(pair[1]) / len(after),
                        "difference": statistics.paired_difference(pair[1], pair[0])}
    return line


if __name__ == "__main__":
    main()
