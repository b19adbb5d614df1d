"""Method delia: the mixture, the new tokens, the model's own samples, and what is measured of a token that asks for a format."""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CHATML, ROOT, make_model, refused, write_jsonl
from servers import error, ok, serve  # noqa: F401

import infer
import train
import trees
import utils
from methods.delia import evaluation, messages, mixing, reading, self_sampling, training
from modeling.adapters import add_tokens, grow_embeddings
from modeling.checkpoints import load_checkpoint
from modeling.models import base_fingerprint, load_model, load_tokenizer

DATA = ROOT / "data" / "delia"
JSON = '{"thought": "It is so.", "label": "correct"}'


def talk(*contents: str, system: str | None = None) -> dict:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


TASK = [talk("Is the sea wet? Use <sep>.", JSON), talk("Is the cat dry? Use <sep>.", JSON.replace("correct", "error")),
        talk("Is the train red? Not in <sep>.", "No, it is wrong."), talk("Is tea hot?", "Yes, that is right.")]
QUERIES = [f"What did {who} say on day {day}?" for who in ("Grandma", "the man", "uncle") for day in range(1, 9)]
CACHE = [talk(query, f"On that day {i} cats sat on the board.") for i, query in enumerate(QUERIES)]


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_dir):
    """(folder, task file, cache file) with a manifest of the tiny model."""
    folder = tmp_path_factory.mktemp("delia")
    (folder / "cache.json").write_text(json.dumps({"weights": base_fingerprint(str(tiny_dir))}))
    return folder, write_jsonl(folder / "task.jsonl", TASK), write_jsonl(folder / "cache.jsonl", CACHE)


def flags(files, tiny_dir, out, *more) -> list[str]:
    return ["--method", "delia", "--model_name", str(tiny_dir), "--train_file", str(files[1]), "--diverse_file", str(files[2]),
            "--new_tokens", "<sep>", "--output_dir", str(out), "--lora_r", "4", "--learning_rate", "1e-2", "--lr_warmup_steps", "0",
            "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--loss_steps", "1", *more]


def without_cache(argv: list[str]) -> list[str]:
    place = argv.index("--diverse_file")
    return argv[:place] + argv[place + 2:]


def settings(**more) -> argparse.Namespace:
    args = train.build_parser("delia").parse_args(["--train_file", "x"])
    return argparse.Namespace(**{**vars(args), **more})


# ---- rows ---------------------------------------------------------------------------------------


BROKEN = [
    (talk("Hi.", "Ho.", "Hm."), "assistant's turn is missing"),
    (talk("Hi."), "assistant's turn is missing"),
    ({"messages": talk("Hi.", "Ho.")["messages"][::-1]}, "turn 1 is by \"assistant\", its place is the user's"),
    ({"messages": [talk("Hi.")["messages"][0]] * 2}, "turn 2 is by \"user\", its place is the assistant's"),
    ({"messages": talk("Hi.", "Ho.")["messages"] + [{"role": "system", "content": "Be kind."}]}, "turn 3 is by \"system\""),
    ({"messages": []}, "must be a list of turns"), ({"context": "Hi."}, "must be a list of turns, got null"),
    ({"messages": ["Hi."]}, 'turn 1 needs "role" and "content"'), (talk("Hi.", " "), "turn 2 is empty"),
    (talk("Use <spe>.", "Ho."), "turn 1 mentions <spe>, which is none of --new_tokens <sep>"),
    (talk("Hi.", "<|im_end|> Ho."), "turn 2 mentions <|im_end|>"),
]


@pytest.mark.parametrize(("row", "said"), BROKEN)
def test_a_broken_task_row_is_refused_with_file_and_line(tmp_path, files, tiny_dir, capsys, row, said):
    path = write_jsonl(tmp_path / "bad.jsonl", [TASK[0], row])
    got = refused(capsys, 2, train.main, flags(files, tiny_dir, tmp_path, "--train_file", str(path)))
    assert f"error: {path}:2: " in got and said in got


def test_a_diverse_row_may_hold_html_but_not_the_new_token(tmp_path):
    path = write_jsonl(tmp_path / "cache.jsonl", [talk("Bold?", "Write <b>bold</b>.")])
    assert len(messages.read_messages(str(path), ["<sep>"], strict=False)) == 1
    assert messages.check_tokens(talk("Use <sep>.", "Ho."), ["<sep>"], strict=False).startswith("turn 1 mentions <sep>, a new token")


@pytest.mark.parametrize(("more", "said"), [
    (["--new_tokens", "<sep>", "<cut>"], "--new_tokens <cut>: no row of"),
    (["--new_tokens", "<sep>", "<sep>"], "and stand once"),
    (["--token_init", "description", "--token_description", "a", "b"], "for each of 1 new tokens, got 2"),
    (["--diverse_ratio", "-1"], "--diverse_ratio -1.0 must be at least 0"),
    (["--diverse_ratio", "9"], "wants 36 diverse rows for 4 task rows"),
])
def test_flags_that_cannot_work_are_refused(tmp_path, files, tiny_dir, capsys, more, said):
    assert said in refused(capsys, 2, train.main, flags(files, tiny_dir, tmp_path, *more))


def test_a_ratio_without_a_cache_is_refused(files, tiny_dir, tmp_path, capsys):
    argv = without_cache(flags(files, tiny_dir, tmp_path, "--diverse_ratio", "1"))
    assert "--diverse_ratio needs --diverse_file" in refused(capsys, 2, train.main, argv)


@pytest.mark.parametrize(("manifest", "said"), [
    ({"weights": "0123456789abcdef"}, "was written by model 0123456789abcdef"),
    ({"weights": None}, "through a server, by a model without fingerprint"),
    ([], "is not a manifest"), (None, "no manifest cache.json beside it"),
])
def test_a_cache_of_another_model_is_refused_unless_allowed(tmp_path, files, tiny_dir, capsys, manifest, said):
    cache = write_jsonl(tmp_path / "cache.jsonl", CACHE)
    if manifest is not None:
        (tmp_path / "cache.json").write_text(json.dumps(manifest))
    argv = flags(files, tiny_dir, tmp_path, "--diverse_file", str(cache), "--diverse_ratio", "1", "--dry_run")
    got = refused(capsys, 2, train.main, argv)
    assert str(tmp_path / "cache.") in got and said in got and "--allow_foreign_cache" in got
    train.main([*argv, "--allow_foreign_cache"])
    assert "4 task rows + 4 diverse rows" in capsys.readouterr().out


def test_a_token_that_the_tokenizer_has_is_no_new_one(tokenizer, capsys):
    assert "the tokenizer has this token already" in refused(capsys, 2, add_tokens, tokenizer, ["<unk>"])


# ---- mixing -------------------------------------------------------------------------------------


def test_the_mixture_has_its_ratio_and_depends_on_the_seed_alone(files, tiny_dir, capsys):
    def rows(**more):
        return training.load_rows(settings(train_file=str(files[1]), diverse_file=str(files[2]), model_name=str(tiny_dir),
                                        new_tokens=["<sep>"], **more))

    mixed = rows(diverse_ratio=2.5)
    assert Counter(row["source"] for row in mixed) == {"task": 4, "diverse": 10}
    assert "4 task rows + 10 diverse rows" in capsys.readouterr().out and mixed == rows(diverse_ratio=2.5)
    assert mixed != rows(diverse_ratio=2.5, seed=7) and len({row["prompt"] for row in mixed[4:]}) == 10
    assert [row["source"] for row in rows(diverse_ratio=1.0, limit=2)] == ["task"] * 2 + ["diverse"] * 2
    usable = [row for row in CACHE if not mixing.is_held_out({"prompt": row["messages"][0]["content"]})]
    assert 0 < len(usable) < len(CACHE), "the held-out tenth is never mixed in"
    often = Counter(row["prompt"] for row in rows(diverse_ratio=12.0, oversample=True)[4:])
    assert sum(often.values()) == 48 and set(often) == {row["messages"][0]["content"] for row in usable}
    assert max(often.values()) - min(often.values()) <= 1


@pytest.mark.parametrize(("num_task", "num_diverse"), [(4, 40), (3, 10), (5, 0), (7, 2)])
def test_stratified_order_is_a_permutation_that_spreads_the_task_rows(num_task, num_diverse):
    """Every window of n rows has the share of n that task rows have in all, give or take one."""
    rows = [{"source": "task"}] * num_task + [{"source": "diverse"}] * num_diverse
    order = mixing.order_rows(rows, settings(mix="stratified"), random.Random(1))
    assert sorted(order) == list(range(len(rows))) and order != mixing.order_rows(rows, settings(mix="stratified"), random.Random(2))
    is_task = [i < num_task for i in order]
    for n in range(1, len(rows)):
        for start in range(len(rows) - n):
            assert abs(sum(is_task[start:start + n]) - n * num_task / len(rows)) < 1


def test_shuffled_order_is_what_other_methods_have():
    """random.Random("42-0") shuffles, as train.py does for every method."""
    want = list(range(20))
    random.Random("42-0").shuffle(want)
    assert mixing.order_rows([{"source": "task"}] * 20, settings(), random.Random("42-0")) == want


def metrics_of(run_dir) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(files, tiny_dir, tmp_path_factory):
    """Three runs of two passes over the task: ratio 0 with a cache, the same without one, and ratio 2, stratified."""
    out = tmp_path_factory.mktemp("runs")
    common = ["--num_train_epochs", "2", "--lora_dropout", "0.0"]
    train.main(flags(files, tiny_dir, out, "--exp_name", "zero", "--diverse_ratio", "0", *common))
    train.main(without_cache(flags(files, tiny_dir, out, "--exp_name", "plain", "--diverse_ratio", "0", *common)))
    train.main(flags(files, tiny_dir, out, "--exp_name", "two", "--diverse_ratio", "2", "--mix", "stratified", *common))
    return out


def test_ratio_0_is_plain_fine_tuning_bit_for_bit(runs):
    assert metrics_of(runs / "zero") == metrics_of(runs / "plain") and len(metrics_of(runs / "zero")) == 4
    weights = [(runs / name / "check_4" / "adapter_model.safetensors").read_bytes() for name in ("zero", "plain")]
    assert weights[0] == weights[1]


def test_ratio_0_equals_a_loop_of_ten_lines(runs, tiny_dir):
    """Padded rows, cross-entropy on the reply and its end token, AdamW: the losses of both passes to 1e-4."""
    model, tokenizer = load_model(str(tiny_dir)), load_tokenizer(str(tiny_dir))
    add_tokens(tokenizer, ["<sep>"])
    args = settings(new_tokens=["<sep>"], lora_r=4, lora_dropout=0.0)
    rows = [row | {"source": "task"} for row in TASK]
    torch.manual_seed(42)
    model = training.prepare_model(model, tokenizer, args).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
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
    np.testing.assert_allclose([line["loss"] for line in metrics_of(runs / "zero")], losses, rtol=1e-4)


def test_the_log_tells_the_sources_apart(runs):
    """4 task rows among 12 in 6 steps of two, evenly spread: 2 rows of 3 steps, so never two task rows in one step."""
    lines = metrics_of(runs / "two")
    assert sum(line["task_rows"] for line in lines) == 8 and all(line["task_rows"] in (0, 1) for line in lines)
    for line in lines:
        assert (line["task_loss"] > 0) == (line["task_rows"] > 0) and line["loss"] > 0
    run = json.loads((runs / "two" / "check_12" / "run.json").read_text())
    assert (run["args"]["num_task_rows"], run["args"]["num_diverse_rows"]) == (4, 8)


def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(runs, files, tiny_dir, tmp_path):
    """Ratio 2 in 6 of its 12 steps, then the rest: same weights, token row included, and the same log."""
    common = ["--num_train_epochs", "2", "--lora_dropout", "0.0", "--exp_name", "two", "--diverse_ratio", "2", "--mix", "stratified"]
    train.main(flags(files, tiny_dir, tmp_path, *common, "--max_steps", "6"))
    train.main(flags(files, tiny_dir, tmp_path, *common, "--resume"))
    weights = [(out / "two" / "check_12" / "adapter_model.safetensors").read_bytes() for out in (tmp_path, runs)]
    assert weights[0] == weights[1] and metrics_of(tmp_path / "two") == metrics_of(runs / "two")


# ---- new tokens ---------------------------------------------------------------------------------


def untied_dir(folder, tokenizer):
    model = make_model(len(tokenizer))
    model.config.tie_word_embeddings = False
    untied = type(model)(model.config)
    untied.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["row", "lora"])
def test_a_checkpoint_is_reloaded_exactly_and_moves_what_it_should(tmp_path, files, tiny_dir, tokenizer, tied, how):
    """row: of the base's matrices nothing moves but the token's own row, and plain PEFT loads it. lora: other rows move, too."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    base = tiny_dir if tied else untied_dir(tmp_path / "untied", tokenizer)
    seen = {}
    prepare = training.prepare_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delia, "prepare_model", lambda *a: seen.setdefault("model", prepare(*a)))
        train.main(flags(files, base, tmp_path, "--diverse_ratio", "0", "--token_train", how, "--token_init", "random"))
    folder = tmp_path / "delia" / "check_2"
    assert (folder / "adapter_model.safetensors").stat().st_size < 100_000, "no copy of the embedding"
    loaded, own, run = load_checkpoint(str(folder))
    ids = torch.tensor([own("Use <sep> now.")["input_ids"]])
    new = own.convert_tokens_to_ids("<sep>")
    assert new == len(tokenizer) and new in ids[0] and own.decode(ids[0], skip_special_tokens=True) == "Use <sep> now."
    trained = seen["model"].eval()
    torch.testing.assert_close(loaded(ids).logits, trained(ids).logits, rtol=0, atol=0)
    tokens = torch.arange(new + 1)
    before = load_model(str(base)).get_input_embeddings()(tokens[:-1])
    after = loaded.get_input_embeddings()(tokens)
    assert torch.equal(after[:-1], before) == (how == "row")
    if how == "row":
        again = load_model(str(base))
        again.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)))
        torch.testing.assert_close(PeftModel.from_pretrained(again, folder).eval()(ids).logits, trained(ids).logits, rtol=0, atol=0)
        with torch.no_grad():
            fresh = load_model(str(base))
            grow_embeddings(fresh, own, run["args"])
            assert not torch.equal(fresh.get_input_embeddings()(tokens[-1:]), after[-1:]), "the row has learnt"


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_row_is_initialised_as_asked_and_no_other_row_changes(tmp_path, tokenizer, tied):
    folder = untied_dir(tmp_path, tokenizer) if not tied else None
    words = "the board says"
    for init in ("mean", "random", "description"):
        model = make_model(len(tokenizer)) if tied else load_model(str(folder))
        own = type(tokenizer).from_pretrained(str(tokenizer.save_pretrained(tmp_path)[0]).rpartition("/")[0])
        add_tokens(own, ["<sep>"])
        old = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
        grow_embeddings(model, own, {"new_tokens": ["<sep>"], "token_init": init, "token_description": [words], "seed": 1})
        for layer, before in zip((model.get_input_embeddings(), model.get_output_embeddings()), old, strict=True):
            assert torch.equal(layer.weight[:-1], before)
            mean = before.mean(0)
            if init == "random":
                assert 0.5 < (layer.weight[-1] - mean).std() / before.std() < 2
            else:
                want = mean if init == "mean" else before[own(words, add_special_tokens=False)["input_ids"]].mean(0)
                torch.testing.assert_close(layer.weight[-1].detach(), want)


def test_only_the_row_and_the_adapter_are_trainable(tiny_model, tokenizer, tmp_path):
    """Rank 4 on q, k, v, o of 2 layers (32 wide, 2 of 4 heads in k and v): 2 x 4 x (2 x 64 + 2 x 48) = 1,792; a row of 32."""
    own = load_tokenizer(str(tokenizer.save_pretrained(tmp_path)[0]).rpartition("/")[0])
    add_tokens(own, ["<sep>"])
    model = training.prepare_model(tiny_model, own, settings(new_tokens=["<sep>"], lora_r=4))
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(sizes.values()) == 1_792 + 32 and sum("trainable_tokens" in name for name in sizes) == 1


# ---- trees --------------------------------------------------------------------------------------


def test_the_last_turn_is_learnt_with_its_end_and_the_others_are_context(tokenizer):
    row = {**talk("Hi.", "Ho.", "Why?", "So.", system="Be kind."), "source": "diverse"}
    tree = training.build_tree(row, tokenizer, settings(), None)
    reply = tree.root.children[0]
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row["messages"][:-1]) + "<|im_start|>assistant\n"
    assert tokenizer.decode(tree.root.input_ids) == text and tokenizer.decode(reply.input_ids) == "So.<|im_end|>"
    assert reply.role == trees.LIKELIHOOD and reply.weights is None and reply.branch == training.DIVERSE
    assert training.build_tree(row, tokenizer, settings(max_length=20), None) is None


def test_a_template_without_a_system_role_gets_it_in_the_first_user_turn(tokenizer):
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    ids = messages.encode(strict, talk("Hi.", system="Be kind.")["messages"])
    assert tokenizer.decode(ids) == "<|im_start|>user\nBe kind.\n\nHi.<|im_end|>\n<|im_start|>assistant\n"


def test_the_loss_is_a_mean_of_rows_and_the_sources_are_told_apart():
    """Rows of 1 and 3 tokens with losses 4 and (1, 2, 3): (4 + 2) / 2 = 3; the task's row is the first: 1 row, 4 nats."""
    logps = torch.tensor([-4.0, -1.0, -2.0, -3.0])
    batch = {"row": torch.tensor([0, 1, 1, 1]), "num_rows": 2, "branch": torch.tensor([training.TASK] + [training.DIVERSE] * 3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "score", lambda *a: logps)
        loss, logged = training.compute_loss(None, batch, settings())
    assert loss == 3 and logged["task_rows"] == 1 and logged["task_loss"] == 4


# ---- self-sampling ------------------------------------------------------------------------------


def sample(model, out, *more) -> None:
    infer.main(["--method", "delia", "--self_sample", "--test_file", str(out.parent / "queries.jsonl"), "--save_file", str(out),
                "--max_new_tokens", "8", "--batch_size", "2", *(["--model_name_or_path", str(model)] if model else []), *more])


@pytest.fixture
def queries(tmp_path):
    return write_jsonl(tmp_path / "queries.jsonl", [{"query": query, "answer": f"It was {i}."} for i, query in enumerate(QUERIES[:5])])


def test_self_sampling_asks_again_after_the_reference_with_published_settings(tiny_dir, queries, tmp_path, monkeypatch):
    drawn = []

    def draw(model, forest, **options):
        drawn.append(options)
        return [[[65] * options["max_new_tokens"]] for _ in forest]

    monkeypatch.setattr("decoding.sample", draw)
    sample(tiny_dir, tmp_path / "cache.jsonl", "--max_new_tokens", "3")
    assert drawn[0]["temperature"] == 0.7 and drawn[0]["top_p"] == 0.95
    first = json.loads((tmp_path / "cache.draws.jsonl").read_text().splitlines()[0])
    assert [turn["role"] for turn in first["messages"]] == ["system", "user", "assistant", "user"]
    assert [turn["content"] for turn in first["messages"][1:]] == [QUERIES[0], "It was 0.", QUERIES[0]]
    assert infer.build_parser("delia").get_default("max_new_tokens") == 512
    assert json.loads((tmp_path / "cache.json").read_text())["counts"]["truncated"] == 5
    assert (tmp_path / "cache.jsonl").read_text() == ""


def test_self_samples_make_a_cache_that_training_takes_and_a_cut_run_ends_with_the_same(tiny_dir, tokenizer, queries, files, tmp_path,
                                                                                        monkeypatch):
    """The tiny model never ends by itself, so what it draws is given here, by the row's seed."""
    monkeypatch.setattr("decoding.sample", lambda model, forest, seeds, **options: [
        [tokenizer(f"Answer {seed % 9973}.", add_special_tokens=False)["input_ids"]] for seed in seeds])
    sample(tiny_dir, tmp_path / "cache.jsonl", "--max_new_tokens", "64")
    whole = (tmp_path / "cache.jsonl").read_bytes(), (tmp_path / "cache.draws.jsonl").read_bytes()
    rows = [json.loads(line) for line in whole[0].splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == QUERIES[:5] and all(len(row["messages"]) == 2 for row in rows)
    manifest = json.loads((tmp_path / "cache.json").read_text())
    assert manifest["weights"] == base_fingerprint(str(tiny_dir)) and manifest["counts"]["kept"] == 5
    (tmp_path / "cache.draws.jsonl").write_bytes(whole[1][: len(whole[1]) // 2])
    sample(tiny_dir, tmp_path / "cache.jsonl", "--max_new_tokens", "64", "--resume")
    assert ((tmp_path / "cache.jsonl").read_bytes(), (tmp_path / "cache.draws.jsonl").read_bytes()) == whole
    train.main(flags(files, tiny_dir, tmp_path, "--diverse_file", str(tmp_path / "cache.jsonl"), "--diverse_ratio", "1", "--dry_run"))


def test_answers_that_are_cut_empty_refusals_or_repeats_are_left_out_and_counted():
    """Seven answers to one query: kept are the first and the reference's own words (copied)."""
    answers = ["By boat.", "BY BOAT", " ", "I'm sorry, but I can't help.", "It goes on and", "As an AI model, I do", "On foot."]
    draws = [{"prompt": "How?", "answer": "On foot", "preds": answers, "cut_at": [4], "warnings": {"missing": 2}}]
    rows, counts = self_sampling.keep_answers(draws)
    assert [row["messages"][1]["content"] for row in rows] == ["By boat.", "On foot."]
    assert counts == {"drawn": 7, "missing": 2, "truncated": 1, "empty": 1, "refused": 2, "duplicate": 1, "kept": 2, "copied": 1}


@pytest.mark.parametrize("text", ["I'm sorry you lost your keys; call a locksmith? No: I am sorry to hear that.", "Sorry is a card game.",
                                  "The AI says no.", "Unfortunately, it rains."])
def test_not_every_sorry_is_a_refusal(text):
    assert bool(self_sampling.REFUSAL.match(text)) == text.startswith("I'm sorry")


def test_a_server_gets_all_four_turns_and_its_cache_has_no_fingerprint(serve, queries, tmp_path):  # noqa: F811
    server = serve(ok("By boat."), error(400, "content policy"), then=ok("On foot, I think."))
    with pytest.raises(SystemExit) as stop:  # one query was refused
        sample(None, tmp_path / "cache.jsonl", "--engine", "openai", "--base_url", server.url, "--served_model", "m",
               "--max_connections", "1")
    assert stop.value.code == 4
    body = server.seen[0][2]
    assert [turn["role"] for turn in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["temperature"] == 0.7 and body["top_p"] == 0.95
    manifest = json.loads((tmp_path / "cache.json").read_text())
    assert manifest["weights"] is None and manifest["counts"]["missing"] == 1
    assert manifest["counts"]["kept"] == 2 and manifest["counts"]["duplicate"] == 2


@pytest.mark.parametrize(("row", "more", "said"), [
    ({"query": "Why?"}, [], 'queries.jsonl:1: field "answer" must be a string with text'),
    ({"query": "Why?", "answer": "So."}, ["--decoding", "greedy"], "--self_sample draws from the model as it is"),
    ({"query": "Why?", "answer": "So."}, ["--save_file", "cache.txt"], "must end in .jsonl"),
])
def test_self_sampling_refuses_what_cannot_work(tiny_dir, tmp_path, capsys, row, more, said):
    write_jsonl(tmp_path / "queries.jsonl", [row])
    assert said in refused(capsys, 2, sample, tiny_dir, tmp_path / "cache.jsonl", *more)


def test_a_cache_that_is_there_is_not_overwritten(tiny_dir, queries, tmp_path, capsys):
    (tmp_path / "cache.jsonl").write_text("precious\n")
    assert "is already there" in refused(capsys, 2, sample, tiny_dir, tmp_path / "cache.jsonl")
    assert (tmp_path / "cache.jsonl").read_text() == "precious\n"


# ---- reading replies ----------------------------------------------------------------------------


@pytest.mark.parametrize(("reply", "label"), [
    (JSON, "correct"), (f"  {JSON}\n", "correct"), (JSON.replace("correct", "error"), "error"),
    (JSON.replace('"', "'"), None), (JSON.replace("correct", "maybe"), None), (JSON[:-1], None), (f"Sure: {JSON}", None),
    (JSON.replace(", ", ",\n"), None), ('{"label": "error"}', None), (JSON.replace("}", ', "x": 1}'), None), ("[]", None), ("", None),
    ('{"thought": " ", "label": "error"}', None), ('{"thought": "a", "label": "error", "label": "correct"}', None),
    ('{"thought": 1, "label": "error"}', None), ('{"thought": "a", "label": ["error"]}', None),
])
def test_the_format_is_one_line_of_json_with_two_keys(reply, label):
    assert reading.read_format(reply) == label


@pytest.mark.parametrize(("reply", "label"), [
    ("This is wrong, since water boils at 100 degrees.", "error"), ("There is no factual error in it.", "correct"),
    ("Nothing is wrong here.", "correct"), ("That is not correct.", "error"), ("It's not quite right.", "error"),
    ("The correct number is eight, so the answer is wrong.", "error"), ("True enough.", "correct"), ("I like cats.", None), ("", None),
])
def test_verdicts_are_read_from_prose(reply, label):
    assert reading.read_prose(reply) == label


def test_every_reference_verdict_of_the_data_is_read_as_its_label():
    for name in ("train", "test"):
        for row in utils.read_jsonl(DATA / f"{name}.jsonl"):
            reply = row["messages"][-1]["content"]
            read = reading.read_format(reply) if row["asks_format"] else reading.read_prose(reply)
            assert read == row["label"], reply


# ---- figures ------------------------------------------------------------------------------------


def test_balanced_accuracy_and_macro_f1_by_hand():
    """8 correct, 2 error. Found: 6 of the 8 right, 1 unread, 1 as error; 1 of 2 errors found, 1 as correct.

    Balanced (6/8 + 1/2) / 2 = 0.625. F1: correct 2 x 6 / (8 + 7) = 0.8, error 2 x 1 / (2 + 2) = 0.5; mean 0.65.
    """
    truth = np.array(["correct"] * 8 + ["error"] * 2, dtype=object)
    found = np.array(["correct"] * 6 + [None, "error", "error", "correct"], dtype=object)
    assert evaluation.balanced_accuracy(truth, found) == 0.625 and evaluation.macro_f1(truth, found) == pytest.approx(0.65)
    figures = evaluation.label_figures(truth, found)
    assert figures["accuracy"][0] == 0.7 and figures["majority"] == {
        "label": "correct", "accuracy": 0.8, "balanced_accuracy": 0.5, "macro_f1": pytest.approx(8 / 18)}
    assert figures["balanced_accuracy"][1] < 0.625 < figures["balanced_accuracy"][2]


def reply_rows(*replies, seen: bool = False) -> list[dict]:
    """Four questions: two that ask for the format (error, correct), one negated (correct), one silent (error)."""
    kinds = [("error", True, False), ("correct", True, False), ("correct", False, True), ("error", False, False)]
    return [{**talk(f"Question {i}\n\nSay it{' again' * seen}.", "So."), "prompt": f"Question {i}\n\nSay it{' again' * seen}.",
             "label": label, "asks_format": asks, "negated": negated, "preds": [reply], **({"seen_phrasing": True} if seen else {})}
            for i, ((label, asks, negated), reply) in enumerate(zip(kinds, replies, strict=True))]


def test_follow_and_leak_are_counted_apart():
    """Both asking rows follow, one with the wrong label; the negated row leaks, the silent one does not."""
    figures = evaluation.reply_figures(reply_rows(JSON, JSON, JSON, "It is wrong."))
    assert [figures[name][0] for name in ("follow", "leak", "leak_negated", "leak_silent")] == [1, 0.5, 1, 0]
    assert figures["follow_minus_leak"] == [0.5, 0, 1] and figures["accuracy"][0] == 0.5
    assert figures["verdict_accuracy"][0] == 0.75 and figures["unread"] == 0
    always = evaluation.reply_figures(reply_rows(*[JSON] * 4))
    assert always["follow_minus_leak"] == [0, 0, 0], "a model that always writes the format has not understood the token"


def test_transfer_compares_the_same_questions_and_a_difference_the_same_rows():
    """Under seen phrasings both follow, under unseen ones the second alone: follow - leak 1 and 0.5, accuracy 0.5 and 0.5."""
    unseen, seen = reply_rows("No.", JSON, "No.", "No."), reply_rows(JSON, JSON, "No.", "No.", seen=True)
    found = evaluation.transfer(unseen, seen[::-1])
    assert found["pairs"] == 4 and found["follow_minus_leak"][0] == -0.5 and found["accuracy"][0] == 0
    assert evaluation.difference(unseen, seen)["follow_minus_leak"][0] == -0.5
    assert evaluation.difference(seen, seen) == {"follow_minus_leak": [0, 0, 0], "balanced_accuracy": [0, 0, 0]}


def test_the_nll_of_a_token_is_that_of_a_padded_pass(tiny_model, tokenizer):
    """Against log_softmax of an ordinary forward pass, for the chosen places, several sequences packed."""
    sequences = [([5, 6, 7, 8], [False, False, True, True]), ([9, 5, 7], [False, True, False]), ([6] * 30, [False] * 29 + [True])]
    got = evaluation.sequence_logps(tiny_model, sequences)
    for (ids, chosen), logps in zip(sequences, got, strict=True):
        want = tiny_model(torch.tensor([ids])).logits[0].log_softmax(-1)
        want = [want[i - 1, ids[i]].item() for i in range(1, len(ids)) if chosen[i]]
        np.testing.assert_allclose(logps, want, atol=1e-5)


def test_the_neighbours_of_an_embedding(tiny_model, tokenizer):
    """A row that is twice the mean of a description's rows has cosine 1 with it, and no token is more like it."""
    words = "the board says"
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        table = tiny_model.get_input_embeddings().weight
        table[0] = 2 * table[ids].mean(0)
    found = evaluation.embedding_figures(tiny_model, tokenizer, tokenizer.convert_ids_to_tokens(0), words)
    assert found["description"] == pytest.approx(1, abs=1e-5) and found["less_like_description"] == pytest.approx(1 - 1 / len(tokenizer))
    assert len(found["nearest"]) == 10 and found["nearest"][0][1] <= 1


# ---- end to end ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero", "two"])
def test_an_evaluation_of_a_run_has_every_figure(runs, tiny_dir, tmp_path, name, capsys):
    """Base and run on four rows and their seen phrasings; the base has no token, and its own retention changes by 0."""
    import eval as evaluation

    kinds = [("error", True, False), ("correct", True, False), ("correct", False, True), ("error", False, False)]
    rows = [{**talk(f"Is {i} wet?\n\n{'Use' if i < 2 else 'No'} <sep> {k}.", JSON), "label": label, "asks_format": asks, "negated": negated,
             **({"seen_phrasing": True} if k else {})} for k in (0, 1) for i, (label, asks, negated) in enumerate(kinds)]
    test_file = write_jsonl(tmp_path / "test.jsonl", rows)
    checkpoint = next(iter(utils.checkpoints_in(runs / name)))
    for model, out in ((tiny_dir, "base"), (checkpoint, "run")):
        infer.main(["--method", "delia", "--model_name_or_path", str(model), "--test_file", str(test_file), "--decoding", "greedy",
                    "--max_new_tokens", "6", "--save_file", str(tmp_path / f"{out}.jsonl")])
    evaluation.main(["--eval_file", str(tmp_path / "base.jsonl"), str(tmp_path / "run.jsonl"), "--save_file", str(tmp_path / "e.json")])
    said = capsys.readouterr().out
    systems = json.loads((tmp_path / "e.json").read_text())["systems"]
    base, run = systems["base"], systems["run"]
    held_out = sum(mixing.is_held_out({"prompt": query}) for query in QUERIES)
    assert base["retention"]["rows"] == run["retention"]["rows"] == held_out > 0
    assert base["retention"]["change"] == [0, 0, 0] and run["retention"]["change"][0] != 0
    assert "token_nll" not in base and run["token_nll"][0] > 0 and run["token_nll_before"][0] > 0
    assert run["ratio"] == (0 if name == "zero" else 2) and run["transfer"]["pairs"] == 4 and "difference" in run
    assert len((tmp_path / "e.jsonl").read_text().splitlines()) == 16 and "follow minus leak" in said
    evaluation.main(["--show", str(tmp_path / "e.json")])
    assert "cosine" in capsys.readouterr().out


def test_a_checkpoints_own_token_may_stand_in_test_rows_and_another_special_token_may_not(runs, tmp_path, capsys):
    checkpoint = next(iter(utils.checkpoints_in(runs / "zero")))
    path = write_jsonl(tmp_path / "test.jsonl", [TASK[0], talk("Say <|im_end|> <sep>.", "So.")])
    said = refused(capsys, 2, infer.main, ["--method", "delia", "--model_name_or_path", str(checkpoint), "--test_file", str(path),
                                        "--save_file", str(tmp_path / "out.jsonl")])
    assert "row 2 spells the special token <|im_end|>" in said


# ---- the data -----------------------------------------------------------------------------------


def test_the_data_sets_hold_what_their_card_says():
    rows = {name: utils.read_jsonl(DATA / f"{name}.jsonl") for name in ("queries", "train", "test", "test_seen", "phrasings")}
    assert [len(rows[name]) for name in ("queries", "train", "test", "test_seen", "phrasings")] == [300, 200, 80, 80, 90]
    assert len({row["query"].lower() for row in rows["queries"]}) == 300 and not any(map(self_sampling.check_query, rows["queries"]))
    text_of = {row["phrasing"]: row["text"] for row in rows["phrasings"]}
    for name in ("train", "test", "test_seen"):
        for row in rows[name]:
            assert messages.check_messages(row) is None and messages.check_tokens(row, ["<sep>"], strict=True) is None
            question, _, sentence = row["messages"][0]["content"].rpartition("\n\n")
            assert sentence == text_of[row["phrasing"]] and re.match(r"Question: .+\nAnswer: ", question)
            kind = row["phrasing"].split("_")[1]
            assert (row["asks_format"], row["negated"], "<sep>" in sentence) == (kind == "ask", kind == "neg", kind != "sil")
    of = {name: {row["phrasing"] for row in rows[name]} for name in ("train", "test", "test_seen")}
    assert not of["train"] & of["test"] and of["test_seen"] <= of["train"]
    assert not {text_of[p] for p in of["train"]} & {text_of[p] for p in of["test"]}
    questions = {name: {evaluation.question_of({**row, "prompt": row["messages"][0]["content"]})[0] for row in rows[name]} for name in of}
    assert questions["test"] == questions["test_seen"] and not questions["test"] & questions["train"]
    every = [text for name in ("train", "test") for row in rows[name] for text in evaluation.question_of(
        {**row, "prompt": row["messages"][0]["content"]})[0].lower().split("\nanswer: ")]
    assert len(set(every)) == len(every) == 560, "no question and no judged answer stands twice"
    for name in of:
        assert Counter(row["label"] for row in rows[name]).most_common()[0][1] * 2 == len(rows[name]), "labels are balanced"


@pytest.mark.parametrize("name", ["smollm2", "llama2"])
def test_the_configs_resolve(name):
    from flags import parse_flags

    args = parse_flags(train.build_parser, ["--config", str(ROOT / "configs" / "delia" / f"{name}.yaml")])
    train.check_flags(args)
    assert args.method == "delia" and args.new_tokens == ["<sep>"] and args.exp_name == f"delia_{name}"
    assert args.diverse_ratio == {"smollm2": 10, "llama2": 260}[name]
