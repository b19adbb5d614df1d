"""The figures of verifiable tasks (scoring/answers.py), in the form of the common figures.

No judge is asked: a program checks every reply, so that valid and yield@k are exact. Beside them
stand the diversity figures that need no judge, for the same systems and degenerate controls. Two
requests of one category are not independent, so all intervals are over categories.

    valid            share of right replies
    yield@k          different right answers among k replies
    distinct         different replies, right or not
    coverage         yield@k over the number of right answers
    collision        share of all pairs of replies that are the same right answer
    collision_ratio  collision over that of uniform draws from all right answers, which is 1 / n for
                     n of them; 1 is as varied as someone who knows them all
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import utils
from scoring import answers, common, diversity, logs, metrics, statistics
from scoring.answers import Answer, normalise
from scoring.evaluated import CONTROL, VERIFIABLE, Evaluated, Figure, figure, rounded
from scoring.sources import Sources
from utils import text_of

EXAMPLES = 5  # requests that the terminal shows side by side
SHOWN = 10  # replies of a request there
WHY_NONE = {
    "coverage": "the requests have rules, not lists of all right answers",
    "collision": "one reply a request has nothing to be the same as",
    "collision_ratio": "it needs two replies a request and lists of all right answers",
    "seconds_per_row": common.NO_SPEED}


def measure(systems: dict[str, list[dict]], sources: Sources, args) -> Evaluated:
    """All figures of systems whose rows answers.check_row has passed, and of their controls."""
    if nothing := common.withheld(systems):
        return nothing
    drawn = len(next(iter(systems.values()))[0]["preds"])
    systems = common.looked_at(systems, args)
    # all at once: batches of texts of one length are the fastest
    sources.embedder.encode([text for rows in systems.values() for row in rows
                             for text in row["preds"]])
    found = {name: find_all(rows) for name, rows in systems.items()}
    replies = {name: [describe(row, of_row) for row, of_row in zip(rows, found[name], strict=True)]
               for name, rows in systems.items()}
    summary = _summarise(systems, found, sources) | {
        "drawn": drawn, "examples": _examples(systems, replies)}
    published = args.save_file.endswith(".pkl")
    return Evaluated(summary, _lines(systems, replies),
                     {".pkl": _published_pickle(systems)} if published else {},
                     _page_prompts(systems, replies))


# ---- replies ------------------------------------------------------------------------------------


def find_all(rows: list[dict]) -> list[list[Answer | None]]:
    """Per row, per reply: the right answer that it gives, or None."""
    return [[find_answer(reply) for reply in row["preds"]]
            for row in rows for find_answer in [answers.finder(row)]]


def describe(row: dict, found: Sequence[Answer | None]) -> list[dict]:
    """A row's replies: {"text", "answer": canonical or None, "repeated"}.

    Repeated is a right reply whose answer, and a wrong one whose words stood in an earlier reply.
    """
    described, seen = [], set()
    for text, answer in zip(row["preds"], found, strict=True):
        # In a pair, since the words of a wrong reply could be the name of an answer by a rule.
        key = (answer is None, normalise(text) if answer is None else answer)
        # An int is the number of a listed answer; one by a rule is its canonical form already.
        name = row["answers"][answer][0] if isinstance(answer, int) else answer
        described.append({"text": text, "answer": name, "repeated": key in seen})
        seen.add(key)
    return described


def _lines(systems: dict[str, list[dict]], replies: dict[str, list[list[dict]]]) -> list[dict]:
    """A line per response of the systems, none about a control."""
    return [{"system": name, "row": number, "category": row["category"], "context": text_of(row),
             "response": reply["text"], "answer": reply["answer"], "repeated": reply["repeated"]}
            for name, rows in systems.items() if not name.startswith(CONTROL)
            for number, (row, of_row) in enumerate(zip(rows, replies[name], strict=True), 1)
            for reply in of_row]


def _published_pickle(systems: dict[str, list[dict]]) -> bytes:
    """The published keys, with the scores that judges give left empty."""
    return logs.published_pickle({name: [
        {"row": row, "preds": row["preds"], "verdicts": [{}] * len(row["preds"])} for row in rows]
        for name, rows in systems.items()})


def _examples(systems: dict[str, list[dict]], replies: dict[str, list[list[dict]]]) -> list[dict]:
    """Requests of different categories, from all over the file, with what every system answered."""
    rows = next(iter(systems.values()))
    firsts: dict[str, int] = {}
    for number, row in enumerate(rows):
        firsts.setdefault(row["category"], number)
    # Two requests of one category show the same answers, as long as there are others.
    numbers = list(firsts.values()) if len(firsts) >= EXAMPLES else list(range(len(rows)))
    count = min(EXAMPLES, len(numbers))
    return [{"row": number + 1, "prompt": text_of(rows[number]),
             "systems": {name: replies[name][number][:SHOWN] for name in systems
                         if not name.startswith(CONTROL)}}
            for number in (numbers[i * len(numbers) // count] for i in range(count))]


def _page_prompts(systems: dict[str, list[dict]],
                  replies: dict[str, list[list[dict]]]) -> list[dict]:
    """What the page shows of every request, see report/page.py."""
    return [{"text": text_of(row), "turns": None, "systems": {name: {
        "replies": replies[name][i], "similarity": None,
        "yield": len({reply["answer"] for reply in replies[name][i]} - {None})}
        for name in systems}} for i, row in enumerate(next(iter(systems.values())))]


# ---- the summary --------------------------------------------------------------------------------


def _summarise(systems: dict[str, list[dict]], found: dict[str, list], sources: Sources) -> dict:
    """The summary that is written as X.json and shown; as that of common.py."""
    names, first = list(systems), next(iter(systems.values()))
    categories, k = [row["category"] for row in first], len(first[0]["preds"])
    values = {name: _per_row(rows, found[name], sources.embedder)
              for name, rows in systems.items()}
    matched = {name: matched_yield(found[name], found[names[0]], categories)
               for name in names[1:]}
    vocabulary = len(sources.embedder.tokenizer)
    return {
        "task": VERIFIABLE, "k": k, "rows": len(first), "categories": len(set(categories)),
        "judge": {"name": "program", "text": "valid, yield: a program checks every reply against "
                  "the right answers of its request; exact, no judge was asked"},
        "systems": {name: _summarise_one(name, rows, values[name], sources, vocabulary)
                    for name, rows in systems.items()},
        "differences": {f"{name} - {names[0]}": {
            key: rounded(statistics.cluster_interval(
                _minus(of_rows, values[names[0]][key]), categories))
            for key, of_rows in values[name].items()} for name in names[1:]},
        "matched": {f"{name} - {names[0]}": {
            "measures": {f"yield@{k}": of_pair["difference"]},
            **{key: of_pair[key] for key in ("prompts", "left_out", "responses")}}
            for name, of_pair in matched.items()},
        "controllability": {},
        "settings": {  # what the figures depend on
            "embedder": "all-MiniLM-L6-v2", "ead_vocabulary": vocabulary,
            "self_bleu": metrics.self_bleu_signature(k - 1) if k > 1 else None,
            "intervals": "95 %, 2000 bootstrap draws of categories; corpus figures: jackknife that "
                         "leaves out categories",
            "versions": utils.versions()},
        "reasons": {}}


def _per_row(rows: list[dict], found: list[list[Answer | None]],
             embedder) -> dict[str, list[float | None]]:
    """The figures that have a value per row, None where it is not defined."""
    groups = [row["preds"] for row in rows]
    exact = [answers.figures(of_row, row["preds"], answers.num_answers(row))
             for row, of_row in zip(rows, found, strict=True)]
    keys = {"yield": f"yield@{len(groups[0])}"}
    return {keys.get(key, key): [of_row[key] for of_row in exact] for key in exact[0]} | (
        diversity.per_row(groups, [embedder.encode(texts) for texts in groups]))


def _summarise_one(name: str, rows: list[dict], values: dict[str, list[float | None]],
                   sources: Sources, vocabulary: int) -> dict:
    """All figures of one system, and counts; `reasons` for what is None."""
    categories, groups = [row["category"] for row in rows], [row["preds"] for row in rows]
    figures: dict = {key: rounded(statistics.cluster_interval(of_rows, categories))
                     for key, of_rows in values.items()}
    figures["collision_ratio"] = rounded(_collision_ratio(rows, values["collision"]))
    # Whole categories are left out, too: their replies hold the same words.
    together: dict[str, list[str]] = {}
    for category, texts in zip(categories, groups, strict=True):
        together.setdefault(category, []).extend(texts)
    figures |= diversity.of_corpus(list(together.values()), vocabulary)
    control = name.startswith(CONTROL)
    seconds = None if control else sources.summary(name).get("seconds_per_row")
    figures |= common.count_replies(groups) | {
        "control": control, "seconds_per_row": None if seconds is None else figure(seconds)}
    figures["reasons"] = {key: WHY_NONE.get(key, diversity.why_none(len(groups[0])))
                          for key, value in figures.items() if value is None}
    return figures


def _collision_ratio(rows: list[dict], collisions: list[float | None]) -> Figure | None:
    """Collision over that of uniform draws, of the rows that list all their right answers."""
    # Sums are divided, not rows: a list of 200 answers would weigh ten times one of 20.
    pairs = [(collision, 1 / answers.num_answers(row), row["category"])
             for row, collision in zip(rows, collisions, strict=True)
             if collision is not None and answers.num_answers(row)]
    if not pairs:
        return None
    of_system, of_uniform, categories = zip(*pairs, strict=True)
    return statistics.cluster_ratio(of_system, of_uniform, categories)


def _minus(a: Sequence[float | None], b: Sequence[float | None]) -> list[float | None]:
    """a - b where both are defined."""
    return [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]


# ---- at equal validity --------------------------------------------------------------------------


def matched_yield(ours: list[list[Answer | None]], theirs: list[list[Answer | None]],
                  categories: Sequence[str]) -> dict:
    """The difference in yield at equal validity, as statistics.matched_difference has it.

    Per row, of both systems as many right replies as the poorer one has are compared; a row counts
    where both have two. Returns difference, prompts, left_out, and responses per system.
    """
    results = []
    # row by row, since the interval of matched_difference takes rows to be independent
    for number, pair in enumerate(zip(ours, theirs, strict=True)):
        measures = [partial(_yield_among, of_row) for of_row in pair]
        valid = [[[answer is not None for answer in of_row]] for of_row in pair]
        results.append(statistics.matched_difference(*measures, *valid, seed=number))
    differences = [result["difference"] and result["difference"]["mean"] for result in results]
    return {"difference": rounded(statistics.cluster_interval(differences, categories)),
            **{key: sum(result[key] for result in results)
               for key in ("prompts", "left_out", "responses")}}


def _yield_among(of_row: list[Answer | None], _: int, keep: list[int]) -> int:
    return len({of_row[i] for i in keep})
