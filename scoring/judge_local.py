"""Judges on this machine: a chat model's expected rating, and a proxy that needs no good model."""

from __future__ import annotations

import json
import random
from os.path import commonprefix

import numpy as np

import trees
import utils
from modeling.prompts import encode_prompt, label_turns
from scoring import statistics
from scoring.judge_prompt import RATINGS, judge_prompt, neutralise
from trees.scoring import score_forest
from utils import USAGE, fail

FOLDS = 5


class HFJudge:
    """A local chat model that is asked what APIJudge asks, and answers with its expected rating.

    The answer starts with "Rating:", without an assessment, and the probabilities of the ten ratings that
    may follow give the expected one. mass is their sum: where it is low, the model would have said something
    else, and its ratings mean little.
    """

    replies_per_forward = 16

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        texts = ["Rating:", *(f"Rating: {rating}" for rating in RATINGS)]
        encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self.prefix = commonprefix(encoded)
        self.endings = [ids[len(self.prefix):] for ids in encoded[1:]]
        self.one_begins_ten = self.endings[9][: len(self.endings[0])] == self.endings[0]
        special = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
        self.marks = tuple(sorted(mark for mark in special if len(mark) > 1 and not mark.isspace()))
        self.shortened = 0  # rows that were shown without their oldest turns

    def score(self, row: dict, replies: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Expected ratings (N,) in [1, 10] and the probability (N,) of the ten ratings together."""
        parts = [self.probabilities(row, replies[i : i + self.replies_per_forward])
                 for i in range(0, len(replies), self.replies_per_forward)]
        probability = np.concatenate(parts) if parts else np.zeros((0, len(RATINGS)))
        mass = probability.sum(1)
        return probability @ np.array(RATINGS) / mass, mass

    def probabilities(self, row: dict, replies: list[str]) -> np.ndarray:
        """The probability of each rating, (N, 10): one context, N replies below it, ten ratings below each."""

        root = trees.branch_prompts(self.encode(row, replies), list(range(len(replies))))
        for i, child in enumerate(root.children):
            child.input_ids += self.prefix
            child.children = [trees.Segment(ids, trees.LIKELIHOOD, branch=i * len(RATINGS) + k)
                              for k, ids in enumerate(self.endings)]
        batch, logps = score_forest(self.model, [trees.Tree(root)])
        sums = trees.sum_by_row(logps.double(), batch["branch"], len(replies) * len(RATINGS))
        probability = sums.exp().view(len(replies), len(RATINGS)).cpu().numpy()
        if self.one_begins_ten:  # "1" is also how "10" starts
            probability[:, 0] = np.maximum(probability[:, 0] - probability[:, 9], 0)
        return probability

    def encode(self, row: dict, replies: list[str]) -> list[list[int]]:
        """The token ids of one question per reply; the oldest turns go until all fit."""
        row = {name: neutralise(row[name], self.marks) for name in ("context", "prompt") if name in row}
        replies = [neutralise(reply, self.marks) for reply in replies]
        nonces = [utils.sha256(json.dumps([row, reply]))[:8] for reply in replies]
        room = (self.model.config.get_text_config().max_position_embeddings
                - len(self.prefix) - max(map(len, self.endings)))
        turns = label_turns(row["context"]) if "context" in row else [""]
        for first in range(len(turns)):
            prompts = [encode_prompt(self.tokenizer, judge_prompt(row, reply, nonce, turns[first:]))
                       for reply, nonce in zip(replies, nonces, strict=True)]
            if max(map(len, prompts)) <= room:
                self.shortened += first > 0
                return prompts
        fail(USAGE, f"a question of {max(map(len, prompts))} tokens is too long for the local judge, {room} fit",
                  "shorten the row or the response, or judge with an API")


class LocalProxy:
    """Coherence by pointwise mutual information and context-reply cosine, calibrated on references.

    After `calibrate`: auc (held-out, in [0.5, 1] for a useful proxy), threshold (a probability) and
    features' names. `score` returns probabilities; a reply is coherent at or above the threshold.
    """

    features = ("pmi per token", "context-reply cosine")

    def __init__(self, model, tokenizer, embedder):
        self.model, self.tokenizer, self.embedder = model, tokenizer, embedder

    def calibrate(self, rows: list[dict], limit: int = 100, seed: int = 0, progress=lambda items: items) -> None:
        """Fit on true pairs against mismatched pairs of at most `limit` rows with `candidates`."""
        rng = random.Random(seed)
        rows = [row for row in rows if row.get("candidates")]
        rows = rng.sample(rows, min(limit, len(rows)))
        if len(rows) < 2 * FOLDS:
            fail(USAGE, f"the local judge needs {2 * FOLDS} rows with candidates to set its threshold, got {len(rows)}",
                      "evaluate more rows")
        inputs, fold = [], []
        for i, row in enumerate(progress(rows)):
            own = row["candidates"][:3]
            others = [rng.choice(other["candidates"]) for other in rng.sample([r for r in rows if r is not row], len(own))]
            inputs.append(self.measure(row, own + others))
            fold += [i % FOLDS] * (2 * len(own))
        truth = np.concatenate([np.repeat([1, 0], len(x) // 2) for x in inputs])
        x, fold = np.concatenate(inputs), np.array(fold)
        held_out = np.zeros(len(x))
        for k in range(FOLDS):
            held_out[fold == k] = fit(x[fold != k], truth[fold != k]).predict_proba(x[fold == k])[:, 1]
        self.auc = statistics.auc(held_out[truth == 1], held_out[truth == 0])
        self.feature_auc = [statistics.auc(x[truth == 1, k], x[truth == 0, k]) for k in range(x.shape[1])]
        self.num_pairs = len(x)
        self.threshold = balanced_threshold(held_out, truth)
        self.model_of_features = fit(x, truth)

    def score(self, row: dict, replies: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities of coherence (N,), 0 for an empty reply, and the features (N, 2)."""
        full = [i for i, reply in enumerate(replies) if reply.strip()]
        probability, features = np.zeros(len(replies)), np.zeros((len(replies), len(self.features)))
        if full:
            features[full] = self.measure(row, [replies[i] for i in full])
            probability[full] = self.model_of_features.predict_proba(features[full])[:, 1]
        return probability, features

    def measure(self, row: dict, replies: list[str]) -> np.ndarray:
        """The two features of each reply, (N, 2)."""
        vectors = self.embedder.encode([row.get("prompt") or row["context"], *replies], normalize_embeddings=True, show_progress_bar=False)
        return np.stack([self.pmi(row, replies), vectors[1:] @ vectors[0]], axis=1)

    def pmi(self, row: dict, replies: list[str]) -> np.ndarray:
        """(log p(reply | context) - log p(reply)) / tokens, in nats, under the base model, (N,)."""

        encode = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        ids = [encode(" " + reply) for reply in replies]
        limit = self.model.config.get_text_config().max_position_embeddings
        room = limit - max(map(len, ids))
        if room < limit // 2:
            fail(USAGE, f"a response of {limit - room} tokens is too long for the local judge", "shorten it, or judge with an API")
        given, blank = (encode(text)[-room:] for text in transcript(row))
        forest = []
        for prompt in (given, blank):
            branches = [trees.Segment(reply, trees.LIKELIHOOD, branch=i) for i, reply in enumerate(ids)]
            forest.append(trees.Tree(trees.Segment(prompt, children=branches)))
        batch, logps = score_forest(self.model, forest)
        cells = batch["row"] * len(ids) + batch["branch"]
        sums = trees.sum_by_row(logps, cells, 2 * len(ids)).view(2, len(ids)).cpu().numpy()
        return (sums[0] - sums[1]) / [len(i) for i in ids]


def transcript(row: dict) -> tuple[str, str]:
    """What stands before a reply in a plain transcript: with the row's context, and without any."""
    if "prompt" in row:
        return f"Task: {row['prompt']}\nAnswer:", "Task: Say something.\nAnswer:"
    return "\n".join([*label_turns(row["context"]), "Person B:"]), "Person A: Hello.\nPerson B:"


def fit(x: np.ndarray, truth: np.ndarray):
    """Logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression()).fit(x, truth)


def balanced_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    """The score where true replies refused and mismatched replies accepted are equally frequent."""
    cuts = np.unique(scores)
    refused = [(scores[truth == 1] < c).mean() for c in cuts]
    accepted = [(scores[truth == 0] >= c).mean() for c in cuts]
    return float(cuts[np.argmin(np.abs(np.array(refused) - np.array(accepted)))])
