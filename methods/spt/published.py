"""The columns of the paper's table: replies against what the person really said, x 100.

Reproduced as published, faults included, so that the numbers can be compared. F1 is that of the
bags of whitespace tokens; DIST is over the pooled replies of all rows, so it falls with their
number; AVG gain is the mean over the other columns of the gain over the first file, in per cent.
"""

from __future__ import annotations

import csv
import io
from importlib.util import find_spec

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from rouge_score.rouge_scorer import RougeScorer

from scoring import metrics

BERT_COLUMNS = ("BERT-F1", "BERT-P", "BERT-R")
# this is the order of the paper's table; AVG gain stays last, since it is made from the others
COLUMNS = ("F1", "BLEU", "R-1", "R-2", "R-L", *BERT_COLUMNS, "DIST-1", "DIST-2", "AVG gain")
BERT_MODEL = "microsoft/deberta-xlarge-mnli"
BERT_LAYERS = 40  # bert-score's choice for this model
ROUGE = {"R-1": "rouge1", "R-2": "rouge2", "R-L": "rougeL"}


def overlap(reply: str, reference: str) -> dict[str, float]:
    """F1 and ROUGE of one reply, 0 to 1."""
    # the published scores are without a stemmer
    rouge = RougeScorer(list(ROUGE.values())).score(reference, reply)
    return {"F1": metrics.token_f1(reply, reference),
            **{column: rouge[kind].fmeasure for column, kind in ROUGE.items()}}


def columns_of(replies: list[str], references: list[str], overlaps: list[dict]
               ) -> tuple[dict[str, float | None], str, dict[str, str]]:
    """(the published columns but AVG gain, sacrebleu's signature, reasons of missing columns).

    overlaps: `overlap` of every reply; other keys are ignored.
    """
    bleu, signature = metrics.corpus_bleu(replies, references)
    bert = bert_scores(replies, references)
    values = {column: sum(of_reply[column] for of_reply in overlaps) / len(overlaps)
              for column in ("F1", *ROUGE)}
    values |= {f"DIST-{n}": metrics.plain_distinct(replies, n) for n in (1, 2)}
    values |= dict.fromkeys(BERT_COLUMNS) if isinstance(bert, str) else bert
    columns = {column: None if values.get(column) is None else 100 * values[column]
               for column in COLUMNS[:-1]} | {"BLEU": bleu}  # BLEU is out of 100 already
    reasons = dict.fromkeys(BERT_COLUMNS, bert) if isinstance(bert, str) else {}
    reasons |= {column: "no reply is long enough" for column, value in columns.items()
                if value is None and column not in reasons}
    return columns, signature, reasons


def bert_scores(replies: list[str], references: list[str]) -> dict[str, float] | str:
    """The means of BERTScore as published (no idf, no rescaling), or why they are left out.

    Nothing is downloaded for it: neither the package nor the model.
    """
    if find_spec("bert_score") is None:
        return "bert-score is not installed"
    try:
        folder = snapshot_download(BERT_MODEL, local_files_only=True)
    except LocalEntryNotFoundError:
        return f"{BERT_MODEL} is not on this machine"
    import bert_score  # optional, not among the requirements

    # bert-score chooses the layer by the hub id; given a folder, it must be told
    precision, recall, f1 = bert_score.score(
        replies, references, model_type=folder, num_layers=BERT_LAYERS)
    # BERT_COLUMNS has F1 first, as the paper, but bert-score returns it last
    means = (float(scores.mean()) for scores in (f1, precision, recall))
    return dict(zip(BERT_COLUMNS, means, strict=True))


def mean_gain(columns: dict, baseline: dict) -> float | None:
    """Mean over the published columns of the gain over the baseline, in per cent."""
    # Missing columns (BERTScore) are left out, so the mean compares with the paper's only where
    # all ten are there. A column that is 0 in the baseline has no relative gain.
    gains = [100 * (columns[c] / baseline[c] - 1) for c in COLUMNS[:-1]
             if columns[c] is not None and baseline[c]]
    return sum(gains) / len(gains) if gains else None


def as_csv(systems: dict[str, dict]) -> bytes:
    """The published table: one header, a line of values for each of {name: columns}."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["system", *COLUMNS])
    for name, columns in systems.items():
        values = ["" if columns[c] is None else f"{columns[c]:.2f}" for c in COLUMNS]
        writer.writerow([name, *values])
    return out.getvalue().encode("utf-8")
