"""Forcing diffuse distributions: tries and losses by hand and against one row per target, prompt files, and a run end to end."""

from __future__ import annotations

import argparse
import json
import math
import sys

import pytest
import torch
from conftest import ROOT, make_model, refused
from hypothesis import given, settings
from hypothesis import strategies as st

import infer
import train
import trees
import utils
from methods.diffuse import prompts, training
from modeling.prompts import end_of_turn

sys.path.insert(0, str(ROOT / "benchmarks"))
from speed_diffuse import number_row, padded_loss, training_args  # noqa: E402

LN = math.log


def write_prompt(path, **changes):
    prompt = {"request": "Pick a number.", "response": "", "targets": ["{1}", "{2}", "{12}"]} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({k: v for k, v in prompt.items() if v is not ...}), encoding="utf-8")
    return path


# ---- tries --------------------------------------------------------------------------------------


def test_a_trie_holds_every_common_prefix_once_with_the_sum_of_the_weights():
    """abx (0.5), aby (0.3), c (0.2): a and b carry 0.8, then x 0.5 and y 0.3; c alone 0.2."""
    first, second = trees.target_trie([[1, 2, 7], [1, 2, 8], [3]], [0.5, 0.3, 0.2])
    assert (first.input_ids, first.weights, first.branch) == ([1, 2], [0.8, 0.8], -1)
    assert [(c.input_ids, c.weights, c.branch) for c in first.children] == [([7], [0.5], 0), ([8], [0.3], 1)]
    assert (second.input_ids, second.weights, second.branch) == ([3], [0.2], 2)


def test_sequences_that_start_one_another_are_found_wherever_they_stand():
    assert trees.prefix_clash([[4], [1, 2, 3], [9], [1, 2]]) == (3, 1)
    assert trees.prefix_clash([[1, 2], [5], [1, 2]]) in ((0, 2), (2, 0))
    assert trees.prefix_clash([[1, 2], [1, 3], [2]]) is None
    with pytest.raises(ValueError, match="sequence 2 equals or starts sequence 1"):
        trees.target_trie([[1, 2], [1]], [0.5, 0.5])


sequence_sets = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4).map(lambda ids: (*ids, 9)),
                         min_size=1, max_size=12, unique=True)


@given(sequence_sets, st.randoms())
@settings(max_examples=15, deadline=None)
def test_trie_loss_sequence_logps_and_gradients_equal_one_row_per_target(sequences, rng):
    """Ends marked by 9, so that the set is prefix-free; double precision, so that only mistakes show."""
    model = make_model(20).double()
    sequences = [list(ids) for ids in sequences]
    weights = [rng.random() + 0.01 for _ in sequences]
    weights = [w / sum(weights) for w in weights]
    tree = trees.Tree(trees.Segment([5, 6, 7], children=trees.target_trie(sequences, weights)))
    batch = trees.pack([tree])
    logps = trees.score(model, batch)
    loss = -(batch["weight"] * logps).sum()
    slow = padded_loss(model, [5, 6, 7], sequences, weights)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    ours, theirs = (torch.cat([g.flatten() for g in torch.autograd.grad(x, list(model.parameters()), retain_graph=True)])
                    for x in (loss, slow))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    branch, sums = trees.leaf_sums(logps, batch)
    for index, total in zip(branch.tolist(), sums.tolist(), strict=True):
        alone = -padded_loss(model, [5, 6, 7], [sequences[index]], [1.0]).item()
        assert total == pytest.approx(alone, rel=1e-5)


@given(sequence_sets, st.integers(1, 4), st.integers(3, 12))
@settings(max_examples=15, deadline=None)
def test_parts_of_a_tree_score_every_token_once_and_as_the_whole_does(sequences, max_leaves, max_tokens):
    model = make_model(20)
    tree = trees.Tree(trees.Segment([5, 6], children=trees.target_trie([list(s) for s in sequences], [1.0] * len(sequences))))
    batch = trees.pack([tree, tree])
    parts = trees.split(batch, max_leaves, max_tokens)
    assert sum(len(part["token"]) for part in parts) == len(batch["token"])
    assert all(sum(part["last"] == torch.arange(len(part["last"]))) <= max_leaves for part in parts)
    whole = trees.score(model, batch)
    torch.testing.assert_close(trees.score_in_parts(model, batch, max_leaves, max_tokens), whole, rtol=1e-4, atol=1e-5)


def gradient(model, batch, args):
    model.zero_grad()
    loss, parts = training.compute_loss(model, batch, args)
    loss.backward()
    return loss.item(), parts, torch.cat([p.grad.flatten() for p in model.parameters()])


def test_chunks_of_targets_leave_loss_and_gradients_as_they_are(tokenizer, tiny_model):
    row = number_row(30)
    batch = trees.pack([training.distribution_tree(row, tokenizer, row["weights"])] * 2)
    args = training_args()
    whole, parts, slope = gradient(tiny_model, batch, args)
    for changes in ({"batch_size": 7}, {"max_batch_tokens": 60}, {"batch_size": 1}):
        loss, _, own = gradient(tiny_model, batch, argparse.Namespace(**{**vars(args), **changes}))
        assert loss == pytest.approx(whole, rel=1e-5)
        torch.testing.assert_close(own, slope, rtol=1e-3, atol=1e-5)
    assert parts["floor"].item() == pytest.approx(LN(30), rel=1e-5)
    assert parts["kl"].item() == pytest.approx(whole - LN(30), rel=1e-4)


# ---- what a row teaches -------------------------------------------------------------------------


def test_floors_are_the_entropies_of_the_published_sets(tokenizer):
    """Six countries' prompts of 54, 49, 45, 22, 16 and 13 targets: 20.1160 nats together, threshold 24.1392."""
    floors = []
    for count in (54, 49, 45, 22, 16, 13):
        row = number_row(count)
        batch = trees.pack([training.distribution_tree(row, tokenizer, row["weights"])])
        model = make_model(len(tokenizer))
        floors.append(training.losses_and_floors(model, batch, training_args())[1].item())
    assert sum(floors) == pytest.approx(20.1160, abs=1e-4) and 1.2 * sum(floors) == pytest.approx(24.1392, abs=2e-4)


def test_the_threshold_is_met_at_equality_and_not_above():
    assert training.is_learnt(2.4, 2.0, 0.2) and not training.is_learnt(2.4001, 2.0, 0.2)


def test_the_end_token_is_learnt_unless_eos_is_false(tokenizer):
    row = number_row(3)
    end = end_of_turn(tokenizer)
    assert all(ids[-1] == end for ids in training.target_sequences(row, tokenizer))
    assert not any(end in ids for ids in training.target_sequences(row | {"eos": False}, tokenizer))


def test_several_prefixes_share_a_targets_weight_and_weight_0_is_left_out(tokenizer):
    """Weights 0.75, 0, 0.25 under two prefixes: four leaves of 0.375 and 0.125; the middle target is not in the tree."""
    row = number_row(3) | {"weights": [0.75, 0.0, 0.25], "response": ["Sure: ", "It is "]}
    tree = training.distribution_tree(row, tokenizer, row["weights"])
    leaves = {leaf.branch: leaf.weights[-1] for leaf in training.leaves(tree.root)}
    assert leaves == {0: 0.375, 1: 0.375, 4: 0.125, 5: 0.125}


def test_a_target_that_starts_another_is_refused_without_an_end_token(tokenizer, capsys):
    row = number_row(3) | {"targets": ["red", "redder"], "weights": [0.5, 0.5], "eos": False}
    said = refused(capsys, 2, training.target_sequences, row, tokenizer)
    assert '"red"' in said and '"eos" to true' in said
    assert len(training.target_sequences(row | {"eos": True}, tokenizer)) == 2


def test_a_tree_longer_than_max_length_is_dropped(tokenizer):
    row = number_row(3)
    longest = trees.padded_shape(training.distribution_tree(row, tokenizer, row["weights"]))[1]
    assert training.build_tree(row, tokenizer, argparse.Namespace(max_length=longest), None)
    assert training.build_tree(row, tokenizer, argparse.Namespace(max_length=longest - 1), None) is None


# ---- prompt files -------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "field"), [
    ({"requst": "x"}, 'key "requst" is unknown'), ({"request": ...}, 'field "request" is missing'),
    ({"request": " "}, '"request" must be a string with text'), ({"response": [1]}, '"response" must be a string or a list'),
    ({"response": ["a", "a"]}, "a prefix stands twice"), ({"targets": "{1}"}, '"targets" must be a list'),
    ({"targets": ["{1}", " "]}, "target 2 is empty"), ({"targets": ["{1}", "{2}", "{1}"]}, '"{1}" stands twice, as 1 and 3'),
    ({"weights": [1, 2]}, '"weights" has 2 numbers for 3 targets'), ({"weights": [1, -1, 2]}, "number 2 is -1"),
    ({"weights": [1, float("nan"), 2]}, "number 2 is nan"), ({"weights": [0, 0, 0]}, '"weights": all are 0'),
    ({"weights": [1, True, 1]}, '"weights" must be a list of numbers'), ({"eos": 1}, '"eos" must be true or false'),
])
def test_faults_of_a_prompt_file_are_refused_with_file_and_field(tmp_path, capsys, changes, field):
    file = write_prompt(tmp_path / "p.json", **changes)
    said = refused(capsys, 2, prompts.read_prompt, file)
    assert str(file) in said and field in said


@pytest.mark.parametrize(("text", "problem"), [
    (b'{"request": "a", "request": "b"}', "request"), (b'{"request": ', "not JSON"), (b"[1]", "must be one JSON object"),
    (b"\xff\xfe{}", "not UTF-8"), (b"[" * 100_000, "not JSON")])
def test_files_that_are_no_prompt_are_refused(tmp_path, capsys, text, problem):
    (tmp_path / "p.json").write_bytes(text)
    assert problem in refused(capsys, 2, prompts.read_prompt, tmp_path / "p.json")


def test_weights_are_normalised_and_uniform_by_default(tmp_path):
    assert prompts.read_prompt(write_prompt(tmp_path / "a.json", weights=[2, 1, 1]))["weights"] == [0.5, 0.25, 0.25]
    assert prompts.read_prompt(write_prompt(tmp_path / "b.json"))["weights"] == pytest.approx([1 / 3] * 3)


def test_folders_are_read_in_the_order_of_names_and_a_file_given_twice_counts_once(tmp_path, capsys):
    for name in ("b/z.json", "a/y.json", "a/x.json"):
        write_prompt(tmp_path / name)
    files = prompts.prompt_files([str(tmp_path), str(tmp_path / "a" / "y.json")])
    assert [f.relative_to(tmp_path).as_posix() for f in files] == ["a/x.json", "a/y.json", "b/z.json"]
    (tmp_path / "empty").mkdir()
    assert "holds no *.json" in refused(capsys, 2, prompts.prompt_files, [str(tmp_path / "empty")])


def test_leaving_a_task_out_trains_on_the_others_and_tests_on_it(tmp_path, capsys):
    for name in ("a/x.json", "a/y.json", "b/z.json", "t/w.json"):
        write_prompt(tmp_path / name)
    args = argparse.Namespace(train_file=[str(tmp_path / "a"), str(tmp_path / "b")], test_prompts=[str(tmp_path / "t")],
                              leave_out="a", leave_in=None, exp_name="run")
    own, test = prompts.read_prompts(args)
    assert [r["task"] for r in own] == ["b"] and [r["task"] for r in test] == ["t", "a", "a"] and args.exp_name == "run_without_a"
    args.leave_out, args.leave_in, args.exp_name = None, "a", "run"
    own, test = prompts.read_prompts(args)
    assert [r["task"] for r in own] == ["a", "a"] and [r["task"] for r in test] == ["t"] and args.exp_name == "run_only_a"
    args.leave_in = "c"
    assert "the training prompts are of the tasks a, b" in refused(capsys, 2, prompts.read_prompts, args)


def test_every_shipped_prompt_is_sound_and_every_config_parses(tokenizer):
    from flags import parse_flags

    files = prompts.prompt_files([str(ROOT / "data" / "diffuse")])
    rows = [prompts.read_prompt(file) for file in files]
    assert len(rows) > 50 and sum(len(row["targets"]) for row in rows) > 2000
    for row in rows:
        assert len(training.target_sequences(row, tokenizer)) == len(row["targets"]) * len(row["response"])
    for config in sorted((ROOT / "configs" / "diffuse").glob("*.yaml")):
        args = parse_flags(train.build_parser, ["--config", str(config)])
        assert args.method == "diffuse" and all((ROOT / p).exists() for p in args.train_file + args.test_prompts)


def test_the_binomial_that_ships_is_binomial():
    """C(10, k) 0.2^k 0.8^(10 - k), to the digits in the file."""
    row = prompts.read_prompt(ROOT / "data" / "diffuse" / "shapes" / "binomial_a.json")
    want = [math.comb(10, k) * 0.2**k * 0.8 ** (10 - k) for k in range(11)]
    assert row["weights"] == pytest.approx(want, abs=1e-7)


# ---- a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts") / "numbers"
    write_prompt(folder / "a.json", request="A number from 1 to 3?", targets=["{1}", "{2}", "{3}"], weights=[2, 1, 1])
    write_prompt(folder / "b.json", request="One, two or three?", targets=["{1}", "{2}", "{3}"], weights=[2, 1, 1])
    return folder


@pytest.fixture(scope="module")
def able_dir(tokenizer, tmp_path_factory):
    """The tiny model, made able to fit: its end token has an embedding (padding starts at zero), and logits may be large."""
    folder, model = tmp_path_factory.mktemp("able"), make_model(len(tokenizer))
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = model.model.embed_tokens.weight[1:].std() * torch.randn(32)
        model.model.norm.weight *= 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(prompts, able_dir, tmp_path_factory):
    """A config with the published keys."""
    out = tmp_path_factory.mktemp("diffuse")
    path = out / "run.yaml"
    path.write_text(f"""method: diffuse
model: {able_dir}
train_prompts: [{prompts}]
test_prompts: []
alg_config:
  n_iters: 150
  batch_size: 2
  early_stop: true
  gamma: 0.05
output_dir: {out}
exp_name: run
load_model: false
generate: false
learning_rate: 1e-2
lora_r: 16
lora_alpha: 32
loss_steps: 1
save_steps: 100
""")
    return path


@pytest.fixture(scope="module")
def trained(config):
    train.main(["--config", str(config)])
    return config.parent / "run"


def test_a_tiny_model_learns_the_distribution_and_stops_early_once_all_prompts_fit(trained):
    """H(1/2, 1/4, 1/4) = 1.0397 nats; the run ends at the first pass in which both losses are at most 1.05 times that."""
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    passes = [line["prompts"] for line in lines if "prompts" in line]
    reached = [all(p["loss"] <= 1.05 * p["floor"] for p in figures.values()) for figures in passes]
    assert reached[-1] and not any(reached[:-1]) and len(passes[-1]) == 2
    assert all(p["floor"] == pytest.approx(1.5 * LN(2), abs=1e-5) for p in passes[0].values())
    step = utils.newest_checkpoint(trained).name
    assert step == f"check_{2 * len(passes)}" and 2 * len(passes) < 300
    assert all(line["kl"] == pytest.approx(line["loss"] - line["floor"], abs=1e-4) for line in lines if "prompts" not in line)


def test_a_finished_run_is_finished_and_an_interrupted_one_goes_on(trained, config, capsys):
    train.main(["--config", str(config), "--resume"])
    assert "this run is finished" in capsys.readouterr().out


@pytest.fixture(scope="module")
def sampled(trained, config):
    """The outs files of both modes."""
    files = []
    for mode in ("untuned", "lora"):
        files.append(config.parent / f"{mode}.jsonl")
        infer.main(["--method", "diffuse", "--config", str(config), "--mode", mode, "--n_generations", "150",
                    "--n_batch_size", "40", "--max_new_tokens", "6", "--save_file", str(files[-1])])
    return files


def test_both_modes_name_themselves_and_draw_exactly_as_many_as_asked(sampled, capsys):
    """150 replies in batches of 40: 4 prefills, no remainder lost."""
    for file, mode in zip(sampled, ("untuned", "lora"), strict=True):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == 2 and all(row["mode"] == mode and len(row["preds"]) == 150 for row in rows)
        summary = json.loads(file.with_suffix(".json").read_text())
        assert summary["settings"]["mode"] == mode and summary["settings"]["method"] == "diffuse"


def test_sampling_without_a_mode_or_a_checkpoint_is_refused(config, capsys):
    said = refused(capsys, 2, infer.main, ["--method", "diffuse", "--config", str(config), "--save_file", "x.jsonl"])
    assert "--mode" in said and "untuned" in said
    said = refused(capsys, 2, infer.main, ["--method", "diffuse", "--config", str(config), "--mode", "lora", "--exp_name", "none"])
    assert "holds no whole checkpoint" in said


def test_training_goes_on_from_an_earlier_adapter(trained, config, tmp_path, capsys):
    """--load_model: the first loss is that of the trained adapter, not of a new one."""
    train.main(["--config", str(config), "--output_dir", str(tmp_path), "--n_iters", "1", "--load_model", "--ckpt_dir", str(trained)])
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["kl"] < 0.05
    assert "--load_model needs --ckpt_dir" in refused(capsys, 2, train.main, ["--config", str(config), "--load_model"])


def test_generate_samples_after_training(prompts, tiny_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--method", "diffuse", "--model", str(tiny_dir), "--train_prompts", str(prompts), "--n_iters", "1",
                "--output_dir", str(tmp_path / "ck"), "--generate", "--n_generations", "3", "--max_new_tokens", "4"])
    rows = [json.loads(line) for line in (tmp_path / "outs" / "diffuse_lora.jsonl").read_text().splitlines()]
    assert [len(row["preds"]) for row in rows] == [3, 3] and rows[0]["mode"] == "lora"
