"""Choose N of M responses that were drawn: as different as possible among those that belong to their row.

- mmr: maximal marginal relevance (Carbonell and Goldstein, 1998); next comes the response that is close to
  the row and far from those taken;
- dpp: greedy maximum a posteriori of a determinantal point process (Chen et al., arXiv:1709.05135); next comes
  the response that adds most volume;
- medoids: N clusters by average linkage, and of each the response nearest to its others.

Embeddings are rows of unit length. `relevance` is the cosine of row and response; responses below the floor
are taken only where the others do not suffice. All functions return indices in the order in which they choose.
"""

from __future__ import annotations

import numpy as np

BALANCE = 0.5  # mmr's weight of relevance against difference
FLOOR = 0.25  # least cosine of row and response: 99 % of the test set's own replies pass, 14 % of other rows'


def choose(how: str, embeddings: np.ndarray, relevance: np.ndarray, number: int, floor: float = FLOOR) -> list[int]:
    """Indices of `number` of the M responses; embeddings (M, D), relevance (M,), number <= M."""
    good = np.flatnonzero(relevance >= floor)
    if len(good) < number:  # the best of the rest make up the number
        return np.argsort(-relevance, kind="stable")[:number].tolist()
    chosen = SELECTORS[how](embeddings[good], relevance[good], number)
    return good[chosen].tolist()


def mmr(embeddings: np.ndarray, relevance: np.ndarray, number: int) -> list[int]:
    """Next: the largest BALANCE x relevance - (1 - BALANCE) x highest cosine to those taken."""
    cosine = embeddings @ embeddings.T
    chosen = [int(relevance.argmax())]
    while len(chosen) < number:
        score = BALANCE * relevance - (1 - BALANCE) * cosine[:, chosen].max(1)
        score[chosen] = -np.inf
        chosen.append(int(score.argmax()))
    return chosen


def dpp(embeddings: np.ndarray, relevance: np.ndarray, number: int) -> list[int]:
    """Next: the response whose embedding has the largest part outside the span of those taken.

    Cholesky steps on the cosine matrix, algorithm 1 of the paper; O(M N) beside the matrix itself.
    The most relevant response comes first, since alone all have the same volume.
    """
    kernel = embeddings @ embeddings.T
    rest = np.diag(kernel).astype(float).copy()  # squared length outside the span
    parts = np.zeros((number, len(kernel)))
    chosen = [int(relevance.argmax())]
    while len(chosen) < number:
        step, last = len(chosen) - 1, chosen[-1]
        parts[step] = (kernel[last] - parts[:step, last] @ parts[:step]) / np.sqrt(max(rest[last], 1e-12))
        rest -= parts[step] ** 2
        rest[chosen] = -np.inf
        chosen.append(int(rest.argmax()))
    return chosen


def medoids(embeddings: np.ndarray, relevance: np.ndarray, number: int) -> list[int]:
    """One response of each of `number` clusters, those of large clusters first."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    distance = np.clip(1 - embeddings @ embeddings.T, 0, None)
    np.fill_diagonal(distance, 0)
    if number == len(distance):
        return list(range(number))
    label = fcluster(linkage(squareform(distance, checks=False), "average"), number, "maxclust")
    clusters = sorted((np.flatnonzero(label == c) for c in np.unique(label)), key=lambda c: (-len(c), c[0]))
    chosen = [int(c[distance[np.ix_(c, c)].sum(1).argmin()]) for c in clusters]
    for extra in np.argsort(-relevance, kind="stable").tolist():  # equal heights can leave fewer clusters than asked
        if len(chosen) < number and extra not in chosen:
            chosen.append(extra)
    return chosen


SELECTORS = {"mmr": mmr, "dpp": dpp, "medoids": medoids}
