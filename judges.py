"""Coherence judges: callables from (row, replies) to scores.

`LocalProxy` is the judge that needs no network. It is a proxy and labelled so wherever it is shown:
it tells replies that belong to their context from replies that belong to another one, which is less
than telling good from bad. Two features go in:

- pointwise mutual information per token under the base model, log p(reply | context) - log p(reply),
  with the dialogue as a plain transcript (not as the prompt that a system under test was given, whose
  own samples it would flatter), computed in one packed row of two prompt trees;
- cosine of the sentence embeddings of context and reply.

A logistic regression on the rows' own reference replies (true pairs against the same replies under
other rows' contexts) joins them; its AUC on held-out rows is reported with every score.
"""

from __future__ import annotations

import random

import numpy as np

import metrics
import trees
import utils

FOLDS = 5


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
            utils.die(2, f"the local judge needs {2 * FOLDS} rows with candidates to set its threshold, got {len(rows)}",
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
        self.auc = metrics.auc(held_out[truth == 1], held_out[truth == 0])
        self.feature_auc = [metrics.auc(x[truth == 1, k], x[truth == 0, k]) for k in range(x.shape[1])]
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
        import torch

        encode = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        ids = [encode(" " + reply) for reply in replies]
        limit = self.model.config.get_text_config().max_position_embeddings
        room = limit - max(map(len, ids))
        if room < limit // 2:
            utils.die(2, f"a response of {limit - room} tokens is too long for the local judge", "shorten it, or judge with an API")
        given, blank = (encode(text)[-room:] for text in transcript(row))
        forest = []
        for prompt in (given, blank):
            branches = [trees.Segment(reply, trees.LIKELIHOOD, branch=i) for i, reply in enumerate(ids)]
            forest.append(trees.Tree(trees.Segment(prompt, children=branches)))
        batch = trees.pack(forest)
        with torch.inference_mode():
            logps = trees.score(self.model, batch)
        cells = batch["row"] * len(ids) + batch["branch"]
        sums = trees.sum_by_row(logps, cells, 2 * len(ids)).view(2, len(ids)).numpy()
        return (sums[0] - sums[1]) / [len(i) for i in ids]


def transcript(row: dict) -> tuple[str, str]:
    """What stands before a reply in a plain transcript: with the row's context, and without any."""
    if "prompt" in row:
        return f"Task: {row['prompt']}\nAnswer:", "Task: Say something.\nAnswer:"
    return "\n".join([*utils.label_turns(row["context"]), "Person B:"]), "Person A: Hello.\nPerson B:"


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
