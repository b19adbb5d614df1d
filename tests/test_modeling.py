"""modeling: adapters, new tokens, and checkpoints that come back as they were or are refused."""

from __future__ import annotations

import json
import os
import socket

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, refused
from huggingface_hub import constants
from safetensors.numpy import save_file

import utils
from flags import Args
from modeling import models, softprompts
from modeling.adapters import (
    add_lora,
    add_tokens,
    ban_tokens,
    fit_embeddings,
    grow_embeddings,
    resolve_lora,
)
from modeling.checkpoints import check_adapter, finish_adapter, load_checkpoint, restore
from modeling.embedder import Embedder
from modeling.models import base_fingerprint, load_model

LORA = Args(lora_r=None, lora_alpha=None, lora_dropout=None, lora_target_modules=None,
            load_in_4bit=False, gradient_checkpointing=False)
SOFT = {"num_prompts": 2, "prompt_length": 3, "prompt_init": "vocab", "retriever": "linear",
        "shared_head": True, "tau_sim": 0.5, "fusion": "probs", "max_context_turns": -1}


# ---- base models --------------------------------------------------------------------------------


def test_without_a_network_the_hub_is_not_asked_again(monkeypatch):
    """huggingface_hub reads the variable when it is imported, peft and child processes later."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens on the discard port
    models.go_offline_if_unreachable()
    assert os.environ["HF_HUB_OFFLINE"] == "1" and constants.HF_HUB_OFFLINE is True


def test_with_a_network_the_hub_stays_in_use(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        models.go_offline_if_unreachable()
    assert "HF_HUB_OFFLINE" not in os.environ and constants.HF_HUB_OFFLINE is False


def make_folder(folder, value: float = 1.0):
    """A sealed folder as train.py leaves it, with one weight of 2 x 3 numbers."""
    (staging := folder.with_name(".staging")).mkdir()
    save_file({"w": np.full((2, 3), value, np.float32)}, staging / "adapter_model.safetensors")
    (staging / "adapter_config.json").write_text("{}")
    utils.seal(staging, folder)
    return folder


def test_a_fingerprint_tells_two_models_of_one_shape_apart(tmp_path):
    one, same, other = (make_folder(tmp_path / name, value)
                        for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.001)))
    assert base_fingerprint(one) == base_fingerprint(same) != base_fingerprint(other)
    assert len(base_fingerprint(one)) == 16 and base_fingerprint(tmp_path) is None


# ---- adapters and new tokens --------------------------------------------------------------------


@pytest.mark.parametrize(("family", "given", "want"), [
    ("llama", {}, (64, 16, 0.1, ["q_proj", "v_proj"])),
    ("mistral", {}, (16, 32, 0.05, ["q_proj", "k_proj", "v_proj", "lm_head"])),
    ("llama", {"lora_r": 8, "lora_alpha": 0, "lora_dropout": 0.0,
               "lora_target_modules": ["all-linear"]}, (8, 0, 0.0, ["all-linear"])),
])
def test_lora_settings_are_those_given_or_the_familys(family, given, want):
    """An alpha or a dropout of 0 is a value; args stay as they are."""
    model, args = make_model(20), LORA.with_values(**given)
    model.config.model_type = family
    before = dict(vars(args))
    assert tuple(resolve_lora(args, model).values()) == want
    assert vars(args) == before


def test_only_the_adapter_is_trained_and_unknown_modules_are_named(capsys):
    model = add_lora(make_model(20), LORA.with_values(lora_r=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8 and all("lora_" in name for name in trained)  # 2 layers, q v, A B
    message = refused(capsys, 2, add_lora, make_model(20),
                      LORA.with_values(lora_target_modules=["q_proj", "c_attn"]))
    assert "--lora_target_modules c_attn: this model has no such module" in message
    assert "its modules: act_fn down_proj embed_tokens" in message and "all-linear" in message


def test_all_linear_beside_other_names_is_refused_and_not_left_untrained(capsys):
    """PEFT takes it for a module's name there, finds none, and would train lm_head alone."""
    args = LORA.with_values(lora_target_modules=["all-linear", "lm_head"])
    message = refused(capsys, 2, add_lora, make_model(20), args)
    assert "all-linear stands for every linear layer" in message and "give it alone" in message


@pytest.mark.parametrize("init", ["mean", "random", "description"])
def test_new_tokens_start_as_they_are_told_and_the_same_every_time(init):
    names, tables = ["<one>", "<two>"], []
    for _ in range(2):
        tokenizer = make_tokenizer("bytelevel")
        model, old = make_model(len(tokenizer)), len(tokenizer)
        add_tokens(tokenizer, names)
        before = model.get_input_embeddings().weight.detach().clone()
        grow_embeddings(model, tokenizer, {
            "new_tokens": names, "token_init": init, "seed": 3,
            "token_description": ["a botany class", "Grandma"]})
        tables.append(model.get_input_embeddings().weight.detach().clone())
    assert torch.equal(*tables) and torch.equal(tables[0][:old], before)
    rows, mean = tables[0][old:], before.double().mean(0).float()
    if init == "mean":
        assert torch.equal(rows, torch.stack([mean, mean]))
    elif init == "description":
        ids = tokenizer("Grandma", add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(rows[1], before[ids].mean(0))
    else:
        assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], mean)


def test_a_token_that_is_there_already_is_no_new_token(capsys):
    message = refused(capsys, 2, add_tokens, make_tokenizer("bytelevel"), ["<|im_end|>"])
    assert "--new_tokens <|im_end|>: the tokenizer has this token already" in message


def test_embeddings_fit_the_tokenizer_and_large_ones_stay(tokenizer):
    model = make_model(len(tokenizer) - 2)
    mean = model.get_input_embeddings().weight.detach().double().mean(0).float()
    fit_embeddings(model, tokenizer)
    weight = model.get_input_embeddings().weight
    assert len(weight) == len(tokenizer) and torch.equal(weight[-2:], torch.stack([mean, mean]))
    large = make_model(len(tokenizer) + 5)
    fit_embeddings(large, tokenizer)
    assert len(large.get_input_embeddings().weight) == len(tokenizer) + 5


def test_banned_tokens_are_never_the_most_probable(tiny_model):
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        favourite = int(tiny_model(ids).logits[0, -1].argmax())
        ban_tokens(tiny_model, [favourite])
        logits = tiny_model(ids).logits[0, -1]
    assert logits[favourite] == -1e9 and logits.isfinite().all()


# ---- checkpoints --------------------------------------------------------------------------------


def test_an_adapter_that_cannot_be_loaded_is_named(tmp_path, capsys):
    folder = make_folder(tmp_path / "check_9")
    assert check_adapter(folder) is None
    data = (weights := folder / "adapter_model.safetensors").read_bytes()
    for broken in (data[:-10], data + b"more", data[:5], data[:20], b"", b"\xff" * 50):
        weights.write_bytes(broken)
        message = refused(capsys, 2, check_adapter, folder)
        assert f"{weights} has {len(broken)} bytes and cannot be read: " in message
        assert "hint: the file is cut; use another check_N" in message
    weights.rename(folder / "adapter_model.bin")
    message = refused(capsys, 2, check_adapter, folder)
    assert "adapter_model.bin is a pickle, which can run code" in message
    (folder / "adapter_model.bin").unlink()
    assert f"{weights} is not there" in refused(capsys, 2, check_adapter, folder)
    (folder / "adapter_config.json").unlink()
    assert f"{folder} holds no adapter_config.json" in refused(capsys, 2, check_adapter, folder)


def logits_of(model, ids=range(5, 15)):
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits


def store(folder, model, tokenizer, base, method: str = "peft", **args):
    """A checkpoint folder of an adapter (control: of a whole model), as training leaves it."""
    (staging := folder.with_name(".staging")).mkdir()
    if method == "spt":
        softprompts.save(model, staging)
    elif method == "control":
        model.save_pretrained(staging)
    else:
        model.save_pretrained(staging, save_embedding_layers=False)
    finish_adapter(staging, tokenizer, {
        "method": method, "base_model": str(base), "base_sha256": base_fingerprint(base),
        "args": args})
    utils.seal(staging, folder)
    return folder


@pytest.fixture
def lora_folder(tiny_dir, tmp_path, tokenizer):
    """A LoRA checkpoint whose tokens 7 and 8 are banned, and the logits of its model."""
    torch.manual_seed(0)
    model = add_lora(load_model(tiny_dir), LORA.with_values(lora_r=2)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    want = logits_of(model)
    want[..., [7, 8]] = -1e9
    return store(tmp_path / "check_3", model, tokenizer, tiny_dir, banned_ids=[7, 8]), want


def test_an_adapter_comes_back_with_its_base_and_its_banned_tokens(lora_folder, tiny_dir):
    folder, want = lora_folder
    model, tokenizer, run = load_checkpoint(str(folder))
    assert torch.equal(logits_of(model), want) and not model.training
    assert run["method"] == "peft" and len(run["weights"]) == 12
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_dir)


def test_what_training_restores_itself_is_left_to_it(lora_folder, tiny_model):
    before = logits_of(tiny_model)
    assert restore(tiny_model, lora_folder[0]) is False
    assert torch.equal(logits_of(tiny_model), before)


def test_soft_prompts_come_back_by_the_kind_that_their_config_names(tiny_dir, tmp_path, tokenizer):
    """Loaded with their base, and put back into a model that goes on training."""
    torch.manual_seed(0)
    model = softprompts.attach(load_model(tiny_dir), SOFT)
    softprompts.soft_prompts(model).centre_on([[4, 5, 6], [7]])
    ids, contexts = [*softprompts.virtual_ids(1, 3), 5, 6], [[5, 6], [9]]
    want, scores = logits_of(model, ids), softprompts.soft_prompts(model).scores(contexts)
    folder = store(tmp_path / "check_3", model, tokenizer, tiny_dir, "spt")
    assert softprompts.read_config(folder) == SOFT
    loaded, _, run = load_checkpoint(str(folder))
    other = softprompts.attach(load_model(tiny_dir), SOFT)
    assert not torch.equal(logits_of(other, ids), want)
    assert restore(other, folder) is True
    for model in (loaded, other):
        assert torch.equal(logits_of(model, ids), want)
        assert torch.equal(softprompts.soft_prompts(model).scores(contexts), scores)
    assert run["method"] == "spt"


def test_rows_of_new_tokens_come_back(tiny_dir, tmp_path):
    """The base lacks them: they are made again as they were at first, then trained rows added."""
    tokenizer, model = make_tokenizer("bytelevel"), load_model(tiny_dir)
    add_tokens(tokenizer, ["<one>"])
    start = {"new_tokens": ["<one>"], "token_init": "random", "token_description": [], "seed": 5}
    grow_embeddings(model, tokenizer, start)
    token = tokenizer.convert_tokens_to_ids("<one>")
    model = add_lora(model, LORA, trainable_token_indices={"embed_tokens": [token]}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.5)
    folder = store(tmp_path / "check_3", model, tokenizer, tiny_dir, "delia", **start)
    loaded, read, _ = load_checkpoint(str(folder))
    assert read.convert_tokens_to_ids("<one>") == token
    ids = [5, token, 6]
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids))


def test_a_model_trained_from_scratch_comes_back_whole(tmp_path, tokenizer, tiny_dir):
    model = make_model(len(tokenizer), seed=8)
    folder = store(tmp_path / "check_3", model, tokenizer, tiny_dir, "control", banned_ids=[7])
    want = logits_of(model)
    want[..., 7] = -1e9
    loaded, _, run = load_checkpoint(str(folder))
    assert torch.equal(logits_of(loaded), want)
    assert run["method"] == "control" and run["weights"] == base_fingerprint(folder)


def test_a_base_model_is_its_own_weights(tiny_dir):
    model, _, run = load_checkpoint(str(tiny_dir))
    assert run == {"method": "base", "base_model": str(tiny_dir), "args": {},
                   "base_sha256": base_fingerprint(tiny_dir), "weights": run["base_sha256"]}
    assert not model.training


def test_a_checkpoint_on_another_base_is_refused_unless_forced(lora_folder, tmp_path, tokenizer,
                                                               capsys):
    folder, want = lora_folder
    make_model(len(tokenizer), seed=9).save_pretrained(other := tmp_path / "other")
    tokenizer.save_pretrained(other)
    run = utils.read_run(folder) | {"base_model": str(other)}
    (folder / "run.json").write_text(text := json.dumps(run))
    utils.atomic_write(folder / "COMPLETE.json", json.dumps({"files": {"run.json": len(text)}}))
    message = refused(capsys, 2, load_checkpoint, str(folder))
    assert f"was trained on base {run['base_sha256']}, {other} is {base_fingerprint(other)}" \
        in message
    assert "--force_base" in message
    model, _, _ = load_checkpoint(str(folder), force_base=True)
    assert not torch.equal(logits_of(model), want)


@pytest.mark.parametrize(("harm", "what"), [
    (lambda folder: (folder / "tokenizer.json").unlink(), "is incomplete (no tokenizer.json)"),
    (lambda folder: [(folder / name).unlink() for name in ("run.json", "COMPLETE.json")],
     "run.json is not there, so the method of this adapter is unknown"),
])
def test_half_a_checkpoint_is_refused(lora_folder, capsys, harm, what):
    harm(lora_folder[0])
    assert what in refused(capsys, 2, load_checkpoint, str(lora_folder[0]))


def test_an_adapter_keeps_the_template_that_it_was_trained_with(lora_folder, capsys):
    message = refused(capsys, 2, load_checkpoint, str(lora_folder[0]), False, "none")
    assert "brings the template that it was trained with" in message


# ---- embedder -----------------------------------------------------------------------------------


def test_the_embedder_asks_for_every_text_once_and_shows_no_bar():
    class Model:
        tokenizer, asked = "its tokenizer", []

        def encode(self, texts, normalize_embeddings, show_progress_bar):
            assert normalize_embeddings and not show_progress_bar
            self.asked.append(texts)
            return np.array([[len(text), 0.0] for text in texts])

    embedder = Embedder(model := Model())
    assert embedder.tokenizer == "its tokenizer"
    assert embedder.encode(["a", "bb", "a"])[:, 0].tolist() == [1, 2, 1]
    assert embedder.encode(["ccc", "bb"])[:, 0].tolist() == [3, 2]
    assert model.asked == [["a", "bb"], ["ccc"]]
