"""Training of method diffuse: tries and losses by hand and against a row per target, and a run."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from conftest import make_model, refused
from diffuse_cases import number_row, padded_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from training_cases import digest, read_metrics, read_run

import train
import trees
import utils
from flags import Args
from methods.diffuse import training
from modeling.prompts import end_of_turn

pytest_plugins = ["diffuse_cases"]  # its fixtures
LN = math.log
ALL_AT_ONCE = Args(batch_size=None, max_batch_tokens=10**6)


# ---- tries --------------------------------------------------------------------------------------


def test_a_trie_holds_every_common_prefix_once_with_the_sum_of_the_weights():
    """abx (0.5), aby (0.3), c (0.2): a and b carry 0.8, then x 0.5 and y 0.3; c alone 0.2."""
    first, second = trees.target_trie([[1, 2, 7], [1, 2, 8], [3]], [0.5, 0.3, 0.2])
    assert (first.input_ids, first.weights, first.branch) == ([1, 2], [0.8, 0.8], -1)
    children = [(child.input_ids, child.weights, child.branch) for child in first.children]
    assert children == [([7], [0.5], 0), ([8], [0.3], 1)]
    assert (second.input_ids, second.weights, second.branch) == ([3], [0.2], 2)


def test_sequences_that_start_one_another_are_found_wherever_they_stand():
    assert trees.prefix_clash([[4], [1, 2, 3], [9], [1, 2]]) == (3, 1)
    assert trees.prefix_clash([[1, 2], [5], [1, 2]]) in ((0, 2), (2, 0))
    assert trees.prefix_clash([[1, 2], [1, 3], [2]]) is None
    with pytest.raises(ValueError, match="sequence 2 equals or starts sequence 1"):
        trees.target_trie([[1, 2], [1]], [0.5, 0.5])


# ends marked by 9, so that a set is prefix-free
SEQUENCE = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(lambda ids: (*ids, 9))
SEQUENCE_SETS = st.lists(SEQUENCE, min_size=1, max_size=12, unique=True)


@given(SEQUENCE_SETS, st.randoms())
@settings(max_examples=15, deadline=None)
def test_trie_loss_sequence_logps_and_gradients_equal_one_row_per_target(sequences, rng):
    """In double precision, so that only mistakes show."""
    model = make_model(20).double()
    sequences = [list(ids) for ids in sequences]
    weights = [rng.random() + 0.01 for _ in sequences]
    weights = [weight / sum(weights) for weight in weights]
    root = trees.Segment([5, 6, 7], children=trees.target_trie(sequences, weights))
    batch = trees.pack([trees.Tree(root)])
    logps = trees.score(model, batch)
    loss = -(batch["weight"] * logps).sum()
    slow = padded_loss(model, [5, 6, 7], sequences, weights)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    parameters = list(model.parameters())
    ours, theirs = (
        torch.cat([g.flatten() for g in torch.autograd.grad(x, parameters, retain_graph=True)])
        for x in (loss, slow))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    branch, sums = trees.leaf_sums(logps, batch)
    for index, total in zip(branch.tolist(), sums.tolist(), strict=True):
        alone = -padded_loss(model, [5, 6, 7], [sequences[index]], [1.0]).item()
        assert total == pytest.approx(alone, rel=1e-5)


@given(SEQUENCE_SETS, st.integers(1, 4), st.integers(3, 12))
@settings(max_examples=15, deadline=None)
def test_parts_of_a_tree_score_every_token_once_and_as_the_whole_does(
        sequences, max_leaves, max_tokens):
    model = make_model(20)
    targets = trees.target_trie([list(ids) for ids in sequences], [1.0] * len(sequences))
    tree = trees.Tree(trees.Segment([5, 6], children=targets))
    batch = trees.pack([tree, tree])
    parts = trees.split(batch, max_leaves, max_tokens)
    assert sum(len(part["token"]) for part in parts) == len(batch["token"])
    for part in parts:
        assert sum(part["last"] == torch.arange(len(part["last"]))) <= max_leaves
    whole = trees.score(model, batch)
    in_parts = trees.score_in_parts(model, batch, max_leaves, max_tokens)
    torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-5)


# ---- what a row teaches -------------------------------------------------------------------------


def tree_of(row, tokenizer):
    return training.distribution_tree(row, tokenizer, row["weights"])


def gradient(model, batch, args):
    model.zero_grad()
    loss, parts = training.compute_loss(model, batch, args, 0)
    loss.backward()
    return loss.item(), parts, torch.cat([p.grad.flatten() for p in model.parameters()])


def test_chunks_of_targets_leave_loss_and_gradients_as_they_are(tokenizer, tiny_model):
    batch = trees.pack([tree_of(number_row(30), tokenizer)] * 2)
    whole, parts, slope = gradient(tiny_model, batch, ALL_AT_ONCE)
    for changes in ({"batch_size": 7}, {"max_batch_tokens": 60}, {"batch_size": 1}):
        loss, _, in_chunks = gradient(tiny_model, batch, ALL_AT_ONCE.with_values(**changes))
        assert loss == pytest.approx(whole, rel=1e-5)
        torch.testing.assert_close(in_chunks, slope, rtol=1e-3, atol=1e-5)
    assert parts["floor"].item() == pytest.approx(LN(30), rel=1e-5)
    assert parts["kl"].item() == pytest.approx(whole - LN(30), rel=1e-4)


def test_floors_are_the_entropies_of_the_published_sets(tokenizer, tiny_model):
    """Six countries' prompts of 54, 49, 45, 22, 16 and 13 targets: 20.1160 nats together, and the
    threshold of gamma 0.2 is 24.1392."""
    batch = trees.pack([tree_of(number_row(count), tokenizer)
                        for count in (54, 49, 45, 22, 16, 13)])
    _, floors = training.losses_and_floors(tiny_model, batch, None, 10**6)
    assert floors.sum().item() == pytest.approx(20.1160, abs=1e-4)
    assert 1.2 * floors.sum().item() == pytest.approx(24.1392, abs=2e-4)


def test_the_threshold_is_met_at_equality_and_not_above():
    assert training.is_learnt(2.4, 2.0, 0.2) and not training.is_learnt(2.4001, 2.0, 0.2)


def test_the_end_token_is_learnt_unless_eos_is_false(tokenizer):
    row = number_row(3)
    end = end_of_turn(tokenizer)
    assert all(ids[-1] == end for ids in training.target_sequences(row, tokenizer))
    assert not any(end in ids
                   for ids in training.target_sequences(row | {"eos": False}, tokenizer))


def test_several_prefixes_share_a_targets_weight_and_weight_0_is_left_out(tokenizer):
    """Weights 0.75, 0, 0.25 under two prefixes: four leaves of 0.375 and 0.125; the middle target
    is not in the tree."""
    row = number_row(3) | {"weights": [0.75, 0.0, 0.25], "response": ["Sure: ", "It is "]}
    leaves = training.leaves(tree_of(row, tokenizer).root)
    assert {leaf.branch: leaf.weights[-1] for leaf in leaves} == \
        {0: 0.375, 1: 0.375, 4: 0.125, 5: 0.125}


def test_a_target_that_starts_another_is_refused_without_an_end_token(tokenizer, capsys):
    row = number_row(3) | {"targets": ["red", "redder"], "weights": [0.5, 0.5], "eos": False}
    message = refused(capsys, 2, training.target_sequences, row, tokenizer)
    assert '"red"' in message and '"eos" to true' in message
    assert len(training.target_sequences(row | {"eos": True}, tokenizer)) == 2


def test_a_tree_longer_than_max_length_is_dropped(tokenizer):
    row = number_row(3)
    _, longest = trees.padded_shape(tree_of(row, tokenizer))
    assert training.build_tree(row, tokenizer, Args(max_length=longest), None)
    assert training.build_tree(row, tokenizer, Args(max_length=longest - 1), None) is None


# ---- a run --------------------------------------------------------------------------------------


def read_passes(run_dir) -> list[dict]:
    """The lines of metrics.jsonl with the fresh figures of every prompt."""
    return [line for line in read_metrics(run_dir) if "prompts" in line]


def test_a_tiny_model_learns_the_distribution_and_stops_early_once_all_prompts_fit(trained):
    """H(1/2, 1/4, 1/4) = 1.0397 nats; the run ends at the first pass in which both losses are at
    most 1.05 times that."""
    passes = [line["prompts"] for line in read_passes(trained)]
    reached = [all(p["loss"] <= 1.05 * p["floor"] for p in figures.values()) for figures in passes]
    assert reached[-1] and not any(reached[:-1]) and len(passes[-1]) == 2
    assert all(p["floor"] == pytest.approx(1.5 * LN(2), abs=1e-5) for p in passes[0].values())
    assert utils.newest_checkpoint(trained).name == f"check_{2 * len(passes)}"
    assert 2 * len(passes) < 300
    for line in read_metrics(trained):
        if "prompts" not in line:
            assert line["kl"] == pytest.approx(line["loss"] - line["floor"], abs=1e-4)


def test_a_run_that_stopped_early_is_finished_also_when_it_is_resumed(
        trained, diffuse_config, capsys):
    before = digest(utils.newest_checkpoint(trained))
    train.main(["--config", str(diffuse_config), "--resume"])
    assert "this run is finished" in capsys.readouterr().out
    assert digest(utils.newest_checkpoint(trained)) == before


def test_an_interrupted_run_stops_where_the_uninterrupted_one_did(
        trained, diffuse_config, tmp_path, capsys):
    """Resumed from half of its way: the line that ended the first run is cut off with those after
    the checkpoint, so training goes on, and stops at the same pass with the same bytes."""
    argv = ["--config", str(diffuse_config), "--output_dir", str(tmp_path)]
    last = utils.newest_checkpoint(trained)
    half = int(last.name.removeprefix("check_")) // 2
    train.main([*argv, "--max_steps", str(half)])
    # as if the run had been killed after its end was logged and before it was saved
    shutil.copy(trained / "metrics.jsonl", tmp_path / "run" / "metrics.jsonl")
    train.main([*argv, "--resume"])
    assert "stopped early" in capsys.readouterr().out
    assert utils.newest_checkpoint(tmp_path / "run").name == last.name
    assert digest(tmp_path / "run" / last.name) == digest(last)
    assert [line["stopped"] for line in read_passes(tmp_path / "run")] == \
        [line["stopped"] for line in read_passes(trained)]


def test_without_early_stop_prompts_are_measured_at_checkpoints_only(
        prompt_dir, able_dir, tmp_path):
    """Ten passes over two prompts with a checkpoint every 8 micro-steps: at 8, 16 and 20."""
    train.main(["--method", "diffuse", "--model", str(able_dir), "--train_prompts", str(prompt_dir),
                "--n_iters", "10", "--save_steps", "8", "--gamma", "1000",
                "--output_dir", str(tmp_path)])
    lines = read_passes(tmp_path / "diffuse")
    assert [line["step"] for line in lines] == [8, 16, 20]
    assert not any(line["stopped"] for line in lines), "all are within 1001 times their floor"


def test_a_checkpoint_in_the_middle_of_a_pass_does_not_stop_the_run(
        prompt_dir, able_dir, tmp_path):
    """A checkpoint after every micro-step; every prompt is within the threshold from the start."""
    train.main(["--method", "diffuse", "--model", str(able_dir), "--train_prompts", str(prompt_dir),
                "--save_steps", "1", "--early_stop", "--gamma", "1000",
                "--output_dir", str(tmp_path)])
    assert [line["stopped"] for line in read_passes(tmp_path / "diffuse")] == [False, True]
    assert utils.newest_checkpoint(tmp_path / "diffuse").name == "check_2"


def test_training_goes_on_from_an_earlier_adapter(trained, diffuse_config, tmp_path):
    """--load_model: the first loss is that of the trained adapter, whose settings are recorded and
    not those of the flags."""
    train.main(["--config", str(diffuse_config), "--output_dir", str(tmp_path), "--n_iters", "1",
                "--load_model", "--ckpt_dir", str(trained), "--lora_r", "3"])
    assert read_metrics(tmp_path / "run")[0]["kl"] < 0.05
    assert read_run(tmp_path / "run" / "check_2")["args"]["lora_r"] == 16


def test_generate_samples_after_training(prompt_dir, tiny_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--method", "diffuse", "--model", str(tiny_dir),
                "--train_prompts", str(prompt_dir), "--n_iters", "1",
                "--output_dir", str(tmp_path / "ck"), "--generate", "--n_generations", "3",
                "--max_new_tokens", "4"])
    text = (tmp_path / "outs" / "diffuse_lora.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [len(row["preds"]) for row in rows] == [3, 3] and rows[0]["mode"] == "lora"
