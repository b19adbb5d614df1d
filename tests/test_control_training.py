"""Method control in training: tokens, rows, the loss, and runs of train.py."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model, make_tokenizer, refused, write_jsonl
from control_cases import ROW, SCHEMA, TRAIN, arguments, in_folder, trained, with_spare  # noqa: F401
from safetensors.torch import load_file

import infer
import train
import trees
from decoding.beams import beam
from decoding.mixtures import GuidedTree
from decoding.sampling import greedy
from methods.control import tokens, training
from modeling.adapters import ban_tokens
from modeling.checkpoints import load_checkpoint
from modeling.models import load_model
from modeling.prompts import end_of_turn

WEIGHTS = "adapter_model.safetensors"


def prepared_tokenizer(args):
    """The tiny tokenizer with the control tokens."""
    tokenizer = make_tokenizer("bytelevel")
    training.prepare_tokenizer(tokenizer, args)
    return tokenizer


# ---- tokens -------------------------------------------------------------------------------------


def test_spare_tokens_serve_where_there_are_enough_else_tokens_are_added():
    few, many = with_spare(4), with_spare(6)
    before = len(few), len(many)
    added, taken = tokens.assign_tokens(few, SCHEMA), tokens.assign_tokens(many, SCHEMA)
    assert list(added) == list(taken) == [
        "toxicity=nontoxic", "toxicity=toxic", "sentiment=neg", "sentiment=neu", "sentiment=pos"]
    assert (len(few), len(many)) == (before[0] + 5, before[1])
    assert added["sentiment=pos"] == "<|sentiment=pos|>"
    assert taken["sentiment=pos"] == "<|reserved_special_token_4|>"
    assert tokens.assign_tokens(few, SCHEMA) == added and len(few) == before[0] + 5, \
        "a second time adds nothing"
    ids = few("<|sentiment=pos|>")["input_ids"]
    assert ids == [few.convert_tokens_to_ids("<|sentiment=pos|>")]


@pytest.mark.parametrize("spare", [0, 6])
def test_new_rows_start_at_the_mean_and_only_they_and_the_adapter_are_trained(spare):
    """The model ties its embeddings: a control token has one row, trained once, as both."""
    tokenizer, args = with_spare(spare), arguments()
    model = make_model(len(tokenizer))
    mean = model.get_input_embeddings().weight.detach().mean(0)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    training.prepare_tokenizer(tokenizer, args)
    model = training.prepare_model(model, tokenizer, [ROW], args)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [p for name, p in trainable.items() if "trainable_tokens" in name]
    assert all("lora_" in name or "trainable_tokens" in name for name in trainable)
    assert [tuple(p.shape) for p in rows] == [(5, 32)]
    assert torch.allclose(rows[0], mean.expand(5, -1), atol=1e-6)
    banned = training.describe(model, tokenizer, [ROW], args)["banned_ids"]
    assert (model(torch.tensor([[1, 2]])).logits[..., banned] == -1e9).all(), \
        "nothing is learnt of them as outputs"
    optimizer = torch.optim.AdamW(trainable.values(), lr=0.1, weight_decay=0.0)
    batch = trees.pack([training.build_tree(ROW, tokenizer, args, random.Random(0))])
    for step in range(3):
        optimizer.zero_grad()
        training.compute_loss(model, batch, args, step)[0].backward()
        optimizer.step()
    # nontoxic and pos stood before the text, the others did not
    assert not torch.allclose(rows[0][0], mean, atol=1e-2)
    assert torch.allclose(rows[0][1:4], mean.expand(3, -1), atol=1e-6)
    base = {name.replace(".base_layer", "").replace("token_adapter.", "")
            .removeprefix("base_model.model."): p
            for name, p in model.named_parameters() if not p.requires_grad}
    for name, value in frozen.items():
        # rows of spare tokens were put to the mean
        kept = slice(None, len(value) - spare) if "embed" in name else slice(None)
        assert torch.equal(base[name][: len(value)][kept], value[kept]), name


def test_banned_tokens_are_never_said_whatever_decodes(tokenizer):
    """Whatever the model would say greedily, by beams or when guided is banned.

    Then it says something else.
    """
    model = make_model(len(tokenizer))
    tree, uncond = (trees.Tree(trees.branch_prompts([[5, last]] * 2, [1, 2])) for last in (6, 7))
    guided = GuidedTree(tree.root, uncond=uncond, guidance_scale=3.0)
    single = trees.Tree(trees.branch_prompts([[5, 6]], [1]))

    def said() -> set[int]:
        replies = greedy(model, [tree], 0, 0, 4)[0] + greedy(model, [guided], 0, 0, 4)[0]
        replies += beam(model, [single], 0, 0, 4, 2, 2)[0]
        return {token for reply in replies for token in reply}

    banned = said()
    ban_tokens(model, sorted(banned))
    assert banned and said() and not said() & banned


# ---- trees and the loss -------------------------------------------------------------------------


def test_tokens_stand_first_and_text_and_end_are_what_is_learnt():
    args = arguments()
    tokenizer = prepared_tokenizer(args)
    tree = training.build_tree(ROW, tokenizer, args, random.Random(0))
    text = tokenizer(ROW["text"])["input_ids"]
    ids = tokenizer.convert_tokens_to_ids(["<|toxicity=nontoxic|>", "<|sentiment=pos|>"])
    assert tree.root.input_ids == tokens.start_ids(tokenizer) + ids
    assert tree.root.children[0].input_ids == text + [end_of_turn(tokenizer)]
    assert trees.pack([tree])["token"].tolist() == list(range(4, 4 + len(text) + 1))


def test_texts_without_tokens_and_models_of_fewer_attributes():
    args = arguments(attributes=["sentiment"])
    tokenizer = prepared_tokenizer(args)
    start = tokens.start_ids(tokenizer)

    def context(row: dict, args) -> list[int]:
        return training.build_tree(row, tokenizer, args, random.Random(0)).root.input_ids

    ids = tokenizer.convert_tokens_to_ids(["<|sentiment=pos|>"])
    assert context(ROW, args) == start + ids
    assert context(ROW | {"unconditioned": True}, args) == start
    assert context(ROW, args.with_values(attributes=[])) == start


def test_the_loss_of_packed_texts_equals_the_mean_over_padded_rows():
    args = arguments()
    tokenizer = prepared_tokenizer(args)
    texts = ("I love this day.", "No.", "The bus leaves at nine, says the man.")
    forest = [training.build_tree(ROW | {"text": text}, tokenizer, args, random.Random(0))
              for text in texts]
    model = make_model(len(tokenizer))
    loss, logged = training.compute_loss(model, trees.pack(forest), args, 0)
    padded = -trees.score_rows(model, forest).mean().item()
    assert loss.item() == pytest.approx(padded, abs=1e-5) == logged["loss"].item()


def test_a_text_that_does_not_fit_is_dropped_not_cut():
    args = arguments()
    row = ROW | {"text": "word " * 80}
    assert training.build_tree(row, prepared_tokenizer(args), args, random.Random(0)) is None


# ---- runs ---------------------------------------------------------------------------------------


def test_rows_and_adapter_are_saved_and_reloaded_exactly(in_folder):  # noqa: F811
    saved = load_file(in_folder / WEIGHTS)
    rows = [value for name, value in saved.items() if "trainable_tokens" in name]
    model, tokenizer, run = load_checkpoint(str(in_folder))
    assert len(rows) == 1 and rows[0].shape == (5, 32)
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    loaded = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    assert torch.equal(loaded[0], rows[0])
    banned = run["args"]["banned_ids"]
    ids = torch.tensor([[1, banned[4], 20, 21]])
    with torch.no_grad():
        first, second = model(ids).logits, load_checkpoint(str(in_folder))[0](ids).logits
    assert torch.equal(first, second) and (first[..., banned] == -1e9).all()
    assert (in_folder / WEIGHTS).stat().st_size < 100_000, "no copy of the embedding"


def test_a_checkpoint_remembers_what_drawing_and_scoring_need(in_folder):  # noqa: F811
    settled = json.loads((in_folder / "run.json").read_text())["args"]
    assert settled["schema"] == json.loads(Path("data/manifest.json").read_text())["schema"]
    assert settled["attributes"] == ["sentiment"] and len(settled["banned_ids"]) == 5
    assert settled["control_tokens"]["sentiment=pos"] == "<|sentiment=pos|>"


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(in_folder):  # noqa: F811
    """Four steps at once, and two steps that are resumed."""
    flags = [*TRAIN, "--save_steps", "2"]
    train.main([*flags, "--exp_name", "whole", "--max_steps", "4"])
    train.main([*flags, "--exp_name", "parts", "--max_steps", "2"])
    train.main([*flags, "--exp_name", "parts", "--max_steps", "4", "--resume"])
    runs = in_folder.parents[1]
    whole, parts = ((runs / name / "check_4" / WEIGHTS).read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_from_scratch_trains_and_reloads_a_whole_random_model(in_folder, capsys):  # noqa: F811
    train.main([*TRAIN, "--exp_name", "scratch", "--from_scratch", "--max_steps", "2"])
    folder = in_folder.parents[1] / "scratch" / "check_2"
    model, tokenizer, run = load_checkpoint(str(folder))
    base = load_model("tiny")
    assert run["method"] == "control" and not (folder / "adapter_config.json").exists()
    sizes = [some.get_input_embeddings().weight.shape[0] for some in (model, base)]
    assert len(tokenizer) == sizes[0] == sizes[1] + 5
    pairs = zip(model.named_parameters(), base.named_parameters(), strict=True)
    same = [torch.allclose(p, q) for (_, p), (name, q) in pairs if "proj" in name]
    assert same and not any(same)
    infer.main(["--model_name_or_path", str(folder), "--condition", "sentiment=pos",
                "--save_file", "outs/scratch.jsonl"])
    assert "1 responses to 1 rows" in capsys.readouterr().out


# ---- what is refused ----------------------------------------------------------------------------


def test_bad_training_rows_are_named_with_file_and_line(in_folder, tmp_path, capsys):  # noqa: F811
    rows = [ROW, {"text": "123", "values": {}}, {"text": "Hello"},
            ROW | {"values": {"toxicity": "toxic", "sentiment": "glad"}}]
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    said = refused(capsys, 2, train.main, [
        *TRAIN, "--train_file", str(path), "--manifest", "data/manifest.json",
        "--exp_name", "bad"])
    assert 'bad.jsonl:2: field "text" must be a string with letters' in said
    assert 'bad.jsonl:3: needs "values"' in said
    assert 'sentiment must be one of neg, neu, pos, got "glad"' in said


@pytest.mark.parametrize(("flags", "problem"), [
    (["--attributes", "beauty"], "does not know the attribute 'beauty'"),
    (["--manifest", "data/train.jsonl"], "is not a manifest"),
    (["--from_scratch", "--load_in_4bit"], "drop --load_in_4bit"),
])
def test_flags_that_cannot_work_are_refused(in_folder, capsys, flags, problem):  # noqa: F811
    assert problem in refused(capsys, 2, train.read_flags, [*TRAIN, *flags])


def test_a_missing_manifest_is_told_before_anything_is_trained(
        in_folder, tmp_path, capsys):  # noqa: F811
    path = write_jsonl(tmp_path / "rows.jsonl", [ROW])
    said = refused(capsys, 2, train.main, [*TRAIN, "--train_file", str(path)])
    assert f"{tmp_path / 'manifest.json'} is not there" in said and "--manifest FILE" in said


@pytest.mark.parametrize(("typed", "attributes"), [
    (["sentiment", "toxicity"], ["toxicity", "sentiment"]), (["none"], []),
    (["toxicity"], ["toxicity"])])
def test_attributes_stand_in_the_order_of_the_manifest(
        in_folder, typed, attributes):  # noqa: F811
    assert train.read_flags([*TRAIN, "--attributes", *typed]).attributes == attributes


def test_configs_are_resolved_without_their_data():
    for path in sorted((ROOT / "configs" / "control").glob("*.yaml")):
        args = train.read_flags(["--config", str(path)])
        assert args.attributes == ["toxicity", "sentiment"]
        assert args.from_scratch == path.stem.startswith("gpt2")
