"""Checkpoints: what they hold, and how they are loaded.

A check_N folder is an adapter (adapter_config.json says of which kind) or a whole model that was
trained from scratch (config.json). Both have run.json, which says how they were made, and a
completeness marker that is written last (utils.seal).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors import SafetensorError, safe_open

from modeling import softprompts
from modeling.adapters import ban_tokens, fit_embeddings, grow_embeddings
from modeling.models import base_fingerprint, load_model, load_tokenizer, model_dir
from utils import USAGE, atomic_write, fail, missing_files, read_run, sha256

# PEFT's file name. Soft prompts are saved under it, too, so one check of the files serves both.
ADAPTER = "adapter_model.safetensors"


class Source(NamedTuple):
    """What a model's name stands for.

    tokenizer_dir, base_dir: from where the tokenizer and the base's weights are loaded.
    adapter: the folder of an adapter on that base, or None.
    run: run.json with "weights", which tells one adapter or base from another.
    """

    tokenizer_dir: str
    base_dir: str
    adapter: Path | None
    run: dict


def load_checkpoint(name: str, force_base: bool = False, chat_template: str | None = None):
    """Load a base model (hub id, folder, smollm2) or a check_N folder with its base.

    Returns (model in eval mode, tokenizer, run) where run is the checkpoint's run.json, or
    {"method": "base", ...} for a base model; run["weights"] tells one adapter or base from another.
    """
    source = _find_source(name, force_base, chat_template)
    is_base = source.run["method"] == "base"  # a trained model brings its own template
    tokenizer = load_tokenizer(source.tokenizer_dir, chat_template if is_base else None)
    model = load_model(source.base_dir)
    settings = source.run["args"]
    if source.adapter:
        # The tokenizer may have grown in training; the adapter fits only a base grown like it.
        fit_embeddings(model, tokenizer)
        # Before the adapter is loaded, which holds what training has made of these rows.
        if settings.get("new_tokens"):
            grow_embeddings(model, tokenizer, settings)
        load = LOADERS.get(_peft_type(source.adapter), _load_peft)
        model = load(model, source.adapter)
    if banned := settings.get("banned_ids"):
        # Of a wrapped model the inner one is hooked: the wrapper passes its output on unchanged.
        ban_tokens(model.get_base_model() if isinstance(model, PeftModel) else model, banned)
    return model.eval(), tokenizer, source.run


def _find_source(name: str, force_base: bool, chat_template: str | None) -> Source:
    """Tell adapter, whole model and base apart; dies where one is incomplete or does not fit."""
    folder = Path(name)
    # A whole model has config.json, an adapter only adapter_config.json.
    if folder.is_dir() and not (folder / "config.json").exists():
        check_adapter(folder)
        if chat_template:
            what = f"--chat_template: {folder} brings the template that it was trained with"
            fail(USAGE, what, "drop the flag")
        # PEFT writes no marker, so an adapter that was made elsewhere has none to compare with.
        if (folder / "COMPLETE.json").exists():
            _refuse_incomplete(folder)
        path = folder / "run.json"
        if not path.is_file():
            what = f"{path} is not there, so the method of this adapter is unknown"
            fail(USAGE, what, "train it with train.py")
        run = read_run(name)
        base = model_dir(run["base_model"])
        if not force_base:
            _refuse_other_base(folder, run, base)
        # An adapter is small enough to hash whole; of a base, base_fingerprint reads only samples.
        weights = sha256((folder / ADAPTER).read_bytes())[:12]
        return Source(str(folder), base, folder, run | {"weights": weights})
    # Trained from scratch: a whole model, but with a run.json that says how it was made.
    if (folder / "run.json").is_file():
        _refuse_incomplete(folder)
        run = read_run(name) | {"weights": base_fingerprint(name)}
        return Source(str(folder), str(folder), None, run)
    base = model_dir(name)
    weights = base_fingerprint(base)
    run = {
        "method": "base", "base_model": name, "base_sha256": weights, "weights": weights, "args": {}
    }
    return Source(base, base, None, run)


def check_adapter(folder: Path) -> None:
    """Die over an adapter folder that cannot be loaded, naming the file."""
    config, weights = folder / "adapter_config.json", folder / ADAPTER
    if not config.is_file():
        hint = "give a check_N folder, a model folder, a hub id or smollm2"
        fail(USAGE, f"{folder} holds no adapter_config.json", hint)
    if not weights.is_file():
        # Older versions of PEFT wrote pickles, so such a folder is likely to be a good adapter.
        pickles = [p for p in folder.glob("adapter*") if p.suffix in (".bin", ".pt", ".pth")]
        if pickles:
            what = f"{pickles[0]} is a pickle, which can run code when it is read"
            fail(USAGE, what, "save the adapter as safetensors")
        fail(USAGE, f"{weights} is not there", "the checkpoint is incomplete; use another check_N")
    try:
        with safe_open(weights, "np"):  # reads the header and compares it with the file's size
            pass
    except SafetensorError as error:
        what = f"{weights} has {weights.stat().st_size} bytes and cannot be read: {error}"
        fail(USAGE, what, "the file is cut; use another check_N")


def _refuse_incomplete(folder: Path) -> None:
    missing = missing_files(folder)
    if missing:
        what = f"{folder} is incomplete (no {', '.join(missing[:3])})"
        fail(USAGE, what, "use another check_N")


def _refuse_other_base(folder: Path, run: dict, base: str) -> None:
    """Die unless the base has the weights that an adapter was trained on."""
    # An adapter loads without complaint on any base of the same shape, and then writes nonsense.
    fingerprint = base_fingerprint(base)
    if fingerprint != run["base_sha256"]:
        fail(
            USAGE,
            f"{folder} was trained on base {run['base_sha256']}, "
            f"{run['base_model']} is {fingerprint}",
            "load the base it was trained on, or pass --force_base",
        )


def _peft_type(folder: Path) -> str | None:
    """The kind of an adapter; None for a whole model."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get("peft_type")


def _load_peft(model, folder: Path):
    """The model with one of PEFT's adapters."""
    model = PeftModel.from_pretrained(model, folder)
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            # Write its rows into the matrix once; otherwise the matrix is copied at every step.
            layer.merge()
    return model


# by the peft_type of adapter_config.json; any other type is one of PEFT's
LOADERS = {softprompts.KIND: softprompts.load}
RESTORERS = {softprompts.KIND: softprompts.restore}


def restore(model, folder: Path) -> bool:
    """Put an adapter's weights back into a model that is being trained, to resume the run.

    Returns False and does nothing for adapters and models that transformers.Trainer restores.
    """
    restorer = RESTORERS.get(_peft_type(Path(folder)))
    if restorer is None:
        return False
    restorer(model, folder)
    return True


def finish_adapter(folder: Path, tokenizer, run: dict) -> None:
    """Complete a saved adapter or model: its tokenizer, run.json, and the base's public name."""
    path = folder / "adapter_config.json"
    if path.exists():  # else a whole model was trained
        config = json.loads(path.read_text(encoding="utf-8"))
        # PEFT has written the folder from which it loaded the base, which no other machine has.
        config["base_model_name_or_path"] = run["base_model"]
        atomic_write(path, json.dumps(config, indent=2, sort_keys=True))
    tokenizer.save_pretrained(folder)
    atomic_write(folder / "run.json", json.dumps(run, indent=1))
