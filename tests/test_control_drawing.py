"""Method control in infer.py: conditions, guidance, sweeps."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model, make_tokenizer, refused, write_jsonl
from control_cases import arguments, in_folder, trained  # noqa: F401

import infer
import utils
from decoding.mixtures import guide
from decoding.sampling import greedy, sample
from methods.control import inference, tokens

# ---- guidance -----------------------------------------------------------------------------------


def test_guidance_is_what_the_equation_says():
    """(1, 4) against (2, 2) unconditionally: at 1.5, 2 - 1.5 = 0.5 and 2 + 3 = 5; at 0, (2, 2)."""
    cond, uncond = torch.tensor([[1.0, 4.0]]), torch.tensor([[2.0, 2.0]])
    logits = torch.stack([cond, cond, uncond, uncond])  # two rows, then both without condition
    assert guide(logits, [1.5, 0.0]).tolist() == [[[0.5, 5.0]], [[2.0, 2.0]]]


def rows_for(prompts: list[str], conditions: list[dict], guidance_scale: float) -> list[dict]:
    return [{"prompt": prompt, "conditions": conditions, "applied_conditions": conditions,
             "guidance_scale": guidance_scale} for prompt in prompts]


def decode(model, tokenizer, args, rows: list[dict], draw=greedy) -> list[list[list[int]]]:
    """Six tokens of every reply."""
    forest = [inference.decode_tree(row, tokenizer, args) for row in rows]
    if draw is greedy:
        return greedy(model, forest, 0, 0, 6)
    return sample(model, forest, [1] * len(forest), 0, 0, 6)


@pytest.fixture(scope="module")
def steered():
    """(a tiny random model, its tokenizer with the control tokens, the flags of drawing)."""
    tokenizer, args = make_tokenizer("bytelevel"), arguments()
    control_tokens = tokens.assign_tokens(tokenizer, args.schema)
    args = args.with_values(control_tokens=control_tokens, num_branches=None, max_new_tokens=8)
    return make_model(len(tokenizer), seed=3), tokenizer, args


def test_guided_decoding_equals_two_plain_forward_passes_a_step(steered):
    """The slow reference computes both prompts anew for every token, one reply at a time."""
    model, tokenizer, args = steered
    conditions = [{"sentiment": "pos"}, {"toxicity": "toxic"}]
    replies = decode(model, tokenizer, args, rows_for(["The bus"], conditions, 2.5))[0]
    for condition, reply in zip(conditions, replies, strict=True):
        prompts = [sum(tokens.encode(tokenizer, own, args.control_tokens, "The bus"), [])
                   for own in (condition, {})]
        said: list[int] = []
        while len(said) < 6:
            with torch.no_grad():
                cond, uncond = (model(torch.tensor([ids + said])).logits[0, -1] for ids in prompts)
            token = (uncond + 2.5 * (cond - uncond)).argmax().item()
            if token == 0:
                break
            said.append(token)
        assert reply == said


def test_guidance_of_one_is_the_condition_and_of_zero_none_of_it(steered):
    model, tokenizer, args = steered

    def drawn(condition: dict, guidance_scale: float):
        rows = rows_for(["The bus", "I"], [condition] * 2, guidance_scale)
        return decode(model, tokenizer, args, rows, sample)

    negative = {"sentiment": "neg"}
    assert drawn(negative, 0.0) == drawn({}, 1.0) != drawn(negative, 1.0)
    assert drawn(negative, 1 + 1e-9) == drawn(negative, 1.0)


def test_prompts_of_different_lengths_in_one_batch_give_what_each_gives_alone(steered):
    model, tokenizer, args = steered
    prompts = ["The bus leaves at nine, says the man", "I", ""]
    rows = rows_for(prompts, [{"toxicity": "toxic"}, {}, {"sentiment": "pos"}], 1.5)
    alone = [decode(model, tokenizer, args, [row])[0] for row in rows]
    assert decode(model, tokenizer, args, rows) == alone


def test_the_context_of_equal_conditions_is_computed_once(steered):
    """Each branch keeps one token; the unconditional tree lacks the control token."""
    _, tokenizer, args = steered
    row, = rows_for(["The bus leaves"], [{"sentiment": "pos"}] * 5, 2.0)
    tree = inference.decode_tree(row, tokenizer, args)
    roots = tree.root, tree.uncond.root
    assert all(len(branch.input_ids) == 1 for root in roots for branch in root.children)
    assert len(tree.root.input_ids) == len(tree.uncond.root.input_ids) + 1


# ---- infer.py -----------------------------------------------------------------------------------


def draw(checkpoint, name: str, *flags: str) -> list[dict]:
    """The rows that infer.py writes; the checkpoint says the method."""
    infer.main(["--model_name_or_path", str(checkpoint), "--max_new_tokens", "6",
                "--save_file", f"outs/{name}.jsonl", *flags])
    return utils.read_jsonl(f"outs/{name}.jsonl")


def test_a_sweep_asks_for_every_combination_and_for_none(in_folder):  # noqa: F811
    """Three values of toxicity (none, nontoxic, toxic) by three of sentiment (none, neg, pos)."""
    rows = draw(in_folder, "sweep", "--sweep", "toxicity", "sentiment=neg,pos",
                "--unknown_attributes", "token", "--limit", "3")
    conditions = rows[0]["conditions"]
    assert len(rows) == 3 and len(conditions) == 9 and conditions[0] == {}
    assert {"toxicity": "toxic", "sentiment": "neg"} in conditions
    assert all(len(row["preds"]) == 9 and row["applied_conditions"] == conditions for row in rows)


def test_a_baseline_may_skip_the_tokens_it_was_not_trained_on(in_folder):  # noqa: F811
    """Greedily, toxicity then changes nothing and sentiment is asked for as it was trained."""
    row, = draw(in_folder, "skip", "--decoding", "greedy", "--sweep", "toxicity=toxic",
                "sentiment=pos", "--unknown_attributes", "skip")
    assert row["conditions"][3] == {"toxicity": "toxic", "sentiment": "pos"}
    assert row["applied_conditions"] == [{}, {"sentiment": "pos"}] * 2
    assert row["preds"][:2] == row["preds"][2:]


def test_replies_continue_the_prompts_of_a_file(in_folder, tmp_path):  # noqa: F811
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "The bus"}, {"prompt": "I"}])
    rows = draw(in_folder, "prompts", "--test_file", str(path), "--condition", "sentiment=pos",
                "--num_response_per_input", "2", "--guidance_scale", "1.5")
    assert [row["prompt"] for row in rows] == ["The bus", "I"]
    assert all(len(row["preds"]) == 2 and row["guidance_scale"] == 1.5 for row in rows)
    assert all(row["conditions"] == [{"sentiment": "pos"}] * 2 for row in rows)


def test_earlier_names_of_the_flags_still_work(in_folder):  # noqa: F811
    args = infer.read_flags([
        "--model_name_or_path", str(in_folder), "--want", "sentiment=pos", "--guidance", "2",
        "--untrained", "skip", "--save_file", "outs/x.jsonl"])
    assert (args.condition, args.guidance_scale) == (["sentiment=pos"], 2)
    assert args.unknown_attributes == "skip"


@pytest.mark.parametrize(("flags", "problem"), [
    (("--condition", "toxicity=nontoxic"), "does not know the attribute 'toxicity'"),
    (("--condition", "sentiment=happy"), "sentiment is never 'happy'"),
    (("--condition", "sentiment"), "is not NAME=VALUE"),
    (("--condition", "sentiment=pos", "sentiment=neg"), "stands twice"),
    (("--sweep", "formality"), "does not know the attribute 'formality'"),
    (("--sweep", "--condition", "sentiment=pos"), "neither --condition nor beams"),
    (("--sweep", "--decoding", "beam"), "neither --condition nor beams"),
    (("--guidance_scale", "2", "--decoding", "beam"), "--guidance_scale does nothing"),
    (("--guidance_scale", "-1"), "--guidance_scale -1 must be at least 0"),
    (("--decoding", "list"), "no decoding by asking"), (("--overgenerate", "8"), "no --overgen"),
    (("--engine", "openai:y", "--base_url", "http://x"), "cannot send control tokens")])
def test_bad_flags_of_drawing_say_what_is_wrong(
        in_folder, capsys, flags, problem):  # noqa: F811
    argv = ["--method", "control", *flags]
    assert problem in refused(capsys, 2, draw, in_folder, "bad", *argv)


def test_a_model_that_is_no_control_checkpoint_is_refused(in_folder, capsys):  # noqa: F811
    said = refused(capsys, 2, draw, "tiny", "bad", "--method", "control")
    assert "no checkpoint of --method control" in said
