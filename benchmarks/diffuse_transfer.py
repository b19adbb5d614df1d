"""Does a model trained on some distributions answer other requests more diversely?

    python -m benchmarks.diffuse_transfer --config configs/diffuse/all.yaml --n_iters 3 \\
        --learning_rate 1e-3

Leaves one task out, for every task: train on the prompts of all others, draw replies to its own
prompts before and after, and compare. What is there already is kept, so an interrupted run goes on.
Prints a table, and as its last line one JSON object; figures and plots of each task go to
--out_dir, where `eval.py --show` reads them. Cost: on 2 cores about an hour with the defaults, most
of it in the replies of the untuned model, which seldom ends early.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

import infer
import train
from benchmarks.measure import about_the_run, table
from methods.diffuse import evaluation, prompts
from scoring import logs, statistics
from scoring.evaluated import with_interval
from scoring.sources import Sources, read_systems

FIGURES = ("kl", "entropy", "coverage", "covered", "valid")
MODES = ("untuned", "lora")  # before and after training


def main(argv: list[str] | None = None) -> None:
    flags = read_flags(argv)
    config = train.read_flags(["--config", flags.config])
    tasks = flags.tasks or sorted({row["task"] for row in prompts.read_prompts(config)[0]})
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table and the JSON line
        measured = {task: leave_out(task, flags) for task in tasks}
    lines = {task: compare(*systems) for task, systems in measured.items()}
    rows = [[task, str(line["prompts"]),
             *(f"{line[name]['before']:.2f} → {line[name]['after']:.2f}" for name in FIGURES),
             with_interval(line["entropy"]["difference"], sign="+")]
            for task, line in lines.items()]
    table(f"left out, before → after; means over prompts of {flags.n_generations} replies; entropy "
          "and its difference in nats", ["task", "prompts", *FIGURES, "difference"], rows)
    print(json.dumps({"tasks": lines} | about_the_run()))


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/diffuse/all.yaml",
                        help="a config of method diffuse with several tasks")
    parser.add_argument("--tasks", nargs="+",
                        help="tasks to leave out (default: every one of the config)")
    parser.add_argument("--n_iters", type=int, default=3,
                        help="passes over the prompts (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--n_generations", type=int, default=250,
                        help="replies per prompt (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--out_dir", type=Path, default=Path("outs/diffuse_transfer"))
    return parser.parse_args(argv)


def leave_out(task: str, flags: argparse.Namespace) -> tuple[dict, dict]:
    """Figures per prompt of a task, of the untuned model and of one trained on the other tasks."""
    run = ["--config", flags.config, "--leave_out", task,
           "--output_dir", str(flags.out_dir / "checkpoints"), "--exp_name", "loo"]
    train.main([*run, "--n_iters", str(flags.n_iters),
                "--learning_rate", str(flags.learning_rate), "--resume"])
    files = [flags.out_dir / f"{task}_{mode}.jsonl" for mode in MODES]
    for mode, file in zip(MODES, files, strict=True):
        infer.main(["--method", "diffuse", *run, "--mode", mode, "--split", "test", "--resume",
                    "--n_generations", str(flags.n_generations),
                    "--max_new_tokens", str(flags.max_new_tokens), "--save_file", str(file)])
    systems = read_systems(files, None)
    result = evaluation.measure(systems, Sources(dict(zip(systems, files, strict=True))), flags)
    # eval.py would add the common figures, which mean little for answers out of a closed set
    logs.write(flags.out_dir / f"{task}.json", result._replace(
        summary={"kind": "eval/diffuse", "diffuse": result.summary}))
    before, after = (system["prompts"] for system in result.summary["systems"].values())
    return before, after


def compare(before: dict, after: dict) -> dict:
    """Means over prompts of every figure, and the paired difference with a 95 % interval.

    Where no reply could be read, there is one answer, none: entropy 0.
    """
    line = {"prompts": len(before)}
    for name in FIGURES:
        first, second = ([_value(figures[name]) for figures in system.values()]
                         for system in (before, after))
        line[name] = {"before": sum(first) / len(first), "after": sum(second) / len(second),
                      "difference": statistics.paired_difference(second, first)}
    return line


def _value(figure: dict | float | None) -> float:
    """A figure without its interval."""
    value = figure["mean"] if isinstance(figure, dict) else figure
    return value or 0.0


if __name__ == "__main__":
    main()
