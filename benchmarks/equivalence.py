"""How well the equivalence classifier agrees with people, by cross-validation grouped by prompt.

    python -m benchmarks.equivalence --data PAIRS.jsonl [--write]

PAIRS.jsonl: prompt, generation_0, generation_1 and similar ("0" or "1") a line, as in the labelled
set of github.com/facebookresearch/darling. --write fits all pairs and replaces
data/equivalence.json. Prints a table, and as its last line one JSON object with accuracy and auc.
Cost: minutes for 1,000 pairs of long answers, most of it for embeddings.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import utils
from benchmarks.measure import table
from modeling.embedder import load_embedder
from scoring import equivalence, statistics

FOLDS, SEEDS, REGULARISATION = 10, 5, 0.3


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="labelled pairs, JSONL")
    parser.add_argument("--write", action="store_true",
                        help="fit all pairs and write data/equivalence.json")
    args = parser.parse_args(argv)
    rows = utils.read_jsonl(args.data, check_pair)
    truth = np.array([int(row["similar"]) for row in rows])
    x = features(rows)
    groups = np.unique([row["prompt"] for row in rows], return_inverse=True)[1]
    scores = [cross_validate(x, truth, groups, seed) for seed in range(SEEDS)]
    aucs = [statistics.auc(p[truth == 1], p[truth == 0]) for p in scores]
    result = {"accuracy": round(float(np.mean([_accuracy(p, truth) for p in scores])), 4),
              "auc": round(float(np.mean(aucs)), 4),
              "majority": round(float(max(truth.mean(), 1 - truth.mean())), 4),
              "pairs": len(rows), "prompts": len(set(groups))}
    _show(x, truth, scores, result)
    if args.write:
        _write(x, truth, result)
    print(json.dumps(result))


def check_pair(row: dict) -> str | None:
    """What is wrong with a labelled pair, or None."""
    texts = [row.get(name) for name in ("prompt", "generation_0", "generation_1")]
    if not all(isinstance(text, str) for text in texts):
        return "needs prompt, generation_0 and generation_1, strings"
    return None if str(row.get("similar")) in ("0", "1") else 'needs similar, "0" or "1"'


def features(rows: list[dict]) -> np.ndarray:
    """The classifier's features (N, 13) of labelled pairs."""
    embedder, found = load_embedder(), []
    for row in tqdm(rows, desc="features", unit="pair"):
        a, b = (equivalence.view(row[name], row["prompt"], embedder)
                for name in ("generation_0", "generation_1"))
        asked = equivalence.embed([row["prompt"]], embedder)[0].mean(0)
        found.append(equivalence.pair_features(a, b, asked))
    return np.array(found)


def cross_validate(x: np.ndarray, truth: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Held-out probabilities (N,); the pairs of a prompt are never on both sides."""
    # GroupKFold makes folds of one size, the same at every call; these differ from seed to seed
    fold = np.random.default_rng(seed).permutation(groups.max() + 1)[groups] % FOLDS
    return cross_val_predict(_regression(), x, truth, cv=PredefinedSplit(fold),
                             method="predict_proba")[:, 1]


def _regression() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=REGULARISATION))


def _accuracy(probability: np.ndarray, truth: np.ndarray) -> float:
    return float(((probability >= 0.5) == truth).mean())


def _show(x: np.ndarray, truth: np.ndarray, scores: list[np.ndarray], result: dict) -> None:
    weights = _regression().fit(x, truth)[-1].coef_[0]
    table("features, each alone", ["feature", "AUC", "weight"], [
        [name, f"{statistics.auc(x[truth == 1, k], x[truth == 0, k]):.3f}", f"{weights[k]:+.2f}"]
        for k, name in enumerate(equivalence.FEATURES)])
    title = f"{FOLDS}-fold cross-validation grouped by prompt, {result['pairs']} pairs"
    table(title, ["", "accuracy", "AUC"], [
        *([f"seed {seed}", f"{_accuracy(p, truth):.3f}",
           f"{statistics.auc(p[truth == 1], p[truth == 0]):.3f}"] for seed, p in enumerate(scores)),
        ["mean", f"{result['accuracy']:.3f}", f"{result['auc']:.3f}"],
        ["majority", f"{result['majority']:.3f}", "0.500"]])


def _write(x: np.ndarray, truth: np.ndarray, result: dict) -> None:
    scaler, model = _regression().fit(x, truth)
    fitted = {"mean": scaler.mean_, "scale": scaler.scale_, "weights": model.coef_[0]}
    utils.atomic_write(equivalence.FILE, json.dumps({
        "features": equivalence.FEATURES,
        **{name: [round(float(v), 6) for v in values] for name, values in fitted.items()},
        "bias": round(float(model.intercept_[0]), 6), "threshold": 0.5, **result}, indent=1) + "\n")
    print(f"written: {equivalence.FILE}")


if __name__ == "__main__":
    utils.run(main)
