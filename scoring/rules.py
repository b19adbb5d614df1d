"""Requests whose right answers follow a rule: integers, words, sentences, dates, times and more.

A rule is {"type": ..., its bounds}; every bound may be left out unless it says otherwise:

    integer     min, max, divisible_by
    word        starts_with, ends_with, min_letters, max_letters; an English word of 3 or
                more letters
    sentence    must_contain (a list of words), min_words, max_words
    date        month (1 to 12), year
    time        from, to ("22:00" to "06:30" passes midnight; both belong to it)
    expression  equals (required): an expression of + - * / ** with at least one of them
    pattern     regex (required), which must match the whole answer

A right answer has a canonical form, so that "5 March" and "March 5th" are one answer. No answer may
cost time: what is read is short, numbers are bounded, and a regular expression has a time limit.
"""

from __future__ import annotations

import ast
import calendar
import datetime
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import regex
from spellchecker import SpellChecker

from scoring.normal_form import MAX_CHARACTERS, first_line, normalise

PATTERN_SECONDS = 0.05  # of one match; a pattern that needs more on a short text never ends
MAX_EXPRESSION = 200  # characters, which also bounds how deep brackets can go
MAX_BITS = 4096  # of a number in an expression: 9**9**9 is not worked out
MIN_LETTERS = 3  # the word list's shorter entries are mostly abbreviations ("bk", "cf")
ENDS = "\"'`“”‘’«»*_ \t"  # quotes and marks of emphasis around an answer
MONTHS = {name.lower(): number for names in (calendar.month_name, calendar.month_abbr)
          for number, name in enumerate(names) if name} | {"sept": 9}

DAY_MONTH = re.compile(r"(?:the )?(\d{1,2})(?:st|nd|rd|th)? (?:of )?([a-z]+)(?: (\d{4}))?")
MONTH_DAY = re.compile(r"([a-z]+) (?:the )?(\d{1,2})(?:st|nd|rd|th)?(?: (\d{4}))?")
ISO_DATE = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})")
TIME = re.compile(r"(\d{1,2})(?::(\d{2}))?(?: ?([ap])\.?m\.?)?")
INTEGER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d{1,15})", re.ASCII)
ARITHMETIC = re.compile(r"[\d .+*/()-]+", re.ASCII)
# ends a sentence within a line, but for the titles before a name
INNER_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)[.!?][\"'”’)]*\s")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv}


# ---- a rule -------------------------------------------------------------------------------------


def check(rule: object) -> str | None:
    """What is wrong with a rule, or None."""
    if not isinstance(rule, dict) or rule.get("type") not in list(RULES):  # a list is no key
        return f'"rule" needs a "type" of {", ".join(RULES)}, got {str(rule)[:60]}'
    kind, bounds = rule["type"], {key: value for key, value in rule.items() if key != "type"}
    types, required, check_bounds, _ = RULES[kind]
    for key, value in bounds.items():
        if key not in types:
            return f'{kind} rule: key "{key}" is unknown, it takes {", ".join(types)}'
        # True is an int to Python
        if not isinstance(value, types[key]) or isinstance(value, bool):
            return f'{kind} rule: "{key}" cannot be {value!r}'
    if missing := [key for key in required if key not in bounds]:
        return f'{kind} rule: needs "{missing[0]}"'
    problem = check_bounds(bounds)
    return problem and f"{kind} rule: {problem}"


def find(rule: dict, reply: str) -> str | None:
    """The canonical form of a reply that is right by a rule that check() passed, else None."""
    line = first_line(reply)
    return RULES[rule["type"]][3](rule, line) if len(line) <= MAX_CHARACTERS else None


def _bare(line: str) -> str:
    """A line without quotes around it and without a full stop, within or after them."""
    return line.strip(ENDS).rstrip(".! ").strip(ENDS)


def _check_order(bounds: dict, low: str, high: str, least: int) -> str | None:
    """What is wrong with two bounds of a count."""
    lower, upper = bounds.get(low, least), bounds.get(high, least)
    if min(lower, upper) < least:
        return f'"{low}" and "{high}" must be {least} or more'
    if high in bounds and lower > upper:
        return f"nothing has {low} {lower} and {high} {upper}"
    return None


# ---- integers -----------------------------------------------------------------------------------


def _check_integer(bounds: dict) -> str | None:
    step = bounds.get("divisible_by", 1)
    if step < 1:
        return f"divisible_by {step} must be 1 or more"
    if "min" in bounds and "max" in bounds:
        least = -(-bounds["min"] // step) * step  # the first multiple from min on
        if least > bounds["max"]:
            return f"nothing from {bounds['min']} to {bounds['max']} is divisible by {step}"
    return None


def _find_integer(rule: dict, line: str) -> str | None:
    text = _bare(line).replace("−", "-")
    if not INTEGER.fullmatch(text):
        return None
    value = int(text.replace(",", ""))
    right = (rule.get("min", value) <= value <= rule.get("max", value)
             and value % rule.get("divisible_by", 1) == 0)
    return str(value) if right else None


# ---- words and sentences ------------------------------------------------------------------------


@cache
def _english() -> frozenset[str]:
    """The words of pyspellchecker's English list: inflected forms too, and common names."""
    words = SpellChecker(language="en").word_frequency.words()
    return frozenset(word for word in words if word.isalpha() and len(word) >= MIN_LETTERS)


def _check_word(bounds: dict) -> str | None:
    if problem := _check_order(bounds, "min_letters", "max_letters", 1):
        return problem
    if not any(_fits(bounds, word) for word in _english()):
        return f"no word of the list fits {bounds}"
    return None


def _fits(bounds: dict, word: str) -> bool:
    return (word.startswith(bounds.get("starts_with", "").lower())
            and word.endswith(bounds.get("ends_with", "").lower())
            and bounds.get("min_letters", 1) <= len(word)
            and len(word) <= bounds.get("max_letters", len(word)))


def _find_word(rule: dict, line: str) -> str | None:
    word = normalise(line)
    return word if word in _english() and _fits(rule, word) else None


def _words_of(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", text.lower())


def _check_sentence(bounds: dict) -> str | None:
    words = bounds.get("must_contain", [])
    if not all(isinstance(word, str) and _words_of(word) == [word.lower()] for word in words):
        return f'"must_contain" must be a list of single words, got {words}'
    if problem := _check_order(bounds, "min_words", "max_words", 1):
        return problem
    if len({word.lower() for word in words}) > bounds.get("max_words", MAX_CHARACTERS):
        return f"max_words {bounds['max_words']} leaves no room for {len(words)} words"
    return None


def _find_sentence(rule: dict, line: str) -> str | None:
    """One sentence: a capital or digit first, one of . ! ? last and none before a space."""
    bare, words = line.strip(ENDS), _words_of(line)
    right = (bare and (bare[0].isupper() or bare[0].isdigit()) and bare[-1] in ".!?"
             and not INNER_END.search(bare)
             and {word.lower() for word in rule.get("must_contain", [])} <= set(words)
             and rule.get("min_words", 1) <= len(words) <= rule.get("max_words", len(words)))
    return normalise(line) if right else None


# ---- dates and times ----------------------------------------------------------------------------


def _check_date(bounds: dict) -> str | None:
    if not 1 <= bounds.get("month", 1) <= 12:
        return f"there is no month {bounds['month']}"
    if not 1 <= bounds.get("year", 1) <= 9999:
        return f"year {bounds['year']} must be 1 to 9999"
    return None


def _find_date(rule: dict, line: str) -> str | None:
    """YYYY-MM-DD if the rule gives the year, which the reply may leave out, else MM-DD.

    Dates in digits alone must be ISO's: 03/04 is a day in March or in April.
    """
    text = " ".join(re.sub(r"[.,]", " ", _bare(line).lower()).split())
    if iso := ISO_DATE.fullmatch(text):
        year, month, day = map(int, iso.groups())
    elif named := DAY_MONTH.fullmatch(text) or MONTH_DAY.fullmatch(text):
        first, second, year = named.groups()
        name, day = (second, int(first)) if first.isdigit() else (first, int(second))
        year, month = year and int(year), MONTHS.get(name, 0)
    else:
        return None
    asked = rule.get("year")
    try:  # a leap year where none is given: 29 February is a date
        date = datetime.date(year or asked or 2000, month, day)
    except ValueError:
        return None
    if date.month != rule.get("month", date.month) or (asked and date.year != asked):
        return None
    return date.isoformat() if asked else f"{date.month:02d}-{date.day:02d}"


def _minutes(text: str) -> int | None:
    """Minutes since midnight of "14:30", "2:30 pm", "2 p.m.", "noon", "midnight", or None."""
    if text in ("noon", "midnight"):
        return 720 * (text == "noon")
    found = TIME.fullmatch(text)
    if not found or not (found[2] or found[3]):  # "14" alone is a number
        return None
    hour, minute = int(found[1]), int(found[2] or 0)
    if found[3]:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + 12 * (found[3] == "p")
    return 60 * hour + minute if hour < 24 and minute < 60 else None


def _check_time(bounds: dict) -> str | None:
    for key, text in bounds.items():
        if not re.fullmatch(r"\d\d:\d\d", text) or _minutes(text) is None:
            return f'"{key}" must be a time like "09:30", got {text!r}'
    return None


def _find_time(rule: dict, line: str) -> str | None:
    minutes = _minutes(_bare(line).lower())
    if minutes is None:
        return None
    start, end = _minutes(rule.get("from", "00:00")), _minutes(rule.get("to", "23:59"))
    if start <= end:
        right = start <= minutes <= end
    else:
        right = minutes >= start or minutes <= end
    return f"{minutes // 60:02d}:{minutes % 60:02d}" if right else None


# ---- expressions and patterns -------------------------------------------------------------------


def _check_expression(bounds: dict) -> str | None:
    try:
        Fraction(str(bounds["equals"]))
    except ValueError:  # nan, inf
        return f'"equals" cannot be {bounds["equals"]}'
    return None


def _find_expression(rule: dict, line: str) -> str | None:
    """The expression as Python writes it: brackets and spaces that change nothing are gone."""
    text = _bare(line).strip("$")
    for sign, python in (("×", "*"), ("·", "*"), ("÷", "/"), ("−", "-"), ("^", "**")):
        text = text.replace(sign, python)
    if len(text) > MAX_EXPRESSION or not ARITHMETIC.fullmatch(text):
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not any(isinstance(node, ast.BinOp) for node in ast.walk(tree)):
            return None  # 12 equals 12, but is no expression
        return ast.unparse(tree) if _value(tree) == Fraction(str(rule["equals"])) else None
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    """The exact value of an expression; ValueError where it is not arithmetic or too large."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(repr(node.value))  # 0.1 as it is written, not its nearest binary number
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp):
        raise ValueError(f"{type(node).__name__} is not arithmetic")
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Pow):
        # measured before it is worked out
        if right.denominator != 1 or _bits(left) * abs(right) > MAX_BITS:
            raise ValueError("a root, or too large")
        return left ** int(right)
    value = OPERATORS[type(node.op)](left, right) if type(node.op) in OPERATORS else None
    if value is None or _bits(value) > MAX_BITS:
        raise ValueError("not arithmetic, or too large")
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


@cache
def _compiled(pattern: str) -> regex.Pattern:
    return regex.compile(pattern)


def _check_pattern(bounds: dict) -> str | None:
    pattern = bounds["regex"]
    try:
        compiled = _compiled(pattern)
    except regex.error as error:
        return f"the regex {pattern!r} does not compile: {error}"
    # what makes nested repetitions try all ways: one or two of the pattern's characters, repeated,
    # and an end that does not fit
    letters = sorted(set(re.sub(r"\W", "", pattern)))[:12] + ["a", "0", " ", "-", "a "]
    pieces = letters + [first + second for first in letters[:6] for second in letters[:6]]
    try:
        for piece in pieces:
            # all letters after the last: an engine that looks for one that must come goes on
            for end in ("", "!", "\0" + "".join(letters)):
                compiled.fullmatch((piece * 200)[:200] + end, timeout=PATTERN_SECONDS)
    except TimeoutError:
        return f"the regex {pattern!r} backtracks without end on {piece!r} repeated"
    return None


def _find_pattern(rule: dict, line: str) -> str | None:
    """The reply in lower case; quotes around it and a full stop after it may be there or not."""
    try:
        for text in dict.fromkeys((line, line.strip(ENDS), _bare(line))):
            if _compiled(rule["regex"]).fullmatch(text, timeout=PATTERN_SECONDS):
                return text.lower()
    except TimeoutError:
        pass
    return None


# type: (types of the keys, required keys, check of the bounds, find)
RULES: dict[str, tuple[dict, tuple, Callable, Callable]] = {
    "integer": (dict.fromkeys(("min", "max", "divisible_by"), int), (), _check_integer,
                _find_integer),
    "word": ({"starts_with": str, "ends_with": str, "min_letters": int, "max_letters": int}, (),
             _check_word, _find_word),
    "sentence": ({"must_contain": list, "min_words": int, "max_words": int}, (), _check_sentence,
                 _find_sentence),
    "date": ({"month": int, "year": int}, (), _check_date, _find_date),
    "time": ({"from": str, "to": str}, (), _check_time, _find_time),
    "expression": ({"equals": (int, float)}, ("equals",), _check_expression, _find_expression),
    "pattern": ({"regex": str}, ("regex",), _check_pattern, _find_pattern),
}
