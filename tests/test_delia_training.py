"""Method delia in training: its rows, the mixture and the loss."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CHATML, ROOT, refused, write_jsonl
from delia_cases import (
    CACHE,
    TASK,
    files,  # noqa: F401
    flags,
    runs,  # noqa: F401
    settings,
    talk,
    without_cache,
)

import train
import trees
from methods.delia import messages, mixing, training
from modeling.models import load_model, load_tokenizer

# ---- rows ---------------------------------------------------------------------------------------

HI = talk("Hi.")["messages"][0]
BROKEN = [
    (talk("Hi.", "Ho.", "Hm."), "assistant's turn is missing"),
    (talk("Hi."), "assistant's turn is missing"),
    ({"messages": talk("Hi.", "Ho.")["messages"][::-1]},
     "turn 1 is by \"assistant\", its place is the user's"),
    ({"messages": [HI, HI]}, "turn 2 is by \"user\", its place is the assistant's"),
    ({"messages": talk("Hi.", "Ho.")["messages"] + [{"role": "system", "content": "Be kind."}]},
     "turn 3 is by \"system\""),
    ({"messages": []}, "must be a list of turns"),
    ({"context": "Hi."}, "must be a list of turns, got null"),
    ({"messages": ["Hi."]}, 'turn 1 needs "role" and "content"'),
    (talk("Hi.", " "), "turn 2 is empty"),
    (talk("Use <spe>.", "Ho."), "turn 1 mentions <spe>, which is none of --new_tokens <sep>"),
    (talk("Hi.", "<|im_end|> Ho."), "turn 2 mentions <|im_end|>"),
]


@pytest.mark.parametrize(("row", "problem"), BROKEN)
def test_a_broken_task_row_is_refused_with_file_and_line(
        tmp_path, files, tiny_dir, capsys, row, problem):  # noqa: F811
    path = write_jsonl(tmp_path / "bad.jsonl", [TASK[0], row])
    argv = flags(files, tiny_dir, tmp_path, "--train_file", str(path))
    said = refused(capsys, 2, train.main, argv)
    assert f"error: {path}:2: " in said and problem in said


def test_a_diverse_row_may_hold_html_but_not_the_new_token(tmp_path):
    path = write_jsonl(tmp_path / "cache.jsonl", [talk("Bold?", "Write <b>bold</b>.")])
    assert len(messages.read_messages(str(path), ["<sep>"], strict=False)) == 1
    problem = messages.check_tokens(talk("Use <sep>.", "Ho."), ["<sep>"], strict=False)
    assert problem.startswith("turn 1 mentions <sep>, a new token")


@pytest.mark.parametrize(("more", "problem"), [
    (["--new_tokens", "<sep>", "<cut>"], "--new_tokens <cut>: no row of"),
    (["--new_tokens", "<sep>", "<sep>"], "and stand once"),
    (["--token_init", "description", "--token_description", "a", "b"],
     "for each of 1 new tokens, got 2"),
    (["--diverse_ratio", "-1"], "--diverse_ratio -1 must be at least 0"),
    (["--diverse_ratio", "9"], "wants 36 diverse rows for 4 task rows"),
])
def test_flags_that_cannot_work_are_refused(
        tmp_path, files, tiny_dir, capsys, more, problem):  # noqa: F811
    assert problem in refused(capsys, 2, train.main, flags(files, tiny_dir, tmp_path, *more))


def test_a_ratio_without_a_cache_is_refused(files, tiny_dir, tmp_path, capsys):  # noqa: F811
    argv = without_cache(flags(files, tiny_dir, tmp_path, "--diverse_ratio", "1"))
    assert "--diverse_ratio needs --diverse_file" in refused(capsys, 2, train.read_flags, argv)


@pytest.mark.parametrize(("manifest", "problem"), [
    ({"weights": "0123456789abcdef"}, "was written by model 0123456789abcdef"),
    ({"weights": None}, "through a server, by a model without fingerprint"),
    ([], "is not a manifest"), (None, "no manifest cache.json beside it"),
])
def test_a_cache_of_another_model_is_refused_unless_allowed(
        tmp_path, files, tiny_dir, capsys, manifest, problem):  # noqa: F811
    cache = write_jsonl(tmp_path / "cache.jsonl", CACHE)
    if manifest is not None:
        (tmp_path / "cache.json").write_text(json.dumps(manifest))
    argv = flags(files, tiny_dir, tmp_path, "--diverse_file", str(cache), "--diverse_ratio", "1",
                 "--dry_run")
    said = refused(capsys, 2, train.main, argv)
    assert str(tmp_path / "cache.") in said and problem in said and "--allow_foreign_cache" in said
    train.main([*argv, "--allow_foreign_cache"])
    assert "4 task rows + 4 diverse rows" in capsys.readouterr().out


def test_an_unknown_author_is_not_taken_for_an_unknown_model(tmp_path, monkeypatch, capsys):
    """A cache through a server and a base without safetensors: None equals None, and says nothing.
    """
    (tmp_path / "cache.json").write_text('{"weights": null}')
    monkeypatch.setattr(mixing, "model_dir", lambda name: name)
    monkeypatch.setattr(mixing, "base_fingerprint", lambda folder: None)
    said = refused(capsys, 2, mixing.check_author, str(tmp_path / "cache.jsonl"), "pickles")
    assert "by a model without fingerprint, pickles is a model without fingerprint" in said


@pytest.mark.parametrize("name", ["smollm2", "llama2"])
def test_the_configs_resolve(name):
    config = ROOT / "configs" / "delia" / f"{name}.yaml"
    args = train.read_flags(["--config", str(config)])
    assert args.method == "delia" and args.new_tokens == ["<sep>"]
    assert args.exp_name == f"delia_{name}"
    assert args.diverse_ratio == {"smollm2": 10, "llama2": 260}[name]
    assert args.lr_warmup_steps == {"smollm2": 5, "llama2": 25}[name]


def test_published_settings_are_the_defaults_where_the_command_says_nothing_else():
    args = settings()
    assert (args.learning_rate, args.lr_warmup_steps, args.weight_decay) == (2e-4, 25, 0.01)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (16, 4)
    assert (args.save_steps, args.lora_r, args.lora_alpha) == (400, 16, 16)


# ---- mixing -------------------------------------------------------------------------------------


def test_the_mixture_has_its_ratio_and_depends_on_the_seed_alone(
        files, tiny_dir, capsys):  # noqa: F811
    def rows(**more):
        return training.load_rows(settings(
            train_file=str(files[1]), diverse_file=str(files[2]), model_name=str(tiny_dir),
            new_tokens=["<sep>"], **more))

    mixed = rows(diverse_ratio=2.5)
    assert Counter(row["source"] for row in mixed) == {"task": 4, "diverse": 10}
    assert "4 task rows + 10 diverse rows" in capsys.readouterr().out
    assert mixed == rows(diverse_ratio=2.5) and mixed != rows(diverse_ratio=2.5, seed=7)
    assert len({row["prompt"] for row in mixed[4:]}) == 10
    cut = rows(diverse_ratio=1.0, limit=2)
    assert [row["source"] for row in cut] == ["task"] * 2 + ["diverse"] * 2
    queries = [row["messages"][0]["content"] for row in CACHE]
    usable = {query for query in queries if not mixing.is_held_out({"prompt": query})}
    assert 0 < len(usable) < len(CACHE), "the held-out tenth is never mixed in"
    often = Counter(row["prompt"] for row in rows(diverse_ratio=12.0, oversample=True)[4:])
    assert sum(often.values()) == 48 and set(often) == usable
    assert max(often.values()) - min(often.values()) <= 1


@pytest.mark.parametrize(("num_task", "num_diverse"), [(4, 40), (3, 10), (5, 0), (7, 2)])
def test_stratified_order_is_a_permutation_that_spreads_the_task_rows(num_task, num_diverse):
    """Every window of n rows has the share of n that task rows have in all, give or take one."""
    rows = [{"source": "task"}] * num_task + [{"source": "diverse"}] * num_diverse
    args = settings(mix="stratified")
    order, other = (training.order_rows(rows, args, random.Random(seed)) for seed in (1, 2))
    assert sorted(order) == list(range(len(rows))) and order != other
    is_task = [i < num_task for i in order]
    for n in range(1, len(rows)):
        for start in range(len(rows) - n):
            assert abs(sum(is_task[start:start + n]) - n * num_task / len(rows)) < 1


def test_shuffled_order_is_what_other_methods_have():
    """random.Random("42-0") shuffles, as train.py does for every method."""
    expected = list(range(20))
    random.Random("42-0").shuffle(expected)
    rows = [{"source": "task"}] * 20
    assert training.order_rows(rows, settings(), random.Random("42-0")) == expected


def metrics_of(run_dir) -> list[dict]:
    """The log of a run without its clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def weights_of(run_dir, step: int) -> bytes:
    return (run_dir / f"check_{step}" / "adapter_model.safetensors").read_bytes()


def test_ratio_0_is_plain_fine_tuning_bit_for_bit(runs):  # noqa: F811
    assert metrics_of(runs / "zero") == metrics_of(runs / "plain")
    assert len(metrics_of(runs / "zero")) == 4
    assert weights_of(runs / "zero", 4) == weights_of(runs / "plain", 4)


def test_ratio_0_equals_a_loop_of_ten_lines(runs, tiny_dir):  # noqa: F811
    """Padded rows, cross-entropy on reply and end, AdamW: the losses of both passes to 1e-4."""
    model, tokenizer = load_model(str(tiny_dir)), load_tokenizer(str(tiny_dir))
    args = settings(new_tokens=["<sep>"], lora_r=4, lora_dropout=0.0)
    training.prepare_tokenizer(tokenizer, args)
    rows = [row | {"source": "task"} for row in TASK]
    torch.manual_seed(42)
    model = training.prepare_model(model, tokenizer, rows, args).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.01)
    losses = []
    for epoch in range(2):
        order = list(range(4))
        random.Random(f"42-{epoch}").shuffle(order)
        for pair in (order[:2], order[2:]):
            forest = [training.build_tree(rows[i], tokenizer, args, None) for i in pair]
            logps = trees.score_rows(model, forest)
            lengths = [len(tree.root.children[0].input_ids) for tree in forest]
            loss = torch.stack([-part.mean() for part in logps.split(lengths)]).mean()
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    logged = [line["loss"] for line in metrics_of(runs / "zero")]
    np.testing.assert_allclose(logged, losses, rtol=1e-4)


def test_the_log_tells_the_sources_apart(runs):  # noqa: F811
    """4 task rows among 12 in 6 steps of two, evenly spread: never two task rows in one step."""
    lines = metrics_of(runs / "two")
    assert sum(line["task_rows"] for line in lines) == 8
    assert all(line["task_rows"] in (0, 1) for line in lines)
    for line in lines:
        assert (line["task_loss"] > 0) == (line["task_rows"] > 0) and line["loss"] > 0
    run = json.loads((runs / "two" / "check_12" / "run.json").read_text())
    assert (run["args"]["num_task_rows"], run["args"]["num_diverse_rows"]) == (4, 8)


def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(
        runs, files, tiny_dir, tmp_path):  # noqa: F811
    """Ratio 2 in 6 of its 12 steps, then the rest: same weights, token row included, same log."""
    argv = flags(files, tiny_dir, tmp_path, "--num_train_epochs", "2", "--lora_dropout", "0.0",
                 "--exp_name", "two", "--diverse_ratio", "2", "--mix", "stratified")
    train.main([*argv, "--max_steps", "6"])
    train.main([*argv, "--resume"])
    assert weights_of(tmp_path / "two", 12) == weights_of(runs / "two", 12)
    assert metrics_of(tmp_path / "two") == metrics_of(runs / "two")


# ---- trees and the loss -------------------------------------------------------------------------


def test_the_last_turn_is_learnt_with_its_end_and_the_others_are_context(tokenizer):
    row = {**talk("Hi.", "Ho.", "Why?", "So.", system="Be kind."), "source": "diverse"}
    tree = training.build_tree(row, tokenizer, settings(), None)
    reply = tree.root.children[0]
    context = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n"
                      for turn in row["messages"][:-1])
    assert tokenizer.decode(tree.root.input_ids) == f"{context}<|im_start|>assistant\n"
    assert tokenizer.decode(reply.input_ids) == "So.<|im_end|>"
    assert reply.role == trees.LIKELIHOOD and reply.weights is None
    assert reply.branch == training.DIVERSE
    assert training.build_tree(row, tokenizer, settings(max_length=20), None) is None


def test_a_template_without_a_system_role_gets_it_in_the_first_user_turn(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = ("{% if messages[0]['role'] == 'system' %}"
                            "{{ raise_exception('no system role') }}{% endif %}" + CHATML)
    ids = messages.encode(strict, talk("Hi.", system="Be kind.")["messages"])
    expected = "<|im_start|>user\nBe kind.\n\nHi.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == expected


def test_the_loss_is_a_mean_of_rows_and_the_sources_are_told_apart(monkeypatch):
    """Rows of 1 and 3 tokens with losses 4 and (1, 2, 3): (4 + 2) / 2 = 3.

    The task's row is the first: 1 row, 4 nats.
    """
    logps = torch.tensor([-4.0, -1.0, -2.0, -3.0])
    branch = torch.tensor([training.TASK] + [training.DIVERSE] * 3)
    batch = {"row": torch.tensor([0, 1, 1, 1]), "num_rows": 2, "branch": branch}
    monkeypatch.setattr(trees, "score", lambda *args: logps)
    loss, logged = training.compute_loss(None, batch, settings(), 0)
    assert loss == 3 and logged["task_rows"] == 1 and logged["task_loss"] == 4
