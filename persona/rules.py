"""Rules that read an interview: age, gender, education, occupation and country of Person B.

    find("age", [("age", "I'm thirty-four.")])  ->  ("thirty-four", "30-39")

The rules only catch plain self-descriptions (not questions, denials, or statements about
relatives). What they catch is mapped to a value of a closed set, data/demographics.yaml; what is in
no table is returned as it was said.
"""

from __future__ import annotations

import re
from functools import lru_cache

import yaml

import utils

ATTRIBUTES = ("age", "gender", "education", "occupation", "country")
_VALUES_FILE = utils.ROOT / "data" / "demographics.yaml"

# ---- who is spoken of ---------------------------------------------------------------------------

# A full stop ends a sentence, but not after an initial ("J. Smith") or in "St. Lucia".
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!St\.)\s+")
# A denial reaches at most three words ahead, but not past "but": "not in Spain but Portugal".
_DENIED = re.compile(
    r"(?:\b(?:not|never|no longer|neither|nor|without)|n't)"
    r"(?:\s+(?!but\b)[\w']+){0,3}\s+$", re.I)
# Any story has a woman or a man in it. A gender is the speaker's own if at most two words stand
# before it, or a word by which the speaker claims it.
_CLAIMS_GENDER = re.compile(
    r"^\W*(?:\w+\W+){0,2}$"
    r"|\b(?:I(?:'m|'d| am| was| would| identify| see| feel| describe| call)"
    r"|gender|it(?:'s| is))\b", re.I)
_RELATIVES = re.compile(
    r"\b(?:my|his|her|their|our)\s+(?:\w+\s)?"
    r"(?:father|mother|dad|mom|mum|parents?|brothers?|sisters?|wife|husband|partner|friends?|sons?"
    r"|daughters?|kids|children|uncle|aunt|grand\w+|boss|neighbou?rs?)\b", re.I)

# What stands before a value where the question was about something else.
_SELF_DESCRIPTION = {
    "age": re.compile(r"\bI(?:'m| am)\s+(?=[\w-]+ years? old|a [\w-]+[- ]year[- ]old)", re.I),
    "gender": re.compile(
        r"\bI(?:'m| am| identify as)(?: an?)?(?: \w+)? "
        r"(?=(?:wo)?man\b|male\b|female\b|non-?binary\b)", re.I),
    "education": re.compile(
        r"\bI (?:have|hold|got|earned|received|completed|graduated with)(?: \w+)? "
        r"(?=[\w.']+(?:'s)? (?:degree|diploma)|ph\.?d)", re.I),
    "occupation": re.compile(
        r"\bI(?:'m| am)(?: currently)?(?: working as)? an? "
        r"|\bI work (?:as|in|for|at) |\bmy job is |\bby profession,? ", re.I),
    "country": re.compile(
        r"\b(?:I(?:'m| am)|I come|I hail)(?: originally| currently)?(?: living| based)? "
        r"(?:from|in) "
        r"|\bI live in |\bI reside in |\bI moved to ", re.I),
}
# What an answer to the attribute's own question names where no table has it. Case only counts for
# countries, whose names are told by their capitals.
_UNMAPPED_CLAIM = {
    "age": re.compile(
        r"\b(?:I(?:'m| am)|age is) (?:an? )?((?:young|middle|old|elder)[\w-]*)", re.I),
    "gender": re.compile(
        r"\b(?:I identify as|I see myself as|I describe myself as|gender is)"
        r"(?: an?)? ([\w-]+)", re.I),
    "education": re.compile(
        r"\b(?:degree|studied|graduated|studying|majored)(?: in| from)? ([\w' -]{3,40})", re.I),
    "occupation": re.compile(
        r"\b(?:(?:I(?:'m| am)(?: currently)?(?: working as)?|work as|profession is|job is) an? "
        r"|I work (?:in|for|at) )([\w' -]{3,40})", re.I),
    "country": re.compile(
        r"\b(?:live|living|reside|based|come|born|I'm|I am)(?: \w+)? (?:in|from) (?:the |a )?"
        r"((?:[A-Z][\w'-]+ ?)+)"),
}

# ---- ages ---------------------------------------------------------------------------------------

_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_BELOW_TWENTY = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_DECADES = (
    "twenties", "thirties", "forties", "fifties", "sixties", "seventies", "eighties", "nineties")
# Digits that stand alone: no price, time, height, flat, version, nor part of a larger number.
_AGE_IN_DIGITS = re.compile(r"(?<![\w$€£.:/'-])(?<!\d,)\d{1,3}(?!\w|[:/'\"]\d|,\d{3}|\.\d)")
_AGE_IN_WORDS = re.compile(
    rf"\b(?:({'|'.join(_TENS)})(?:[- ]({'|'.join(_BELOW_TWENTY[:9])}))?"
    rf"|({'|'.join(_BELOW_TWENTY)}))\b"
    r"(?=[- ]years?[- ]old|\s*[.,!]|$)", re.I)
_DECADE = re.compile(rf"\b(?:({'|'.join(_DECADES)})|(\d0)'?s)\b", re.I)
_TEEN_OR_YEAR_OLD = re.compile(
    r"\bteen(?:ager|s)?\b|(?<=\d)[- ]year[- ]old|\b(\d{1,2})(?=[- ]year[- ]old)", re.I)
# What makes the number before it a count of something else: "20 years" of work, "3 cats", "5th".
_COUNTS_SOMETHING_ELSE = re.compile(
    r"\s*(?:%|(?:st|nd|rd|th)\b"
    r"|(?:hours?|days?|weeks?|months?|minutes?|times|people|kids|children|cats|dogs|st|feet"
    r"|kilo\w*|miles?)\b"
    r"|[- ]?years?\b(?!\s*(?:old|young|of age|,|\.|!|$)))", re.I)
# What makes the number after it an age of the past or a duration: "since I was 18", "for ten".
_ANOTHER_TIME = re.compile(
    r"\b(?:for|in|(?:since|when|until|till|before) I (?:was|turned))"
    r"(?: about| around| only)?\s+$", re.I)


# ---- closed sets --------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def value_tables() -> dict:
    """data/demographics.yaml: {attribute: {value: its words}}, for age a list of groups."""
    return yaml.safe_load(_VALUES_FILE.read_text(encoding="utf-8"))


def values_of(attribute: str) -> list[str]:
    """The closed set of an attribute, in the table's order."""
    return list(value_tables()[attribute])


@lru_cache(maxsize=len(ATTRIBUTES))
def _words_of(attribute: str) -> tuple[re.Pattern, dict[str, str]]:
    """A pattern for all words of an attribute, and {word in lower case: its value}.

    Only whole words count (Niger is not in Nigeria), and longer ones come first (Papua New Guinea
    before Guinea).
    """
    table = value_tables()[attribute]
    words = [(word, value) for value, others in table.items() for word in (value, *others)]
    cased = set(value_tables()["cased"])  # "US" is a country, "us" is not
    options = [re.escape(word) if word in cased else f"(?i:{re.escape(word)})"
               for word, _ in sorted(words, key=lambda item: len(item[0]), reverse=True)]
    pattern = re.compile(rf"(?<![\w-])(?:{'|'.join(options)})(?!\w)")
    return pattern, {word.lower(): value for word, value in words}


def _age_in(text: str) -> tuple[str, int] | None:
    """The words and years of the first age (3 to 119) in a text; a decade gives its first year."""
    ages: list[tuple[int, str, int]] = []  # where it stands, its words, years
    for match in _AGE_IN_DIGITS.finditer(text):
        years = int(match[0])
        if 3 <= years < 120 and _is_age_of_today(text, match):
            ages.append((match.start(), match[0], years))
    for match in _AGE_IN_WORDS.finditer(text):
        years = _years_in_words(*match.groups())
        at_the_hour = text[: match.start()].lower().endswith(" at ")  # "we leave at four"
        if years > 2 and _is_age_of_today(text, match) and not at_the_hour:
            ages.append((match.start(), match[0], years))
    for match in _DECADE.finditer(text):
        word, digits = match.groups()
        years = 10 * _DECADES.index(word.lower()) + 20 if word else int(digits)
        ages.append((match.start(), match[0], years))
    for match in _TEEN_OR_YEAR_OLD.finditer(text):
        if match[1] or match[0].lower().startswith("teen"):
            ages.append((match.start(), match[0], int(match[1] or 13)))
    return min(ages)[1:] if ages else None


def _is_age_of_today(text: str, match: re.Match) -> bool:
    """Whether what stands around a number leaves it an age of today."""
    return (not _COUNTS_SOMETHING_ELSE.match(text, match.end())
            and not _ANOTHER_TIME.search(text[: match.start()]))


def _years_in_words(tens: str | None, unit: str | None, small: str | None) -> int:
    """The number that the groups of _AGE_IN_WORDS spell: "thirty" and "four", or "seventeen"."""
    if small:
        return _BELOW_TWENTY.index(small.lower()) + 1
    units = _BELOW_TWENTY.index(unit.lower()) + 1 if unit else 0
    return 10 * _TENS.index(tens.lower()) + 20 + units


def _age_group(years: int) -> str:
    """The group of ten years, one for 70 and above."""
    return values_of("age")[min(7, years // 10)]


def match_value(attribute: str, text: str) -> tuple[str, str] | None:
    """(words, value of the closed set) of the first value that a text names; None if it names none.

    Of education the highest level counts, not the first. "others" only counts where nothing else
    fits: a freelance nurse is in health care.
    """
    if attribute == "age":
        age = _age_in(text)
        return age and (age[0], _age_group(age[1]))
    pattern, value_of = _words_of(attribute)
    matches = []
    for match in pattern.finditer(text):
        before = text[: match.start()]
        if not _DENIED.search(before) and (attribute != "gender" or _CLAIMS_GENDER.search(before)):
            matches.append((match[0], value_of[match[0].lower()]))
    if attribute == "education":
        order = values_of("education")  # from the highest level down
        matches.sort(key=lambda item: order.index(item[1]))
    else:
        matches.sort(key=lambda item: item[1] == "others")
    return matches[0] if matches else None


# ---- answers ------------------------------------------------------------------------------------


def find(attribute: str, answers: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """(words, value) that a person's (topic, answer) pairs give for an attribute.

    Answers to the attribute's own question come first, then what a person says of themselves
    elsewhere. value is None where the words are in no table, both where nothing is said.
    """
    direct = [text for topic, answer in answers if topic == attribute
              for text in _statements(answer)]
    elsewhere = [text for topic, answer in answers if topic != attribute
                 for text in _statements(answer)]
    for text in direct:
        if match := match_value(attribute, text):
            return match
    for text in elsewhere:
        start = _SELF_DESCRIPTION[attribute].search(text)
        # the space lets a denial right before the value count: "I'm not" + " "
        if start and not _DENIED.search(text[: start.end()] + " "):
            if match := match_value(attribute, text[start.end() :]):
                return match
    for text in direct:
        claim = _UNMAPPED_CLAIM[attribute].search(text)
        if claim and claim[1].strip():
            return claim[1].strip(), None
    return None, None


def _statements(answer: str) -> list[str]:
    """The sentences of an answer, without questions, each up to where it turns to a relative."""
    statements = []
    for sentence in _SENTENCE_END.split(answer.replace("’", "'")):
        relative = _RELATIVES.search(sentence)
        text = sentence[: relative.start()] if relative else sentence
        if text.strip() and not sentence.rstrip().endswith("?"):
            statements.append(text)
    return statements


def by_rules(row: dict) -> dict[str, dict]:
    """{attribute: {"said", "value"}} of an interview."""
    answers = list(zip(row["topics"], row["turns"][1::2], strict=True))
    extraction = {}
    for attribute in ATTRIBUTES:
        said, value = find(attribute, answers)
        extraction[attribute] = {"said": said, "value": value}
    return extraction
