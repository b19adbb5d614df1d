"""Soft prompts over a frozen model, and the retriever that chooses among them.

A soft prompt is V rows in the model's embedding space. `SoftPrompts` takes the place of the input
embedding: an id below FIRST_VIRTUAL is a word, id FIRST_VIRTUAL + k * V + j is row j of soft prompt
k. So prompt trees, packing, scoring and decoding need not know of soft prompts, one batch may mix
them, and no copy of the model is needed. The output layer keeps the original matrix, also where it
is tied: a virtual id is never generated.

Shapes: B rows, K prompts, V rows a prompt, d embedding size.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

FIRST_VIRTUAL = 1 << 24  # no vocabulary is that large
KIND = "SELECTIVE_PROMPT_TUNING"  # peft_type in adapter_config.json
# Share of the mean context that is added back after centring. With 0 the retriever cannot learn
# that one prompt suits most contexts, and chose worse than blindly for new people (README.md).
COMMON = 0.5


def virtual_ids(prompt: int, length: int) -> list[int]:
    """The token ids of soft prompt number `prompt`, counted from 0."""
    return list(range(FIRST_VIRTUAL + prompt * length, FIRST_VIRTUAL + (prompt + 1) * length))


class SoftPrompts(nn.Module):
    """An input embedding of words and K soft prompts, with the retriever of the latter.

    config: num_prompts, prompt_length, prompt_init (normal or vocab), retriever (linear or
    transformer), shared_head, tau_sim, fusion and max_context_turns; it is saved with the weights.
    """

    def __init__(self, words: nn.Module, config: dict):
        super().__init__()
        self.words, self.config = words, config
        count, length, (size, dim) = (
            config["num_prompts"], config["prompt_length"], words.weight.shape
        )
        device = words.weight.device
        # Float32 in both cases, also over a bf16 model, whose 8 bits would swallow small updates.
        if config["prompt_init"] == "vocab":  # rows of random words (Lester et al., 2104.08691)
            ids = torch.randint(size, (count, length), device=device)
            start = words.weight.detach()[ids].float()
        else:
            # Standard normal, as published. Such rows are far larger than the embeddings of words.
            start = torch.randn(count, length, dim, device=device)
        self.prompts = nn.Parameter(start.clone())
        self.retriever = Retriever(dim, config["retriever"], config["shared_head"]).to(device)
        # A buffer, so that it is saved and moved with the module, but not trained.
        self.register_buffer("centre", torch.zeros(dim, device=device))

    @property
    def weight(self) -> Tensor:
        """The words' matrix: other code asks an embedding for its weight."""
        return self.words.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        # Both tables are read at every place, each with an id that it has.
        virtual = input_ids >= FIRST_VIRTUAL
        words = self.words(input_ids.masked_fill(virtual, 0))
        rows = F.embedding((input_ids - FIRST_VIRTUAL).clamp(min=0), self.prompts.flatten(0, 1))
        return torch.where(virtual[..., None], rows.to(words.dtype), words)

    def scores(self, contexts: list[list[int]]) -> Tensor:
        """How well every prompt suits every context, (B, K) in [0, 1]; contexts are token ids."""
        length, device = max(map(len, contexts)), self.prompts.device
        padding = [length - len(context) for context in contexts]
        ids = [context + [0] * pad for context, pad in zip(contexts, padding, strict=True)]
        mask = [[True] * (length - pad) + [False] * pad for pad in padding]
        with torch.no_grad():  # the words are frozen; gradients go to prompts and retriever
            words = self.words(torch.tensor(ids, device=device)).float() - self.centre
        return self.retriever(self.prompts, words, torch.tensor(mask, device=device), self.centre)

    @torch.no_grad()
    def centre_on(self, contexts: list[list[int]]) -> None:
        """Let the retriever see a context as its deviation from the mean of these contexts.

        Raw embeddings of contexts are nearly parallel, so one prompt would be chosen for all.
        """
        ids = [torch.tensor(context, device=self.centre.device) for context in contexts]
        # One context at a time, because a padded batch of a thousand would have to fit into memory.
        means = [self.words(context).float().mean(0) for context in ids]
        self.centre.copy_(torch.stack(means).mean(0))

    def choice(self, scores: Tensor) -> Tensor:
        """log h (B, K): the probability that the retriever gives every prompt."""
        return (scores / self.config["tau_sim"]).log_softmax(-1)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: prompts, retriever and centre, without the frozen words."""
        return {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.state_dict().items()
            if not name.startswith("words.")
        }


class Retriever(nn.Module):
    """Scores s = softplus_10(cos(head(prompt), head(context))), as published.

    That is 0.07 at cosine 0 and the identity above 0.1. linear: the masked mean of the rows, then
    the head; transformer: two encoder layers of four heads, then the mean and the head. Rows are
    normalised first (layer norm without weights), since prompts and words differ in size.
    """

    def __init__(self, dim: int, kind: str = "linear", shared_head: bool = True):
        super().__init__()
        self.encoder = None
        if kind == "transformer":
            layer = nn.TransformerEncoderLayer(
                dim, nhead=4, dim_feedforward=2 * dim, dropout=0.0, batch_first=True,
                norm_first=True,
            )
            # Nested tensors do not work with norm_first; left on, torch warns at every start.
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, dim)
        # The paper describes two heads, its code shares one.
        self.prompt_head = None if shared_head else nn.Linear(dim, dim)

    def pool(self, rows: Tensor, mask: Tensor) -> Tensor:
        """(B, T, d) and (B, T) -> (B, d): the mean over what the mask keeps."""
        if self.encoder is not None:
            rows = self.encoder(F.layer_norm(rows, rows.shape[-1:]), src_key_padding_mask=~mask)
        mean = (rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.layer_norm(mean, mean.shape[-1:])

    def forward(self, prompts: Tensor, words: Tensor, mask: Tensor, centre: Tensor) -> Tensor:
        """Scores (B, K). words (B, T, d) are centred; COMMON of the centre is added back."""
        full = torch.ones(prompts.shape[:2], dtype=torch.bool, device=prompts.device)
        key = (self.prompt_head or self.head)(self.pool(prompts, full))  # (K, d)
        # The centre is normalised like the pooled context, else COMMON would not be a share of it.
        context = self.pool(words, mask) + COMMON * F.layer_norm(centre, centre.shape)
        query = self.head(context)  # (B, d)
        cosine = F.cosine_similarity(query[:, None], key[None], dim=-1)
        return F.softplus(cosine, beta=10, threshold=1)


def attach(model, config: dict, state: dict[str, Tensor] | None = None):
    """Freeze a model and give it soft prompts, new or saved ones; it is changed in place."""
    # Before the prompts are put in, since these are to be trained.
    model.requires_grad_(False)
    soft = SoftPrompts(model.get_input_embeddings(), config)
    if state is not None:
        _load_state(soft, state)
    model.set_input_embeddings(soft)
    return model


def soft_prompts(model) -> SoftPrompts:
    """The soft prompts of a model, also through a wrapper such as DDP."""
    return extract_model_from_parallel(model).get_input_embeddings()


def save(model, folder: str | Path) -> None:
    """Write adapter_model.safetensors (prompts and retriever) and adapter_config.json."""
    soft, folder = soft_prompts(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(soft.state(), folder / "adapter_model.safetensors")
    # checkpoints.finish_adapter fills in the base's name, which is not known here.
    config = {"peft_type": KIND, "base_model_name_or_path": None, **soft.config}
    text = json.dumps(config, indent=1)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def read_config(folder: str | Path) -> dict:
    """The config of saved soft prompts."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    for name in ("peft_type", "base_model_name_or_path"):
        config.pop(name, None)
    return config


def load(model, folder: str | Path):
    """A base model with the soft prompts of a checkpoint."""
    return attach(model, read_config(folder), _read_state(folder))


def restore(model, folder: str | Path) -> None:
    """Put the soft prompts of a checkpoint back into a model that is being trained."""
    _load_state(soft_prompts(model), _read_state(folder))


def _read_state(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def _load_state(soft: SoftPrompts, state: dict[str, Tensor]) -> None:
    # Not strict, because the frozen words are part of the module but not of a checkpoint.
    missing, unknown = soft.load_state_dict(state, strict=False)
    foreign = [*unknown, *(name for name in missing if not name.startswith("words."))]
    assert not foreign, f"not soft prompts: {foreign}"
