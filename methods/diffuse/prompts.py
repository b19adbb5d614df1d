"""Prompt files: a request with its targets."""

from __future__ import annotations

import json
import math
from pathlib import Path

import utils
from utils import USAGE, fail

KEYS = ("request", "response", "targets", "weights", "eos")


def read_prompts(args) -> tuple[list[dict], list[dict]]:
    """The rows of --train_prompts and --test_prompts after --leave_out or --leave_in, which also name the run."""
    train_files = prompt_files(args.train_file)
    train = [read_prompt(path) for path in train_files]
    test = [read_prompt(path) for path in prompt_files(args.test_prompts) if path not in train_files]
    task = args.leave_out or args.leave_in
    if not task:
        return train, test
    tasks = sorted({row["task"] for row in train})
    if args.leave_out and args.leave_in:
        fail(USAGE, "--leave_out and --leave_in exclude each other", "give one of them")
    if task not in tasks or (args.leave_out and len(tasks) == 1):
        fail(USAGE, f"--{'leave_out' if args.leave_out else 'leave_in'} {task}: the training prompts are of the tasks "
                  f"{', '.join(tasks)}", "a task is the name of the folder that holds the files")
    own = [row for row in train if row["task"] == task]
    if args.leave_in:
        args.exp_name += f"_only_{task}"
        return own, test
    args.exp_name += f"_without_{task}"
    return [row for row in train if row["task"] != task], test + own


def prompt_files(names: list[str]) -> list[Path]:
    """The prompt files that names of files and folders stand for, each once, folders in the order of their paths."""
    files: list[Path] = []
    for name in names:
        path = Path(name)
        found = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            fail(USAGE, f"{path} {'holds no *.json' if path.is_dir() else 'is not there'}", "give prompt files or folders of them")
        files += [file for file in found if file not in files]
    return files


def read_prompt(path: Path) -> dict:
    """A prompt file as a row: prompt, response (list), targets, weights (sum 1), eos, file and task; dies over faults."""
    try:
        prompt = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=utils.unique_keys)
        problem = check_prompt(prompt)
    except UnicodeDecodeError:
        problem = "not UTF-8"
    except (ValueError, RecursionError) as error:
        problem = f"not JSON: {error}"
    if problem:
        fail(USAGE, f"{path}: {problem}", f"a prompt file holds {', '.join(KEYS)}")
    targets, response = prompt["targets"], prompt["response"]
    weights = prompt.get("weights") or [1.0] * len(targets)
    return {
        "prompt": prompt["request"], "response": [response] if isinstance(response, str) else response, "targets": targets,
        "weights": [w / math.fsum(weights) for w in weights], "eos": prompt.get("eos", True),
        "file": path.as_posix(), "task": path.resolve().parent.name}


def check_prompt(prompt: object) -> str | None:
    """What is wrong with a prompt file's content, or None."""
    if not isinstance(prompt, dict):
        return f"must be one JSON object, got {type(prompt).__name__}"
    unknown = [key for key in prompt if key not in KEYS]
    missing = [key for key in KEYS[:3] if key not in prompt]
    if unknown or missing:
        return f'key "{unknown[0]}" is unknown' if unknown else f'field "{missing[0]}" is missing'
    request, response, targets, weights, eos = (prompt.get(key) for key in KEYS)
    if not isinstance(request, str) or not request.strip():
        return f'field "request" must be a string with text, got {json.dumps(request)[:40]}'
    prefixes = [response] if isinstance(response, str) else response
    if not isinstance(prefixes, list) or not prefixes or not all(isinstance(p, str) for p in prefixes):
        return f'field "response" must be a string or a list of strings, got {json.dumps(response)[:40]}'
    if len(set(prefixes)) < len(prefixes):
        return 'field "response": a prefix stands twice'
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        return f'field "targets" must be a list of strings, got {json.dumps(targets)[:40]}'
    for number, target in enumerate(targets, 1):
        if not target.strip():
            return f'field "targets": target {number} is empty'
        if target in targets[: number - 1]:
            return f'field "targets": {json.dumps(target, ensure_ascii=False)} stands twice, as {targets.index(target) + 1} and {number}'
    if "eos" in prompt and not isinstance(eos, bool):
        return f'field "eos" must be true or false, got {json.dumps(eos)[:40]}'
    return check_weights(weights, len(targets)) if "weights" in prompt else None


def check_weights(weights: object, count: int) -> str | None:
    """What is wrong with the weights of so many targets, or None."""
    if not isinstance(weights, list) or any(isinstance(w, bool) or not isinstance(w, (int, float)) for w in weights):
        return f'field "weights" must be a list of numbers, got {json.dumps(weights)[:40]}'
    if len(weights) != count:
        return f'field "weights" has {len(weights)} numbers for {count} targets'
    for number, weight in enumerate(weights, 1):
        if not 0 <= weight < math.inf:  # false for nan
            return f'field "weights": number {number} is {weight}, it must be at least 0'
    return 'field "weights": all are 0' if weights and not any(weights) else None
