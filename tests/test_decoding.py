"""Beams and branches on shared prefill, against plain references.

Diverse beam search is also held to what the library gave when it still had it.
"""

from __future__ import annotations

import json
import math
import socket

import pytest
import torch
from conftest import DIALOGUES, ROOT, make_model
from decoding_cases import PAD, forest_of, numbered
from hypothesis import given, settings
from hypothesis import strategies as st
from make_beam_fixtures import build_model
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

import trees
from decoding.beams import beam, diverse, diverse_beam_search
from decoding.sampling import TopNSigma, greedy
from trees import Tree, branch_prompts

FIXTURES = ROOT / "tests" / "fixtures" / "diverse_beam.json"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A decoder that needs a hub or a network fails here."""
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def reference(model, prompt: list[int], groups: int, size: int, penalty: float, eos: int,
              new: int) -> list[list[int]]:
    """Diverse beam search of one prompt by the book: no cache, no batch, dictionaries.

    A group is a list of (score, tokens); finished beams compete by score / length; best first.
    """
    def logps(tokens: list[int]) -> list[float]:
        logits = model(torch.tensor([prompt + tokens])).logits[0, -1]
        return logits.float().log_softmax(-1).tolist()

    def best_first(pairs: list) -> list:
        return sorted(pairs, key=lambda pair: -pair[0])

    running = [[(0.0, [])] for _ in range(groups)]
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(groups)]
    closed = [False] * groups
    for step in range(1, new + 1):
        taken: dict[int, int] = {}
        for g in range(groups):
            if closed[g]:
                taken[PAD] = taken.get(PAD, 0) + size
                continue
            options = [(score + p - penalty * taken.get(token, 0), tokens, token)
                       for score, tokens in running[g] for token, p in enumerate(logps(tokens))]
            options = best_first(options)[: 2 * size]
            running[g] = []
            for rank, (score, tokens, token) in enumerate(options):
                if token != eos:
                    running[g].append((score, [*tokens, token]))
                elif rank < size:
                    finished[g] = best_first([*finished[g], (score / step, tokens)])[:size]
                if len(running[g]) == size:
                    break
            full = len(finished[g]) == size
            closed[g] = full and finished[g][-1][0] >= options[0][0] / step
            for _, tokens in running[g]:
                taken[tokens[-1]] = taken.get(tokens[-1], 0) + 1
        if all(closed):
            break
    for g in range(groups):
        if not closed[g]:
            ends = [(score / len(tokens), tokens) for score, tokens in running[g]]
            finished[g] = best_first(finished[g] + ends)[:size]
    return [tokens for _, tokens in best_first([pair for group in finished for pair in group])]


def strip(sequences: torch.Tensor, start: int, eos: int) -> list[list[int]]:
    """The new tokens of every sequence, up to its end token."""
    new = sequences[:, start:].tolist()
    return [ids[: ids.index(eos)] if eos in ids else ids for ids in new]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 99), groups=st.integers(1, 4), size=st.integers(1, 3),
       penalty=st.sampled_from([0.3, 1.0, 5.0]),
       lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3))
def test_diverse_beam_search_equals_the_slow_reference_in_left_padded_batches(
        seed, groups, size, penalty, lengths):
    """A random model of 17 tokens, one of them the end, so that beams end early, late and never."""
    model = make_model(17, seed)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(2, 17, (n,), generator=generator).tolist() for n in lengths]
    ids, mask = trees.left_pad(prompts, PAD, "cpu")
    beams = groups * size
    out = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=beams, num_return_sequences=beams,
        max_new_tokens=6, eos_token_id=1, pad_token_id=PAD, custom_generate=diverse_beam_search,
        num_beam_groups=groups, diversity_penalty=penalty)
    with torch.no_grad():
        want = [tokens for prompt in prompts
                for tokens in reference(model, prompt, groups, size, penalty, 1, 6)]
    assert strip(out, ids.shape[1], 1) == want


def test_token_ids_and_scores_equal_those_of_transformers_4_55_4():
    """43 cases of tests/make_beam_fixtures.py: one prompt and eight left-padded ones."""
    kept = json.loads(FIXTURES.read_text())
    models = {name: build_model(recipe) for name, recipe in kept["models"].items()}
    close = dict(rtol=1e-4, atol=1e-4)
    for name, recipe in kept["models"].items():
        logits = models[name](torch.arange(2, 12)[None]).logits[0, -1]
        probe = torch.tensor(recipe["probe"])
        torch.testing.assert_close(logits, probe, **close, msg="the models differ")
    assert len(kept["cases"]) == 43
    for case in kept["cases"]:
        out = models[case["model"]].generate(
            torch.tensor(case["input_ids"]), attention_mask=torch.tensor(case["attention_mask"]),
            custom_generate=diverse_beam_search, return_dict_in_generate=True, **case["settings"])
        assert out.sequences.tolist() == case["sequences"], case["name"]
        scores = torch.tensor(case["scores"])
        torch.testing.assert_close(out.sequences_scores, scores, **close, msg=case["name"])


def copied(tree: Tree, branch: int = 0) -> torch.Tensor:
    return torch.tensor([tree.root.input_ids + tree.root.children[branch].input_ids])


def test_one_group_is_beam_search_and_a_vanishing_penalty_gives_copies_of_it(
        tiny_model, tokenizer):
    """Three groups of two at penalty 1e-9: every sequence of a search with two beams, thrice."""
    forest = forest_of(tokenizer)
    plain = beam(tiny_model, forest, PAD, 1, 10, num_beams=2, num_responses=2)
    assert diverse(tiny_model, forest, PAD, 1, 10, 2, 1, 2) == plain
    copies = diverse(tiny_model, forest, PAD, 1, 10, 6, 3, 6, diversity_penalty=1e-9)
    assert [sorted(row) for row in copies] == [sorted(row * 3) for row in plain]


def test_a_higher_penalty_changes_the_output_and_its_first_tokens_differ(tiny_model, tokenizer):
    """Five groups of one beam: at 1e-9 all begin alike, at 50 nats no two begin alike."""
    forest = forest_of(tokenizer)
    low, high = (diverse(tiny_model, forest, PAD, 1, 10, 5, 5, 5, diversity_penalty=penalty)
                 for penalty in (1e-9, 50.0))
    assert low != high
    assert all(len({tuple(ids[:1]) for ids in row}) == 1 for row in low)
    assert all(len({tuple(ids[:1]) for ids in row}) == 5 for row in high)


@pytest.mark.parametrize("how", ["beam", "diverse"])
def test_beams_on_shared_prefill_are_those_of_copied_prompts(how, tiny_model, tokenizer):
    """Rows of different lengths decoded together, and each alone by the library."""
    forest = forest_of(tokenizer)
    options = dict(max_new_tokens=8, eos_token_id=1, pad_token_id=PAD, num_beams=4,
                   num_return_sequences=4)
    if how == "beam":
        shared = beam(tiny_model, forest, PAD, 1, 8, 4, 4)
    else:
        shared = diverse(tiny_model, forest, PAD, 1, 8, 4, 2, 4, diversity_penalty=1.0)
        options |= dict(custom_generate=diverse_beam_search, num_beam_groups=2,
                        diversity_penalty=1.0)
    for tree, row in zip(forest, shared, strict=True):
        ids = copied(tree)
        alone = tiny_model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert strip(alone, ids.shape[1], 1) == row


def test_a_number_per_group_is_the_search_of_that_number_where_groups_do_not_meet(
        tiny_model, tokenizer):
    """At a penalty of 1e-9 group g under number g finds what greedy choice under it finds."""
    forest = forest_of(tokenizer, branches=3)
    found = diverse(tiny_model, forest, PAD, 1, 8, 3, 3, 3, diversity_penalty=1e-9)
    want = greedy(tiny_model, forest, PAD, 1, 8)
    assert [sorted(row) for row in found] == [sorted(row) for row in want]
    assert len({tuple(ids) for ids in want[0]}) > 1, "equal responses would prove nothing"


def test_diverse_beam_search_runs_through_a_lora_adapter(tiny_model, tokenizer):
    """With B = 0 the adapter is the base model; with random weights it is another one."""
    forest = forest_of(tokenizer)
    base = diverse(tiny_model, forest, PAD, 1, 8, 4, 4, 4)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    wrapped = get_peft_model(tiny_model, lora).eval()
    assert diverse(wrapped, forest, PAD, 1, 8, 4, 4, 4) == base
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    assert diverse(wrapped, forest, PAD, 1, 8, 4, 4, 4) != base


@pytest.mark.parametrize(("options", "what"), [
    ({"num_beams": 5, "num_beam_groups": 2},
     "num_beams 5 must be a multiple of num_beam_groups 2"),
    ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.0},
     "diversity_penalty 0.0 must be above 0"),
    ({"num_beams": 4, "diversity_penalty": math.nan}, "must be above 0"),
])
def test_impossible_groups_and_penalties_are_named(tiny_model, options, what):
    with pytest.raises(ValueError, match=what):
        tiny_model.generate(torch.tensor([[3, 4]]), max_new_tokens=2,
                            custom_generate=diverse_beam_search, **options)


def test_processors_of_generate_reach_the_groups(tiny_model):
    """A repetition penalty so high that no token may come twice."""
    out = tiny_model.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=12, num_beams=3, num_return_sequences=3,
        repetition_penalty=1e6, eos_token_id=None, pad_token_id=PAD,
        custom_generate=diverse_beam_search)
    assert all(len(set(row)) == len(row) for row in out.tolist())


def test_top_n_sigma_keeps_logits_within_n_deviations_of_the_best():
    """Logits 3, 2, 1, -2: mean 1, deviation sqrt((4 + 1 + 0 + 9) / 3) = 2.16.

    Within one deviation of 3 are 3, 2, 1; within 0.4 of it only 3.
    """
    scores = torch.tensor([[3.0, 2.0, 1.0, -2.0]])
    assert torch.isfinite(TopNSigma(1.0)(None, scores)).tolist() == [[True, True, True, False]]
    assert torch.isfinite(TopNSigma(0.4)(None, scores)).tolist() == [[True, False, False, False]]


def test_beams_copy_the_context_when_decoding_starts_and_branches_never_do(
        tiny_model, tokenizer, monkeypatch):
    """Beams: one sequence a row in the cache, then four. Branches: one a row to the end.

    And that one is far shorter than N copies: a context, then ends and tokens of all branches.
    """
    repeats = []
    real = DynamicCache.batch_repeat_interleave

    def watched(cache, times):
        repeats.append((cache.layers[0].keys.shape[0], times))
        real(cache, times)

    monkeypatch.setattr(DynamicCache, "batch_repeat_interleave", watched)
    diverse(tiny_model, forest_of(tokenizer), PAD, 1, 3, 4, 4, 4)
    assert repeats == [(3, 4)]
    forest = forest_of(tokenizer, 5)
    branches = trees.Branches(tiny_model, forest, PAD)
    for _ in range(3):
        branches.feed(torch.full((3, 5), 7))
    longest = max(len(tree.root.input_ids) for tree in forest)
    ends = len(forest[0].root.children[0].input_ids)
    assert branches.cache.layers[0].keys.shape[0] == 3
    assert branches.cache.layers[0].keys.shape[2] == longest + 5 * (ends + 3)


def test_branches_that_grow_together_have_the_logits_of_sequences_alone(tiny_model, tokenizer):
    """Rows and branch ends of different lengths (#9, #10), four tokens each, at every step."""
    prompts = [numbered(tokenizer, row, [9, 10]) for row in DIALOGUES[:3]]
    forest = [Tree(branch_prompts(branches, [9, 10])) for branches in prompts]
    tokens = torch.randint(3, 400, (3, 2, 4), generator=torch.Generator().manual_seed(0))
    branches = trees.Branches(tiny_model, forest, PAD)
    for step in range(5):
        for row in range(3):
            for b in range(2):
                ids = torch.tensor([prompts[row][b] + tokens[row, b, :step].tolist()])
                with torch.no_grad():
                    want = tiny_model(ids).logits[0, -1]
                torch.testing.assert_close(branches.logits[row, b], want, rtol=1e-4, atol=1e-4)
        if step < 4:
            branches.feed(tokens[:, :, step])


@pytest.mark.parametrize("end", [1, 7, PAD])
def test_greedy_branches_write_what_generate_writes_from_copied_prompts(
        tiny_model, tokenizer, end):
    """Fifteen branches of three rows, some of which end early; the padding may be the end."""
    forest = forest_of(tokenizer, 5)
    found = greedy(tiny_model, forest, PAD, end, 12)
    for tree, row in zip(forest, found, strict=True):
        for b, reply in enumerate(row):
            ids = copied(tree, b)
            out = tiny_model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                eos_token_id=end, pad_token_id=PAD)
            assert strip(out, ids.shape[1], end) == [reply]
