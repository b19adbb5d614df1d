"""LoRA adapters, and tokens that a model learns anew."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tokenizers import AddedToken

from utils import USAGE, fail

# r, alpha, dropout and target modules of the code of arXiv:2412.03343, which looks for "llama" in
# the path. The config's model_type does not depend on what a folder is called.
LORA_DEFAULTS = {
    "llama": (64, 16, 0.1, ["q_proj", "v_proj"]),
    "other": (16, 32, 0.05, ["q_proj", "k_proj", "v_proj", "lm_head"]),
}


def resolve_lora(args, model) -> dict:
    """The settings of a LoRA adapter: flags not given take the model family's defaults."""
    family = LORA_DEFAULTS.get(model.config.model_type, LORA_DEFAULTS["other"])
    r, alpha, dropout, target_modules = family
    # 0 is a meaningful alpha and dropout, so only None means that a flag was not given.
    return {
        "lora_r": args.lora_r or r,
        "lora_alpha": alpha if args.lora_alpha is None else args.lora_alpha,
        "lora_dropout": dropout if args.lora_dropout is None else args.lora_dropout,
        "lora_target_modules": args.lora_target_modules or target_modules,
    }


def add_lora(model, args, **more):
    """Wrap a model in a LoRA adapter, its only trainable part.

    more: further settings of PEFT's LoraConfig.
    """
    settings = resolve_lora(args, model)
    targets = settings["lora_target_modules"]
    if "all-linear" in targets and len(targets) > 1:
        # In a list it is to PEFT a module's name like any other, which no module has.
        fail(
            USAGE,
            f"--lora_target_modules {' '.join(targets)}: all-linear stands for every linear layer",
            "give it alone, or name the modules",
        )
    names = sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name})
    # PEFT compares a target with the end of a module's name, and refuses only if no target matches
    # any. One misspelt name among good ones would go unnoticed.
    missing = [t for t in targets if t != "all-linear" and t not in names]
    if missing:
        modules = " ".join(n for n in names if not n.isdigit())
        fail(
            USAGE,
            f"--lora_target_modules {' '.join(missing)}: this model has no such module",
            f"its modules: {modules}; or all-linear",
        )
    if args.load_in_4bit:
        model = prepare_model_for_kbit_training(model, args.gradient_checkpointing)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        bias="none",
        r=settings["lora_r"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings["lora_dropout"],
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        **more,
    )
    return get_peft_model(model, config)


def add_tokens(tokenizer, names: list[str]) -> None:
    """Add tokens to a tokenizer; unlike special ones they are shown in decoded text."""
    known = [name for name in names if name in tokenizer.get_vocab()]
    if known:
        fail(
            USAGE,
            f"--new_tokens {known[0]}: the tokenizer has this token already",
            "choose another name",
        )
    # normalized=False: the token is looked for in the text as it is written. A tokenizer that
    # lower-cases its input would otherwise miss one with a capital letter.
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])


def fit_embeddings(model, tokenizer) -> None:
    """Resize the embeddings to the tokenizer. New rows are the mean of the old ones.

    So the result is deterministic. A model whose matrices are large enough stays as it is.
    """
    old = model.get_input_embeddings().weight.shape[0]
    # Many matrices have spare rows, because sizes that are multiples of 64 or 128 are faster.
    if len(tokenizer) <= old:
        return
    # In float64, so that the mean does not depend on the number of threads that add it up.
    means = [layer.weight.detach().double().mean(0) for layer in _embeddings(model)]
    # The library's own mean_resizing draws new rows at random around the mean.
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer, mean in zip(_embeddings(model), means, strict=True):
            layer.weight[old:] = mean.to(layer.weight)


def grow_embeddings(model, tokenizer, settings: dict) -> None:
    """Make room for `new_tokens` and fill their rows by `token_init`.

    mean: of all rows; random: a draw with the mean and deviation of each dimension; description:
    the mean of the rows of `token_description`. The same base and `seed` give the same rows. An
    output embedding with a matrix of its own gets its rows in the same way.
    """
    ids = tokenizer.convert_tokens_to_ids(settings["new_tokens"])
    old = min(ids)  # rows from here on are new, or spare
    fit_embeddings(model, tokenizer)
    weights = {id(layer.weight): layer.weight for layer in _embeddings(model)}  # tied ones once
    with torch.no_grad():
        for weight in weights.values():
            known = weight[:old].double()  # see fit_embeddings
            mean, deviation = known.mean(0), known.std(0)
            # Seeded again for every matrix, so what one draws does not depend on the other.
            generator = torch.Generator().manual_seed(settings["seed"])
            for index, token in enumerate(ids):
                row = mean
                if settings["token_init"] == "random":
                    noise = torch.randn(len(mean), generator=generator, dtype=mean.dtype)
                    row = mean + deviation * noise.to(mean.device)
                elif settings["token_init"] == "description":
                    text = settings["token_description"][index]
                    row = known[tokenizer(text, add_special_tokens=False)["input_ids"]].mean(0)
                weight[token] = row.to(weight.dtype)


def ban_tokens(model, token_ids: list[int]) -> None:
    """Make a model never generate these tokens, whatever decodes it.

    Their logits are -1e9 rather than -inf, which guidance would turn into nan.
    """

    def lower(module, inputs, output):
        output.logits[..., token_ids] = -1e9

    model.register_forward_hook(lower)


def _embeddings(model) -> list[torch.nn.Module]:
    """The input embedding and, where there is one, the output embedding."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return [layer for layer in layers if layer is not None]
