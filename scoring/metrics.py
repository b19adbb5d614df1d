"""Diversity metrics and controls. Pure functions of texts, embeddings and numbers.

Sources: corpus distinct-n and SBERT diversity as in arXiv:2412.03343; distinct-n from Li et al.,
arXiv:1510.03055; yield@k as the number of distinct and coherent responses among k; others at their
place. What is not defined (one response, no n-gram) is None, never 0 or nan.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from nltk.tokenize import NLTKWordTokenizer, PunktSentenceTokenizer
from sacrebleu import sentence_bleu
from sacrebleu.metrics import BLEU
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from scoring.statistics import entropy, mutual_information

# The word tokenizer writes quotes as `` and '', and leaves ellipses whole.
PUNCTUATION = {*string.punctuation, "``", "''", "...", "..", "–", "…", "•", "“", "”", "‘", "’"}
SENTENCES, WORDS = PunktSentenceTokenizer(), NLTKWordTokenizer()


@lru_cache(maxsize=100_000)  # every metric of words asks for the same texts
def words(text: str) -> tuple[str, ...]:
    """Lower-cased NLTK (Penn Treebank) word tokens, as nltk.word_tokenize gives them.

    Unlike with it, an abbreviation ("Dr. Smith") ends a sentence and loses its full stop.
    """
    # The word tokenizer takes a full stop off the last word of its input alone, so sentences are
    # split first. The splitter is untrained, since NLTK would have to download its data.
    return tuple(word.lower() for sentence in SENTENCES.tokenize(text)
                 for word in WORDS.tokenize(sentence))


def grams(texts: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All n-grams of a pool of texts without those that hold a punctuation token, as published."""
    pool = []
    for text in texts:
        tokens = words(text)
        # As published, a text of one token counts for nothing, not even as a 1-gram.
        if len(tokens) > 1:
            runs = zip(*(tokens[i:] for i in range(n)), strict=False)
            pool += [run for run in runs if not PUNCTUATION & set(run)]
    return pool


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Distinct n-grams over all n-grams of a pool of texts, in (0, 1]; higher is more diverse.

    None if there is no n-gram. The score falls as the pool grows: compare pools of one size only.
    """
    pool = grams(texts, n)
    return len(set(pool)) / len(pool) if pool else None


def pairwise_diversity(embeddings: np.ndarray) -> float | None:
    """1 - mean cosine over the pairs of one prompt's responses; embeddings (N, D) of unit length.

    None for fewer than two responses. Published corpus score = mean over prompts with equal N.
    """
    n = len(embeddings)
    if n < 2:
        return None
    cosine = embeddings @ embeddings.T
    # The diagonal is left out: a response has cosine 1 with itself, so that with it the score would
    # depend on N.
    return float(1 - (cosine.sum() - np.trace(cosine)) / (n * (n - 1)))


def ead(texts: Sequence[str], n: int, vocab_size: int) -> float | None:
    """Expectation-adjusted distinct (Liu et al., arXiv:2202.13587): N / (V (1 - ((V - 1) / V)^C)).

    N distinct of C n-grams in all, over the number that C uniform draws from V kinds would give.
    Unlike distinct-n it does not fall with length; above 1 where texts vary more than such draws.
    Figures with different V do not compare. None without n-grams.
    """
    pool = grams(texts, n)
    if not pool:
        return None
    # Written as in the paper, 1 - ((V - 1) / V)^C is a difference of two nearly equal numbers.
    return len(set(pool)) / (vocab_size * -np.expm1(len(pool) * np.log1p(-1 / vocab_size)))


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean sentence BLEU (sacrebleu) of each response against all the others, 0 to 100.

    Lower is more diverse. Empty responses are left out; None if fewer than two remain.
    """
    # An empty response has BLEU 0 and would pass for the most diverse one.
    full = [text for text in texts if text.strip()]
    if len(full) < 2:
        return None
    place = {text: i for i, text in enumerate(full)}  # equal responses have equal scores
    scores = {text: sentence_bleu(text, full[:i] + full[i + 1 :]).score
              for text, i in place.items()}
    return float(np.mean([scores[text] for text in full]))


def self_bleu_signature(num_references: int) -> str:
    """sacrebleu's signature of the scores above, to be printed with them."""
    bleu = BLEU(effective_order=True)  # as sentence_bleu has it
    bleu.sentence_score("a b", ["a b"] * num_references)  # the signature counts references
    return str(bleu.get_signature())


def vendi_score(embeddings: np.ndarray) -> float | None:
    """Effective number of different responses (Vendi score of order 1, arXiv:2210.02410), 1 to N.

    exp of the entropy of the eigenvalues of the cosine matrix over N; embeddings (N, D) of unit
    length.
    """
    n = len(embeddings)
    if not n:
        return None
    values = np.linalg.eigvalsh(embeddings @ embeddings.T / n)
    values = values[values > 1e-12]  # 0 ln 0 is 0, and rounding makes some eigenvalues negative
    return float(np.clip(np.exp(-(values * np.log(values)).sum()), 1.0, n))


def wording(text: str) -> str:
    """A text without case, punctuation at words' ends and extra spaces: equal for equal answers."""
    # utils.normalise is narrower on purpose: it decides which replies training takes for equal, so
    # changing it would change what checkpoints have learnt.
    return " ".join(word.strip(string.punctuation + "“”‘’…–") for word in text.casefold().split())


def duplicates(texts: Sequence[str]) -> float | None:
    """Share of responses that repeat the words of an earlier one."""
    return 1 - len({wording(text) for text in texts}) / len(texts) if len(texts) else None


def mean_length(texts: Sequence[str]) -> tuple[float, float] | None:
    """(words, characters) per response."""
    if not len(texts):
        return None
    return (float(np.mean([len(text.split()) for text in texts])),
            float(np.mean([len(text) for text in texts])))


def incoherence_rate(scores: Sequence[float | None],
                     threshold: float = 5) -> tuple[float | None, int]:
    """(share of the rated responses at or below `threshold` of 10, number of unrated ones)."""
    rated = [score for score in scores if score is not None]
    rate = float(np.mean([score <= threshold for score in rated])) if rated else None
    return rate, len(scores) - len(rated)


def partition(similarity: np.ndarray, threshold: float) -> list[int]:
    """Class of each of N responses, numbered by first appearance, from a symmetric (N, N) matrix.

    Average linkage: classes join while the mean similarity of their pairs reaches the threshold,
    the closest pair of classes first. All pairs count and their order does not, unlike comparing
    each response with the first one of every class; one doubtful pair does not chain two classes
    together.
    """
    n = len(similarity)
    if n < 2:
        return list(range(n))
    # rounding: no distance below 0, none of a response to itself
    distance = np.clip(1 - (similarity + similarity.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    joined = linkage(squareform(distance, checks=False), "average")
    labels = fcluster(joined, 1 - threshold + 1e-9, "distance")  # a mean at the threshold joins
    number: dict[int, int] = {}
    # scipy's labels follow the tree of joins, and so the order of the matrix.
    return [number.setdefault(int(label), len(number)) for label in labels]


def distinct_k(classes: Sequence[int]) -> int:
    """Number of classes among k responses (NoveltyBench, arXiv:2504.05228)."""
    return len(set(classes))


def utility_k(classes: Sequence[int], utilities: Sequence[float | None],
              patience: float = 0.8) -> float | None:
    """Utility of k responses to a reader who goes on with probability p (NoveltyBench, section 3).

    (1 - p) / (1 - p^k) x sum over i of p^(i-1) x utility_i (arXiv:2504.05228), where only the first
    response of a class counts. None if there is none, or if a utility that counts is None.
    """
    seen: set[int] = set()
    total = 0.0
    # i also counts repeated responses: a reader needs patience for them, too.
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


def controllability(tables: Sequence[np.ndarray], rounds: int = 200, seed: int = 0) -> dict:
    """Whether number k of a prompt leads to a class of its own, whatever the seed.

    tables: per prompt the classes (numbers, seeds) of its responses.
    mutual_information: between number and class, in nats, the mean over prompts; shuffled: the same
    with responses moved among the numbers of their prompt, which is what chance gives; excess:
    their difference; p_value: share of shuffles that reach it. coincide: share of pairs of numbers
    with one class at one seed; stable: share of pairs of seeds with one class for one number. None
    where there is one seed, or one number.
    """
    numbers, seeds = np.shape(tables[0])
    tables = [np.asarray(table) for table in tables]
    result = {"mutual_information": None, "shuffled": None, "excess": None, "p_value": None,
              "coincide": None, "stable": None, "prompts": len(tables)}
    if numbers > 1:
        result["coincide"] = float(np.mean([_agreement(table) for table in tables]))
    if seeds > 1:
        result["stable"] = float(np.mean([_agreement(table.T) for table in tables]))
    if numbers > 1 and seeds > 1:
        # ravel() goes through a table number by number, hence the number of each of its classes.
        rng, handle = np.random.default_rng(seed), np.repeat(np.arange(numbers), seeds)
        classes = [table.ravel() for table in tables]
        observed = float(np.mean([mutual_information(handle, of_row) for of_row in classes]))
        # one permutation of every prompt a round, so that rounds are independent
        shuffled = [[rng.permutation(of_row) for of_row in classes] for _ in range(rounds)]
        chance = np.mean([mutual_information(handle, np.array(of_row))
                          for of_row in zip(*shuffled, strict=True)], axis=0)  # (rounds,)
        # The observed table counts as one more shuffle, so that p is never 0; 1e-12 is for
        # rounding.
        result |= {"mutual_information": observed, "shuffled": float(chance.mean()),
                   "excess": observed - float(chance.mean()),
                   "p_value": float(1 + (chance >= observed - 1e-12).sum()) / (1 + rounds)}
    return result


def _agreement(table: np.ndarray) -> float:
    """Share of pairs of rows with one class, column by column."""
    i, j = np.triu_indices(len(table), 1)
    return float(np.mean(table[i] == table[j]))


def random_words(groups: Sequence[Sequence[str]], seed: int = 0) -> list[list[str]]:
    """Responses of the same lengths, of words drawn from all responses: diverse and meaningless."""
    rng = np.random.default_rng(seed)
    pool = [word for group in groups for text in group for word in text.split()] or [""]
    return [[" ".join(pool[i] for i in rng.integers(0, len(pool), len(text.split())))
             for text in group] for group in groups]


def shuffled_replies(groups: Sequence[Sequence[str]], seed: int = 0) -> list[list[str]] | None:
    """Every response under another prompt: fluent and beside the point. None for a single prompt.

    The k-th responses move together, each k by a step of its own, so that no prompt keeps one.
    """
    n = len(groups)
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, n, max(map(len, groups)))
    others = [[groups[(i + steps[k]) % n] for k in range(len(group))]
              for i, group in enumerate(groups)]
    return [[other[k % len(other)] for k, other in enumerate(of_row)] for of_row in others]


def repeated_first(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """The first response of each prompt, again and again: coherent and all the same."""
    return [[group[0]] * len(group) for group in groups]


def exact_fit(weights: Sequence[float], logps: Sequence[float]) -> dict[str, float]:
    """How a model's sequence probabilities p of the targets fit the wanted distribution w.

    kl = sum w ln(w / p), infinite where a wanted target has probability 0; outside = 1 - sum p over
    the wanted targets (w > 0), the mass of every other text; tv = (sum |w - p| + outside) / 2;
    floor: the entropy of w, which the loss cannot get below.
    """
    weights, logps = (np.asarray(x, dtype=float) for x in (weights, logps))
    wanted = weights > 0
    w, logp = weights[wanted], logps[wanted]
    outside = max(0.0, float(1 - np.exp(logp).sum()))  # rounding may bring the sum above 1
    return {"kl": float((w * (np.log(w) - logp)).sum()), "outside": outside,
            "tv": float((np.abs(w - np.exp(logp)).sum() + outside) / 2),
            "floor": float(-(w * np.log(w)).sum())}


def token_f1(text: str, reference: str) -> float:
    """F1 of the bags of whitespace tokens, case and punctuation kept, in [0, 1], as published.

    0 without overlap.
    """
    a, b = text.split(), reference.split()
    common = sum((Counter(a) & Counter(b)).values())
    # Equal to the harmonic mean of precision (common / len(a)) and recall (common / len(b)).
    return 2 * common / (len(a) + len(b)) if common else 0.0


def plain_distinct(texts: Sequence[str], n: int) -> float | None:
    """Distinct over all n-grams of tokens between single spaces, punctuation attached.

    As published, an empty text is one token.
    """
    pool = [tuple(tokens[i : i + n]) for tokens in (text.strip().split(" ") for text in texts)
            for i in range(len(tokens) - n + 1)]
    return len(set(pool)) / len(pool) if pool else None


def corpus_bleu(texts: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """(sacrebleu's corpus BLEU, 0 to 100, its signature), one reference each."""
    bleu = BLEU()
    score = bleu.corpus_score(list(texts), [list(references)]).score
    return float(score), str(bleu.get_signature())


def content_words(text: str) -> set[str]:
    """The words of a text without stop words (scikit-learn's list), clitics and punctuation.

    The pair classifier (equivalence.py) was fitted with another definition, and keeps it.
    """
    return {word for word in words(text)
            if word not in ENGLISH_STOP_WORDS and any(c.isalnum() for c in word)
            and not word.startswith("'") and word != "n't"}


def persona_overlap(text: str, persona: Sequence[str]) -> float | None:
    """Share of a text's content words that its persona has; None if one of them has none."""
    # Words of the text, not of the persona: a reply need not tell all that a persona says.
    of_text, of_persona = content_words(text), content_words(" ".join(persona))
    return len(of_text & of_persona) / len(of_text) if of_text and of_persona else None
