"""The controls of a coherence judge: replies that make no sense, made of the rows under evaluation.

A judge that accepts them accepts anything, and its figures are withheld. They are made of the same
prompts and references that the systems are judged by, since a judge may well be right about other
data. Five kinds, and the references themselves, which a judge has to accept:

repeated turn   Person A's last turn; of a task its prompt
scrambled       a reference, its words in random order
context words   random words of the prompt
spliced         another row's reference with two words of this prompt put in
shuffled        another row's reference

(The degenerate systems that scoring/common.py adds are another thing: they check the metrics of
diversity.) Every random choice depends on the seed, the row and the other rows' references alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from scoring.judge_local import references
from utils import normalise, row_hash, text_of

REFERENCES = "references"
PLURALS = {"repeated turn": "repeated turns", "scrambled": "scrambled references",
           "context words": "random words of the prompt",
           "spliced": "other rows' references with two words of the prompt",
           "shuffled": "other rows' references", REFERENCES: "the references"}
MAX_ACCEPTED = 0.1  # of every control; some other row's reference does fit now and then
MIN_ACCEPTED = 0.8  # of the references; people accept 95 to 100 % of such replies
CONTEXT_WORDS = 12  # about the length of a reply
MIN_WORDS = 4  # below, a text may well make sense in any order: "Thank you", "Not me, thanks"
TRIES = 20  # for an order of words that is another one

Probes = list[tuple[dict, dict[str, str]]]


# ---- what is asked ------------------------------------------------------------------------------


def make(rows: list[dict], limit: int, seed: int = 0) -> Probes:
    """(row, {control: text}) for at most `limit` different prompts, in the order of the rows.

    One text of each kind that a row allows, and one of its references.
    """
    # Rows with one prompt, such as the conditions of a sweep, would count a control several times.
    different = list({text_of(row): row for row in reversed(rows)}.values())[::-1]
    pool = [text for row in different for text in references(row)[:1]]
    # Spread over the file, whose rows may be sorted by subject.
    chosen = sorted(random.Random(seed).sample(range(len(different)), min(limit, len(different))))
    return [(different[i], of_row(different[i], pool, seed)) for i in chosen]


def of_row(row: dict, pool: list[str], seed: int = 0) -> dict[str, str]:
    """The controls of one row, and one of its references, by name.

    pool: references of all rows, of which those that are this row's own, too, are no controls.
    """
    rng = random.Random(f"{seed} {row_hash(row)}")  # a text: tuples would not be seeds
    known, prompt = references(row), text_of(row)
    mine = {normalise(text) for text in known}
    others = [text for text in pool if normalise(text) not in mine]
    texts = {"repeated turn": prompt.strip("\n").split("\n")[-1] if "context" in row else prompt,
             "context words": _disordered(prompt, CONTEXT_WORDS, rng)}
    if known:
        texts[REFERENCES] = rng.choice(known)
        texts["scrambled"] = _disordered(texts[REFERENCES], None, rng)
    if others and known:
        texts["shuffled"] = rng.choice(others)
        texts["spliced"] = _spliced(rng.choice(others), prompt, rng)
    # What cannot be made is empty, and so is the repeated turn of a continuation of nothing.
    return {name: texts[name] for name in PLURALS
            if texts.get(name, "").strip()
            and (name == REFERENCES or normalise(texts[name]) not in mine)}


def _disordered(text: str, count: int | None, rng: random.Random) -> str:
    """`count` of a text's words, or all of them, in another order; "" where there is none."""
    words = text.split()
    if len(words) < MIN_WORDS:
        return ""
    count = min(count or len(words), len(words))
    for _ in range(TRIES):
        drawn = " ".join(rng.sample(words, count))
        if drawn not in " ".join(words):  # an excerpt may well make sense
            return drawn
    return ""


def _spliced(text: str, prompt: str, rng: random.Random) -> str:
    """A text with two words of a prompt put in at random places; "" where there are no two."""
    words = sorted({word.strip(".,;:!?\"'()") for word in prompt.split()} - {""})
    # Words of content, since those are what a judge of relevance looks for.
    content = [word for word in words if word.lower() not in ENGLISH_STOP_WORDS]
    words = content if len(content) > 1 else words
    if len(words) < 2:
        return ""
    spliced = text.split()
    for word in rng.sample(words, 2):
        spliced.insert(rng.randint(0, len(spliced)), word)
    return " ".join(spliced)


# ---- what comes of it ---------------------------------------------------------------------------


def count(probes: Probes, verdicts: list[dict[str, dict]]) -> dict[str, dict]:
    """{control: {"accepted": share, "asked": n}}; accepted is None where no text has a verdict.

    verdicts: per probe {text: verdict}. A share is that of the texts with a verdict; where some
    have none, "unscored" counts them.
    """
    answers: dict[str, list[bool | None]] = {}
    for (_, texts), of_row_verdicts in zip(probes, verdicts, strict=True):
        for name, text in texts.items():
            answers.setdefault(name, []).append(of_row_verdicts[text]["coherent"])
    counted = {}
    for name in filter(answers.__contains__, PLURALS):
        scored = [answer for answer in answers[name] if answer is not None]
        counted[name] = {"accepted": round(sum(scored) / len(scored), 4) if scored else None,
                         "asked": len(answers[name])}
        if unscored := len(answers[name]) - len(scored):
            counted[name]["unscored"] = unscored
    return counted


def failed(shares: Mapping[str, float | None]) -> list[str]:
    """The names of the checks that a judge fails; without a verdict on any text it fails, too."""
    return [name for name, share in shares.items() if share is None
            or (share < MIN_ACCEPTED if name == REFERENCES else share > MAX_ACCEPTED)]


def passes(shares: Mapping[str, float | None]) -> bool:
    """Whether a judge may be believed: it was asked about a control at least, and fails none."""
    return not failed(shares) and any(name != REFERENCES for name in shares)


def describe(counted: dict[str, dict]) -> dict:
    """What a judge's description says of its checks: controls, failed, trusted; reason if not."""
    shares = {name: figures["accepted"] for name, figures in counted.items()}
    described = {"controls": counted, "failed": failed(shares), "trusted": passes(shares)}
    return described if described["trusted"] else described | {"reason": _why(shares)}


def _why(shares: Mapping[str, float | None]) -> str:
    """Why a judge is not believed."""
    if not any(name != REFERENCES for name in shares):
        return "no control of the judge can be made of these rows"
    wrong = {name: shares[name] for name in failed(shares)}
    accepted = [f"{'only ' * (name == REFERENCES)}{percent(share)} of {PLURALS[name]}"
                for name, share in wrong.items() if share is not None]
    silent = [PLURALS[name] for name, share in wrong.items() if share is None]
    parts = [f"accepts {', '.join(accepted)}"] if accepted else []
    parts += [f"gives no verdict on {', '.join(silent)}"] if silent else []
    return f"the judge {' and '.join(parts)}"


def percent(share: float | None) -> str:
    return "—" if share is None else f"{100 * share:.3g} %"
