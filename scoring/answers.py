"""Verifiable tasks: requests with many right answers that a program can check, without a judge.

A row is {"prompt", "category", "answers": [[canonical, alias, ...], ...], "candidates": [...]}, or
has "rule" (scoring/rules.py) in place of "answers". `candidates` are right answers to train on, and
may be left out. Validity is exact, and two replies are the same where they name one answer, so that
yield@k is a fact. Only a reply that is an answer and nothing else is right: "A crow, who has ..."
is not, where "Answer with the name only." was asked for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence

import utils
from scoring import rules
from scoring.normal_form import MAX_CHARACTERS, first_line, normalise

__all__ = ["check_row", "figures", "find", "finder", "is_verifiable", "normalise"]

PLURALS = ("s", "es")
Answer = int | str  # the number of a listed answer, or the canonical form of one by a rule


# ---- rows ---------------------------------------------------------------------------------------


def is_verifiable(row: dict) -> bool:
    """Whether a row says what its right answers are, well or badly."""
    return "answers" in row or "rule" in row


def check_row(row: dict) -> str | None:
    """What is wrong with a row of a verifiable task, or None; for utils.read_jsonl."""
    if problem := utils.check_row(row, candidates=False):
        return problem
    if "prompt" not in row:
        return 'a verifiable task needs "prompt"'
    category = row.get("category")
    if not isinstance(category, str) or not category.strip():
        return f'field "category" must be a string that is not empty, got {category!r}'
    kinds = [key for key in ("answers", "rule") if key in row]
    if len(kinds) != 1:
        return f'needs either "answers" or "rule", has {kinds or "none of them"}'
    problem = _check_answers(row["answers"]) if "answers" in row else rules.check(row["rule"])
    return problem or _check_candidates(row)


def _check_answers(answers: object) -> str | None:
    """What is wrong with the list of all right answers."""
    if not isinstance(answers, list) or not answers:
        return f'field "answers" must be a list that is not empty, got {json.dumps(answers)[:60]}'
    for number, names in enumerate(answers, 1):
        if not isinstance(names, list) or not names or not all(
                isinstance(name, str) for name in names):
            return (f"answer {number} must be a list of strings, the first one canonical, "
                    f"got {json.dumps(names)[:60]}")
        if bad := [name for name in names
                   if not normalise(name) or len(first_line(name)) > MAX_CHARACTERS]:
            return f"answer {number}: {bad[0][:60]!r} holds no answer, or is too long for one"
    return _check_ambiguous(answers)


def _check_ambiguous(answers: list[list[str]]) -> str | None:
    """A name that stands for two answers, as it is or by its singular."""
    numbers: dict[str, int] = {}
    for number, names in enumerate(answers):
        for name in names:
            # a name may stand twice in one answer: "Crow" and "the crow" are the same to find()
            other = numbers.setdefault(normalise(name), number)
            if other != number:
                return (f"{name!r} stands for two answers, {answers[other][0]!r} and "
                        f"{names[0]!r}")
    # such a pair would make one answer two, and yield would count a plural as a new answer
    for name, number in numbers.items():
        for plural in (name + ending for ending in PLURALS):
            if numbers.get(plural, number) != number:
                return (f"{name!r} and {plural!r} are one answer, singular and plural, but stand "
                        f"for {answers[number][0]!r} and {answers[numbers[plural]][0]!r}")
    return None


def _check_candidates(row: dict) -> str | None:
    """A candidate that is not right, or names the same answer as another one."""
    # two names of one answer would teach a model to repeat itself
    find_answer, seen = finder(row), {}
    for candidate in row.get("candidates", []):
        answer = find_answer(candidate)
        if answer is None:
            return f"candidate {candidate!r} is not a right answer"
        if answer in seen:
            return f"candidates {seen[answer]!r} and {candidate!r} are the same answer"
        seen[answer] = candidate
    return None


# ---- replies ------------------------------------------------------------------------------------


def finder(row: dict) -> Callable[[str], Answer | None]:
    """A function that gives a reply's answer, as find does; made once for all replies of a row."""
    if "rule" in row:
        return lambda reply: rules.find(row["rule"], reply)
    numbers: dict[str, int] = {}
    for number, names in enumerate(row["answers"]):
        for name in names:
            numbers.setdefault(normalise(name), number)
    return lambda reply: _look_up(numbers, normalise(reply))


def find(row: dict, reply: str) -> Answer | None:
    """The right answer that a reply gives, or None if it gives none.

    The number of a listed answer, from 0, or the canonical form of an answer by the row's rule.
    """
    return finder(row)(reply)


def _look_up(numbers: dict[str, int], text: str) -> int | None:
    """The number of the answer with this name, or with its singular or plural in s or es."""
    singulars = [text.removesuffix(ending) for ending in PLURALS if text.endswith(ending)]
    plurals = [text + ending for ending in PLURALS]
    return next((numbers[form] for form in (text, *singulars, *plurals) if form in numbers), None)


# ---- figures of a prompt ------------------------------------------------------------------------


def figures(found: Sequence[Answer | None], replies: Sequence[str],
            num_answers: int | None) -> dict[str, float | None]:
    """The figures of a prompt's k replies.

    found: per reply its answer, as find gives it. num_answers: how many right answers there are,
    None where a rule has no list of them.
    valid        share of right replies
    yield        different right answers
    distinct     different replies after normalising, right or not; an empty one is none
    coverage     yield over num_answers; None without it
    collision    share of all pairs of replies that are the same right answer; None for k = 1
    """
    k, counts = len(found), Counter(answer for answer in found if answer is not None)
    pairs = k * (k - 1) // 2
    same = sum(count * (count - 1) // 2 for count in counts.values())
    # an empty reply stands for one that is missing, and must not count as a new string
    return {"valid": counts.total() / k, "yield": len(counts),
            "distinct": len({normalise(reply) for reply in replies} - {""}),
            "coverage": len(counts) / num_answers if num_answers else None,
            "collision": same / pairs if pairs else None}


def num_answers(row: dict) -> int | None:
    """How many right answers a row lists; None for a rule."""
    return len(row["answers"]) if "answers" in row else None
