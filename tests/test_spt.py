"""Selective prompt tuning: soft prompts, retriever, losses, data, training, drawing, chat and figures."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pty
import random
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model, make_tokenizer, refused, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

import infer
import train
import trees
import utils
from decoding.mixtures import Fusion
from decoding.sampling import fused_greedy, fused_sample, greedy, sample
from flags import parse_flags
from methods.spt import evaluation, inference, messages, personas, training
from methods.spt.losses import (
    by_prompt,
    contrastive_loss,
    fusion_loss,
    logit_fusion_loss,
    mean_nll,
    selection_loss,
    similarity,
)
from modeling.checkpoints import load_checkpoint
from modeling.prompts import end_of_turn
from modeling.softprompts import FIRST_VIRTUAL, Retriever, read, soft_prompts, virtual_ids
from scoring import metrics, statistics

evaluation = __import__("eval")
ROWS = [
    {"persona": ["I sell tomatoes: red ones.", "My cat is called 12."], "context": "Is a tomato a fruit?\nOnly in botany.\nThen why?",
     "response": "Ask my cat.", "person": "a"},
    {"persona": ["I drive a train.", "I live by the sea."], "context": "When do you leave?", "response": "At nine, from platform 4.",
     "person": "b"},
    {"persona": ["I drive a train.", "I live by the sea."], "context": "Do you swim?", "response": "Only in June.", "person": "b"},
    {"persona": ["Grandma surfs with me."], "context": "Who is that in the yellow suit?", "response": "That is grandma.", "person": "c"},
]


TRAIN_FILE = write_jsonl(Path(tempfile.mkdtemp()) / "train.jsonl", ROWS)


def spt_args(*flags: str) -> argparse.Namespace:
    return parse_flags(train.build_parser, ["--method", "spt", "--train_file", str(TRAIN_FILE), "--max_length", "1000", *flags])


def prepared(tokenizer, *flags: str):
    """(model, args) with soft prompts; seeded."""
    args = spt_args(*flags)
    model = make_model(len(tokenizer))
    torch.manual_seed(1)
    return training.prepare_model(model, tokenizer, args), args


def packed(rows, tokenizer, args) -> dict:
    return trees.pack([training.build_tree(row, tokenizer, args, random.Random(0)) for row in rows])


# ---- losses by hand -----------------------------------------------------------------------------


def test_selection_loss_by_hand():
    """nll (ln 3, 0) gives g = (1/4, 3/4); h = (1/2, 1/2): KL = 1/4 ln(1/2) + 3/4 ln(3/2). At tau 1/2, g = (1/10, 9/10)."""
    nll, log_h = torch.tensor([[math.log(3), 0.0]], requires_grad=True), torch.full((1, 2), -math.log(2), requires_grad=True)
    loss = selection_loss(nll, log_h)
    assert loss.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    loss.backward()
    assert nll.grad is None and log_h.grad is not None, "the model's feedback is a target and no path for gradients"
    assert selection_loss(nll, log_h, 0.5).item() == pytest.approx(0.1 * math.log(0.2) + 0.9 * math.log(1.8))


def test_noise_on_the_selection_target_keeps_it_a_distribution():
    """Noise of size 50 on probabilities of 1/4 would make most of them negative; on logits the loss stays finite and positive."""
    torch.manual_seed(0)
    losses = [selection_loss(torch.ones(8, 4), torch.full((8, 4), -math.log(4)), noise=50.0).item() for _ in range(20)]
    assert all(0 < loss <= math.log(4) + 1e-5 for loss in losses)


def test_fusion_loss_by_hand():
    """One row, h = (1/4, 3/4), token probabilities (1/2, 1/6) and (1, 0.2): mixtures 1/4 and 0.4."""
    logps = torch.tensor([[0.5, 1.0], [1 / 6, 0.2]]).log()
    loss = fusion_loss(logps, torch.tensor([[0.25, 0.75]]).log(), torch.tensor([0, 0]))
    assert loss.item() == pytest.approx(-(math.log(0.25) + math.log(0.4)) / 2)


def test_logit_fusion_by_hand():
    """Weights 2 and 1 on logits (ln 2, 0) and (0, ln 4): the sum (2 ln 2, ln 4) is even, so each token has 1/2."""
    logits = torch.tensor([[[math.log(2), 0.0]], [[0.0, math.log(4)]]])
    loss = logit_fusion_loss(logits, torch.tensor([[2.0, 1.0]]), torch.tensor([1]), torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(2))


def test_contrastive_loss_by_hand():
    """Rows 1 and 2 say the same: 1 - cos(45 degrees); 1 and 3 differ with cos 0, 2 and 3 differ with cos 45 degrees."""
    scores, c = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), math.sqrt(0.5)
    texts = ["I drive a big red train.", "I drive a big red train.", "Nobody ever swims here, they say."]
    assert contrastive_loss(scores, texts).item() == pytest.approx((1 - c + 0 + c) / 3, abs=1e-6)
    assert contrastive_loss(scores[:1], texts[:1]).item() == 0


@given(st.text("ab c", max_size=12), st.text("ab c", max_size=12))
@settings(deadline=None, max_examples=30)
def test_similarity_does_not_depend_on_the_order(a, b):
    assert similarity(a, b) == similarity(b, a)


def test_scores_follow_the_published_softplus():
    """Cosine -1 -> 0.0000, 0 -> 0.0693, above 0.1 the identity."""
    retriever = Retriever(4)
    retriever.head.weight.data, retriever.head.bias.data = torch.eye(4), torch.zeros(4)
    axis = torch.tensor([1.0, -1.0, 1.0, -1.0])
    prompts = torch.stack([axis, -axis, torch.tensor([1.0, 1.0, -1.0, -1.0])])[:, None]
    scores = retriever(prompts, axis[None, None], torch.ones(1, 1, dtype=torch.bool), torch.zeros(4))
    assert scores[0].tolist() == pytest.approx([1.0, 4.5e-6, math.log(2) / 10], abs=1e-4)


# ---- retriever ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "transformer"])
@pytest.mark.parametrize("heads", ["shared", "separate"])
def test_scores_do_not_depend_on_padding_or_on_the_other_rows(tokenizer, kind, heads):
    model, _ = prepared(tokenizer, "--retriever", kind, "--heads", heads)
    soft, contexts = soft_prompts(model), [[5, 6], list(range(7, 40)), [9, 8, 7]]
    together = soft.scores(contexts)
    alone = torch.cat([soft.scores([c]) for c in contexts])
    assert torch.allclose(together, alone, atol=1e-6) and together.std() > 1e-4
    assert not torch.allclose(soft.scores([contexts[1]]), soft.scores([contexts[1][::-1][:5]]), atol=1e-4)


def test_contexts_are_told_apart_by_what_they_do_not_share(tokenizer):
    """Three contexts that share 30 tokens and differ in two: their scores differ ten times as much once their mean is taken off."""
    model, _ = prepared(tokenizer)
    soft, contexts = soft_prompts(model), [[5] * 15 + list(range(60, 75)) + [k, k + 9] for k in (100, 200, 300)]
    soft.centre.zero_()
    before = soft.scores(contexts).std(0).mean()
    soft.centre_on(contexts)
    assert soft.scores(contexts).std(0).mean() > 10 * before
    assert torch.allclose(soft.centre, soft.words(torch.tensor(contexts)).mean((0, 1)), atol=1e-6)


def test_a_preference_that_all_contexts_share_is_learnt_for_contexts_never_seen(tokenizer):
    """40 random contexts, for all of which prompt 2 is best. Of deviations from their mean alone no linear map has one sign, so
    new contexts would be given the opposite; with the mean beside them, prompt 2 is chosen for new ones too."""
    model, _ = prepared(tokenizer, "--K", "2", "--heads", "separate")
    soft, rng = soft_prompts(model), random.Random(0)
    contexts = [[rng.randrange(60, 400) for _ in range(12)] for _ in range(60)]
    soft.centre_on(contexts[:40])
    optimizer, nll = torch.optim.AdamW(soft.retriever.parameters(), lr=1e-3), torch.tensor([[1.0, 0.5]] * 40)
    for _ in range(60):
        selection_loss(nll, soft.choice(soft.scores(contexts[:40])), 0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert soft.scores(contexts[40:]).argmax(-1).float().mean() > 0.9


def test_the_retriever_never_sees_the_reply(tokenizer):
    """Another reply changes the log-probabilities and nothing that the retriever is given, and so no gradient of the contrast."""
    args = spt_args()
    first, second = (training.build_tree(ROWS[0] | {"response": text}, tokenizer, args, None) for text in ("Ask my cat.", "Never."))
    assert first.note == second.note
    ids = first.note["ids"]
    assert tokenizer.decode(ids) == "\n".join([*ROWS[0]["persona"], ROWS[0]["context"]])


# ---- soft prompts in a forest -------------------------------------------------------------------


def reference_logps(model, row, k, tokenizer, args):
    """The reply's log-probabilities by one ordinary row of embeddings."""
    soft = soft_prompts(model)
    prompt = messages.prompt_ids(row, tokenizer, args, 999)[0]
    reply = tokenizer(row["response"])["input_ids"] + [end_of_turn(tokenizer)]
    words = soft.words(torch.tensor(prompt + reply))
    logits = model(inputs_embeds=torch.cat([soft.prompts[k], words])[None]).logits[0].log_softmax(-1)
    start = args.prompt_length + len(prompt)
    return torch.stack([logits[start + i - 1, token] for i, token in enumerate(reply)])


def test_a_packed_forest_scores_every_reply_as_ordinary_rows_do(tokenizer):
    model, args = prepared(tokenizer, "--K", "3", "--num_virtual_tokens", "5")
    batch = packed(ROWS[:3], tokenizer, args)
    logps, row = by_prompt(trees.score(model, batch), batch)
    nll = mean_nll(logps, row, 3)
    for r in range(3):
        for k in range(3):
            want = reference_logps(model, ROWS[r], k, tokenizer, args)
            assert torch.allclose(logps[k][row == r], want, atol=1e-4)
            assert nll[r, k].item() == pytest.approx(-want.mean().item(), abs=1e-4)
    assert nll.std(1).min() > 1e-3, "the prompts differ"


def test_learned_positions_of_opt_models_work(tokenizer):
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                                     max_position_embeddings=512, word_embed_proj_dim=16, do_layer_norm_before=True, init_std=0.3)).eval()
    args = spt_args("--K", "2")
    model = training.prepare_model(model, tokenizer, args)
    batch = packed(ROWS[1:3], tokenizer, args)
    logps, row = by_prompt(trees.score(model, batch), batch)
    assert torch.allclose(logps[1][row == 1], reference_logps(model, ROWS[2], 1, tokenizer, args), atol=1e-4)


def test_one_prompt_without_extra_losses_is_plain_prompt_tuning(tokenizer):
    """Loss and gradient of the prompt equal those of the peft library's prompt tuning with the same rows."""
    from peft import PromptTuningConfig, get_peft_model

    model, args = prepared(tokenizer, "--K", "1", "--w_sel", "0", "--w_fuse", "0", "--w_ctr", "0")
    soft = soft_prompts(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.embed_tokens.prompts"]
    loss, _ = training.compute_loss(model, packed(ROWS[:1], tokenizer, args), args)
    loss.backward()
    plain = get_peft_model(make_model(len(tokenizer)), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8))
    weight = plain.prompt_encoder["default"].embedding.weight
    weight.data = soft.prompts.detach()[0].clone()
    prompt = messages.prompt_ids(ROWS[0], tokenizer, args, 999)[0]
    reply = tokenizer(ROWS[0]["response"])["input_ids"] + [end_of_turn(tokenizer)]
    labels = torch.tensor([[-100] * len(prompt) + reply])
    want = plain(input_ids=torch.tensor([prompt + reply]), labels=labels).loss
    want.backward()
    assert loss.item() == pytest.approx(want.item(), abs=1e-5)
    assert torch.allclose(soft.prompts.grad[0], weight.grad, atol=1e-5) and weight.grad.abs().max() > 1e-4


def test_tied_output_keeps_the_original_matrix_and_a_virtual_id_is_never_generated(tokenizer):
    model, _ = prepared(tokenizer)
    soft = soft_prompts(model)
    assert model.lm_head.weight is soft.words.weight
    assert model(input_ids=torch.tensor([virtual_ids(2, 8)])).logits.shape[-1] == len(tokenizer)


def frozen_hash(model) -> str:
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not name.startswith(("model.embed_tokens.prompts", "model.embed_tokens.retriever")):
            assert not p.requires_grad
            digest.update(name.encode() + p.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("flags", [(), ("--fusion", "logits_raw"), ("--fusion", "logits_norm", "--target_noise", "0.1"),
                                   ("--retriever", "transformer", "--heads", "separate", "--prompt_init", "vocab")])
def test_training_moves_prompts_and_retriever_and_nothing_else(tokenizer, flags):
    """Four steps lower the loss on the rows; the hash of all frozen weights stays."""
    model, args = prepared(tokenizer, "--K", "2", "--num_virtual_tokens", "4", *flags)
    before, own = frozen_hash(model), {n: t.clone() for n, t in soft_prompts(model).own_state().items()}
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    batch = packed(ROWS[1:4], tokenizer, args)
    for _ in range(4):
        loss, parts = training.compute_loss(model, batch, args)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "DDP needs a gradient for every one"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and frozen_hash(model) == before
    moved = {n for n, t in soft_prompts(model).own_state().items() if not torch.equal(t, own[n])}
    assert moved == set(own) - {"centre"}
    assert sum(parts[f"use_{k}"].item() for k in (1, 2)) == pytest.approx(1) and 0 <= parts["usage_entropy"] <= math.log(2) + 1e-6


@pytest.mark.parametrize("off", ["w_lm", "w_sel", "w_fuse", "w_ctr"])
def test_every_loss_can_be_switched_off(tokenizer, off):
    model, args = prepared(tokenizer)
    batch = packed(ROWS[:2], tokenizer, args)
    loss, parts = training.compute_loss(model, batch, args)
    weight, part = getattr(args, off), parts[{"w_lm": "lm_loss", "w_sel": "sel_loss", "w_fuse": "fuse_loss", "w_ctr": "ctr_loss"}[off]]
    setattr(args, off, 0.0)
    assert training.compute_loss(model, batch, args)[0].item() == pytest.approx((loss - weight * part).item(), abs=1e-5) and part > 0


def test_published_weights_are_the_defaults():
    args = spt_args()
    assert (args.num_prompts, args.prompt_length, args.w_lm, args.w_sel, args.w_fuse, args.w_ctr) == (4, 8, 1, 0.4, 1, 0.4)
    assert (args.tau_gold, args.tau_sim, args.ctr_threshold, args.fusion) == (1, 1, 20, "probs")


def test_published_recipes_are_resolved_with_their_own_keys():
    found = {path.stem: parse_flags(train.build_parser, ["--config", str(path)]) for path in (ROOT / "configs" / "spt").glob("*.yaml")}
    for name, args in found.items():
        train.check_flags(args)
        assert args.exp_name == name and args.method == "spt"
    assert found["llama2"].w_sel == found["llama2"].w_ctr == 1.0 and found["llama2"].prompt_length == 1
    assert found["llama2_noise"].target_noise == 0.1 and found["opt_125m"].train_file.endswith("train_self_original_no_cands.txt")


# ---- drawing ------------------------------------------------------------------------------------


def test_fusion_by_hand():
    """Two branches, weights 1/4 and 3/4: probabilities (1/2, 1/2) and (1/6, 5/6) mix to (1/4, 3/4) for both."""
    scores = torch.tensor([[0.5, 0.5], [1 / 6, 5 / 6]]).log()
    mixed = Fusion(torch.tensor([[0.25, 0.75]]), "probs")(None, scores).exp()
    assert torch.allclose(mixed, torch.tensor([[0.25, 0.75]] * 2))
    raw = Fusion(torch.tensor([[2.0, 1.0]]), "logits_raw")(None, torch.tensor([[1.0, 0.0], [0.0, 5.0]]))
    assert raw.tolist() == [[2.0, 5.0]] * 2


@pytest.mark.parametrize("prompts", ["chosen", "all", "fused"])
def test_greedy_replies_are_those_of_ordinary_decoding(tokenizer, prompts):
    """Each soft prompt by hand, token by token; a mixture with all its weight on prompt 2 is prompt 2."""
    model, args = prepared(tokenizer, "--K", "3")
    vars(args).update(max_new_tokens=6, prompts=prompts, num_branches=1 if prompts == "chosen" else 3)
    soft = soft_prompts(model)

    @torch.no_grad()
    def by_hand(row, k):
        rows = torch.cat([soft.prompts[k], soft.words(torch.tensor(messages.prompt_ids(row, tokenizer, args, 999)[0]))])
        out = []
        for _ in range(6):
            out.append(model(inputs_embeds=rows[None]).logits[0, -1].argmax())
            rows = torch.cat([rows, soft.words(out[-1])[None]])
        return [int(t) for t in out]

    numbers = [[2], [3]] if prompts == "chosen" else [[1, 2, 3]] * 2
    forest = [inference.decode_tree(row | {"prompts": own}, tokenizer, args) for row, own in zip(ROWS[:2], numbers, strict=True)]
    if prompts == "fused":
        for tree in forest:
            tree.note = {"kind": "probs", "weights": torch.tensor([0.0, 1.0, 0.0])}
        found = fused_greedy(model, forest, 0, -1, 6)
        numbers = [[2], [2]]
    else:
        found = greedy(model, forest, 0, -1, 6)
    assert found == [[by_hand(row, k - 1) for k in own] for row, own in zip(ROWS, numbers, strict=False)]


def test_a_fused_sample_is_one_voice(tokenizer):
    """All branches take the drawn token: an even mixture of one prompt with itself is that prompt's own sample."""
    model, args = prepared(tokenizer, "--K", "2")
    vars(args).update(max_new_tokens=6, prompts="fused", num_branches=2)
    both, one = (inference.decode_tree(ROWS[0] | {"prompts": own}, tokenizer, args) for own in ([1, 1], [1]))
    both.note = {"kind": "probs", "weights": torch.tensor([0.5, 0.5])}
    assert fused_sample(model, [both], [7], 0, -1, 6) == sample(model, [one], [7], 0, -1, 6)


# ---- data ---------------------------------------------------------------------------------------

SELF = "1 your persona: i like: tea.\n2 your persona: i ski.\n3 hi\thello there\n4 you ski ?\tyes , daily .\n1 your persona: i read.\n2 hey\tyo\n"
BOTH = "1 your persona: i ski.\n2 partner's persona: i cook.\n3 my persona: none\thello\t\tbye|no|hello\n"


def convai(tmp_path, text: str) -> str:
    path = tmp_path / "valid.txt"
    path.write_bytes(text.encode())
    return str(path)


def test_the_published_text_format_is_read_with_and_without_candidates_and_personas(tmp_path):
    """A colon in a persona is kept, `persona:` inside an utterance is talk, every reply is a row with its whole history."""
    rows = personas.read(convai(tmp_path, SELF))
    assert [row["context"] for row in rows] == ["hi", "hi\nhello there\nyou ski ?", "hey"]
    assert [row["response"] for row in rows] == ["hello there", "yes , daily .", "yo"]
    assert rows[1]["persona"] == ["i like: tea.", "i ski."] and rows[2]["persona"] == ["i read."] and "candidates" not in rows[0]
    row, = personas.read(convai(tmp_path, BOTH))
    assert row == {"persona": ["i ski."], "partner_persona": ["i cook."], "context": "my persona: none", "response": "hello",
                   "candidates": ["bye", "no", "hello"]}
    other, = personas.read(convai(tmp_path, "1 partner's persona: i cook.\n2 hi\tho\n"))
    assert other["persona"] == [] and other["partner_persona"] == ["i cook."]
    none, = personas.read(convai(tmp_path, "1 hi\tho\r\n"))
    assert none["persona"] == none["partner_persona"] == [] and none["response"] == "ho"


@pytest.mark.parametrize(("text", "said"), [
    ("1 your persona: \n2 hi\tho\n", ":1: a persona line without text"),
    ("1 your persona: i ski.\n2 hi\tho\n3 your persona: late\n", ":3: a persona line after the first utterance"),
    ("1 your persona: i ski.\n2 hi\tho\n3 how are\n", ":3: must be an utterance, a tab and the reply"),
    ("1 your persona: i ski.\n2 hi\tho\n3 how are", ":3: the last line does not end: the file is cut"),
    ("1 your persona: i ski.\n2 hi\tho\n4 hi\tho\n", ":3: number 4 follows 2: lines are missing"),
    ("7 hi\tho\n", ":1: starts with number 7: the first lines of the dialogue are missing"),
    ("1 your persona: i ski.\n1 hi\tho\n", ":1: the dialogue ends before anybody speaks"),
    ("1 hi\tho\n1 your persona: i ski.\n", ":2: the dialogue ends before anybody speaks"),
    ("1 hi\tho\nhello\n", ":2: must be a number, a space and text"), ("1 hi\t\n", ":1: must be an utterance"), ("", "no rows"),
])
def test_faults_of_text_files_are_named_by_line(tmp_path, capsys, text, said):
    assert f"valid.txt{said}".replace("txtno", "txt: no") in refused(capsys, 2, personas.read, convai(tmp_path, text))


@pytest.mark.parametrize(("change", "said"), [
    ({"persona": []}, 'field "persona" is empty'), ({"persona": ["I ski.", " "]}, 'field "persona": sentence 2 is empty'),
    ({"persona": "I ski."}, 'field "persona" must be a list of strings'), ({"response": ""}, 'field "response" must be a string with text'),
    ({"context": " "}, 'field "context" is empty'),
])
def test_faults_of_jsonl_rows_are_named_by_line(tmp_path, capsys, change, said):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], ROWS[0] | change])
    assert f"{path}:2: {said}" in refused(capsys, 2, personas.read, str(path))


def test_the_projects_persona_set_is_whole_and_split_by_person():
    """40 people with 6 sentences each, 200 dialogues; nobody stands on both sides."""
    sides = [personas.read(str(ROOT / "data" / "spt" / f"{name}.jsonl")) for name in ("train", "test")]
    people = [{row["person"] for row in rows} for rows in sides]
    assert [len(rows) for rows in sides] == [160, 40] and [len(p) for p in people] == [32, 8] and not people[0] & people[1]
    assert all(len(row["persona"]) == 6 and row["response"] == row["candidates"][0] for rows in sides for row in rows)


def test_the_oldest_turns_go_first_and_the_persona_stays(tokenizer):
    row = ROWS[0] | {"context": "\n".join(f"Turn number {i} is here." for i in range(7))}
    args = spt_args()
    tree = training.build_tree(row, tokenizer, args, None)
    args.max_length = trees.padded_shape(tree)[1] - 10
    short = training.build_tree(row, tokenizer, args, None)
    text = tokenizer.decode([i for i in short.root.children[0].input_ids if i < FIRST_VIRTUAL])
    assert 0 < short.dropped_turns < 7 and "number 0" not in text and "number 6" in text and ROWS[0]["persona"][0] in text
    args.max_context_turns = 2
    text = tokenizer.decode(messages.prompt_ids(row, tokenizer, args, 999)[0])
    assert "number 3" not in text and "Person A: Turn number 4" in text
    args.max_length = 30
    assert training.build_tree(row, tokenizer, args, None) is None


# ---- commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "said"), [
    (["--K", "0"], "--num_prompts 0 must be at least 1"), (["--num_virtual_tokens", "0"], "--prompt_length 0 must be at least 1"),
    (["--tau_sim", "0"], "--tau_sim 0.0 must be above 0"), (["--w_ctr", "-1"], "--w_ctr -1.0 must be at least 0"),
    (["--retriever_learning_rate", "0"], "--retriever_learning_rate 0.0 must be above 0"),
    (["--w_lm", "0", "--w_sel", "0", "--w_fuse", "0", "--w_ctr", "0"], "there is nothing to learn"),
    (["--lora_r", "8"], "--lora_r does nothing with method spt"), (["--max_context_turns", "0"], "keeps no turn"),
    (["--ul_weight", "1"], "option --ul_weight is unknown for this method"), (["--retriever", "dense"], "invalid choice"),
])
def test_flags_that_cannot_work_are_refused(tmp_path, capsys, flags, said):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert said in refused(capsys, 2, train.main, ["--method", "spt", "--train_file", str(path), *flags])


@pytest.fixture(scope="module")
def finished(tiny_dir, tmp_path_factory):
    """(the file of rows, flags of training, the checkpoint after four steps, saved every two)."""
    folder = tmp_path_factory.mktemp("spt")
    path = write_jsonl(folder / "rows.jsonl", ROWS)
    flags = ["--method", "spt", "--train_file", str(path), "--model_name", str(tiny_dir), "--max_length", "1000", "--num_epochs", "2",
             "--save_steps", "2", "--loss_steps", "2", "--learning_rate", "1e-2", "--target_noise", "0.1"]
    train.main([*flags, "--output_dir", str(folder / "ck"), "--exp_name", "a"])
    return path, flags, folder / "ck" / "a" / "check_4"


def test_a_checkpoint_holds_prompts_and_retriever_alone_and_loads_to_equal_logits(finished, tokenizer):
    from safetensors.torch import load_file

    _, _, checkpoint = finished
    state = load_file(checkpoint / "adapter_model.safetensors")
    assert set(state) == {"prompts", "centre", "retriever.head.weight", "retriever.head.bias"} and state["prompts"].shape == (4, 8, 32)
    model, _, run = load_checkpoint(str(checkpoint))
    again, _, _ = load_checkpoint(str(checkpoint))
    args = spt_args()
    batch = packed(ROWS[:2], tokenizer, args)
    assert run["method"] == "spt" and torch.equal(trees.score(model, batch), trees.score(again, batch))
    fresh, _ = prepared(tokenizer)
    assert not torch.allclose(trees.score(fresh, batch), trees.score(model, batch), atol=1e-3)
    assert frozen_hash(model) == frozen_hash(fresh)
    assert FIRST_VIRTUAL > 2**20 and 4 * (4 * 8 * 576 + 2 * (576 * 576 + 576)) < 10e6, "the embedded model's file, in bytes"


def test_the_saved_state_is_the_trained_one(tokenizer, tmp_path):
    model, args = prepared(tokenizer, "--heads", "separate")
    soft_prompts(model).prompts.data += 1
    training.save_adapter(model, tmp_path)
    loaded = training.load_adapter(make_model(len(tokenizer)), tmp_path)
    batch = packed(ROWS[:2], tokenizer, args)
    assert torch.equal(trees.score(model, batch), trees.score(loaded, batch))
    assert torch.equal(soft_prompts(model).scores([[4, 5]]), soft_prompts(loaded).scores([[4, 5]]))


def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(finished, tmp_path):
    _, flags, checkpoint = finished
    flags = [*flags, "--output_dir", str(tmp_path), "--exp_name", "a"]
    train.main([*flags, "--max_steps", "2"])
    train.main([*flags, "--resume"])
    assert (tmp_path / "a" / "check_4" / "adapter_model.safetensors").read_bytes() == (checkpoint / "adapter_model.safetensors").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert {"lm_loss", "sel_loss", "fuse_loss", "ctr_loss", "usage_entropy", "agreement", "use_4"} <= set(lines[-1])


def test_the_retriever_may_learn_at_a_rate_of_its_own(finished, tmp_path):
    """Adam's first step moves every entry by the learning rate: after one step at 1e-2 and at 1e-4 the same prompts stand
    beside retrievers that are 0.0099 apart."""
    from safetensors.torch import load_file

    _, flags, _ = finished
    states = []
    for name, own in (("shared", []), ("own", ["--retriever_learning_rate", "1e-4"])):
        train.main([*flags, *own, "--max_steps", "1", "--output_dir", str(tmp_path), "--exp_name", name])
        states.append(load_file(tmp_path / name / "check_1" / "adapter_model.safetensors"))
    shared, own = states
    assert torch.equal(shared["prompts"], own["prompts"])
    assert (shared["retriever.head.weight"] - own["retriever.head.weight"]).abs().max().item() == pytest.approx(0.0099, rel=1e-3)


def test_two_processes_learn_what_one_learns_with_twice_the_accumulation(finished, tmp_path):
    """Batches of one row: two processes x accumulation 1 see the updates of one process x accumulation 2, retriever included."""
    _, flags, _ = finished
    flags = [*flags, "--output_dir", str(tmp_path), "--batch_size", "1", "--target_noise", "0", "--num_epochs", "1", "--save_steps", "4"]
    train.main([*flags, "--exp_name", "alone", "--gradient_accumulation_steps", "2"])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(ROOT / "train.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *flags, "--exp_name", "pair"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read(tmp_path / name / check)[1] for name, check in (("alone", "check_4"), ("pair", "check_2")))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5, msg=name)


def drawn(finished, folder, name: str, *flags: str) -> list[dict]:
    path, _, checkpoint = finished
    infer.main(["--method", "spt", "--model_name_or_path", f"{checkpoint}/", "--test_file", str(path), "--max_new_tokens", "5",
                "--save_file", str(folder / f"{name}.jsonl"), *flags])
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_prompts_are_chosen_fixed_drawn_all_or_fused(finished, tmp_path):
    rows = drawn(finished, tmp_path, "chosen")
    assert all(row["chosen"] == 1 + max(range(4), key=lambda k: row["scores"][k]) and row["prompts"] == [row["chosen"]] for row in rows)
    assert [len(row["preds"]) for row in rows] == [1] * 4
    fixed = drawn(finished, tmp_path, "fixed", "--prompt_id", "3", "--num_response_per_input", "2")
    assert all(row["prompts"] == [3, 3] and len(row["preds"]) == 2 for row in fixed)
    every = drawn(finished, tmp_path, "all", "--prompts", "all", "--decoding", "greedy")
    assert all(row["prompts"] == [1, 2, 3, 4] and len(row["preds"]) == 4 for row in every)
    third = drawn(finished, tmp_path, "third", "--prompt_id", "3", "--decoding", "greedy")
    assert [row["preds"][0] for row in third] == [row["preds"][2] for row in every], "a row's reply does not depend on its neighbours"
    many = drawn(finished, tmp_path, "sampled", "--prompts", "sampled", "--num_response_per_input", "40", "--max_new_tokens", "1")
    assert {k for row in many for k in row["prompts"]} == {1, 2, 3, 4}
    assert len(drawn(finished, tmp_path, "fused", "--prompts", "fused", "--num_response_per_input", "2")[0]["preds"]) == 2
    noisy = drawn(finished, tmp_path, "noisy", "--selection_noise", "100")
    assert [row["chosen"] for row in noisy] != [row["chosen"] for row in rows]


@pytest.mark.parametrize(("flags", "said"), [
    (["--prompt_id", "9"], "the checkpoint has prompts 1 to 4"), (["--prompt_id", "1", "--prompts", "all"], "drop one of the two"),
    (["--decoding", "list"], "--decoding list does not work"), (["--decoding", "greedy", "--num_response_per_input", "2"], "would repeat"),
])
def test_drawing_flags_that_cannot_work_are_refused(finished, tmp_path, capsys, flags, said):
    assert said in refused(capsys, 2, lambda: drawn(finished, tmp_path, "x", *flags))


def test_a_checkpoint_asks_for_its_method(finished, tmp_path, capsys):
    path, _, checkpoint = finished
    argv = ["--model_name_or_path", f"{checkpoint}/", "--test_file", str(path), "--save_file", str(tmp_path / "x.jsonl")]
    assert "add --method spt" in refused(capsys, 2, infer.main, argv)


# ---- chat ---------------------------------------------------------------------------------------


class Terminal:
    """A command in a pseudo-terminal: type a line, wait for text."""

    def __init__(self, argv: list[str], cwd):
        self.master, slave = pty.openpty()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env=env, close_fds=True)
        os.close(slave)
        self.text = ""

    def expect(self, mark: str, seconds: float = 60) -> str:
        """What came up to the mark, which is taken out of the text."""
        end = time.time() + seconds
        while mark not in self.text:
            assert time.time() < end, f"no {mark!r} in {self.text!r}"
            if select.select([self.master], [], [], 0.5)[0]:
                self.text += os.read(self.master, 4096).decode("utf-8", "replace")
        before, _, self.text = self.text.partition(mark)
        return before

    def say(self, line: str) -> None:
        os.write(self.master, f"{line}\n".encode())


def test_a_terminal_chat_answers_clears_reloads_saves_and_leaves(finished, tmp_path):
    """Real keys in a pseudo-terminal; the persona file is changed while the chat runs, and r takes its next person."""
    _, _, checkpoint = finished
    path = write_jsonl(tmp_path / "people.jsonl", ROWS)
    chat = Terminal([sys.executable, str(ROOT / "infer.py"), "--method", "spt", "--interactive", "--model_name_or_path", f"{checkpoint}/",
                     "--test_file", str(path), "--save_file", str(tmp_path / "chat.jsonl"), "--max_new_tokens", "4"], tmp_path)
    chat.expect("My cat is called 12.")
    chat.expect("you: ")
    chat.say("save")
    chat.expect("nothing to save")
    chat.say("Do you sell tomatoes?")
    chat.expect("them: ")
    shown = chat.expect("]")
    assert "prompt" in shown and "scores" in shown
    chat.say("And fish?")
    chat.expect("them: ")
    chat.expect("]")
    chat.say("save")
    chat.expect("(saved to")
    chat.say("clear")
    chat.expect("forgotten")
    chat.say("save")
    chat.expect("nothing to save")
    write_jsonl(path, [ROWS[0], ROWS[1] | {"persona": ["I was written meanwhile."]}])
    chat.say("r")
    chat.expect("I was written meanwhile.")
    chat.say("exit")
    assert chat.process.wait(20) == 0
    row, = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert row["turns"][0::2] == ["Do you sell tomatoes?", "And fish?"] and len(row["turns"]) == 4 and len(row["prompts"]) == 2
    assert row["persona"] == ROWS[0]["persona"]


# ---- figures ------------------------------------------------------------------------------------


def test_reference_figures_by_hand():
    """a b c against b c d e: 2 common of 3 and 4; a b a: 2 of 3 distinct words, 2 of 2 pairs; an empty text is one token."""
    assert metrics.token_f1("a b c", "b c d e") == pytest.approx(4 / 7) and metrics.token_f1("A", "a") == 0
    assert metrics.plain_distinct(["a b a"], 1) == pytest.approx(2 / 3) and metrics.plain_distinct(["a b a"], 2) == 1
    assert metrics.plain_distinct(["", "a."], 1) == 1 and metrics.plain_distinct([""], 2) is None
    score, signature = metrics.corpus_bleu(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert score == pytest.approx(100) and "tok:13a" in signature and "smooth:exp" in signature
    assert metrics.persona_overlap("My cat sleeps.", ["I have a cat."]) == pytest.approx(0.5)
    assert metrics.persona_overlap("I am.", ["I have a cat."]) is None


def test_an_interval_over_persons_is_wider_than_one_over_rows():
    """Two persons, ten equal rows each: drawing persons gives 0, 1/2 or 1, so the interval is the whole range."""
    values, people = [0.0] * 10 + [1.0] * 10, ["a"] * 10 + ["b"] * 10
    assert statistics.cluster_interval(values, people) == (0.5, 0.0, 1.0)
    mean, low, high = statistics.interval(values)
    assert mean == 0.5 and 0.2 < low < high < 0.8


def test_one_person_has_no_interval():
    assert evaluation.mean_of([1.0, None, 2.0], ["a", "a", "a"]) == [1.5] and evaluation.mean_of([None], ["a"]) is None
    assert len(evaluation.mean_of([1.0, 2.0], ["a", "b"])) == 3


class Embedder:
    """Two texts are alike if they have equal length."""

    def encode(self, texts, **_):
        import numpy as np

        return np.eye(200)[[len(text) for text in texts]]


def test_choice_figures_by_hand():
    """nll (2, 1, 3), chosen 1: random 2, oracle 1, regret 1, no agreement; the reply compared is the one under prompt 1."""
    row = ROWS[0] | {"preds": ["Never.", "Ask my cat.", "No!"], "prompts": [2, 1, 3], "chosen": 1, "scores": [0.5, 0.1, 0.1]}
    own = evaluation.row_figures(row, [2.0, 1.0, 3.0], Embedder())
    assert (own["nll"], own["random"], own["oracle"], own["regret"], own["agreement"]) == (2.0, 2.0, 1.0, 1.0, 0.0)
    assert own["F1"] == own["R-1"] == own["embedding"] == 1.0 and own["sbert_diversity"] == 1.0


def test_gain_over_the_baseline_is_the_mean_over_columns():
    columns = dict.fromkeys(evaluation.COLUMNS)
    assert evaluation.mean_gain(columns | {"F1": 11.0, "BLEU": 3.0}, columns | {"F1": 10.0, "BLEU": 2.0}) == pytest.approx(30)


def test_the_published_table_has_one_value_under_every_heading(finished, tmp_path, monkeypatch, capsys):
    drawn(finished, tmp_path, "one", "--prompts", "all")
    drawn(finished, tmp_path, "two", "--prompt_id", "1", "--num_response_per_input", "4")
    monkeypatch.setattr(utils, "load_embedder", Embedder)
    capsys.readouterr()
    evaluation.main(["--eval_file", str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl"), "--save_file", str(tmp_path / "e.json")])
    said = capsys.readouterr().out
    header, *lines = (tmp_path / "e.csv").read_text().splitlines()
    assert header == "system," + ",".join(evaluation.COLUMNS) and [len(line.split(",")) for line in lines] == [12, 12]
    summary = json.loads((tmp_path / "e.json").read_text())
    one, two = summary["systems"].values()
    assert one["persons"] == 3 and sum(one["usage"].values()) == pytest.approx(1) and two["usage"]["1"] == 1
    assert one["figures"]["oracle"][0] <= one["figures"]["nll"][0] and one["figures"]["oracle"] == two["figures"]["oracle"]
    assert "nrefs:1" in said and "BERTScore: bert-score is not installed" in said or "BERTScore" in said
    evaluation.main(["--show", str(tmp_path / "e.json")])
    assert "published columns" in capsys.readouterr().out


def test_nll_of_the_figures_is_that_of_ordinary_rows(finished, tokenizer):
    model = load_checkpoint(str(finished[2]))[0]
    args = argparse.Namespace(max_length=1000, max_input_length=250)
    nlls = evaluation.prompt_nlls(model, tokenizer, ROWS[1], args)
    with torch.no_grad():
        assert nlls == pytest.approx([-reference_logps(model, ROWS[1], k, tokenizer, args).mean().item() for k in range(4)], abs=1e-4)


def test_sentencepiece_tokenizers_give_the_same_prompts_in_training_and_inference():
    tokenizer = make_tokenizer("sentencepiece")
    args = spt_args("--K", "2")
    tree = training.build_tree(ROWS[0], tokenizer, args, None)
    vars(args).update(max_new_tokens=5, prompts="all", num_branches=2)
    asked = inference.decode_tree(ROWS[0] | {"prompts": [1, 2]}, tokenizer, args)
    assert [run.input_ids for run in tree.root.children] == [run.input_ids for run in asked.root.children]
