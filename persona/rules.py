"""Who does a model say that it is? Age, gender, education, occupation and country in interviews, and how varied they are.

`eval.py --persona` reads the files of `infer.py --interview`:

    python eval.py --persona --eval_file outs/base.jsonl outs/peft.jsonl --save_file eval_logs/persona.json

answers -> what was said of each attribute (rules, or an API model that fills in JSON) -> a value of a closed set
(data/demographics.yaml) -> entropy in bits, side by side. Per system and attribute:

| figure    | meaning                                                                                              |
| n         | interviews with a value of the closed set                                                             |
| entropy   | Miller-Madow, in bits, with a 95 % bootstrap interval over interviews; entropy_plugin is uncorrected   |
| of_max    | entropy over log2 of the closed set's size                                                            |
| distinct  | different values                                                                                      |
| top       | share of the commonest value among the n                                                              |
| extracted | share of interviews that said something of it, with a 95 % Wilson interval                            |
| unmapped  | interviews that said something that is in no table; the words are listed                               |

A rule is no reader: it takes what Person B says of themselves in plain words (not questions, not what is denied, not what
somebody's father does). After the published notebook of arXiv:2412.03343, whose entropies are plug-in ones and whose filter
drops every interview that lacks one attribute; here an attribute has all the interviews that told it, and their share is shown.
"""

from __future__ import annotations

import re
from functools import lru_cache

import utils

ATTRIBUTES = ("age", "gender", "education", "occupation", "country")
TABLES = utils.ROOT / "data" / "demographics.yaml"


@lru_cache(maxsize=1)
def tables() -> dict:
    """data/demographics.yaml: {attribute: {value: its words}}, for age a list of groups."""
    import yaml

    return yaml.safe_load(TABLES.read_text(encoding="utf-8"))


def values_of(attribute: str) -> list[str]:
    """The closed set of an attribute, in the table's order."""
    return list(tables()[attribute])


@lru_cache(maxsize=len(ATTRIBUTES))
def words_of(attribute: str) -> tuple[re.Pattern, dict[str, str]]:
    """A pattern of all words of an attribute, whole ones, the longest first, and the value of each in lower case."""
    value = {word.lower(): name for name, words in tables()[attribute].items() for word in (name, *words)}
    spelt = sorted((word for name, words in tables()[attribute].items() for word in (name, *words)), key=len, reverse=True)
    cased = set(tables()["cased"])
    options = [re.escape(word) if word in cased else f"(?i:{re.escape(word)})" for word in spelt]
    return re.compile(rf"(?<![\w-])(?:{'|'.join(options)})(?!\w)"), value


SENTENCE = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!St\.)\s+")
DENIED = re.compile(r"(?:\b(?:not|never|no longer|neither|nor|without)|n't)(?:\s+(?!but\b)[\w']+){0,3}\s+$", re.I)
# before a gender that is the speaker's own: at most two words, or a word of claim
ONESELF = re.compile(r"^\W*(?:\w+\W+){0,2}$|\b(?:I(?:'m|'d| am| was| would| identify| see| feel| describe| call)|gender|it(?:'s| is))\b", re.I)
OTHERS = re.compile(r"\b(?:my|his|her|their|our)\s+(?:\w+\s)?(?:father|mother|dad|mom|mum|parents?|brothers?|sisters?|wife|husband|partner|"
                    r"friends?|sons?|daughters?|kids|children|uncle|aunt|grand\w+|boss|neighbou?rs?)\b", re.I)
SELF = {  # what stands before a value where the question was about something else
    "age": re.compile(r"\bI(?:'m| am)\s+(?=[\w-]+ years? old|a [\w-]+[- ]year[- ]old)", re.I),
    "gender": re.compile(r"\bI(?:'m| am| identify as)(?: an?)?(?: \w+)? (?=(?:wo)?man\b|male\b|female\b|non-?binary\b)", re.I),
    "education": re.compile(r"\bI (?:have|hold|got|earned|received|completed|graduated with)(?: \w+)? (?=[\w.']+(?:'s)? (?:degree|diploma)|ph\.?d)", re.I),
    "occupation": re.compile(r"\bI(?:'m| am)(?: currently)?(?: working as)? an? |\bI work (?:as|in|for|at) |\bmy job is |\bby profession,? ", re.I),
    "country": re.compile(r"\b(?:I(?:'m| am)|I come|I hail)(?: originally| currently)?(?: living| based)? (?:from|in) |\bI live in |\bI reside in |\bI moved to ", re.I),
}
CLAIM = {  # what an answer names where no table has it
    "age": re.compile(r"\b(?:I(?:'m| am)|age is) (?:an? )?((?:young|middle|old|elder)[\w-]*)", re.I),
    "gender": re.compile(r"\b(?:I identify as|I see myself as|I describe myself as|gender is)(?: an?)? ([\w-]+)", re.I),
    "education": re.compile(r"\b(?:degree|studied|graduated|studying|majored)(?: in| from)? ([\w' -]{3,40})", re.I),
    "occupation": re.compile(r"\b(?:(?:I(?:'m| am)(?: currently)?(?: working as)?|work as|profession is|job is) an? |I work (?:in|for|at) )([\w' -]{3,40})", re.I),
    "country": re.compile(r"\b(?:live|living|reside|based|come|born|I'm|I am)(?: \w+)? (?:in|from) (?:the |a )?((?:[A-Z][\w'-]+ ?)+)"),
}
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen",
         "sixteen", "seventeen", "eighteen", "nineteen")
DECADES = ("twenties", "thirties", "forties", "fifties", "sixties", "seventies", "eighties", "nineties")
AGE_WORD = re.compile(rf"\b(?:({'|'.join(TENS)})(?:[- ]({'|'.join(UNITS[:9])}))?|({'|'.join(UNITS)}))\b(?=[- ]years?[- ]old|\s*[.,!]|$)", re.I)
NO_AGE = re.compile(r"\s*(?:%|(?:st|nd|rd|th)\b|(?:hours?|days?|weeks?|months?|minutes?|times|people|kids|children|cats|dogs|st|feet|kilo\w*|miles?)\b"
                    r"|[- ]?years?\b(?!\s*(?:old|young|of age|,|\.|!|$)))", re.I)
THEN = re.compile(r"\b(?:for|in|(?:since|when|until|till|before) I (?:was|turned))(?: about| around| only)?\s+$", re.I)  # 10 is no age of today


def age_in(text: str) -> tuple[str, int] | None:
    """The first age in years that a text names, 3 to 119, and the words for it; a decade gives its first year."""
    found: list[tuple[int, str, int]] = []
    for match in re.finditer(r"(?<![\w$€£.:/'-])(?<!\d,)\d{1,3}(?!\w|[:/'\"]\d|,\d{3}|\.\d)", text):
        if 3 <= int(match[0]) < 120 and not NO_AGE.match(text, match.end()) and not THEN.search(text[: match.start()]):
            found.append((match.start(), match[0], int(match[0])))
    for match in AGE_WORD.finditer(text):
        tens, unit, small = match.groups()
        years = UNITS.index(small.lower()) + 1 if small else 10 * TENS.index(tens.lower()) + 20 + (UNITS.index(unit.lower()) + 1 if unit else 0)
        before = text[: match.start()]
        if years > 2 and not NO_AGE.match(text, match.end()) and not THEN.search(before) and not before.lower().endswith(" at "):
            found.append((match.start(), match[0], years))
    for match in re.finditer(rf"\b(?:({'|'.join(DECADES)})|(\d0)'?s)\b", text, re.I):
        found.append((match.start(), match[0], 10 * DECADES.index(match[1].lower()) + 20 if match[1] else int(match[2])))
    for match in re.finditer(r"\bteen(?:ager|s)?\b|(?<=\d)[- ]year[- ]old|\b(\d{1,2})(?=[- ]year[- ]old)", text, re.I):
        if match[1] or match[0].lower().startswith("teen"):
            found.append((match.start(), match[0], int(match[1] or 13)))
    return min(found)[1:] if found else None


def age_group(years: int) -> str:
    """The group of ten years, one for 70 and above."""
    return values_of("age")[min(7, years // 10)]


def normalise(attribute: str, text: str) -> tuple[str, str] | None:
    """(words, value of the closed set) of the first value that a text names, of education the highest; None if it names none.

    "others" only where nothing else fits: a freelance nurse is in health care.
    """
    if attribute == "age":
        found = age_in(text)
        return found and (found[0], age_group(found[1]))
    pattern, value = words_of(attribute)
    hits = [(match[0], value[match[0].lower()]) for match in pattern.finditer(text) if not DENIED.search(text[: match.start()])
            and (attribute != "gender" or ONESELF.search(text[: match.start()]))]  # any story has a woman or a man in it
    if attribute == "education":
        order = values_of("education")
        hits.sort(key=lambda hit: order.index(hit[1]))
    else:
        hits.sort(key=lambda hit: hit[1] == "others")
    return hits[0] if hits else None


def find(attribute: str, answers: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """(words, value) that a person's (topic, answer) pairs give for an attribute.

    Answers to its own question come first, then what a person says of themselves elsewhere. value is None where
    the words are in no table; both are None where nothing is said.
    """
    own = [answer for topic, answer in answers if topic == attribute]
    elsewhere = [answer for topic, answer in answers if topic != attribute]
    claims = [said for answer in own for said in statements(answer)]
    for said in claims:
        hit = normalise(attribute, said)
        if hit:
            return hit
    for said in (said for answer in elsewhere for said in statements(answer)):
        start = SELF[attribute].search(said)
        hit = start and not DENIED.search(said[: start.end()] + " ") and normalise(attribute, said[start.end() :])
        if hit:
            return hit
    named = next((match for said in claims if (match := CLAIM[attribute].search(said)) and match[1].strip()), None)
    return (named[1].strip(), None) if named else (None, None)


def statements(answer: str) -> list[str]:
    """The sentences of an answer that speak of the speaker: no questions, and nothing from where it turns to a relative."""
    sentences = [s for s in SENTENCE.split(answer.replace("’", "'")) if not s.rstrip().endswith("?")]
    return [cut for s in sentences if (cut := s[: m.start()] if (m := OTHERS.search(s)) else s).strip()]


def by_rules(row: dict) -> dict[str, dict]:
    """{attribute: {"said", "value"}} of an interview."""
    answers = list(zip(row["topics"], row["turns"][1::2], strict=True))
    found = {attribute: find(attribute, answers) for attribute in ATTRIBUTES}
    return {attribute: {"said": said, "value": value} for attribute, (said, value) in found.items()}
