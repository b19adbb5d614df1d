"""Choose N of M responses: as different as possible among those that are relevant to their row.

- mmr: maximal marginal relevance (Carbonell and Goldstein, 1998); next comes the response that is
  relevant to the row and unlike those taken;
- dpp: greedy maximum a posteriori of a determinantal point process (Chen et al., arXiv:1709.05135);
  next comes the response that adds most volume;
- medoids: N clusters by average linkage, and of each the response nearest to its others.

Embeddings are rows of unit length. `relevance` is the cosine of row and response; responses below
min_relevance are taken only where the others do not suffice. All functions return indices in the
order in which they choose.

Shapes: M responses, D dimensions.
"""

from __future__ import annotations

import numpy as np

BALANCE = 0.5  # mmr's weight of relevance against difference
# Of the test set's own replies 99 % are at least as relevant, of other rows' replies 14 %.
MIN_RELEVANCE = 0.25


def choose(
    how: str,
    embeddings: np.ndarray,
    relevance: np.ndarray,
    number: int,
    min_relevance: float = MIN_RELEVANCE,
) -> list[int]:
    """Indices of `number` of the M responses; embeddings (M, D), relevance (M,), number <= M."""
    if number == 0:  # a row whose responses are all empty, or were all refused by a server
        return []
    relevant = np.flatnonzero(relevance >= min_relevance)
    if len(relevant) < number:  # too few to choose from: the most relevant ones are taken
        return np.argsort(-relevance, kind="stable")[:number].tolist()
    chosen = SELECTORS[how](embeddings[relevant], relevance[relevant], number)
    return relevant[chosen].tolist()


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
    """
    kernel = embeddings @ embeddings.T
    residual = np.diag(kernel).astype(float).copy()  # squared length outside the span
    parts = np.zeros((number, len(kernel)))
    # Alone, all responses have the same volume, so relevance decides on the first.
    chosen = [int(relevance.argmax())]
    while len(chosen) < number:
        step, last = len(chosen) - 1, chosen[-1]
        overlap = kernel[last] - parts[:step, last] @ parts[:step]
        # Equal responses leave a residual of 0, by which nothing may be divided.
        parts[step] = overlap / np.sqrt(max(residual[last], 1e-12))
        residual -= parts[step] ** 2
        residual[chosen] = -np.inf
        chosen.append(int(residual.argmax()))
    return chosen


def medoids(embeddings: np.ndarray, relevance: np.ndarray, number: int) -> list[int]:
    """One response of each of `number` clusters, those of large clusters first."""
    # Imported here because it takes a quarter of a second, and infer.py --help reads MIN_RELEVANCE.
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    distance = np.clip(1 - embeddings @ embeddings.T, 0, None)  # rounding can go below 0
    np.fill_diagonal(distance, 0)
    # Every response is a cluster; `linkage` refuses a single one.
    if number == len(distance):
        return list(range(number))
    tree = linkage(squareform(distance, checks=False), "average")
    label = fcluster(tree, number, "maxclust")
    clusters = [np.flatnonzero(label == c) for c in np.unique(label)]
    clusters.sort(key=lambda members: (-len(members), members[0]))
    chosen = [int(c[distance[np.ix_(c, c)].sum(1).argmin()]) for c in clusters]
    # Merges at equal heights can leave fewer clusters than asked for.
    for extra in np.argsort(-relevance, kind="stable").tolist():
        if len(chosen) < number and extra not in chosen:
            chosen.append(extra)
    return chosen


SELECTORS = {"mmr": mmr, "dpp": dpp, "medoids": medoids}
