"""Does a new token ask for a format, and only where it should?

Figures of each system, for rows with `asks_format`, `label` (error or correct), `negated`,
`messages`, one reply, and maybe `seen_phrasing` (the same question under an instruction sentence of
the training set; such rows count in `transfer` alone).

| figure            | rows      | meaning                                                          |
| follow            | asking    | share of replies that are the wanted line of JSON                |
| leak              | others    | the same share where the format is forbidden (leak_negated) or   |
|                   |           | not mentioned (leak_silent)                                      |
| follow_minus_leak | both      | their difference; a model that always, or never, uses the format |
|                   |           | has 0                                                            |
| accuracy          | asking    | share of replies in the format with the right label; a reply     |
|                   |           | without the format is a wrong answer                             |
| balanced_accuracy | asking    | mean of the two labels' accuracies; macro_f1 likewise; majority: |
|                   |           | what saying one label always scores                              |
| verdict_*         | all       | the same for all rows; where prose is asked for, the verdict is  |
|                   |           | read from the prose; unread: replies without a verdict           |
| transfer          | pairs     | follow_minus_leak, and accuracy, of unseen phrasings minus those |
|                   |           | of seen ones, same questions                                     |
| difference        | all       | this system minus the first one, same rows                       |
| token_nll         | mentions  | -log p(new token | all before) in nats; token_nll_before: before |
|                   |           | training; token_unscored: prompts that open with the only one    |
| reply_nll         | asking    | nats per token of the reference reply                            |
| retention         | held-out  | nats per token of the untrained model's own answers that no run  |
|                   |           | trains on; change against the untrained model                    |
| neighbours        | embedding | cosine of the token's embedding with that of the written-out     |
|                   |           | format, and the nearest tokens                                   |

Intervals are 95 %: Wilson for shares, else bootstrap over rows (for differences and balanced
figures within groups of rows). The figures from token_nll on need the model (probabilities.py).
"""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np

from methods import missing
from methods.delia import probabilities
from methods.delia.reading import LABELS, read_format, read_prose
from scoring import statistics
from scoring.evaluated import DASH, Evaluated, Figure, Table, with_interval

SHOWN = ("ratio", "follow", "leak", "leak_negated", "leak_silent", "follow_minus_leak", "accuracy",
         "balanced_accuracy", "macro_f1", "verdict_accuracy", "verdict_balanced_accuracy",
         "verdict_macro_f1", "unread", "cut", "token_nll", "token_nll_before", "reply_nll")
# parts of a figure, as (figure, part); the figure itself is None where it is undefined
NESTED = (("retention", "nll"), ("retention", "change"), ("transfer", "follow_minus_leak"),
          ("transfer", "accuracy"), ("difference", "follow_minus_leak"),
          ("difference", "balanced_accuracy"))


class Verdicts(NamedTuple):
    """Per row, as arrays (N,) of labels or bools.

    parsed: the label in the format. read: that, or else the verdict in prose where prose is asked
    for. Both are None where there is none.
    """

    truth: np.ndarray
    parsed: np.ndarray
    read: np.ndarray
    asks: np.ndarray
    negated: np.ndarray

    @property
    def formatted(self) -> np.ndarray:
        """1.0 for replies in the format, else 0.0."""
        return np.array([label is not None for label in self.parsed], dtype=float)

    @property
    def is_right(self) -> np.ndarray:
        """1.0 for replies in the format with the right label, else 0.0."""
        return (self.truth == self.parsed).astype(float)


def measure(systems: dict[str, list[dict]], sources, args) -> Evaluated:
    """The figures of every system, and a line of every reply.

    systems: {name: rows with one pred each}; the first is the baseline of the differences.
    """
    if why := _why_not(systems):
        return missing.not_the_methods(why)
    # retention compares all systems on one set of answers, so it is chosen before any is measured
    held_out, no_held_out = probabilities.held_out_rows(sources)
    baseline = _by_phrasing(next(iter(systems.values())))[0]
    before = probabilities.BeforeTraining(baseline, held_out)
    summary, lines = {"systems": {}}, []
    for name, rows in systems.items():
        unseen, seen = _by_phrasing(rows)
        # phrasings of the training set would flatter the figures, so they count in transfer alone
        figures, reasons = reply_figures(unseen)
        figures["transfer"] = transfer(unseen, seen)
        if figures["transfer"] is None:
            reasons["transfer"] = "too few questions stand under unseen and seen phrasings"
        is_first = not summary["systems"]
        figures["difference"] = None if is_first else difference(unseen, baseline)
        if is_first:
            reasons["difference"] = "the first system is the baseline"
        of_model, why_missing = probabilities.model_figures(
            unseen, sources, name, before, no_held_out)
        summary["systems"][name] = figures | of_model | {"reasons": reasons | why_missing}
        lines += _lines(name, rows)
    return Evaluated(summary, lines)


def _why_not(systems: dict[str, list[dict]]) -> str | None:
    """Why the rows are not the method's, or None."""
    for name, rows in systems.items():
        if any("asks_format" not in row for row in rows):
            return f"the rows of {name} do not say whether they ask for the format"
        for number, row in enumerate(rows, 1):
            if row.get("label") not in LABELS or "negated" not in row:
                return (f"row {number} of {name} needs a label ({' or '.join(LABELS)}), and "
                        "negated, whether it forbids the format")
        # read_systems pads all rows of a file to one length, so the first row is enough
        if len(rows[0]["preds"]) != 1:
            return (f"{name} has {len(rows[0]['preds'])} replies a row, these figures read one "
                    "(infer.py --num_response_per_input 1)")
        # without one of the two kinds, follow or leak would be undefined
        if {row["asks_format"] for row in _by_phrasing(rows)[0]} != {True, False}:
            return (f"{name} needs rows that ask for the format and rows that do not, under unseen "
                    "phrasings (data/delia/test.jsonl has both)")
    return None


def _by_phrasing(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(rows with an unseen instruction sentence, those with one of the training set)."""
    return ([row for row in rows if not row.get("seen_phrasing")],
            [row for row in rows if row.get("seen_phrasing")])


def _lines(name: str, rows: list[dict]) -> list[dict]:
    v = verdicts(rows)
    return [{"system": name, "prompt": row["prompt"], "phrasing": row.get("phrasing"),
             "label": row["label"], "asks_format": row["asks_format"], "negated": row["negated"],
             "reply": row["preds"][0], "parsed": parsed, "read": read}
            for row, parsed, read in zip(rows, v.parsed, v.read, strict=True)]


# ---- figures of the replies ---------------------------------------------------------------------


def verdicts(rows: list[dict]) -> Verdicts:
    parsed = [read_format(row["preds"][0]) for row in rows]
    # where the format is asked for, a right verdict in prose is still a wrong answer
    read = [label or (None if row["asks_format"] else read_prose(row["preds"][0]))
            for row, label in zip(rows, parsed, strict=True)]
    labels = ([row["label"] for row in rows], parsed, read)
    flags = ([row["asks_format"] for row in rows], [row["negated"] for row in rows])
    # in an array of strings, None would become the text "None"
    return Verdicts(*(np.array(column, dtype=object) for column in labels),
                    *(np.array(column, dtype=bool) for column in flags))


def reply_figures(rows: list[dict]) -> tuple[dict, dict[str, str]]:
    """The figures from follow to verdict_*, and reasons of missing ones.

    At least one row must ask for the format, and one must not.
    """
    v = verdicts(rows)

    def share(where: np.ndarray) -> Figure | None:
        return statistics.share_interval(int(v.formatted[where].sum()), int(where.sum()))

    asks, rest = v.asks, ~v.asks
    of_verdicts = label_figures(v.truth, v.read)
    figures = {
        "rows": len(rows), "follow": share(asks), "leak": share(rest),
        "leak_negated": share(v.negated), "leak_silent": share(rest & ~v.negated),
        # how many rows ask for the format is decided by the data set, so it is not resampled
        "follow_minus_leak": statistics.bootstrap_within(
            _minus, v.formatted[asks], v.formatted[rest]),
        **label_figures(v.truth[asks], v.parsed[asks]),
        **{f"verdict_{name}": value for name, value in of_verdicts.items()},
        "unread": sum(label is None for label in v.read),
        "cut": sum(row.get("warnings", {}).get("cut", 0) for row in rows)}
    reasons = {"leak_negated": "no row forbids the format",
               "leak_silent": "no row leaves the format unmentioned"}
    return figures, {name: why for name, why in reasons.items() if figures[name] is None}


def label_figures(truth: np.ndarray, answers: np.ndarray) -> dict:
    """accuracy, balanced_accuracy and macro_f1 with intervals, and `majority`, the same scores of
    always saying the more frequent label.

    Balanced figures are resampled within each label: how often a label occurs is a choice of the
    data set.
    """
    codes, groups = by_label(truth, answers)
    most = max(LABELS, key=lambda label: (truth == label).sum())
    always = np.full(len(truth), most, dtype=object)
    # scikit-learn takes 2 ms a call, too long for 2,000 resamples: these come from counts
    balanced = statistics.bootstrap_within(mean_of_means, *groups)
    macro_f1 = statistics.bootstrap_within(macro_f1_of_codes, *codes)
    # means are from scikit-learn, so only the intervals rest on our own formulas
    return {
        "accuracy": statistics.share_interval(int((truth == answers).sum()), len(truth)),
        "balanced_accuracy": balanced | {"mean": statistics.balanced_accuracy(truth, answers)},
        "macro_f1": macro_f1 | {"mean": statistics.macro_f1(truth, answers, LABELS)},
        "majority": {"label": most, "accuracy": float((truth == most).mean()),
                     "balanced_accuracy": statistics.balanced_accuracy(truth, always),
                     "macro_f1": statistics.macro_f1(truth, always, LABELS)}}


def by_label(truth: np.ndarray, answers: np.ndarray) -> tuple[list[list[int]], list[np.ndarray]]:
    """The rows of each true label: coded answers, and for labels that occur, which are right."""
    codes = [[_code(answer) for answer in answers[truth == label]] for label in LABELS]
    # as in scikit-learn, a label without rows is left out here, but counts as 0 in macro-F1
    right = [answers[truth == label] == label for label in LABELS if (truth == label).any()]
    return codes, right


def _code(label: str | None) -> int:
    """A label's place in LABELS; a verdict that could not be read is a third kind of answer."""
    return len(LABELS) if label is None else LABELS.index(label)


def _minus(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.mean() - b.mean())


def mean_of_means(*groups: np.ndarray) -> float:
    """Balanced accuracy: the mean over labels of the share of right rows (1.0 right, 0.0 wrong)."""
    return float(np.mean([group.mean() for group in groups]))


def macro_f1_of_codes(*codes: np.ndarray) -> float:
    """Mean F1 of the labels from the coded answers of each label's rows."""
    kinds = len(LABELS) + 1
    # the column of unread answers is cut off: they are false negatives, and positives of no label
    confusion = np.array([np.bincount(np.asarray(answers, dtype=int), minlength=kinds)
                          for answers in codes])[:, : len(LABELS)]  # (truth, answer)
    # F1 = 2 TP / (rows of the label + answers that name it); at least 1, so that 0 / 0 gives 0
    sizes = np.array([len(answers) for answers in codes])
    return float(np.mean(2 * np.diag(confusion) / np.maximum(1, sizes + confusion.sum(0))))


def transfer(unseen: list[dict], seen: list[dict]) -> dict | None:
    """Unseen minus seen phrasings, question by question: follow_minus_leak and accuracy, paired.

    None unless rows that ask for the format and rows that do not can be paired.
    """
    # the rows of both kinds come in any order, and a seen phrasing may be missing
    by_question = {question_of(row): row for row in seen}
    pairs = [(row, by_question[question_of(row)]) for row in unseen
             if question_of(row) in by_question]
    a, b = verdicts([row for row, _ in pairs]), verdicts([row for _, row in pairs])
    if a.asks.all() or not a.asks.any():  # also where there are no pairs
        return None
    follows = a.formatted - b.formatted
    return {"pairs": len(pairs),
            "follow_minus_leak": statistics.bootstrap_within(
                _minus, follows[a.asks], follows[~a.asks]),
            "accuracy": statistics.interval((a.is_right - b.is_right)[a.asks].tolist())}


def question_of(row: dict) -> tuple[str, bool, bool]:
    """What two rows with different instruction sentences share.

    The text before the sentence, and what kind of sentence it is.
    """
    # in data/delia the instruction sentence is the last paragraph of every prompt
    return row["prompt"].rpartition("\n\n")[0], row["asks_format"], row["negated"]


def difference(rows: list[dict], baseline: list[dict]) -> dict[str, Figure]:
    """This system minus the baseline on the same rows, paired."""
    a, b = verdicts(rows), verdicts(baseline)
    follows, right = a.formatted - b.formatted, a.is_right - b.is_right
    # balanced accuracy is a mean over labels, and so is the difference of two of them
    of_labels = [right[a.asks & (a.truth == label)] for label in LABELS]
    return {"follow_minus_leak": statistics.bootstrap_within(
                _minus, follows[a.asks], follows[~a.asks]),
            "balanced_accuracy": statistics.bootstrap_within(
                mean_of_means, *(group for group in of_labels if len(group)))}


# ---- tables -------------------------------------------------------------------------------------


def tables(summary: dict) -> list[Table]:
    """One table with a system a column; what does not fit into it stands in the notes."""
    title = "95 % intervals over rows; nll in nats"
    systems = summary["systems"]
    if not systems:
        return missing.empty_tables(title, summary)
    first = next(iter(systems))
    lines = [(name.replace("_", " "), [system[name] for system in systems.values()])
             for name in SHOWN]
    for group, name in NESTED:
        label = f"minus {first}" if group == "difference" else group
        lines.append((f"{label}: {name.replace('_', ' ')}",
                      [system[group] and system[group][name] for system in systems.values()]))
    # a figure that no system has would be a line of dashes
    rows = [[label, *map(_text, values)] for label, values in lines
            if any(value is not None for value in values)]
    return [Table(title, ["figure", *systems], rows, _notes(systems))]


def _notes(systems: dict[str, dict]) -> list[str]:
    """What a constant answer scores, where the tokens' embeddings lie, and what is missing."""
    first = next(iter(systems.values()))
    majority, verdict = first["majority"], first["verdict_majority"]
    notes = [f"always saying \"{majority['label']}\" in the format: accuracy "
             f"{majority['accuracy']:.2f}, balanced {majority['balanced_accuracy']:.2f}, macro-F1 "
             f"{majority['macro_f1']:.2f} (all rows: accuracy {verdict['accuracy']:.2f})"]
    for name, system in systems.items():
        for token, near in (system["neighbours"] or {}).items():
            words = ", ".join(json.dumps(text, ensure_ascii=False)
                              for text, _ in near["nearest"][:6])
            notes.append(
                f"{name}: {token} has cosine {near['description']:.3f} with the written-out format "
                f"(more than {100 * near['less_like_description']:.1f} % of all tokens), length "
                f"{near['norm_ratio']:.2f} of the mean; nearest: {words}")
        # summaries of earlier versions lack the count
        if unscored := system.get("token_unscored"):
            notes.append(f"{name}: {unscored} prompts open with their only new token, which "
                         "nothing predicts; they are not in token nll")
        of_model = {figure: why for figure, why in system["reasons"].items()
                    if figure in probabilities.FIGURES}
        notes += missing.notes(name, of_model)
    return notes


def _text(value: Figure | float | None) -> str:
    if value is None:
        return DASH
    return with_interval(value) if isinstance(value, dict) else f"{value:g}"
