"""Method delia: the new tokens, how they start, and what training moves."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_model, refused
from delia_cases import files, flags, settings  # noqa: F401
from peft import PeftModel
from transformers import AutoTokenizer

import train
from methods.delia import training
from modeling.adapters import add_tokens, grow_embeddings
from modeling.checkpoints import load_checkpoint
from modeling.models import load_model


def test_a_token_that_the_tokenizer_has_is_no_new_one(tokenizer, capsys):
    said = refused(capsys, 2, add_tokens, tokenizer, ["<unk>"])
    assert "the tokenizer has this token already" in said


def untied_dir(folder, tokenizer):
    """The tiny model with an output embedding of its own."""
    model = make_model(len(tokenizer))
    model.config.tie_word_embeddings = False
    type(model)(model.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["row", "lora"])
def test_a_checkpoint_is_reloaded_exactly_and_moves_what_it_should(
        tmp_path, files, tiny_dir, tokenizer, monkeypatch, tied, how):  # noqa: F811
    """row: of the base's matrices only the token's own row moves, and plain PEFT loads it.

    lora: other rows move, too, and run.json names the embedding among LoRA's modules.
    """
    base = tiny_dir if tied else untied_dir(tmp_path / "untied", tokenizer)
    prepared = {}
    prepare_model = training.prepare_model
    monkeypatch.setattr(training, "prepare_model",
                        lambda *args: prepared.setdefault("model", prepare_model(*args)))
    train.main(flags(files, base, tmp_path, "--diverse_ratio", "0", "--token_train", how,
                     "--token_init", "random"))
    folder = tmp_path / "delia" / "check_2"
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert size < 100_000, "no copy of the embedding"
    loaded, own, run = load_checkpoint(str(folder))
    assert ("embed_tokens" in run["args"]["lora_target_modules"]) == (how == "lora")
    ids = torch.tensor([own("Use <sep> now.")["input_ids"]])
    new = own.convert_tokens_to_ids("<sep>")
    assert new == len(tokenizer) and new in ids[0]
    assert own.decode(ids[0], skip_special_tokens=True) == "Use <sep> now."
    logits = prepared["model"].eval()(ids).logits
    torch.testing.assert_close(loaded(ids).logits, logits, rtol=0, atol=0)
    tokens = torch.arange(new + 1)
    before = load_model(str(base)).get_input_embeddings()(tokens[:-1])
    after = loaded.get_input_embeddings()(tokens)
    assert torch.equal(after[:-1], before) == (how == "row")
    if how == "row":
        plain = load_model(str(base))
        plain.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)))
        plain = PeftModel.from_pretrained(plain, folder).eval()
        torch.testing.assert_close(plain(ids).logits, logits, rtol=0, atol=0)
        with torch.no_grad():
            fresh = load_model(str(base))
            grow_embeddings(fresh, own, run["args"])
            start = fresh.get_input_embeddings()(tokens[-1:])
            assert not torch.equal(start, after[-1:]), "the row has learnt"


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_row_is_initialised_as_asked_and_no_other_row_changes(tmp_path, tokenizer, tied):
    folder = untied_dir(tmp_path, tokenizer) if not tied else None
    words = "the board says"
    for init in ("mean", "random", "description"):
        model = make_model(len(tokenizer)) if tied else load_model(str(folder))
        own = copy.deepcopy(tokenizer)
        add_tokens(own, ["<sep>"])
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        old = [layer.weight.detach().clone() for layer in layers]
        grow_embeddings(model, own, {"new_tokens": ["<sep>"], "token_init": init,
                                     "token_description": [words], "seed": 1})
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        for layer, before in zip(layers, old, strict=True):
            assert torch.equal(layer.weight[:-1], before)
            mean = before.mean(0)
            if init == "random":
                assert 0.5 < (layer.weight[-1] - mean).std() / before.std() < 2
                continue
            described = before[own(words, add_special_tokens=False)["input_ids"]].mean(0)
            expected = mean if init == "mean" else described
            torch.testing.assert_close(layer.weight[-1].detach(), expected)


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(("more", "names"), [
    ({"token_train": "lora", "lora_target_modules": ["all-linear"]}, LINEAR | {"embed_tokens"}),
    ({"token_train": "lora", "lora_target_modules": ["embed_tokens", "all-linear"]},
     LINEAR | {"embed_tokens"}),
    ({"lora_target_modules": ["q_proj", "all-linear"]}, LINEAR),
    ({"new_tokens": [], "lora_target_modules": ["all-linear", "lm_head"]}, LINEAR | {"lm_head"}),
])
def test_all_linear_beside_other_modules_is_every_linear_layer(tokenizer, more, names):
    """PEFT would look for a module of this name, and train the other ones alone."""
    own, model = copy.deepcopy(tokenizer), make_model(len(tokenizer))
    args = settings(**{"new_tokens": ["<sep>"], "lora_r": 4, **more})
    training.prepare_tokenizer(own, args)
    model = training.prepare_model(model, own, [], args)
    trained = {part for name, p in model.named_parameters() if p.requires_grad and "lora_" in name
               for part in name.split(".")}
    assert names <= trained and not ({*LINEAR, "embed_tokens", "lm_head"} - names) & trained
    described = training.describe(model, own, [], args)["lora_target_modules"]
    assert described == sorted(names), "run.json has the names, as the adapter does"


def test_all_linear_alone_stays_the_word_that_peft_knows(tiny_model, tokenizer):
    args = settings(new_tokens=[], lora_target_modules=["all-linear"], lora_r=4)
    model = training.prepare_model(tiny_model, tokenizer, [], args)
    assert training.describe(model, tokenizer, [], args)["lora_target_modules"] == ["all-linear"]


def test_only_the_row_and_the_adapter_are_trainable(tiny_model, tokenizer):
    """Rank 4 on q, k, v, o of 2 layers (32 wide, 2 of 4 heads in k and v): 1,792; and a row of 32.

    2 x 4 x (2 x 64 + 2 x 48) = 1,792.
    """
    own = copy.deepcopy(tokenizer)
    args = settings(new_tokens=["<sep>"], lora_r=4)
    training.prepare_tokenizer(own, args)
    model = training.prepare_model(tiny_model, own, [], args)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(sizes.values()) == 1_792 + 32
    assert sum("trainable_tokens" in name for name in sizes) == 1
