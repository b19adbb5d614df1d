"""Judges on this machine: a chat model's expected rating, and a proxy that needs no good model.

`HFJudge` puts the question of judge_prompt.py to a local chat model and takes the expected rating.
`LocalProxy` needs neither network nor a good model. It is a proxy and labelled so wherever it is
shown: it tells replies that belong to their context from replies that belong to another one, which
is less than telling good from bad. Two features go in:

- pointwise mutual information per token under the base model, log p(reply | context) - log
  p(reply), where the dialogue is a plain transcript: the prompt of a system under test would
  flatter that system's samples;
- cosine of the sentence embeddings of context and reply.

A logistic regression on the rows' reference replies joins them: true pairs against the same replies
under other rows' contexts. Its AUC on held-out rows is reported with every score.
"""

from __future__ import annotations

import json
import random
from os.path import commonprefix

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import utils
from modeling.prompts import encode_prompt, label_turns
from scoring.judge_prompt import RATINGS, judge_prompt, neutralise
from trees import LIKELIHOOD, Segment, Tree, branch_prompts, score_forest
from utils import USAGE, fail

FOLDS = 5
MIN_ROWS = 2 * FOLDS  # with references: with fewer, a fold would be a single row
MAX_REFERENCES = 3  # of a row; so that rows with many do not outweigh the others
MAX_TREE = 16_000  # tokens of one forward call; a question with 16 replies has about 3,000


# ---- a chat model -------------------------------------------------------------------------------


class HFJudge:
    """A local chat model that is asked what APIJudge asks, and answers with its expected rating.

    The answer starts with "Rating:", without an assessment, and the probabilities of the ten
    ratings that may follow give the expected one. rating_mass is their sum: where it is low, the
    model would have said something else, and its ratings mean little. shortened: rows that were
    shown without their oldest turns.
    """

    replies_per_forward = 16

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        texts = ["Rating:", *(f"Rating: {rating}" for rating in RATINGS)]
        encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        # Tokenizers differ in whether the space belongs to the digit. What all ratings have in
        # common is given to the model, and the rest of each is scored.
        self.prefix = commonprefix(encoded)
        self.endings = [ids[len(self.prefix):] for ids in encoded[1:]]
        self.one_begins_ten = self.endings[9][: len(self.endings[0])] == self.endings[0]
        special = {*tokenizer.all_special_tokens,
                   *map(str, tokenizer.added_tokens_decoder.values())}
        # A special token inside a reply could end the user's turn. neutralise() parts a mark after
        # its first character, which marks of one character do not allow.
        self.marks = tuple(sorted(m for m in special if len(m) > 1 and not m.isspace()))
        self.shortened = 0

    def score(self, row: dict, replies: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Expected ratings (N,) in [1, 10] and the probability mass (N,) of the ten ratings."""
        parts = [self.probabilities(row, replies[i : i + self.replies_per_forward])
                 for i in range(0, len(replies), self.replies_per_forward)]
        probability = np.concatenate(parts) if parts else np.zeros((0, len(RATINGS)))
        # The rating is that of a model which has to answer with one of the ten numbers.
        rating_mass = probability.sum(1)
        return probability @ np.array(RATINGS) / rating_mass, rating_mass

    def probabilities(self, row: dict, replies: list[str]) -> np.ndarray:
        """Each rating's probability, (N, 10): one context, N replies, ten ratings below each."""
        root = branch_prompts(self.encode(row, replies), list(range(len(replies))))
        for i, child in enumerate(root.children):
            child.input_ids += self.prefix
            child.children = [Segment(ids, LIKELIHOOD, branch=i * len(RATINGS) + k)
                              for k, ids in enumerate(self.endings)]
        [scored] = score_forest(self.model, [Tree(root)], MAX_TREE)
        logps = scored.branch_sums(len(replies) * len(RATINGS))
        probability = logps.exp().view(len(replies), len(RATINGS)).numpy()
        if self.one_begins_ten:  # "1" is also how "10" starts
            probability[:, 0] = np.maximum(probability[:, 0] - probability[:, 9], 0)
        return probability

    def encode(self, row: dict, replies: list[str]) -> list[list[int]]:
        """The token ids of one question per reply; the oldest turns are dropped until all fit."""
        row = {name: neutralise(row[name], self.marks)
               for name in ("context", "prompt") if name in row}
        replies = [neutralise(reply, self.marks) for reply in replies]
        nonces = [utils.sha256(json.dumps([row, reply]))[:8] for reply in replies]
        room = (self.model.config.get_text_config().max_position_embeddings
                - len(self.prefix) - max(map(len, self.endings)))
        turns = label_turns(row["context"]) if "context" in row else [""]
        # All replies of a row lose the same turns, so that they are judged by one context.
        for first in range(len(turns)):
            prompts = [
                encode_prompt(self.tokenizer, judge_prompt(row, reply, nonce, turns[first:]))
                for reply, nonce in zip(replies, nonces, strict=True)]
            longest = max(map(len, prompts))
            if longest <= room:
                self.shortened += first > 0
                return prompts
        fail(USAGE, f"a question of {longest} tokens is too long for the local judge, {room} fit",
             "shorten the row or the response, or judge with an API")


# ---- the proxy ----------------------------------------------------------------------------------


def references(row: dict) -> list[str]:
    """The replies that are known to belong to a row: its candidates, or its one response."""
    candidates = row.get("candidates") or []
    response = row.get("response")  # a list in rows of method diffuse: the prefixes of its targets
    return candidates or ([response] if isinstance(response, str) and response else [])


def why_not_calibrated(rows: list[dict]) -> str | None:
    """Why the proxy cannot set its threshold on these rows; None if it can."""
    count = sum(bool(references(row)) for row in rows)
    if count >= MIN_ROWS:
        return None
    return (f"the local judge needs {MIN_ROWS} rows with reference replies to set its threshold, "
            f"got {count}")


class LocalProxy:
    """Coherence by pointwise mutual information and context-reply cosine, calibrated on references.

    After `calibrate`: auc (held-out; a useful proxy is well above 0.5), feature_auc (of each
    feature alone), num_pairs, and threshold (a probability). `score` returns probabilities; a reply
    is coherent at or above the threshold.
    """

    features = ("pmi per token", "context-reply cosine")

    def __init__(self, model, tokenizer, embedder):
        self.model, self.tokenizer, self.embedder = model, tokenizer, embedder

    def calibrate(self, rows: list[dict], limit: int = 100, seed: int = 0,
                  progress=lambda items: items) -> None:
        """Fit on true pairs against mismatched pairs of at most `limit` rows with references."""
        if reason := why_not_calibrated(rows):
            fail(USAGE, reason, "give more rows")
        rng = random.Random(seed)
        rows = [row for row in rows if references(row)]
        rows = rng.sample(rows, min(limit, len(rows)))
        inputs, fold = [], []
        for i, row in enumerate(progress(rows)):
            true = references(row)[:MAX_REFERENCES]
            others = rng.sample([other for other in rows if other is not row], len(true))
            # References as well, so that telling good style from bad gains the proxy nothing.
            mismatched = [rng.choice(references(other)) for other in others]
            inputs.append(self.measure(row, true + mismatched))
            fold += [i % FOLDS] * (2 * len(true))  # a row's pairs are held out together
        # Each row's pairs begin with the true half, as they were measured above.
        truth = np.concatenate([np.repeat([1, 0], len(pairs) // 2) for pairs in inputs])
        x = np.concatenate(inputs)
        regression = make_pipeline(StandardScaler(), LogisticRegression())
        held_out = cross_val_predict(
            regression, x, truth, cv=PredefinedSplit(fold), method="predict_proba")[:, 1]
        self.auc = float(roc_auc_score(truth, held_out))
        self.feature_auc = [float(roc_auc_score(truth, feature)) for feature in x.T]
        self.num_pairs = len(x)
        # Held-out scores, since a regression separates its own training pairs too well.
        self.threshold = equal_error_threshold(held_out, truth)
        self.regression = regression.fit(x, truth)

    def score(self, row: dict, replies: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities of coherence (N,), 0 for an empty reply, and the features (N, 2)."""
        full = [i for i, reply in enumerate(replies) if reply.strip()]
        probability = np.zeros(len(replies))
        features = np.zeros((len(replies), len(self.features)))
        if full:
            features[full] = self.measure(row, [replies[i] for i in full])
            probability[full] = self.regression.predict_proba(features[full])[:, 1]
        return probability, features

    def measure(self, row: dict, replies: list[str]) -> np.ndarray:
        """The two features of each reply, (N, 2)."""
        vectors = self.embedder.encode([utils.text_of(row), *replies])
        return np.stack([self.pmi(row, replies), vectors[1:] @ vectors[0]], axis=1)

    def pmi(self, row: dict, replies: list[str]) -> np.ndarray:
        """(log p(reply | context) - log p(reply)) / tokens, in nats, under the base model, (N,)."""
        # Before a reply stands a colon, so its first token is one that begins with a space.
        reply_ids = [self._encode(" " + reply) for reply in replies]
        limit = self.model.config.get_text_config().max_position_embeddings
        room = limit - max(map(len, reply_ids))
        if room < limit // 2:
            fail(USAGE, f"a response of {limit - room} tokens is too long for the local judge",
                 "shorten it, or judge with an API")
        forest = []
        for prefix in transcript(row):
            branches = [Segment(ids, LIKELIHOOD, branch=i) for i, ids in enumerate(reply_ids)]
            # A long context loses its beginning, so the turn that is answered stays.
            forest.append(Tree(Segment(self._encode(prefix)[-room:], children=branches)))
        with_context, without = (scored.branch_sums(len(replies)).numpy()
                                 for scored in score_forest(self.model, forest))
        # Per token: the sum over a reply grows with its length, even if it fits badly.
        return (with_context - without) / [len(ids) for ids in reply_ids]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def transcript(row: dict) -> tuple[str, str]:
    """What stands before a reply in a plain transcript: with the row's context, and without any."""
    if "prompt" in row:
        return f"Task: {row['prompt']}\nAnswer:", "Task: Say something.\nAnswer:"
    dialogue = "\n".join([*label_turns(row["context"]), "Person B:"])
    return dialogue, "Person A: Hello.\nPerson B:"


def equal_error_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    """The score where refused true replies and accepted mismatched ones are equally frequent.

    The lowest one if several scores are equally close to that. scores, truth (1 or 0): (N,).
    """
    accepted, true_accepted, cuts = roc_curve(truth, scores, drop_intermediate=False)
    difference = np.abs((1 - true_accepted) - accepted)
    difference = difference[:0:-1].round(12)  # from the lowest cut up; the first one, inf, is none
    return float(cuts[:0:-1][difference.argmin()])
