"""Requests with many right answers: check what was written, and make it the rows of a ruler.

    python -m data.build_answers

data/answers/train.yaml, dev.yaml and test.yaml become train.jsonl, dev.jsonl and test.jsonl beside
them: a row per request, in the form of scoring/answers.py. A file is a list of

    - category: yellow fruits
      requests: ["Name a yellow fruit. Answer with the name only.", ...]
      answers: ["banana", "lemon = sour lemon; yellow citrus", ...]      # canonical = alias; alias

or has `rule:` (scoring/rules.py) and `candidates:`, right answers to train on, in place of
`answers:`, all of which are candidates. Spellings without accents and with curly apostrophes are
added, plurals in -ies, and for countries and languages the names of ISO 3166 and 639 (pycountry).
A category may stand once, no two may be nearly the same, and those of RESERVED are left free.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import yaml
from nltk.stem import PorterStemmer

import utils
from flags import Args, FlagParser, parse_flags
from scoring import answers
from scoring.answers import normalise
from utils import MISSING, USAGE, fail

PARTS = ("train", "dev", "test")
KEYS = {"category", "requests", "answers", "rule", "candidates"}
# Categories that others test on: a model that has learnt from these files must not know them.
RESERVED = (
    "US states", "US presidents", "chemical elements", "planets and moons", "constellations",
    "dog breeds", "dinosaurs", "gemstones", "fabrics", "herbs and spices", "cheeses",
    "pasta shapes", "breads", "soups and stews", "sauces and dips", "card games", "board games",
    "currencies", "rivers", "mountains", "islands", "Greek gods", "units of measure",
    "programming languages", "file extensions", "car makes", "airlines", "martial arts",
    "Shakespeare's plays", "books of the Bible", "composers", "painters", "military ranks",
    "music genres", "film genres", "poem forms", "diseases", "rooms", "office supplies",
    "fairy-tale figures")
KIND_OF = re.compile(r"^(?:\w+ )?(?:kinds|types|sorts|varieties|names) of ", re.I)
SMALL_WORDS = {"the", "of", "an", "and", "or", "that", "common"}
PREPOSITION = re.compile(r" (?:of|in|on|at|from|with|by|for|that|to|used|found) ")
SHARED = 0.5  # of the shorter list: two categories with more answers in common are one
COUNTRIES = ("countries of ",)
LANGUAGES = ("languages",)
# ISO 639-1 names that are not the everyday ones; None for a variety of another entry
EVERYDAY = {
    "Abkhazian": "Abkhaz", "Avaric": "Avar", "Church Slavic": "Old Church Slavonic",
    "Divehi": "Maldivian", "Modern Greek": "Greek", "Western Frisian": "Frisian",
    "Fulah": "Fula", "Haitian": "Haitian Creole", "Sichuan Yi": "Yi", "Kalaallisut": "Greenlandic",
    "Kikuyu": "Gikuyu", "Kirghiz": "Kyrgyz", "Kuanyama": "Kwanyama", "Limburgan": "Limburgish",
    "Ganda": "Luganda", "Malay": "Malaysian", "Burmese": "Myanmar", "Nauru": "Nauruan",
    "Chichewa": "Nyanja", "Ojibwa": "Ojibwe", "Oriya": "Odia", "Ossetian": "Ossetic",
    "Panjabi": "Punjabi", "Persian": "Farsi", "Pushto": "Pashto", "Rundi": "Kirundi",
    "Sinhala": "Sinhalese", "Slovenian": "Slovene", "Southern Sotho": "Sotho", "Swati": "Swazi",
    "Tagalog": "Filipino", "Tonga": "Tongan", "Tswana": "Setswana", "Uighur": "Uyghur",
    "Serbo-Croatian": None, "Norwegian Nynorsk": None, "Norwegian Bokmål": None}


class Category(NamedTuple):
    """An entry of a file, place: file:line."""

    place: str
    name: str
    requests: list[str]
    row: dict  # what all its rows share: category, answers or rule, candidates


# ---- reading ------------------------------------------------------------------------------------


def read_categories(path: Path) -> Iterator[Category | str]:
    """The entries of a file, or what is wrong with them; fails where it is no list of entries."""
    if not path.is_file():
        fail(USAGE, f"{path} is not there", "a list of categories; see --help")
    try:
        text = path.read_text(encoding="utf-8")
        # read twice: only the nodes know their lines
        nodes, entries = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        fail(USAGE, f"{path}: not YAML: {' '.join(str(error).split())[:200]}", "correct it")
    if not isinstance(entries, list):
        fail(USAGE, f"{path} must be a list of categories", "see --help")
    for node, entry in zip(nodes.value, entries, strict=True):
        place = f"{path}:{node.start_mark.line + 1}"
        problem = _check_entry(entry)
        yield f"{place}: {problem}" if problem else Category(
            place, entry["category"], entry["requests"], _shared(entry))


def _check_entry(entry: object) -> str | None:
    """What is wrong with an entry's form; the rows that it makes are checked later."""
    if not isinstance(entry, dict) or not isinstance(entry.get("category"), str):
        return f'needs "category", a string, got {str(entry)[:60]}'
    name = entry["category"]
    if unknown := sorted(set(map(str, entry)) - KEYS):
        return f"{name}: key {unknown[0]!r} is unknown, it takes {', '.join(sorted(KEYS))}"
    if ("answers" in entry) == ("rule" in entry) or ("answers" in entry and "candidates" in entry):
        return f'{name}: needs either "answers", or "rule" and "candidates"'
    for key in {"requests", "answers", "candidates"} & set(entry):
        texts = entry[key]
        # YAML reads no and 12 as a truth value and a number
        if bad := [text for text in texts if not isinstance(text, str)] if isinstance(
                texts, list) else [texts]:
            return f'{name}: "{key}" must be a list of strings, got {bad[0]!r} (quotes help)'
    return None if entry.get("requests") else f'{name}: needs "requests"'


def _shared(entry: dict) -> dict:
    """What the rows of an entry have in common."""
    if "rule" in entry:
        return {key: entry[key] for key in ("category", "rule", "candidates") if key in entry}
    # spellings before names as well: the Guarani of ISO is the Guaraní that is written
    named = add_spellings([parse_answer(text) for text in entry["answers"]])
    if entry["category"].startswith(COUNTRIES):
        named = add_names(named, country_names(), further=False)
    elif entry["category"] in LANGUAGES:
        named = add_names(named, language_names(), further=True)
    named = add_spellings(named)
    return {"category": entry["category"], "answers": named,
            "candidates": [names[0] for names in named]}


def parse_answer(text: str) -> list[str]:
    """'lemon = sour lemon; yellow citrus' as [canonical, alias, ...]."""
    canonical, _, aliases = text.partition("=")
    return [name.strip() for name in (canonical, *aliases.split(";")) if name.strip()]


# ---- names and spellings ------------------------------------------------------------------------


def _iso():
    """pycountry, which is among the packages for development only."""
    try:
        import pycountry
    except ImportError:
        fail(MISSING, "pycountry is not installed", "pip install -r requirements-dev.txt")
    return pycountry


def country_names() -> list[list[str]]:
    """Per country of ISO 3166 its names: short, common and official."""
    return [_unique([_turned(name) for name in (
        getattr(country, "common_name", None), country.name,
        getattr(country, "official_name", None)) if name]) for country in _iso().countries]


def language_names() -> list[list[str]]:
    """Per language of ISO 639-1 its names, the everyday one last."""
    found = []
    for language in _iso().languages:
        name = re.sub(r" \(.*\)", "", language.name)  # "Malay (macrolanguage)"
        if hasattr(language, "alpha_2") and EVERYDAY.get(name, name) is not None:
            found.append(_unique([name, getattr(language, "common_name", name),
                                  EVERYDAY.get(name, name)]))
    return found


def _turned(name: str) -> str:
    """'Tanzania, United Republic of' as it is said."""
    first, _, second = name.partition(", ")
    return f"{second} {first}" if second else name


def add_names(named: list[list[str]], others: list[list[str]], further: bool) -> list[list[str]]:
    """Answers with the other names of those that are listed; further: with those that are not."""
    taken = {normalise(name): number for number, names in enumerate(named) for name in names}
    found = [list(names) for names in named]
    for names in others:
        known = {taken[normalise(name)] for name in names if normalise(name) in taken}
        if len(known) == 1:
            number = known.pop()
        elif further and not known:
            number = len(found)
            found.append([])
        else:  # elsewhere, or its names are written as two answers
            continue
        for name in names:
            if taken.setdefault(normalise(name), number) == number:
                found[number].append(name)
    return [_unique(names) for names in found]


def add_spellings(named: list[list[str]]) -> list[list[str]]:
    """Answers with the spellings that normalising does not see; never a name of two answers."""
    taken = {normalise(name): number for number, names in enumerate(named) for name in names}
    return [names + [spelling for spelling in _spellings(names)
                     if taken.setdefault(normalise(spelling), number) == number]
            for number, names in enumerate(named)]


def _spellings(names: list[str]) -> list[str]:
    """Without accents, with curly apostrophes, the plural of -y; only what is not written yet."""
    found = []
    for name in names:
        letters = unicodedata.normalize("NFD", name)
        found += ["".join(c for c in letters if not unicodedata.combining(c)),
                  name.replace("'", "’")]
        if re.search(r"[^aeiou]y$", name) and name.islower():
            found.append(name[:-1] + "ies")
    written = {normalise(name) for name in names}
    return [name for name in _unique(found) if normalise(name) not in written]


def _unique(names: list[str]) -> list[str]:
    """The names without those that normalise to an earlier one."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(normalise(name), name)
    return list(first.values())


# ---- checks -------------------------------------------------------------------------------------


def check_all(categories: list[Category]) -> list[str]:
    """What is wrong with all files together, as file:line: problem."""
    problems, requests = [], {}
    for category in categories:
        if reserved := next((name for name in RESERVED if _is_part(name, category.name)), None):
            problems.append(f"{category.place}: category {category.name!r} is reserved "
                            f"({reserved}), it is tested on")
        for request in category.requests:
            if problem := answers.check_row({"prompt": request, **category.row}):
                problems.append(f"{category.place}: {category.name}: {problem}")
                break  # the others share the answers
        for request in category.requests:
            if first := requests.get(normalise(request)):
                problems.append(f"{category.place}: request {request!r} stands twice, see {first}")
            requests[normalise(request)] = category.place
    for first, second in combinations(categories, 2):
        if why := _alike(first, second):
            problems.append(f"{second.place}: category {second.name!r} is nearly {first.name!r} "
                            f"of {first.place}: {why}")
    return problems


def _alike(first: Category, second: Category) -> str | None:
    """Why two categories are nearly the same, or None."""
    if _is_narrower(first.name, second.name) or _is_narrower(second.name, first.name):
        return "one's words are among the other's"
    lists = [{normalise(names[0]) for names in category.row.get("answers", [])}
             for category in (first, second)]
    shared = lists[0] & lists[1]
    if len(shared) > SHARED * min(map(len, lists)):
        return f"{len(shared)} answers stand in both"
    return None


def _is_part(reserved: str, name: str) -> bool:
    """Whether a category is, or is part of, a reserved one or one of a reserved pair."""
    return any(_is_narrower(piece, wide) for piece in reserved.split(" and ")
               for wide in name.split(" and "))


def _is_narrower(wide: str, narrow: str) -> bool:
    """Whether narrow says all that wide does about the same noun: birds, birds of prey.

    The noun is the last word before a preposition: bread toppings are no breads.
    """
    return stems(wide) <= stems(narrow) and _noun(wide) == _noun(narrow)


def _noun(name: str) -> str:
    return PorterStemmer().stem(PREPOSITION.split(_bare(name))[0].split()[-1])


def _bare(name: str) -> str:
    return KIND_OF.sub("", name.lower().replace("'s", ""))


def stems(name: str) -> frozenset[str]:
    """The stems of a category's words, but for those that most categories could have."""
    words = [PorterStemmer().stem(word) for word in re.findall(r"\w+", _bare(name))]
    return frozenset(words) - SMALL_WORDS or frozenset(words)


# ---- the script ---------------------------------------------------------------------------------


def build_parser() -> FlagParser:
    parser = FlagParser(prog="-m data.build_answers", description=__doc__)
    parser.add_argument("--folder", default="data/answers",
                        help="train.yaml, dev.yaml, test.yaml, and the rows beside them "
                             "(default: %(default)s)")
    return parser


def read_flags(argv: list[str] | None) -> Args:
    """The flags of a command."""
    return parse_flags(build_parser(), argv)


def main(argv: list[str] | None = None) -> None:
    folder = Path(read_flags(argv).folder)
    read = {part: list(read_categories(folder / f"{part}.yaml")) for part in PARTS}
    entries = [entry for part in PARTS for entry in read[part]]
    problems = [entry for entry in entries if isinstance(entry, str)]
    problems += check_all([entry for entry in entries if isinstance(entry, Category)])
    if problems:
        for problem in problems[1:utils.MAX_SHOWN_ERRORS]:
            print(f"error: {problem}", file=sys.stderr)
        fail(USAGE, f"{problems[0]}\n{len(problems)} problems in {folder}", "correct them")
    for part, categories in read.items():
        rows = [{"prompt": request, **category.row}
                for category in categories for request in category.requests]
        utils.atomic_write(folder / f"{part}.jsonl", "".join(
            json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        listed = sum(len(category.row.get("answers", [])) for category in categories)
        print(f"{folder / part}.jsonl: {len(rows)} requests of {len(categories)} categories, "
              f"{listed} answers")


if __name__ == "__main__":
    utils.run(main)
