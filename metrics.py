"""Diversity metrics, intervals and comparisons. Pure functions of texts, embeddings and numbers.

Sources: corpus distinct-n and SBERT diversity as in arXiv:2412.03343; distinct-n from Li et al.,
arXiv:1510.03055; yield@k as the number of distinct and coherent responses among k; others at their place.
What is not defined (one response, no n-gram) is None, never 0 or nan.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

PUNCTUATION = set(string.punctuation) | {"``", "''", "...", "..", "–", "…", "•", "“", "”", "‘", "’"}


@lru_cache(maxsize=100_000)
def words(text: str) -> tuple[str, ...]:
    """Lower-cased NLTK (Penn Treebank) word tokens."""
    from nltk.tokenize import NLTKWordTokenizer

    return tuple(word.lower() for word in NLTKWordTokenizer().tokenize(text))


def grams(texts: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All n-grams of a pool of texts, but those that hold a punctuation token, as published.

    A text of one token holds none.
    """
    found = []
    for text in texts:
        tokens = words(text)
        if len(tokens) > 1:
            runs = zip(*(tokens[i:] for i in range(n)), strict=False)
            found += [run for run in runs if not PUNCTUATION & set(run)]
    return found


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Distinct n-grams over all n-grams of a pool of texts, in (0, 1]; higher is more diverse.

    n-grams that hold a punctuation token do not count, and texts of one token hold none, as published.
    None if there is no n-gram. The score falls as the pool grows: compare pools of one size only.
    """
    found = grams(texts, n)
    return len(set(found)) / len(found) if found else None


def pairwise_diversity(embeddings: np.ndarray) -> float | None:
    """1 - mean cosine over the pairs of one prompt's responses; embeddings (N, D) of unit length.

    None for fewer than two responses. Published corpus score = mean over prompts with equal N.
    """
    n = len(embeddings)
    if n < 2:
        return None
    cosine = embeddings @ embeddings.T
    return float(1 - (cosine.sum() - np.trace(cosine)) / (n * (n - 1)))


def interval(values: Sequence[float], rounds: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % percentile bootstrap interval over prompts: (mean, low, high)."""
    values = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(values), (rounds, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive scores above a negative, ties half (area under the ROC curve)."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positive, negative]))
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))

# ---- more ways to be diverse --------------------------------------------------------------------


def ead(texts: Sequence[str], n: int, vocab_size: int) -> float | None:
    """Expectation-adjusted distinct (Liu et al., arXiv:2202.13587): N / (V (1 - ((V - 1) / V)^C)).

    N distinct of C n-grams in all, over the number that C uniform draws from V kinds would give. Unlike
    distinct-n it does not fall with length; above 1 where texts vary more than such draws. Figures with
    different V do not compare. None without n-grams.
    """
    found = grams(texts, n)
    if not found:
        return None
    return len(set(found)) / (vocab_size * -np.expm1(len(found) * np.log1p(-1 / vocab_size)))


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean sentence BLEU (sacrebleu) of each response against all the others, 0 to 100; lower is more diverse.

    Empty responses are left out; None if fewer than two remain.
    """
    from sacrebleu import sentence_bleu

    full = [text for text in texts if text.strip()]
    if len(full) < 2:
        return None
    return float(np.mean([sentence_bleu(text, full[:i] + full[i + 1 :]).score for i, text in enumerate(full)]))


def self_bleu_signature(num_references: int) -> str:
    """sacrebleu's signature of the scores above, to be printed with them."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)  # as sentence_bleu has it
    bleu.sentence_score("a b", ["a b"] * num_references)
    return str(bleu.get_signature())


def vendi_score(embeddings: np.ndarray) -> float | None:
    """Effective number of different responses (Friedman and Dieng, arXiv:2210.02410), order 1, in [1, N].

    exp of the entropy of the eigenvalues of the cosine matrix over N; embeddings (N, D) of unit length.
    """
    n = len(embeddings)
    if not n:
        return None
    values = np.linalg.eigvalsh(embeddings @ embeddings.T / n)
    values = values[values > 1e-12]
    return float(np.clip(np.exp(-(values * np.log(values)).sum()), 1.0, n))


def normalise(text: str) -> str:
    """What an exact duplicate shares: the text without case, outer punctuation of words and extra spaces."""
    return " ".join(word.strip(string.punctuation + "“”‘’…–") for word in text.casefold().split())


def duplicates(texts: Sequence[str]) -> float | None:
    """Share of responses that repeat an earlier one."""
    return 1 - len({normalise(text) for text in texts}) / len(texts) if len(texts) else None


def mean_length(texts: Sequence[str]) -> tuple[float, float] | None:
    """(words, characters) per response."""
    if not len(texts):
        return None
    return float(np.mean([len(text.split()) for text in texts])), float(np.mean([len(text) for text in texts]))


def incoherence_rate(scores: Sequence[float | None], threshold: float = 5) -> tuple[float | None, int]:
    """(share of the rated responses at or below `threshold` of 10, number of unrated ones)."""
    rated = [score for score in scores if score is not None]
    return (float(np.mean([score <= threshold for score in rated])) if rated else None), len(scores) - len(rated)


# ---- classes of equal meaning -------------------------------------------------------------------


def partition(similarity: np.ndarray, threshold: float) -> list[int]:
    """Class of each of N responses, numbered by first appearance, from a symmetric (N, N) matrix.

    Average linkage: classes join while the mean similarity of their pairs reaches the threshold, the closest
    pair of classes first. All pairs count and their order does not, unlike comparing each response with the
    first one of every class; one doubtful pair does not chain two classes together.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    n = len(similarity)
    if n < 2:
        return list(range(n))
    distance = np.clip(1 - (similarity + similarity.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    label = fcluster(linkage(squareform(distance, checks=False), "average"), 1 - threshold + 1e-9, "distance")
    first: dict[int, int] = {}
    return [first.setdefault(int(c), len(first)) for c in label]


def distinct_k(classes: Sequence[int]) -> int:
    """Number of classes among k responses (NoveltyBench, arXiv:2504.05228)."""
    return len(set(classes))


def utility_k(classes: Sequence[int], utilities: Sequence[float | None], patience: float = 0.8) -> float | None:
    """Utility of k responses to a reader who goes on with probability p (NoveltyBench, arXiv:2504.05228, section 3).

    (1 - p) / (1 - p^k) x sum over i of p^(i-1) x utility_i, where only the first response of a class counts.
    None if there is none, or if a utility that counts is None.
    """
    seen: set[int] = set()
    total = 0.0
    for i, (c, utility) in enumerate(zip(classes, utilities, strict=True)):
        if c not in seen:
            seen.add(c)
            if utility is None:
                return None
            total += patience**i * utility
    return (1 - patience) / (1 - patience ** len(classes)) * total if len(classes) else None


def semantic_entropy(classes: Sequence[int]) -> float | None:
    """Discrete semantic entropy (Kuhn et al., arXiv:2302.09664) over class frequencies, in nats."""
    return entropy(np.unique(classes, return_counts=True)[1])


def effective_number(classes: Sequence[int]) -> float | None:
    """exp of the semantic entropy: as many equally frequent classes would have it; at most k."""
    nats = semantic_entropy(classes)
    return None if nats is None else float(np.exp(nats))


def yield_of_classes(classes: Sequence[int], coherent: Sequence[bool]) -> int:
    """yield@k for a given partition: classes with at least one coherent response."""
    return len({c for c, good in zip(classes, coherent, strict=True) if good})


# ---- does a decode handle mean anything ---------------------------------------------------------


def mutual_information(x: Sequence[int], y: Sequence[int]) -> float:
    """Mutual information of two paired label sequences in nats, from their frequencies (biased upwards)."""
    _, x = np.unique(x, return_inverse=True)
    _, y = np.unique(y, return_inverse=True)
    joint = np.zeros((x.max() + 1, y.max() + 1))
    np.add.at(joint, (x, y), 1 / len(x))
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    cells = joint > 0
    return float((joint[cells] * np.log(joint[cells] / independent[cells])).sum())


def controllability(tables: Sequence[np.ndarray], rounds: int = 200, seed: int = 0) -> dict:
    """Whether number k of a prompt leads to a class of its own, whatever the seed.

    tables: per prompt the classes (numbers, seeds) of its responses. mutual_information: between number and
    class, in nats, the mean over prompts; shuffled: the same with responses moved among the numbers of their
    prompt, which is what chance gives; excess: their difference; p_value: share of shuffles that reach it.
    coincide: share of pairs of numbers with one class at one seed; stable: share of pairs of seeds with one
    class for one number. None where there is one seed, or one number.
    """
    numbers, seeds = np.shape(tables[0])
    result = {"mutual_information": None, "shuffled": None, "excess": None, "p_value": None, "coincide": None,
              "stable": None, "prompts": len(tables)}

    def agree(table: np.ndarray) -> float:  # of pairs of rows, column by column
        i, j = np.triu_indices(len(table), 1)
        return float(np.mean(table[i] == table[j]))

    if numbers > 1:
        result["coincide"] = float(np.mean([agree(np.asarray(t)) for t in tables]))
    if seeds > 1:
        result["stable"] = float(np.mean([agree(np.asarray(t).T) for t in tables]))
    if numbers > 1 and seeds > 1:
        rng, handle = np.random.default_rng(seed), np.repeat(np.arange(numbers), seeds)
        flat = [np.asarray(t).ravel() for t in tables]
        found = float(np.mean([mutual_information(handle, t) for t in flat]))
        chance = [float(np.mean([mutual_information(handle, rng.permutation(t)) for t in flat])) for _ in range(rounds)]
        result |= {"mutual_information": found, "shuffled": float(np.mean(chance)), "excess": found - float(np.mean(chance)),
                   "p_value": (1 + sum(c >= found - 1e-12 for c in chance)) / (1 + rounds)}
    return result


# ---- comparing systems --------------------------------------------------------------------------


def paired_difference(a: Sequence[float | None], b: Sequence[float | None], rounds: int = 2000,
                      seed: int = 0) -> tuple[float, float, float, int] | None:
    """Mean of a - b over the prompts where both are defined, its 95 % bootstrap interval, and their number."""
    pairs = [x - y for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return (*interval(pairs, rounds, seed), len(pairs)) if pairs else None


def matched_difference(measure_a, measure_b, coherent_a: Sequence[Sequence[bool]], coherent_b: Sequence[Sequence[bool]],
                       draws: int = 50, rounds: int = 2000, seed: int = 0) -> dict:
    """The difference a - b of a diversity measure at matched coherence: coherent responses only, equally many of each.

    measure_x(row, keep) is the measure of the responses `keep` (indices) of a row; coherent_x[row] has a bool per
    response. A row counts where both systems have two coherent responses or more; of each, as many as the poorer one
    has are drawn at random, `draws` times. So a system gains nothing from incoherent responses, nor from having more
    coherent ones. What it cannot see: the rows that are left out (counted) are the hard ones.
    Returns difference ([mean, low, high] or None), prompts, left_out, and responses per system.
    """
    rng = np.random.default_rng(seed)
    differences, responses = [], 0
    for row, pair in enumerate(zip(coherent_a, coherent_b, strict=True)):
        good = [np.flatnonzero(c) for c in pair]
        size = min(map(len, good))
        if size < 2:
            continue
        found = []
        for measure, own in zip((measure_a, measure_b), good, strict=True):
            repeats = 1 if len(own) == size else draws
            values = [measure(row, sorted(rng.choice(own, size, replace=False).tolist())) for _ in range(repeats)]
            found.append(None if None in values else float(np.mean(values)))
        if None not in found:
            differences.append(found[0] - found[1])
            responses += size
    return {"difference": list(interval(differences, rounds, seed)) if differences else None, "prompts": len(differences),
            "left_out": len(coherent_a) - len(differences), "responses": responses}


# ---- degenerate controls ------------------------------------------------------------------------
# Responses that no good metric may reward; groups holds the responses of one prompt each.


def random_words(groups: Sequence[Sequence[str]], seed: int = 0) -> list[list[str]]:
    """Responses of the same lengths, of words drawn from all responses: diverse and meaningless."""
    rng = np.random.default_rng(seed)
    pool = [word for group in groups for text in group for word in text.split()] or [""]
    return [[" ".join(pool[i] for i in rng.integers(0, len(pool), len(text.split()))) for text in group] for group in groups]


def shuffled_replies(groups: Sequence[Sequence[str]], seed: int = 0) -> list[list[str]] | None:
    """Every response under another prompt than its own: fluent and beside the point. None for a single prompt.

    The k-th responses move together, each k by a step of its own, so that no prompt keeps one of its own.
    """
    n = len(groups)
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, n, max(map(len, groups)))
    return [[groups[(i + steps[k]) % n][k % len(groups[(i + steps[k]) % n])] for k in range(len(group))]
            for i, group in enumerate(groups)]


def repeated_first(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """The first response of each prompt, again and again: coherent and all the same."""
    return [[group[0]] * len(group) for group in groups]


# ---- distributions over targets -----------------------------------------------------------------
# Exact figures come from the targets' log-probabilities, the others from counts of sampled answers. In nats.


def exact_fit(weights: Sequence[float], logps: Sequence[float]) -> dict[str, float]:
    """How a model's sequence probabilities p of the targets fit the wanted distribution w.

    kl = sum w ln(w / p), infinite where a wanted target has probability 0; outside = 1 - sum p over the wanted targets
    (w > 0), the mass of every other text; tv = (sum |w - p| + outside) / 2; entropy of w, the floor of the loss.
    """
    weights, logps = (np.asarray(x, dtype=float) for x in (weights, logps))
    wanted = weights > 0
    w, logp = weights[wanted], logps[wanted]
    outside = max(0.0, float(1 - np.exp(logp).sum()))  # rounding may bring the sum above 1
    return {"kl": float((w * (np.log(w) - logp)).sum()), "outside": outside,
            "tv": float((np.abs(w - np.exp(logp)).sum() + outside) / 2), "floor": float(-(w * np.log(w)).sum())}


def entropy(counts: Sequence[float]) -> float | None:
    """Entropy of the empirical distribution of counts (the plug-in estimate, biased low); None without counts."""
    counts = np.asarray(counts, dtype=float)
    counts = counts[counts > 0]
    if not len(counts):
        return None
    shares = counts / counts.sum()
    return max(0.0, float(-(shares * np.log(shares)).sum()))


def miller_madow(counts: Sequence[float]) -> float | None:
    """Plug-in entropy + (m - 1) / 2N for m values seen among N (Miller 1955): takes off the bias of first order."""
    plain = entropy(counts)
    if plain is None:
        return None
    counts = np.asarray(counts)
    return float(plain + (np.count_nonzero(counts) - 1) / (2 * counts.sum()))


def entropy_interval(counts: Sequence[int], rounds: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of the Miller-Madow entropy: basic bootstrap over the sampled answers.

    Resamples scatter around the plug-in entropy of what they are drawn from, so their deviations from it are taken
    off the estimate; the percentiles of the resamples themselves would lie too low.
    """
    counts = np.asarray(counts)
    if not counts.sum():
        return None
    draws = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), rounds)
    errors = np.array([miller_madow(draw) for draw in draws]) - entropy(counts)
    low, high = miller_madow(counts) - np.percentile(errors, [97.5, 2.5])
    return max(0.0, float(low)), float(high)


def share_interval(hits: int, total: int) -> tuple[float, float, float] | None:
    """A share with its 95 % Wilson interval; None of nothing."""
    if not total:
        return None
    from scipy.stats import binomtest

    interval = binomtest(hits, total).proportion_ci(method="wilson")
    return hits / total, float(interval.low), float(interval.high)


def chi_square(counts: Sequence[int], weights: Sequence[float], rounds: int = 10_000, seed: int = 0) -> dict | None:
    """Pearson's goodness of fit of counts to a distribution over the same values; None without counts.

    p_value: share of `rounds` simulated samples of that size at least as far off, which also holds where
    expected counts are small. Values of weight 0 must not be counted in.
    """
    counts, weights = np.asarray(counts, dtype=float), np.asarray(weights, dtype=float)
    total = int(counts.sum())
    if not total:
        return None
    expected = total * weights / weights.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    simulated = np.random.default_rng(seed).multinomial(total, weights / weights.sum(), rounds)
    as_far = ((simulated - expected) ** 2 / expected).sum(1) >= statistic * (1 - 1e-12)
    return {"chi_square": statistic, "dof": len(counts) - 1, "p_value": float((1 + as_far.sum()) / (1 + rounds)),
            "least_expected": float(expected.min())}


# ---- replies with a reference, and rows that belong together ------------------------------------


def cluster_interval(values: Sequence[float], groups: Sequence[str], rounds: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % percentile bootstrap interval where whole groups of values are drawn: (mean, low, high).

    Rows of one person are not independent: their interval over rows would be too narrow.
    """
    values = np.asarray(values, dtype=float)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    sums, sizes = np.bincount(member, values), np.bincount(member)
    draws = np.random.default_rng(seed).integers(0, len(names), (rounds, len(names)))
    low, high = np.percentile(sums[draws].sum(1) / sizes[draws].sum(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def token_f1(text: str, reference: str) -> float:
    """F1 of the bags of whitespace tokens, case and punctuation kept, in [0, 1]; 0 without overlap, as published."""
    from collections import Counter

    a, b = text.split(), reference.split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else 0.0


def plain_distinct(texts: Sequence[str], n: int) -> float | None:
    """Distinct over all n-grams of tokens between single spaces, punctuation attached; an empty text is one token, as published."""
    found = [tuple(t[i : i + n]) for t in (text.strip().split(" ") for text in texts) for i in range(len(t) - n + 1)]
    return len(set(found)) / len(found) if found else None


def corpus_bleu(texts: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """(sacrebleu's corpus BLEU, 0 to 100, its signature), one reference each."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU()
    return float(bleu.corpus_score(list(texts), [list(references)]).score), str(bleu.get_signature())


def content_words(text: str) -> set[str]:
    """The words of a text without stop words (scikit-learn's list), clitics and punctuation."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return {w for w in words(text) if w not in ENGLISH_STOP_WORDS and any(c.isalnum() for c in w) and not w.startswith("'") and w != "n't"}


def persona_overlap(text: str, persona: Sequence[str]) -> float | None:
    """Share of a text's content words that its persona has, too; None without content words or without persona."""
    own, about = content_words(text), content_words(" ".join(persona))
    return len(own & about) / len(own) if own and about else None
