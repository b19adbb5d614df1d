"""Soft prompts over a frozen model, the retriever that chooses among them, and the losses of both.

A soft prompt is V rows in the model's embedding space. `SoftPrompts` takes the place of the input embedding: an id
below FIRST_VIRTUAL is a word, id FIRST_VIRTUAL + k * V + j is row j of soft prompt k. So prompt trees, packing,
scoring and decoding know nothing of soft prompts, one batch may mix them, and no copy of the model is needed.
The output layer keeps the original matrix, also where it is tied: a virtual id is never generated.

Shapes: B rows, K prompts, V rows a prompt, d embedding size, N response tokens of all rows.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FIRST_VIRTUAL = 1 << 24  # no vocabulary is that large
COMMON = 0.5  # weight of what all contexts share in what the retriever sees of one; 0: it cannot learn that a prompt is best for most
KIND = "SELECTIVE_PROMPT_TUNING"


def virtual_ids(prompt: int, length: int) -> list[int]:
    """The token ids of soft prompt number `prompt`, counted from 0."""
    return list(range(FIRST_VIRTUAL + prompt * length, FIRST_VIRTUAL + (prompt + 1) * length))


class SoftPrompts(nn.Module):
    """An input embedding with K soft prompts beside its words, and their retriever.

    config: num_prompts, prompt_length, prompt_init (normal or vocab), retriever (linear or transformer), shared_head,
    tau_sim, fusion and max_context_turns, saved with the weights.
    """

    def __init__(self, words: nn.Module, config: dict):
        super().__init__()
        self.words, self.config = words, config
        count, length, (size, dim) = config["num_prompts"], config["prompt_length"], words.weight.shape
        if config["prompt_init"] == "vocab":  # rows of random words (Lester et al., arXiv:2104.08691)
            start = words.weight.detach()[torch.randint(size, (count, length), device=words.weight.device)].float()
        else:
            start = torch.randn(count, length, dim, device=words.weight.device)
        self.prompts = nn.Parameter(start.clone())
        self.retriever = Retriever(dim, config["retriever"], config["shared_head"]).to(start.device)
        self.register_buffer("centre", torch.zeros(dim, device=start.device))

    @property
    def weight(self) -> Tensor:
        """The words' matrix, for whoever asks an embedding for it."""
        return self.words.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        virtual = input_ids >= FIRST_VIRTUAL
        words = self.words(input_ids.masked_fill(virtual, 0))
        rows = F.embedding((input_ids - FIRST_VIRTUAL).clamp(min=0), self.prompts.flatten(0, 1))
        return torch.where(virtual[..., None], rows.to(words.dtype), words)

    def scores(self, contexts: list[list[int]]) -> Tensor:
        """How well every prompt suits every context, (B, K) in [0, 1]; contexts are token ids of any length."""
        length, device = max(map(len, contexts)), self.prompts.device
        ids = torch.tensor([c + [0] * (length - len(c)) for c in contexts], device=device)
        mask = torch.tensor([[True] * len(c) + [False] * (length - len(c)) for c in contexts], device=device)
        with torch.no_grad():
            words = self.words(ids).float() - self.centre
        return self.retriever(self.prompts, words, mask, self.centre)

    @torch.no_grad()
    def centre_on(self, contexts: list[list[int]]) -> None:
        """Let the retriever see contexts as deviations from the mean of these ones (each the mean of its tokens)."""
        device = self.centre.device
        self.centre.copy_(torch.stack([self.words(torch.tensor(c, device=device)).float().mean(0) for c in contexts]).mean(0))

    def choice(self, scores: Tensor) -> Tensor:
        """log h (B, K): the probability that the retriever gives every prompt."""
        return (scores / self.config["tau_sim"]).log_softmax(-1)

    def own_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the prompts, the retriever, and the centre of its contexts."""
        return {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items() if not name.startswith("words.")}


class Retriever(nn.Module):
    """Scores s = softplus_10(cos(head(prompt), head(context))), as published: 0.07 at cosine 0, the identity above 0.1.

    linear: the masked mean of the rows, then the head; transformer: two encoder layers of four heads, then the mean.
    Rows are normalised first (layer norm without weights), since prompts and words differ in size.
    """

    def __init__(self, dim: int, kind: str = "linear", shared_head: bool = True):
        super().__init__()
        self.encoder = None
        if kind == "transformer":
            layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, dim)
        self.prompt_head = None if shared_head else nn.Linear(dim, dim)

    def pool(self, rows: Tensor, mask: Tensor) -> Tensor:
        """(B, T, d) and (B, T) -> (B, d): the mean over what the mask keeps."""
        if self.encoder is not None:
            rows = self.encoder(F.layer_norm(rows, rows.shape[-1:]), src_key_padding_mask=~mask)
        mean = (rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.layer_norm(mean, mean.shape[-1:])

    def forward(self, prompts: Tensor, words: Tensor, mask: Tensor, centre: Tensor) -> Tensor:
        """Scores (B, K) of contexts whose words stand there less the centre; what all contexts share comes back at COMMON of their size."""
        whole = torch.ones(prompts.shape[:2], dtype=torch.bool, device=prompts.device)
        p = (self.prompt_head or self.head)(self.pool(prompts, whole))  # (K, d)
        q = self.head(self.pool(words, mask) + COMMON * F.layer_norm(centre, centre.shape))  # (B, d)
        cosine = F.cosine_similarity(q[:, None], p[None], dim=-1)
        return F.softplus(cosine, beta=10, threshold=1)


def attach(model, config: dict, state: dict[str, Tensor] | None = None):
    """Freeze a model and give it soft prompts, new ones or those of a saved state; the model is changed in place."""
    model.requires_grad_(False)
    soft = SoftPrompts(model.get_input_embeddings(), config)
    if state is not None:
        missing, unknown = soft.load_state_dict(state, strict=False)
        assert not unknown and all(name.startswith("words.") for name in missing), f"not soft prompts: {unknown} {missing}"
    model.set_input_embeddings(soft)
    return model


def soft_prompts(model) -> SoftPrompts:
    """The soft prompts of a model, also through a wrapper such as DDP."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model).get_input_embeddings()


def save(model, folder: str) -> None:
    """Write prompts and retriever as adapter_model.safetensors, and their config as adapter_config.json."""
    from safetensors.torch import save_file

    soft = soft_prompts(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(soft.own_state(), Path(folder) / "adapter_model.safetensors")
    text = json.dumps({"peft_type": KIND, "base_model_name_or_path": None, **soft.config}, indent=1)
    (Path(folder) / "adapter_config.json").write_text(text, encoding="utf-8")


def read(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """(config, state) of what `save` has written."""
    from safetensors.torch import load_file

    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in ("peft_type", "base_model_name_or_path")}
    return config, load_file(Path(folder) / "adapter_model.safetensors")
