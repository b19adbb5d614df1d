"""LoRA adapters, and tokens that a model learns anew."""

from __future__ import annotations

from utils import USAGE, fail

LORA_DEFAULTS = {  # as published, by model family: r, alpha, dropout, target modules
    "llama": (64, 16, 0.1, ["q_proj", "v_proj"]),
    "other": (16, 32, 0.05, ["q_proj", "k_proj", "v_proj", "lm_head"]),
}


def fit_embeddings(model, tokenizer) -> None:
    """Give tokens that a tokenizer has and its model has not rows at the mean of the old ones, the same at every call."""
    import torch

    old = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= old:
        return
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    means = [layer.weight.detach().double().mean(0) for layer in layers]  # so that it does not depend on the number of threads
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer, mean in zip((model.get_input_embeddings(), model.get_output_embeddings()), means, strict=False):
            layer.weight[old:] = mean.to(layer.weight)


def ban_tokens(model, token_ids: list[int]) -> None:
    """Make a model never say these tokens, whatever decodes it: their logits are -1e9, also where guidance adds them up."""

    def lower(module, inputs, output):
        output.logits[..., token_ids] = -1e9

    model.register_forward_hook(lower)


def add_lora(model, tokenizer, args, **more):
    """Wrap a model in a LoRA adapter, the only trainable part; unset flags take the family's defaults.

    more: further settings of PEFT's LoraConfig.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    r, alpha, dropout, targets = LORA_DEFAULTS.get(model.config.model_type, LORA_DEFAULTS["other"])
    args.lora_r = args.lora_r or r
    args.lora_alpha = alpha if args.lora_alpha is None else args.lora_alpha
    args.lora_dropout = dropout if args.lora_dropout is None else args.lora_dropout
    args.lora_target_modules = args.lora_target_modules or targets
    targets = args.lora_target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM", bias="none", r=args.lora_r, lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets, **more,
    )
    if args.load_in_4bit:
        model = prepare_model_for_kbit_training(model, args.gradient_checkpointing)
    names = sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name})
    missing = [t for t in targets if t != "all-linear" and t not in names]
    if missing:
        fail(USAGE, f"--lora_target_modules {' '.join(missing)}: no such module in this model",
            f"its modules: {' '.join(n for n in names if not n.isdigit())}; or all-linear")
    return get_peft_model(model, config)


def add_tokens(tokenizer, names: list[str]) -> None:
    """Add tokens that the tokenizer lacks; they are shown in decoded text, unlike special ones."""
    from tokenizers import AddedToken

    known = [name for name in names if name in tokenizer.get_vocab()]
    if known:
        fail(USAGE, f"--new_tokens {known[0]}: the tokenizer has this token already", "choose another name")
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])


def grow_embeddings(model, tokenizer, settings: dict) -> None:
    """Make room for `new_tokens` and fill their rows by `token_init`, the same for the same base and `seed`.

    mean of all rows, a random draw with the mean and deviation of each dimension, or the mean of the rows of
    `token_description`. An output embedding that is a matrix of its own gets its rows in the same way.
    """
    import torch

    ids = tokenizer.convert_tokens_to_ids(settings["new_tokens"])
    old = min(ids)  # rows from here on are new, or spare
    fit_embeddings(model, tokenizer)
    weights = {id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for weight in weights.values():
            known = weight[:old].double()  # so that the mean does not depend on the number of threads
            generator = torch.Generator().manual_seed(settings["seed"])
            for place, token in enumerate(ids):
                row = known.mean(0)
                if settings["token_init"] == "random":
                    row = row + known.std(0) * torch.randn(len(row), generator=generator, dtype=row.dtype).to(row.device)
                elif settings["token_init"] == "description":
                    text = tokenizer(settings["token_description"][place], add_special_tokens=False)["input_ids"]
                    row = known[text].mean(0)
                weight[token] = row.to(weight.dtype)
