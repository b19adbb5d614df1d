"""The diversity figures that need no judge and no classes of meaning, for rows of every kind.

groups: per row its k replies; undefined is None, never 0 or nan.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from scoring import metrics, statistics
from scoring.evaluated import Figure, rounded

ONE_REPLY = "one response a prompt has nothing to differ from"
NOTHING = "no response holds what it counts"


def per_row(groups: Sequence[list[str]],
            embeddings: Sequence[np.ndarray]) -> dict[str, list[float | None]]:
    """The figures that have a value per row; embeddings: per row (k, D) unit vectors."""
    # rows have one reply at least, so that a length is never None
    lengths = [metrics.mean_length(texts) for texts in groups]
    return {
        "sbert_diversity": [metrics.pairwise_diversity(vectors) for vectors in embeddings],
        "vendi": [metrics.vendi_score(vectors) for vectors in embeddings],
        "duplicates": [metrics.duplicates(texts) for texts in groups],
        "self_bleu": [metrics.self_bleu(texts) for texts in groups],
        "distinct-1 per prompt": [metrics.distinct_n(texts, 1) for texts in groups],
        "distinct-2 per prompt": [metrics.distinct_n(texts, 2) for texts in groups],
        "words": [words for words, _ in lengths],
        "characters": [characters for _, characters in lengths],
    }


def of_corpus(groups: Sequence[Sequence[str]], vocabulary: int) -> dict[str, Figure | None]:
    """The figures of all replies together; their intervals leave out blocks of groups.

    They have no value per row, so they are left out of paired differences.
    """
    # A figure of a pool grows or falls with the pool, so it is never the mean of its rows' figures.
    measures = {f"distinct-{n}": partial(metrics.distinct_n, n=n) for n in (1, 2)}
    measures |= {f"ead-{n}": partial(metrics.ead, n=n, vocab_size=vocabulary) for n in (1, 2)}
    return {name: rounded(statistics.jackknife(measure, groups))
            for name, measure in measures.items()}


def why_none(k: int) -> str:
    """Why one of these figures is not defined for rows of k replies."""
    return ONE_REPLY if k == 1 else NOTHING
