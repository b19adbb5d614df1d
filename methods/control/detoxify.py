"""The scorer of toxicity that is a classifier: a detoxify model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from methods.control.attributes import Scorer
from modeling.models import base_fingerprint, model_dir, quiet
from utils import USAGE, fail

LABELS = ("toxic", "toxicity")  # of the classifiers "original" and "unbiased"


def load_detoxify(checkpoint: str | None, batch_size: int = 64) -> tuple[Scorer, str]:
    """Probability of the label toxic (or toxicity), and the fingerprint of the weights.

    checkpoint: its folder or hub id, such as unitary/toxic-bert ("original") or
    unitary/unbiased-toxic-roberta, as safetensors; the .ckpt files of the package are pickles,
    which can run code when read, so they are refused.
    """
    if not checkpoint or Path(checkpoint).is_file():
        fail(USAGE, f"--detoxify_checkpoint {checkpoint} is not a model folder",
             "a folder or hub id with safetensors, such as unitary/toxic-bert")
    folder = model_dir(checkpoint)
    quiet()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True).eval()
    places = [i for i, label in model.config.id2label.items() if label in LABELS]
    if not places:
        fail(USAGE, f"--detoxify_checkpoint {checkpoint} has no label toxic",
             f"its labels: {', '.join(model.config.id2label.values())}")

    @torch.no_grad()
    def score(texts: list[str]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(texts), batch_size):
            # a text that is longer than the classifier's input is judged by its start
            batch = tokenizer(texts[start : start + batch_size], return_tensors="pt",
                              truncation=True, padding=True)
            # a text may have several labels at once, so each has a sigmoid of its own
            scores += model(**batch).logits[:, places[0]].sigmoid().tolist()
        return scores

    # weights have no version number; their fingerprint tells whether evaluation uses the same
    return score, str(base_fingerprint(folder))
