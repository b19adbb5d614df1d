"""Method control: labels, tokens, training, guidance and what is measured; data/build_control.py."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import DIALOGUES, ROOT, make_model, make_tokenizer, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

import infer
import train
import trees
import utils
from data import build_control
from decoding.beams import beam
from decoding.mixtures import guide
from decoding.sampling import greedy, sample
from flags import parse_flags
from methods.control import attributes, evaluation, inference, tokens, training
from modeling.adapters import ban_tokens
from modeling.checkpoints import load_checkpoint
from modeling.models import base_fingerprint, load_model, load_tokenizer
from modeling.prompts import end_of_turn

evaluation = importlib.import_module("eval")
SCHEMA = {"toxicity": {"values": ["nontoxic", "toxic"], "thresholds": [0.5], "scorer": "alt-profanity-check", "version": "1.9.1"},
          "sentiment": {"values": ["neg", "neu", "pos"], "thresholds": [-0.05, 0.05], "scorer": "vaderSentiment", "version": "3.3.2"}}
ROW = {"text": "I love this day.", "values": {"toxicity": "nontoxic", "sentiment": "pos"}}
DOCUMENTS = [{"texts": row["candidates"] + row["context"].split("\n")} for row in DIALOGUES] + [
    {"text": "I love this lovely day! It is great, says Dr. No. This is an awful, terrible mess. 123. Is it not sad?"},
    {"texts": ["What a wonderful, happy surprise.", "You are a stupid fool and I hate you.", "The bus leaves at nine."]}]


def arguments(**changes) -> SimpleNamespace:
    own = dict(num_branches=None, schema=SCHEMA, attributes=list(SCHEMA), control_tokens=None, banned_ids=None, max_length=64, max_new_tokens=8,
               from_scratch=False, lora_r=2, lora_alpha=4, lora_dropout=0.0, load_in_4bit=False,
               gradient_checkpointing=False, lora_target_modules=["q_proj", "v_proj"])
    return SimpleNamespace(**{**own, **changes})


def with_spare(count: int):
    """The tiny tokenizer with so many reserved tokens; their rows are there, as in a real model."""
    tokenizer = make_tokenizer("bytelevel")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|reserved_special_token_{i}|>" for i in range(count)]})
    return tokenizer


def refused(run, *flags) -> int:
    with pytest.raises(SystemExit) as stop:
        run([str(flag) for flag in flags])
    return stop.value.code


@pytest.fixture
def build(tmp_path, capsys):
    """Run the builder on documents: its manifest, rows by file, and what it printed."""

    def run(documents: list[dict], *flags: str):
        build_control.main(["--input", str(write_jsonl(tmp_path / "docs.jsonl", documents)), "--out_dir", str(tmp_path / "d"),
                            "--min_words", "2", "--valid_share", "0.2", *flags])
        rows = {name: [json.loads(line) for line in (tmp_path / "d" / f"{name}.jsonl").read_text().splitlines()]
                for name in ("train", "valid", "prompts")}
        return json.loads((tmp_path / "d" / "manifest.json").read_text()), rows, capsys.readouterr().out

    return run


# ---- data ---------------------------------------------------------------------------------------


def test_cleaning_puts_a_space_for_what_it_takes_off_and_keeps_letters_of_all_scripts():
    assert build_control.clean("one.\nline — café, “ça va”? @bob see https://x.y/z  now") == "one. line — café, “ça va”? see now"
    assert build_control.clean("RT hello\tworld") == "hello world" and build_control.clean("rtx is a card") == "rtx is a card"


def test_sentences_end_at_marks_before_capitals_but_not_after_abbreviations():
    assert build_control.sentences('He saw Dr. No. "Really?" she said. It cost 3.50 e.g. in May!\nNew line') == [
        "He saw Dr. No.", '"Really?" she said.', "It cost 3.50 e.g. in May!", "New line"]


def test_dropped_texts_are_counted_by_the_first_reason(build):
    texts = ["I love this.", "i love this", "12 34 56", "Hm", "Write to me at a@b.com today", "<|im_start|> is a token", "I hate this.",
             "It is a chair.", "You stupid idiot, damn you."]
    manifest, rows, out = build([{"texts": texts}, {"texts": ["A table stands there.", "Here is a lamp."]}], "--threshold", "toxicity=q0.5")
    assert {name: own["dropped"] for name, own in manifest["filters"].items()} == {
        "no letters": 1, "length": 1, "personal data": 1, "special token": 1, "duplicate": 1}
    assert sum(len(rows[split]) for split in ("train", "valid")) == len(texts) - 5 + 2


def test_a_document_is_in_one_split_and_the_scores_are_of_the_written_text(build):
    manifest, rows, _ = build(DOCUMENTS, "--threshold", "toxicity=q0.8")
    assert not {r["document"] for r in rows["train"]} & {r["document"] for r in rows["valid"]} and rows["valid"]
    score, version = attributes.load_scorer("vaderSentiment")
    for row in rows["train"] + rows["valid"]:
        assert row["scores"]["sentiment"] == pytest.approx(score([row["text"]])[0], abs=1e-4)
        assert row["values"] == attributes.values_of(row["scores"], manifest["schema"])
    assert manifest["schema"]["sentiment"]["version"] == version == importlib.metadata.version("vaderSentiment")


def test_the_same_seed_writes_the_same_files_and_another_one_does_not(build):
    flags = ("--attributes", "sentiment", "--drop_rate", "0.3")
    first, again, other = build(DOCUMENTS, *flags)[:2], build(DOCUMENTS, *flags)[:2], build(DOCUMENTS, *flags, "--seed", "7")[1]
    assert first == again and first[1] != other


def test_the_share_without_tokens_lies_within_binomial_bounds(build):
    documents = [{"texts": [f"Chair {i} is {word}." for word in ("good", "bad", "here", "away", "blue")]} for i in range(120)]
    manifest, rows, _ = build(documents, "--attributes", "sentiment", "--drop_rate", "0.1")
    n, found = len(rows["train"]), sum("unconditioned" in row for row in rows["train"])
    assert manifest["unconditioned"] == found and abs(found - 0.1 * n) < 4 * math.sqrt(0.09 * n)


def test_balancing_leaves_equally_many_texts_of_every_combination(build):
    manifest, rows, _ = build(DOCUMENTS, "--attributes", "sentiment", "question", "--balance")
    joint = manifest["counts"]["train"]["joint"]
    assert len(set(joint.values())) == 1 and sum(joint.values()) == len(rows["train"])
    assert set(joint) == set(manifest["counts_before_choosing"]["train"]["joint"])


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.floats(-0.9, 0.4), st.floats(0.01, 0.5))
def test_values_rise_with_scores_and_ties_are_no_pole(scores, low, gap):
    values = [attributes.value_of(s, [low, low + gap], ("neg", "neu", "pos")) for s in sorted(scores)]
    assert values == sorted(values)  # neg < neu < pos in the alphabet, too
    assert attributes.value_of(low + gap / 2, [low, low + gap], ("neg", "neu", "pos")) == "neu"


def test_a_text_without_sentiment_words_is_neutral_not_negative():
    score, _ = attributes.load_scorer("vaderSentiment")
    texts = ["The bus leaves at nine.", "I love it.", "I hate it."]
    assert [attributes.value_of(s, [-0.05, 0.05], ("neg", "neu", "pos")) for s in score(texts)] == ["neu", "pos", "neg"]


def test_formality_length_and_question_follow_their_rules():
    """Five of six marks: capital, stop, no contraction, no slang, no lone i, no shouting."""
    assert attributes.formality("I would like to see it.") == 1
    assert attributes.formality("i dont wanna go!!") == pytest.approx(2 / 6)  # a mark at the end, no contraction with an apostrophe
    assert attributes.load_scorer("words")[0](["one two three"]) == [3.0]
    assert attributes.load_scorer("question")[0](['"Is it?"', "It is. Is it? Yes."]) == [1.0, 0.0]


@pytest.mark.parametrize("flags, says", [
    (("--threshold", "toxicity=1.5"), "no text is toxic"),
    (("--threshold", "sentiment=0.05,-0.05"), "rising"),
    (("--threshold", "toxicity=high"), "neither numbers nor quantiles"),
    (("--threshold", "length=3"), "none of --attributes"),
    (("--drop_rate", "1"), "shares"),
    (("--attributes", "beauty"), "invalid choice")])
def test_bad_flags_of_the_builder_say_what_is_wrong(build, capsys, flags, says):
    with pytest.raises(SystemExit) as stop:
        build(DOCUMENTS, *flags)
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_a_file_without_letters_is_refused_with_its_counts(build, capsys):
    with pytest.raises(SystemExit) as stop:
        build([{"texts": ["12 34", "!!! ???", "5 + 5"]}])
    assert stop.value.code == 2 and "3 no letters" in capsys.readouterr().err


def test_a_scorer_that_is_not_installed_is_named_with_its_command(monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(SystemExit) as stop:
        attributes.load_scorer("vaderSentiment")
    assert stop.value.code == 3 and "pip install vaderSentiment==3.3.2" in capsys.readouterr().err


def test_detoxify_scores_are_the_sigmoid_of_its_label_and_pickles_are_refused(tmp_path, capsys):
    """A tiny random classifier with three labels; toxic is the second."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = make_tokenizer("bytelevel")
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        id2label={0: "insult", 1: "toxic", 2: "threat"}, label2id={"insult": 0, "toxic": 1, "threat": 2})).eval()
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    score, version = attributes.load_scorer("detoxify", str(tmp_path / "m"))
    texts = ["I know.", "The bus leaves at nine, says the man."]
    with torch.no_grad():
        wanted = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 1].sigmoid().item() for text in texts]
    assert score(texts) == pytest.approx(wanted, abs=1e-5) and version == base_fingerprint(str(tmp_path / "m"))
    (tmp_path / "toxic.ckpt").touch()
    assert refused(lambda flags: attributes.load_scorer("detoxify", *flags), tmp_path / "toxic.ckpt") == 2
    assert "no model folder" in capsys.readouterr().err


# ---- tokens -------------------------------------------------------------------------------------


def test_spare_tokens_serve_where_there_are_enough_else_tokens_are_added():
    few, many = with_spare(4), with_spare(6)
    before = len(few), len(many)
    added, taken = tokens.assign_tokens(few, SCHEMA), tokens.assign_tokens(many, SCHEMA)
    assert list(added) == list(taken) == ["toxicity=nontoxic", "toxicity=toxic", "sentiment=neg", "sentiment=neu", "sentiment=pos"]
    assert (len(few), len(many)) == (before[0] + 5, before[1])
    assert added["sentiment=pos"] == "<|sentiment=pos|>" and taken["sentiment=pos"] == "<|reserved_special_token_4|>"
    assert tokens.assign_tokens(few, SCHEMA) == added and len(few) == before[0] + 5  # a second time adds nothing
    assert few("<|sentiment=pos|>")["input_ids"] == [few.convert_tokens_to_ids("<|sentiment=pos|>")]


@pytest.mark.parametrize("spare", [0, 6])
def test_new_rows_start_at_the_mean_and_only_they_and_the_adapter_are_trained(spare):
    """The model ties its embeddings: a control token has one row, trained once, as input and output."""
    tokenizer = with_spare(spare)
    model, args = make_model(len(tokenizer)), arguments()
    mean = model.get_input_embeddings().weight.detach().mean(0)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = training.prepare_model(model, tokenizer, args)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [p for name, p in trainable.items() if "trainable_tokens" in name]
    assert all("lora_" in name or "trainable_tokens" in name for name in trainable)
    assert [tuple(p.shape) for p in rows] == [(5, 32)] and torch.allclose(rows[0], mean.expand(5, -1), atol=1e-6)
    assert (model(torch.tensor([[1, 2]])).logits[..., args.banned_ids] == -1e9).all()  # nothing is learnt of them as outputs
    optimizer = torch.optim.AdamW(trainable.values(), lr=0.1, weight_decay=0.0)
    batch = trees.pack([training.build_tree(ROW, tokenizer, args, random.Random(0))])
    for _ in range(3):
        optimizer.zero_grad()
        training.compute_loss(model, batch, args)[0].backward()
        optimizer.step()
    assert not torch.allclose(rows[0][0], mean, atol=1e-2)  # nontoxic and pos stood in the text, the others did not
    assert torch.allclose(rows[0][1:4], mean.expand(3, -1), atol=1e-6)
    base = {name.replace(".base_layer", "").replace("token_adapter.", "").removeprefix("base_model.model."): p
            for name, p in model.named_parameters() if not p.requires_grad}
    for name, value in frozen.items():
        kept = slice(None, len(value) - spare) if "embed" in name else slice(None)  # spare rows start at the mean
        assert torch.equal(base[name][: len(value)][kept], value[kept]), name


def test_banned_tokens_are_never_said_whatever_decodes(tokenizer):
    """Whatever the model would say greedily, by beams or when guided is banned; then it says something else."""
    model = make_model(len(tokenizer))
    tree = trees.Tree(trees.branch_prompts([[5, 6]] * 2, [1, 2]))
    guided = trees.Tree(tree.root, twin=trees.Tree(trees.branch_prompts([[5, 7]] * 2, [1, 2])), guidance=3.0)

    def said() -> set[int]:
        replies = greedy(model, [tree], 0, 0, 4)[0] + greedy(model, [guided], 0, 0, 4)[0]
        replies += beam(model, [trees.Tree(trees.branch_prompts([[5, 6]], [1]))], 0, 0, 4, 2, 2)[0]
        return {token for reply in replies for token in reply}

    banned = said()
    ban_tokens(model, sorted(banned))
    assert banned and said() and not said() & banned


# ---- training -----------------------------------------------------------------------------------


def test_tokens_stand_first_and_text_and_end_are_what_is_learnt(tokenizer):
    tokenizer, args = make_tokenizer("bytelevel"), arguments()
    tree = training.build_tree(ROW, tokenizer, args, random.Random(0))
    text = tokenizer(ROW["text"])["input_ids"]
    ids = tokenizer.convert_tokens_to_ids(["<|toxicity=nontoxic|>", "<|sentiment=pos|>"])
    assert tree.root.input_ids == tokens.start_ids(tokenizer) + ids
    assert tree.root.children[0].input_ids == text + [end_of_turn(tokenizer)]
    assert trees.pack([tree])["token"].tolist() == list(range(4, 4 + len(text) + 1))


def test_texts_without_tokens_and_models_of_fewer_attributes():
    tokenizer, args = make_tokenizer("bytelevel"), arguments(attributes=["sentiment"])
    start = tokens.start_ids(tokenizer)
    tree = training.build_tree(ROW, tokenizer, args, random.Random(0))
    assert tree.root.input_ids == start + tokenizer.convert_tokens_to_ids(["<|sentiment=pos|>"])
    assert training.build_tree(ROW | {"unconditioned": True}, tokenizer, args, random.Random(0)).root.input_ids == start
    args.attributes = []
    assert training.build_tree(ROW, tokenizer, args, random.Random(0)).root.input_ids == start


def test_the_loss_of_packed_texts_equals_the_mean_over_padded_rows():
    tokenizer, args = make_tokenizer("bytelevel"), arguments()
    forest = [training.build_tree(ROW | {"text": text}, tokenizer, args, random.Random(0))
              for text in ("I love this day.", "No.", "The bus leaves at nine, says the man.")]
    model = make_model(len(tokenizer))
    loss, logged = training.compute_loss(model, trees.pack(forest), args)
    assert loss.item() == pytest.approx(-trees.score_rows(model, forest).mean().item(), abs=1e-5) == logged["loss"].item()


def test_a_text_that_does_not_fit_is_dropped_not_cut():
    assert training.build_tree(ROW | {"text": "word " * 80}, make_tokenizer("bytelevel"), arguments(), random.Random(0)) is None


# ---- decoding -----------------------------------------------------------------------------------


def test_guidance_is_what_the_equation_says():
    conditioned, plain = torch.tensor([[1.0, 4.0]]), torch.tensor([[2.0, 2.0]])
    logits = torch.stack([conditioned, conditioned, plain, plain])  # two rows and their twins
    assert guide(logits, [1.5, 0.0]).tolist() == [[[0.5, 5.0]], [[2.0, 2.0]]]


def rows_for(prompts: list[str], wants: list[dict], guidance: float) -> list[dict]:
    return [{"prompt": prompt, "wants": wants, "given": wants, "guidance": guidance} for prompt in prompts]


def decode(model, tokenizer, args, rows: list[dict], how: str = "greedy") -> list[list[list[int]]]:
    forest = [inference.decode_tree(row, tokenizer, args) for row in rows]
    if how == "greedy":
        return greedy(model, forest, 0, 0, 6)
    return sample(model, forest, [1] * len(forest), 0, 0, 6)


@pytest.fixture(scope="module")
def settled():
    """A tiny random model whose tokenizer has the control tokens, with its arguments."""
    tokenizer, args = make_tokenizer("bytelevel"), arguments()
    tokens.settle_tokens(tokenizer, args)
    return make_model(len(tokenizer), seed=3), tokenizer, args


def test_guided_decoding_equals_two_plain_forward_passes_a_step(settled):
    """The slow reference computes both prompts anew for every token, one reply at a time."""
    model, tokenizer, args = settled
    want = {"sentiment": "pos"}
    fast = decode(model, tokenizer, args, rows_for(["The bus"], [want, {"toxicity": "toxic"}], 2.5))[0]
    for wanted, reply in zip((want, {"toxicity": "toxic"}), fast, strict=True):
        prompts = [sum(tokens.encode(tokenizer, own, args.control_tokens, "The bus"), []) for own in (wanted, {})]
        said: list[int] = []
        while len(said) < 6:
            with torch.no_grad():
                asked, plain = (model(torch.tensor([ids + said])).logits[0, -1] for ids in prompts)
            token = (plain + 2.5 * (asked - plain)).argmax().item()
            if token == 0:
                break
            said.append(token)
        assert reply == said


def test_guidance_of_one_is_the_condition_and_of_zero_none_of_it(settled):
    model, tokenizer, args = settled
    want, prompts = [{"sentiment": "neg"}] * 2, ["The bus", "I"]
    plain = decode(model, tokenizer, args, rows_for(prompts, [{}] * 2, 1.0), "sample")
    asked = decode(model, tokenizer, args, rows_for(prompts, want, 1.0), "sample")
    assert decode(model, tokenizer, args, rows_for(prompts, want, 0.0), "sample") == plain != asked
    assert decode(model, tokenizer, args, rows_for(prompts, want, 1 + 1e-9), "sample") == asked


def test_prompts_of_different_lengths_in_one_batch_give_what_each_gives_alone(settled):
    model, tokenizer, args = settled
    rows = rows_for(["The bus leaves at nine, says the man", "I", ""], [{"toxicity": "toxic"}, {}, {"sentiment": "pos"}], 1.5)
    assert decode(model, tokenizer, args, rows) == [decode(model, tokenizer, args, [row])[0] for row in rows]


def test_the_context_of_equal_conditions_is_computed_once(settled):
    _, tokenizer, args = settled
    tree = inference.decode_tree(rows_for(["The bus leaves"], [{"sentiment": "pos"}] * 5, 2.0)[0], tokenizer, args)
    assert all(len(child.input_ids) == 1 for half in (tree, tree.twin) for child in half.root.children)
    assert len(tree.root.input_ids) == len(tree.twin.root.input_ids) + 1  # the token that the twin lacks


# ---- end to end ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Data, an adapter, and the folder of both, made by the scripts on the tiny model."""
    folder = tmp_path_factory.mktemp("control")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        tokenizer = make_tokenizer("bytelevel")
        make_model(len(tokenizer)).save_pretrained("tiny")
        tokenizer.save_pretrained("tiny")
        write_jsonl(folder / "docs.jsonl", DOCUMENTS)
        build_control.main(["--input", "docs.jsonl", "--out_dir", "data", "--min_words", "2", "--threshold", "toxicity=q0.5",
                            "--prompt_words", "2", "--drop_rate", "0.1"])
        train.main(TRAIN)
    return folder


TRAIN = ["--method", "control", "--train_file", "data/train.jsonl", "--model_name", "tiny", "--max_length", "120", "--lora_r", "2",
         "--learning_rate", "1e-2", "--num_train_epochs", "4", "--per_device_train_batch_size", "8", "--attributes", "sentiment",
         "--exp_name", "sen"]


@pytest.fixture
def in_folder(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return next((trained / "checkpoints" / "sen").glob("check_*"))


def test_rows_and_adapter_are_saved_and_reloaded_exactly(in_folder):
    from safetensors.torch import load_file

    saved = load_file(in_folder / "adapter_model.safetensors")
    rows = [value for name, value in saved.items() if "trainable_tokens" in name]
    model, tokenizer, run = load_checkpoint(str(in_folder))
    assert len(rows) == 1 and rows[0].shape == (5, 32) and len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    loaded = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    assert torch.equal(loaded[0], rows[0])
    ids = torch.tensor([[1, run["args"]["banned_ids"][4], 20, 21]])
    with torch.no_grad():
        first, second = model(ids).logits, load_checkpoint(str(in_folder))[0](ids).logits
    assert torch.equal(first, second) and (first[..., run["args"]["banned_ids"]] == -1e9).all()
    assert (in_folder / "adapter_model.safetensors").stat().st_size < 25e6


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(in_folder):
    """Four steps at once, and two steps that are resumed."""
    flags = [*TRAIN, "--save_steps", "2", "--max_steps"]
    name = flags.index("sen")
    flags[name] = "whole"
    train.main([*flags, "4"])
    flags[name] = "parts"
    train.main([*flags, "2"])
    train.main([*flags, "4", "--resume"])
    one, two = (utils.sha256((in_folder.parents[1] / run / "check_4" / "adapter_model.safetensors").read_bytes()) for run in ("whole", "parts"))
    assert one == two


def test_from_scratch_trains_and_reloads_a_whole_random_model(in_folder, capsys):
    flags = [*TRAIN, "--from_scratch", "--max_steps", "2"]
    flags[flags.index("sen")] = "scratch"
    train.main(flags)
    folder = in_folder.parents[1] / "scratch" / "check_2"
    model, tokenizer, run = load_checkpoint(str(folder))
    base = load_model("tiny")
    assert run["method"] == "control" and not (folder / "adapter_config.json").exists()
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0] == base.get_input_embeddings().weight.shape[0] + 5
    same = [torch.allclose(p, q) for (_, p), (name, q) in zip(model.named_parameters(), base.named_parameters(), strict=True)
            if "proj" in name]
    assert same and not any(same)
    infer.main(["--method", "control", "--model_name_or_path", str(folder), "--want", "sentiment=pos", "--save_file", "outs/scratch.jsonl"])
    assert "1 responses to 1 rows" in capsys.readouterr().out


def test_a_sweep_asks_for_every_combination_and_evaluation_scores_it(in_folder, capsys):
    common = ["--method", "control", "--model_name_or_path", str(in_folder), "--sweep", "toxicity", "sentiment=neg,pos", "--untrained",
              "token", "--limit", "3", "--max_new_tokens", "6"]
    infer.main([*common, "--save_file", "outs/one.jsonl"])
    infer.main([*common, "--guidance", "2", "--save_file", "outs/two.jsonl"])
    rows = utils.read_jsonl("outs/one.jsonl")
    wants = rows[0]["wants"]
    assert len(rows) == 3 and len(wants) == 9 and wants[0] == {} and {"toxicity": "toxic", "sentiment": "neg"} in wants
    assert all(len(row["preds"]) == 9 for row in rows)
    evaluation.main(["--eval_file", "outs/one.jsonl", "outs/two.jsonl", "--save_file", "logs/both.json"])
    summary = json.loads((in_folder.parents[2] / "logs" / "both.json").read_text())
    one, two = summary["systems"].values()
    assert two["guidance"] == 2.0 and one["trained"] == ["sentiment"]
    assert set(one["conditions"]) == {attributes.write_want(want) for want in wants}
    assert one["conditions"]["no condition"]["perplexity_ratio"][0] == pytest.approx(1)
    assert len(one["effects"]) == 4 + 4 * 3  # single values; joint ones, also attribute by attribute
    capsys.readouterr()
    evaluation.main(["--show", "logs/both.json"])
    assert "misaligned replies" in (out := capsys.readouterr().out) and "toxicity=nontoxic" in out


def test_a_baseline_may_skip_the_tokens_it_was_not_trained_on(in_folder):
    """Greedily, toxicity then changes nothing and sentiment is asked for as it was trained."""
    common = ["--method", "control", "--model_name_or_path", str(in_folder), "--decoding", "greedy", "--max_new_tokens", "6",
              "--sweep", "toxicity=toxic", "sentiment=pos", "--untrained"]
    infer.main([*common, "skip", "--save_file", "outs/skip.jsonl"])
    row = utils.read_jsonl("outs/skip.jsonl")[0]
    assert row["wants"][3] == {"toxicity": "toxic", "sentiment": "pos"} and row["given"] == [{}, {"sentiment": "pos"}] * 2
    assert row["preds"][:2] == row["preds"][2:]


def test_perplexity_is_that_of_the_base_after_the_prompt(in_folder):
    """One row at a time, the whole text through the plain model."""
    preds = ["leaves at nine", "is late.", ""]
    found = evaluation.base_nats("tiny", {"a": [{"prompt": "The bus", "preds": preds}, {"prompt": "", "preds": ["I know"]}]})
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    for prompt, text in (("The bus", "leaves at nine"), ("The bus", "is late."), ("", "I know")):
        context = tokens.start_ids(tokenizer) + (tokenizer(prompt)["input_ids"] if prompt else [])
        ids = tokenizer(f" {text}" if prompt else text)["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([context + ids])).logits[0].log_softmax(-1)
        nll = -sum(logps[len(context) - 1 + i, token].item() for i, token in enumerate(ids))
        assert found[prompt, text][0] == pytest.approx(nll, abs=1e-4) and found[prompt, text][1] == len(ids)
    assert found["The bus", ""] == (0.0, 0)


@pytest.mark.parametrize("flags, says", [
    (("--want", "toxicity=nontoxic"), "does not know the attribute 'toxicity'"),
    (("--want", "sentiment=happy"), "sentiment is never 'happy'"),
    (("--want", "sentiment"), "is not NAME=VALUE"),
    (("--want", "sentiment=pos", "sentiment=neg"), "stands twice"),
    (("--sweep", "formality"), "does not know the attribute 'formality'"),
    (("--sweep", "--want", "sentiment=pos"), "neither --want nor beams"),
    (("--guidance", "2", "--decoding", "beam"), "--guidance does nothing"),
    (("--guidance", "-1"), "at least 0"),
    (("--engine", "openai", "--base_url", "http://x", "--served_model", "y"), "cannot send control tokens")])
def test_bad_flags_of_drawing_say_what_is_wrong(in_folder, capsys, flags, says):
    common = ("--method", "control", "--model_name_or_path", in_folder, "--save_file", "outs/bad.jsonl")
    assert refused(infer.main, *common, *flags) == 2 and says in capsys.readouterr().err


def test_a_model_that_is_no_control_checkpoint_is_refused(in_folder, capsys):
    assert refused(infer.main, "--method", "control", "--model_name_or_path", "tiny", "--save_file", "outs/bad.jsonl") == 2
    assert "no checkpoint of --method control" in capsys.readouterr().err


def test_bad_training_rows_are_named_with_file_and_line(in_folder, capsys):
    rows = [ROW | {"values": {"toxicity": "toxic", "sentiment": "pos"}}, {"text": "123", "values": {}}, {"text": "Hello"},
            ROW | {"values": {"toxicity": "toxic", "sentiment": "glad"}}]
    write_jsonl(in_folder.parents[2] / "data" / "bad.jsonl", rows)
    flags = ["--method", "control", "--train_file", "data/bad.jsonl", "--model_name", "tiny", "--exp_name", "bad"]
    assert refused(train.main, *flags) == 2
    err = capsys.readouterr().err
    assert "bad.jsonl:2: field \"text\" must be a string with letters" in err and "bad.jsonl:3: needs \"values\"" in err
    assert "sentiment must be one of neg, neu, pos, got \"glad\"" in err
    flags[3] = "data/train.jsonl"
    assert refused(train.main, *flags, "--attributes", "beauty") == 2 and "does not know the attribute 'beauty'" in capsys.readouterr().err
    assert refused(train.main, *flags, "--manifest", "docs.jsonl") == 2 and "is no manifest" in capsys.readouterr().err


def test_configs_are_resolved_without_error():
    for path in sorted((ROOT / "configs" / "control").glob("*.yaml")):
        args = parse_flags(train.build_parser, ["--config", str(path)])
        train.check_flags(args)
        assert args.attributes == ["toxicity", "sentiment"] and args.from_scratch == path.stem.startswith("gpt2")


# ---- figures ------------------------------------------------------------------------------------


def reply(row: int, want: dict, sentiment: float | None, text: str = "x", nll: float = 0.0, tokens: int = 0) -> evaluation.Reply:
    scores = None if sentiment is None else {"toxicity": 0.1, "sentiment": sentiment}
    return evaluation.Reply(row, want, text, scores, scores and attributes.values_of(scores, SCHEMA), nll, tokens)


def test_misalignment_by_hand():
    """Two rows. Nothing asked: pos, neu (one of two is not pos). Asked for pos: pos, pos (none). Asked for neg: neg, pos."""
    pos, neg = {"sentiment": "pos"}, {"sentiment": "neg"}
    replies = {(): [reply(0, {}, 0.6), reply(1, {}, 0.0)],
               tuple(pos.items()): [reply(0, pos, 0.6), reply(1, pos, 0.9)],
               tuple(neg.items()): [reply(0, neg, -0.6), reply(1, neg, 0.9)]}
    first, second = evaluation.effects(replies, SCHEMA, 2, [reply(0, {}, 0.0), reply(1, {}, 0.0)])
    assert first["baseline_difference"][0] == -1.0 and second["baseline_difference"][0] == -0.5
    assert first["want"] == pos and first["no_condition"][0] == 0.5 and first["asked"][0] == 0.0 and first["difference"][0] == -0.5
    assert first["opposite"][0] == 0.5 and first["opposite_difference"][0] == 0.0
    assert second["no_condition"][0] == 1.0 and second["asked"][0] == 0.5 and second["opposite"][0] == 1.0


def test_a_joint_condition_is_missed_by_missing_either_attribute():
    want = {"toxicity": "nontoxic", "sentiment": "pos"}
    assert not evaluation.misaligned({"toxicity": "nontoxic", "sentiment": "pos"}, want)
    assert evaluation.misaligned({"toxicity": "toxic", "sentiment": "pos"}, want)
    assert evaluation.misaligned({"toxicity": "nontoxic", "sentiment": "neu"}, want)
    assert attributes.opposite(want, SCHEMA) == {"toxicity": "toxic", "sentiment": "neg"}
    assert attributes.opposite({"sentiment": "neu"}, SCHEMA) is None and attributes.opposite({}, SCHEMA) is None


def test_a_joint_condition_is_also_measured_attribute_by_attribute():
    """One reply asked to be nontoxic and pos, nontoxic and neg as it is: jointly missed, sentiment missed, toxicity met."""
    want = {"toxicity": "nontoxic", "sentiment": "pos"}
    found = evaluation.effects({tuple(want.items()): [reply(0, want, -0.6)]}, SCHEMA, 1, [])
    assert [(own["measured"], own["asked"][0]) for own in found] == [(want, 1.0), ({"toxicity": "nontoxic"}, 0.0), ({"sentiment": "pos"}, 1.0)]
    assert found[0]["no_condition"] is None and found[0]["difference"] is None


def test_replies_without_letters_are_counted_and_no_score_is_made_up():
    replies = [reply(0, {}, 0.6), reply(1, {}, None, "12")]
    figures = evaluation.describe(replies, replies, SCHEMA, 2)
    assert figures["unscored"] == 1 and figures["replies"] == 2 and figures["shares"]["sentiment"]["pos"] == 1.0
    assert evaluation.share_by_row(replies, {"sentiment": "pos"}, 2) == [0.0, None]


def test_perplexity_and_its_ratio_by_hand():
    """8 nats over 4 tokens against 4 over 4: e^2 against e, ratio e; all rows alike, so the interval is the point."""
    a, b = [(4.0, 2), (4.0, 2)], [(2.0, 2), (2.0, 2)]
    assert evaluation.ratio_interval(a, b) == pytest.approx((math.e, math.e, math.e))
    assert evaluation.ratio_interval([(0.0, 0)], [(1.0, 1)]) is None


def test_repetition_counts_what_stood_before_in_the_same_text():
    """a b c a b c: 3-grams abc bca cab abc, one of four again."""
    assert evaluation.repetition(["a b c a b c"]) == 0.25 and evaluation.repetition(["a b c d", "one two"]) == 0.0
    assert evaluation.repetition(["one two"]) is None


def test_every_combination_stands_once_and_the_first_asks_for_nothing():
    found = attributes.combinations({"toxicity": ["nontoxic", "toxic"], "sentiment": ["pos"]})
    assert found[0] == {} and len(found) == 6 == len({json.dumps(f) for f in found})


def test_files_of_other_scorers_are_not_compared(in_folder, capsys, tmp_path):
    row = {"prompt": "a", "wants": [{}], "guidance": 1.0, "preds": ["hello"]}
    for name, schema in (("a", SCHEMA), ("b", {"toxicity": SCHEMA["toxicity"]})):
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
        run = {"base_model": "tiny", "args": {"schema": schema, "attributes": []}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"run": run}))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert refused(evaluation.main, "--eval_file", *files, "--save_file", tmp_path / "e.json") == 2
    assert "another base or schema" in capsys.readouterr().err
    (tmp_path / "a.json").unlink()
    assert refused(evaluation.main, "--eval_file", files[0], "--save_file", tmp_path / "e.json") == 2
    assert "which scorers and thresholds" in capsys.readouterr().err
