"""Checkpoints: what they hold, and how they are loaded."""

from __future__ import annotations

import json
from pathlib import Path

from modeling.adapters import ban_tokens, fit_embeddings, grow_embeddings
from modeling.models import base_fingerprint, load_model, load_tokenizer, model_dir
from utils import USAGE, atomic_write, fail, missing_files, sha256


def finish_adapter(folder: Path, tokenizer, run: dict) -> None:
    """Add to a saved adapter its tokenizer, run.json, and the base's name instead of a machine's path."""
    path = folder / "adapter_config.json"
    if path.exists():  # else a whole model was trained
        config = json.loads(path.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = run["base_model"]
        atomic_write(path, json.dumps(config, indent=2, sort_keys=True))
    tokenizer.save_pretrained(folder)
    atomic_write(folder / "run.json", json.dumps(run, indent=1))


def check_adapter(folder: Path) -> None:
    """Die over an adapter folder that cannot be loaded, naming the file."""
    if not (folder / "adapter_config.json").is_file():
        fail(USAGE, f"{folder} holds no adapter_config.json", "give a check_N folder, a model folder, a hub id or smollm2")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")
                   and p.name.startswith("adapter")]
        if pickles:
            fail(USAGE, f"{folder / pickles[0]} is a pickle, which can run code when read",
                "save the adapter as safetensors")
        fail(USAGE, f"{weights} is not there", "the checkpoint is incomplete; use another check_N")
    size = weights.stat().st_size
    with open(weights, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = file.read(header_size) if header_size < size else b""
    try:
        entries = [e for name, e in json.loads(header).items() if name != "__metadata__"]
        expected = 8 + header_size + max(entry["data_offsets"][1] for entry in entries)
    except (ValueError, TypeError, AttributeError, KeyError):
        expected = -1
    if size != expected:
        says = f"its header says {expected}" if expected > 0 else "its header is broken"
        fail(USAGE, f"{weights} has {size} bytes, {says}", "the file is cut; use another check_N")


def load_checkpoint(name: str, force_base: bool = False, chat_template: str | None = None):
    """Load a base model (hub id, folder, smollm2) or a check_N folder with its base.

    Returns (model in eval mode, tokenizer, run) where run is the checkpoint's run.json, or
    {"method": "base", ...} for a base model; its "weights" tell one adapter or base from another.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        check_adapter(folder)
        if chat_template:
            fail(USAGE, f"--chat_template: {folder} brings the template that it was trained with", "drop the flag")
        missing = missing_files(folder) if (folder / "COMPLETE.json").exists() else []
        if missing:
            fail(USAGE, f"{folder} is incomplete (no {', '.join(missing[:3])})", "use another check_N")
        path = folder / "run.json"
        if not path.is_file():
            fail(USAGE, f"{path} is not there, so the method of this adapter is unknown", "train it with train.py")
        saved = json.loads(path.read_text(encoding="utf-8"))
        base = model_dir(saved["base_model"])
        fingerprint = base_fingerprint(base)
        if fingerprint != saved["base_sha256"] and not force_base:
            fail(USAGE, f"{folder} was trained on base {saved['base_sha256']}, {saved['base_model']} is {fingerprint}",
                "load the base it was trained on, or pass --force_base")
        from peft import PeftModel  # after model_dir: it reads HF_HUB_OFFLINE when imported
        from peft.tuners.trainable_tokens import TrainableTokensLayer

        from methods import OWN_ADAPTER, load_method

        own = saved["method"] in OWN_ADAPTER
        load_adapter = load_method(saved["method"]).load_adapter if own else PeftModel.from_pretrained
        tokenizer = load_tokenizer(str(folder))
        model = load_model(base)
        fit_embeddings(model, tokenizer)
        if saved["args"].get("new_tokens"):
            grow_embeddings(model, tokenizer, saved["args"])
        model = load_adapter(model, folder)
        for layer in model.modules():  # written into the matrix once, else it is copied at every step
            if isinstance(layer, TrainableTokensLayer):
                layer.merge()
        saved["weights"] = sha256((folder / "adapter_model.safetensors").read_bytes())[:12]
    elif (folder / "run.json").is_file():  # trained from scratch: a whole model, no adapter
        missing = missing_files(folder)
        if missing:
            fail(USAGE, f"{folder} is incomplete (no {', '.join(missing[:3])})", "use another check_N")
        saved = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        saved["weights"] = base_fingerprint(str(folder))
        tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder))
    else:
        base = model_dir(name)
        fingerprint = base_fingerprint(base)
        saved = {"method": "base", "base_model": name, "base_sha256": fingerprint, "weights": fingerprint, "args": {}}
        tokenizer = load_tokenizer(base, chat_template)
        model = load_model(base)
    if banned := saved["args"].get("banned_ids"):
        ban_tokens(model.get_base_model() if (folder / "adapter_config.json").exists() else model, banned)
    return model.eval(), tokenizer, saved
