"""Method spt: soft prompts in packed trees, and what training moves."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import PromptTuningConfig, get_peft_model
from spt_cases import ROWS, frozen_hash, packed, prepared, reference_logps, spt_args
from transformers import OPTConfig, OPTForCausalLM

import trees
from methods.spt import inference, messages, training
from methods.spt.losses import by_prompt, mean_nll
from modeling.prompts import end_of_turn
from modeling.softprompts import FIRST_VIRTUAL, soft_prompts, virtual_ids


def logps_by_prompt(model, batch):
    """Log-probabilities (K, N) of the replies' tokens, and the row (N,) of each."""
    logps = by_prompt(trees.score(model, batch), batch["branch"])
    return logps, by_prompt(batch["row"], batch["branch"])[0]


# ---- soft prompts in a forest -------------------------------------------------------------------


def test_a_packed_forest_scores_every_reply_as_ordinary_rows_do(tokenizer):
    model, args = prepared(tokenizer, "--K", "3", "--num_virtual_tokens", "5")
    logps, row = logps_by_prompt(model, packed(ROWS[:3], tokenizer, args))
    nll = mean_nll(logps, row, 3)
    for r in range(3):
        for k in range(3):
            expected = reference_logps(model, ROWS[r], k, tokenizer, args)
            assert torch.allclose(logps[k][row == r], expected, atol=1e-4)
            assert nll[r, k].item() == pytest.approx(-expected.mean().item(), abs=1e-4)
    assert nll.std(1).min() > 1e-3, "the prompts differ"


def test_learned_positions_of_opt_models_work(tokenizer):
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, word_embed_proj_dim=16,
        do_layer_norm_before=True, init_std=0.3)).eval()
    args = spt_args("--K", "2")
    model = training.prepare_model(model, tokenizer, ROWS, args)
    logps, row = logps_by_prompt(model, packed(ROWS[1:3], tokenizer, args))
    expected = reference_logps(model, ROWS[2], 1, tokenizer, args)
    assert torch.allclose(logps[1][row == 1], expected, atol=1e-4)


def test_one_prompt_without_extra_losses_is_plain_prompt_tuning(tokenizer):
    """Loss and gradient equal those of the peft library's prompt tuning with the same prompt."""
    model, args = prepared(
        tokenizer, "--K", "1", "--w_sel", "0", "--w_fuse", "0", "--w_ctr", "0")
    soft = soft_prompts(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["model.embed_tokens.prompts"]
    assert training.parameter_groups(model, args) == [{"params": [soft.prompts]}]
    loss, _ = training.compute_loss(model, packed(ROWS[:1], tokenizer, args), args, 0)
    loss.backward()
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    plain = get_peft_model(make_model(len(tokenizer)), config)
    weight = plain.prompt_encoder["default"].embedding.weight
    weight.data = soft.prompts.detach()[0].clone()
    prompt = messages.prompt_ids(ROWS[0], tokenizer, args, 999)[0]
    reply = tokenizer(ROWS[0]["response"])["input_ids"] + [end_of_turn(tokenizer)]
    labels = torch.tensor([[-100] * len(prompt) + reply])
    expected = plain(input_ids=torch.tensor([prompt + reply]), labels=labels).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.allclose(soft.prompts.grad[0], weight.grad, atol=1e-5)
    assert weight.grad.abs().max() > 1e-4


def test_tied_output_keeps_the_original_matrix_and_a_virtual_id_is_never_generated(tokenizer):
    model, _ = prepared(tokenizer)
    assert model.lm_head.weight is soft_prompts(model).words.weight
    ids = torch.tensor([virtual_ids(2, 8)])
    assert ids.min() >= FIRST_VIRTUAL > len(tokenizer)
    assert model(input_ids=ids).logits.shape[-1] == len(tokenizer)


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    (), ("--fusion", "logits_raw"), ("--fusion", "logits_norm", "--target_noise", "0.1"),
    ("--retriever", "transformer", "--heads", "separate", "--prompt_init", "vocab")])
def test_training_moves_prompts_and_retriever_and_nothing_else(tokenizer, flags):
    """Four steps lower the loss on the rows; the hash of all frozen weights stays."""
    model, args = prepared(tokenizer, "--K", "2", "--num_virtual_tokens", "4", *flags)
    soft = soft_prompts(model)
    frozen, before = frozen_hash(model), {n: t.clone() for n, t in soft.state().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    batch = packed(ROWS[1:4], tokenizer, args)
    for step in range(4):
        loss, logged = training.compute_loss(model, batch, args, step)
        loss.backward()
        assert all(p.grad is not None for p in trained), "DDP needs a gradient for every one"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and frozen_hash(model) == frozen
    moved = {name for name, t in soft.state().items() if not torch.equal(t, before[name])}
    assert moved == set(before) - {"centre"}
    assert sum(logged[f"use_{k}"].item() for k in (1, 2)) == pytest.approx(1)
    assert 0 <= logged["usage_entropy"] <= math.log(2) + 1e-6


def test_the_optimizer_gets_exactly_what_is_trainable(tokenizer):
    model, args = prepared(
        tokenizer, "--learning_rate", "1e-2", "--retriever_learning_rate", "1e-4")
    prompts, retriever = training.parameter_groups(model, args)
    grouped = {id(p) for group in (prompts, retriever) for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}
    assert "lr" not in prompts and retriever["lr"] == 1e-4
    assert training.parameter_groups(model, args.with_values(
        retriever_learning_rate=None))[1]["lr"] == 1e-2


@pytest.mark.parametrize(("weight", "part"), [
    ("w_lm", "lm_loss"), ("w_sel", "sel_loss"), ("w_fuse", "fuse_loss"), ("w_ctr", "ctr_loss")])
def test_every_loss_can_be_switched_off(tokenizer, weight, part):
    model, args = prepared(tokenizer)
    batch = packed(ROWS[:2], tokenizer, args)
    loss, logged = training.compute_loss(model, batch, args, 0)
    without, _ = training.compute_loss(model, batch, args.with_values(**{weight: 0.0}), 0)
    share = vars(args)[weight] * logged[part].item()
    assert share > 0 and without.item() == pytest.approx(loss.item() - share, abs=1e-5)


# ---- rows as trees ------------------------------------------------------------------------------


def test_the_oldest_turns_go_first_and_the_persona_stays(tokenizer):
    turns = [f"Turn number {i} is here." for i in range(7)]
    row, args = ROWS[0] | {"context": "\n".join(turns)}, spt_args()
    tree = training.build_tree(row, tokenizer, args, None)
    tight = args.with_values(max_length=trees.padded_shape(tree)[1] - 10)
    short = training.build_tree(row, tokenizer, tight, None)
    ids = [i for i in short.root.children[0].input_ids if i < FIRST_VIRTUAL]
    text = tokenizer.decode(ids)
    assert 0 < short.dropped_turns < 7 and "number 0" not in text and "number 6" in text
    assert ROWS[0]["persona"][0] in text
    few = args.with_values(max_context_turns=2)
    text = tokenizer.decode(messages.prompt_ids(row, tokenizer, few, 999)[0])
    assert "number 3" not in text and "Person A: Turn number 4" in text
    assert training.build_tree(row, tokenizer, args.with_values(max_length=30), None) is None


@pytest.mark.parametrize("kind", ["bytelevel", "sentencepiece"])
def test_tokenizers_give_the_same_prompts_in_training_and_inference(kind):
    tokenizer, args = make_tokenizer(kind), spt_args("--K", "2")
    tree = training.build_tree(ROWS[0], tokenizer, args, None)
    args = args.with_values(max_new_tokens=5, soft_prompt="all", num_branches=2)
    asked = inference.decode_tree(ROWS[0] | {"soft_prompts": [1, 2]}, tokenizer, args)
    learnt = [run.input_ids for run in tree.root.children]
    assert learnt == [run.input_ids for run in asked.root.children]
