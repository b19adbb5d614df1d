"""Rows, models and a trained checkpoint of method spt that several test files share."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
import torch
from conftest import make_model, write_jsonl

import infer
import train
import trees
from flags import Args
from methods.spt import messages, training
from modeling.prompts import end_of_turn
from modeling.softprompts import soft_prompts

ROWS = [
    {"persona": ["I sell tomatoes: red ones.", "My cat is called 12."], "person": "a",
     "context": "Is a tomato a fruit?\nOnly in botany.\nThen why?", "response": "Ask my cat."},
    {"persona": ["I drive a train.", "I live by the sea."], "person": "b",
     "context": "When do you leave?", "response": "At nine, from platform 4."},
    {"persona": ["I drive a train.", "I live by the sea."], "person": "b",
     "context": "Do you swim?", "response": "Only in June."},
    {"persona": ["Grandma surfs with me."], "person": "c",
     "context": "Who is that in the yellow suit?", "response": "That is grandma."},
]


def spt_args(*flags: str) -> Args:
    """The flags of training on rows that need not be there."""
    return train.read_flags(["--method", "spt", "--train_file", "rows.jsonl",
                             "--max_length", "1000", *flags])


def prepared(tokenizer, *flags: str):
    """(tiny model with soft prompts, args), always with the same prompts."""
    args = spt_args(*flags)
    model = make_model(len(tokenizer))
    torch.manual_seed(1)
    return training.prepare_model(model, tokenizer, ROWS, args), args


def packed(rows, tokenizer, args) -> dict:
    """A batch of some rows."""
    return trees.pack([training.build_tree(row, tokenizer, args, random.Random(0))
                       for row in rows])


def reference_logps(model, row, k, tokenizer, args):
    """The reply's log-probabilities under prompt k, by one ordinary row of embeddings."""
    soft = soft_prompts(model)
    prompt = messages.prompt_ids(row, tokenizer, args, 999)[0]
    reply = tokenizer(row["response"])["input_ids"] + [end_of_turn(tokenizer)]
    words = soft.words(torch.tensor(prompt + reply))
    embeddings = torch.cat([soft.prompts[k], words])[None]
    logits = model(inputs_embeds=embeddings).logits[0].log_softmax(-1)
    start = args.prompt_length + len(prompt)
    return torch.stack([logits[start + i - 1, token] for i, token in enumerate(reply)])


def frozen_hash(model) -> str:
    """A hash of all weights but prompts and retriever, which must be frozen."""
    learnt = ("model.embed_tokens.prompts", "model.embed_tokens.retriever")
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not name.startswith(learnt):
            assert not p.requires_grad
            digest.update(name.encode() + p.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def finished(tiny_dir, tmp_path_factory):
    """(the file of rows, flags of training, the checkpoint after four steps, saved every two)."""
    folder = tmp_path_factory.mktemp("spt")
    path = write_jsonl(folder / "rows.jsonl", ROWS)
    flags = ["--method", "spt", "--train_file", str(path), "--model_name", str(tiny_dir),
             "--max_length", "1000", "--num_epochs", "2", "--save_steps", "2", "--loss_steps", "2",
             "--learning_rate", "1e-2", "--target_noise", "0.1"]
    train.main([*flags, "--output_dir", str(folder / "ck"), "--exp_name", "a"])
    return path, flags, folder / "ck" / "a" / "check_4"


def drawn(finished, folder, name: str, *flags: str) -> list[dict]:
    """The rows that infer.py writes; the checkpoint says the method."""
    path, _, checkpoint = finished
    save_file = folder / f"{name}.jsonl"
    infer.main(["--model_name_or_path", f"{checkpoint}/", "--test_file", str(path),
                "--max_new_tokens", "5", "--save_file", str(save_file), *flags])
    return [json.loads(line) for line in save_file.read_text().splitlines()]
