"""Method delia: what a model's probabilities say, and where nothing can be said."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from delia_cases import talk
from transformers import AutoTokenizer

from methods.delia import probabilities
from modeling.adapters import add_tokens, grow_embeddings
from modeling.models import load_model, load_tokenizer


def test_the_nll_of_a_token_is_that_of_a_padded_pass(tiny_model, tokenizer):
    """Against log_softmax of an ordinary forward pass, at the chosen places; several are packed."""
    sequences = [([5, 6, 7, 8], [False, False, True, True]), ([9, 5, 7], [False, True, False]),
                 ([6] * 30, [False] * 29 + [True])]
    got = probabilities.sequence_logps(tiny_model, sequences)
    for (ids, chosen), logps in zip(sequences, got, strict=True):
        want = tiny_model(torch.tensor([ids])).logits[0].log_softmax(-1)
        want = [want[i - 1, ids[i]].item() for i in range(1, len(ids)) if chosen[i]]
        np.testing.assert_allclose(logps, want, atol=1e-5)


def test_a_token_that_opens_its_prompt_is_not_scored_and_is_no_nan(tiny_model):
    """Nothing predicts a first token: 9 alone, 9 first of three, and a third one at place 2."""
    sequences = [([9], [True]), ([9, 5, 7], [True, False, False]),
                 ([5, 9, 7], [False, True, False])]
    first, second, third = probabilities.mean_nlls(tiny_model, sequences)
    want = -tiny_model(torch.tensor([[5]])).logits[0, 0].log_softmax(-1)[9].item()
    assert first is None and second is None and third == pytest.approx(want, abs=1e-5)
    assert probabilities.mean_nlls(tiny_model, sequences[:2]) == [None, None]


@pytest.mark.parametrize(("prompts", "unscored", "why"), [
    (["<sep> Is it?", "Is it <sep>?"], 1, None),
    (["<sep> Is it?", "Is it?"], 1, "the new tokens open their prompts"),
    (["Is it?", "Is it?"], 0, "no prompt mentions a new token"),
])
def test_prompts_whose_token_cannot_be_scored_are_counted(
        tiny_dir, tmp_path, prompts, unscored, why):
    """Plain prompts without a start token, in which <sep> stands first, later, or nowhere."""
    model, tokenizer = load_model(str(tiny_dir)), load_tokenizer(str(tiny_dir), "none")
    args = {"new_tokens": ["<sep>"], "token_init": "mean", "token_description": ["it"], "seed": 1}
    add_tokens(tokenizer, ["<sep>"])
    grow_embeddings(model, tokenizer, args)
    rows = [{**talk(prompt, "So."), "asks_format": True} for prompt in prompts]
    run = {"method": "delia", "base_model": str(tiny_dir), "args": args}
    sources = SimpleNamespace(model=lambda name: (model, tokenizer, run))
    before = probabilities.BeforeTraining(rows, [])
    figures, reasons = probabilities.model_figures(rows, sources, "a", before, "none")
    assert figures["token_unscored"] == unscored
    for name in ("token_nll", "token_nll_before"):
        assert (figures[name] is None) == (why is not None)
        assert reasons.get(name, "").startswith(why or "")
    assert figures["token_nll"] == figures["token_nll_before"], "nothing was trained"


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}"])
def test_before_training_is_measured_on_the_prompts_of_the_run(
        tiny_dir, tokenizer, tmp_path, template):
    """The base has no template, or another one; the run was trained with that of `tokenizer`.

    Nothing was trained, so before and after are equal, token by token.
    """
    base = shutil.copytree(tiny_dir, tmp_path / "base")
    bare = AutoTokenizer.from_pretrained(base)
    bare.chat_template = template
    (base / "chat_template.jinja").unlink(missing_ok=True)
    bare.save_pretrained(base)
    model, own = load_model(str(base)), copy.deepcopy(tokenizer)
    args = {"new_tokens": ["<sep>"], "token_init": "mean", "token_description": ["it"], "seed": 1}
    rows = [{**talk("Use <sep>.", "So."), "asks_format": True}]
    held_out = [talk("Is tea hot?", "It is.")]
    add_tokens(own, ["<sep>"])
    grow_embeddings(model, own, args)
    run = {"method": "delia", "base_model": str(base), "args": args}
    sources = SimpleNamespace(model=lambda name: (model, own, run))
    before = probabilities.BeforeTraining(rows, held_out)
    figures, _ = probabilities.model_figures(rows, sources, "a", before, None)
    assert figures["token_nll"] == figures["token_nll_before"]
    # a row more in the softmax, that of <sep>, takes a little from all others
    assert figures["retention"]["change"]["mean"] == pytest.approx(0, abs=0.05)
    sequences = probabilities.reply_sequences(held_out, own)
    assert tokenizer.decode(sequences[0][0]).startswith("<|im_start|>user\nIs tea hot?")
    want = probabilities.mean_nlls(load_model(str(base)), sequences)
    assert before.held_out_nlls(str(base), own.chat_template) == want


def test_the_neighbours_of_an_embedding(tiny_model, tokenizer):
    """A row that is twice the mean of a description's rows has cosine 1 with it.

    No token is more like the description.
    """
    words = "the board says"
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        table = tiny_model.get_input_embeddings().weight
        table[0] = 2 * table[ids].mean(0)
    token = tokenizer.convert_ids_to_tokens(0)
    found = probabilities.embedding_figures(tiny_model, tokenizer, token, words)
    assert found["description"] == pytest.approx(1, abs=1e-5)
    assert found["less_like_description"] == pytest.approx(1 - 1 / len(tokenizer))
    assert len(found["nearest"]) == 10 and found["nearest"][0][1] <= 1
