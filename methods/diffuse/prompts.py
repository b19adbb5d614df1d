"""Prompt files: a request with its targets."""

from __future__ import annotations

import json
import math
from pathlib import Path

import utils
from utils import USAGE, fail

KEYS = ("request", "response", "targets", "weights", "eos")
REQUIRED = KEYS[:3]


def read_prompts(args) -> tuple[list[dict], list[dict]]:
    """The rows to train on and those to test on, after --leave_out or --leave_in.

    A file that is named in both --train_file and --test_prompts is trained on.
    """
    train_files = prompt_files(args.train_file)
    train = [read_prompt(path) for path in train_files]
    test = [read_prompt(path) for path in prompt_files(args.test_prompts)
            if path not in train_files]
    task = args.leave_out or args.leave_in
    if not task:
        return train, test
    tasks = sorted({row["task"] for row in train})
    if task not in tasks or (args.leave_out and len(tasks) == 1):
        flag = "leave_out" if args.leave_out else "leave_in"
        fail(USAGE, f"--{flag} {task}: the training prompts are of the tasks {', '.join(tasks)}",
             "a task is the name of the folder that holds the files")
    of_task = [row for row in train if row["task"] == task]
    if args.leave_in:
        return of_task, test
    return [row for row in train if row["task"] != task], test + of_task


def prompt_files(names: list[str]) -> list[Path]:
    """The prompt files that files and folders stand for, each once; folders sorted by path."""
    files: list[Path] = []
    for name in names:
        path = Path(name)
        paths = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        if not paths or not paths[0].is_file():
            problem = "holds no *.json" if path.is_dir() else "is not there"
            fail(USAGE, f"{path} {problem}", "give prompt files or folders of them")
        files += [file for file in paths if file not in files]
    return files


def read_prompt(path: Path) -> dict:
    """A prompt file as a row; exits over faults.

    The row has prompt, response (a list of prefixes), targets, weights (their sum is 1), eos, file
    and task, the name of the file's folder.
    """
    try:
        prompt = json.loads(path.read_text(encoding="utf-8-sig"),
                            object_pairs_hook=utils.unique_keys)
        problem = _problem(prompt)
    except UnicodeDecodeError:
        problem = "not UTF-8"
    except (ValueError, RecursionError) as error:  # RecursionError: a thousand brackets
        problem = f"not JSON: {error}"
    if problem:
        fail(USAGE, f"{path}: {problem}", f"a prompt file holds {', '.join(KEYS)}")
    targets, response = prompt["targets"], prompt["response"]
    weights = prompt.get("weights") or [1.0] * len(targets)
    total = math.fsum(weights)
    return {
        "prompt": prompt["request"],
        "response": [response] if isinstance(response, str) else response,
        "targets": targets,
        "weights": [weight / total for weight in weights],
        "eos": prompt.get("eos", True),
        "file": path.as_posix(),
        "task": path.resolve().parent.name,
    }


def _problem(prompt: object) -> str | None:
    """What is wrong with a prompt file's content, or None."""
    if not isinstance(prompt, dict):
        return f"must be one JSON object, got {type(prompt).__name__}"
    unknown = [key for key in prompt if key not in KEYS]
    missing = [key for key in REQUIRED if key not in prompt]
    if unknown:
        return f'key "{unknown[0]}" is unknown'
    if missing:
        return f'field "{missing[0]}" is missing'
    request, eos = prompt["request"], prompt.get("eos", True)
    if not isinstance(request, str) or not request.strip():
        return f'field "request" must be a string with text, got {_shown(request)}'
    if not isinstance(eos, bool):
        return f'field "eos" must be true or false, got {_shown(eos)}'
    targets = prompt["targets"]
    problem = _problem_of_prefixes(prompt["response"]) or _problem_of_targets(targets)
    if problem or "weights" not in prompt:
        return problem
    return _problem_of_weights(prompt["weights"], len(targets))


def _shown(value: object) -> str:
    return json.dumps(value)[:40]


def _problem_of_prefixes(response: object) -> str | None:
    prefixes = [response] if isinstance(response, str) else response
    if not isinstance(prefixes, list) or not prefixes \
            or not all(isinstance(prefix, str) for prefix in prefixes):
        return f'field "response" must be a string or a list of strings, got {_shown(response)}'
    if len(set(prefixes)) < len(prefixes):
        return 'field "response": a prefix stands twice'
    return None


def _problem_of_targets(targets: object) -> str | None:
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        return f'field "targets" must be a list of strings, got {_shown(targets)}'
    for number, target in enumerate(targets, 1):
        if not target.strip():
            return f'field "targets": target {number} is empty'
        first = targets.index(target) + 1
        if first < number:
            text = json.dumps(target, ensure_ascii=False)
            return f'field "targets": {text} stands twice, as {first} and {number}'
    return None


def _problem_of_weights(weights: object, count: int) -> str | None:
    numbers = isinstance(weights, list) and all(
        isinstance(weight, (int, float)) and not isinstance(weight, bool) for weight in weights)
    if not numbers:
        return f'field "weights" must be a list of numbers, got {_shown(weights)}'
    if len(weights) != count:
        return f'field "weights" has {len(weights)} numbers for {count} targets'
    for number, weight in enumerate(weights, 1):
        if not 0 <= weight < math.inf:  # false for nan
            return f'field "weights": number {number} is {weight}, it must be at least 0'
    return 'field "weights": all are 0' if weights and not any(weights) else None
