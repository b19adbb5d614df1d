"""Prompt trees: masks and positions by hand, and equality with ordinary rows and gradients."""

from __future__ import annotations

import copy
import random
import subprocess
import sys

import pytest
import torch
from conftest import DIALOGUES, ROOT, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask, flex_attention

import trees
from flags import Args
from methods.possibility import training
from modeling.adapters import add_lora
from modeling.models import load_model
from modeling.prompts import encode_prompt
from trees import CONTEXT, LIKELIHOOD, UNLIKELIHOOD, Segment, Tree


def possibility_args(replies: int = 4) -> Args:
    """The published flags of peft, for a tiny model."""
    return Args(
        method="peft", num_response_per_input=replies, replies="first", numbered_prompts=True,
        max_pos_number=9,
        max_num_negatives_per_sample=50, no_ul=False, ul_weight=0.5, ul_words="content",
        likelihood_only_steps=-1, max_length=500, max_input_length=300,
        load_in_4bit=False, gradient_checkpointing=False,
        lora_r=4, lora_alpha=None, lora_dropout=0.0, lora_target_modules=None,
    )


def nine_tokens() -> Tree:
    """Context 10 11; below it 20 with leaves 30 31 and 32, 21 with leaf 33, and leaf 22."""
    first = Segment([20], children=[Segment([30, 31], LIKELIHOOD, branch=1),
                                    Segment([32], UNLIKELIHOOD, branch=2)])
    second = Segment([21], children=[Segment([33], LIKELIHOOD, branch=3)])
    return Tree(Segment([10, 11], children=[first, second, Segment([22], LIKELIHOOD, branch=4)]))


def test_the_nine_token_tree_is_laid_out_as_worked_by_hand():
    """Depth first: 10 11 20 30 31 32 21 33 22. Token 33 follows 21, which follows 11 at depth 2."""
    batch = trees.pack([nine_tokens()])
    assert batch["input_ids"].tolist() == [[10, 11, 20, 30, 31, 32, 21, 33, 22]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 2, 3, 2]]
    assert batch["parent"].tolist() == [-1, 0, 1, 2, 3, 2, 1, 6, 1]
    assert batch["last"].tolist() == [8, 8, 5, 4, 4, 5, 7, 7, 8]
    assert batch["token"].tolist() == [3, 4, 5, 7, 8]
    assert batch["role"].tolist() == [LIKELIHOOD, LIKELIHOOD, UNLIKELIHOOD, LIKELIHOOD, LIKELIHOOD]
    assert batch["branch"].tolist() == [1, 1, 2, 3, 4]


def test_the_mask_of_the_nine_token_tree_is_the_one_worked_by_hand():
    """Each row lists what a token may see: itself and its ancestors, never a sibling's subtree."""
    seen = {0: {0}, 1: {0, 1}, 2: {0, 1, 2}, 3: {0, 1, 2, 3}, 4: {0, 1, 2, 3, 4}, 5: {0, 1, 2, 5},
            6: {0, 1, 6}, 7: {0, 1, 6, 7}, 8: {0, 1, 8}}
    mask = trees.attention_mask(trees.pack([nine_tokens()])["last"])
    assert mask.shape == (1, 1, 9, 9)
    assert {i: set(mask[0, 0, i].nonzero().flatten().tolist()) for i in range(9)} == seen


def test_packed_trees_do_not_see_each_other_and_start_at_position_0():
    batch = trees.pack([nine_tokens(), nine_tokens()])
    mask = trees.attention_mask(batch["last"])[0, 0]
    assert not mask[9:, :9].any() and not mask[:9, 9:].any()
    assert batch["position_ids"][0, 9:].tolist() == batch["position_ids"][0, :9].tolist()
    assert batch["row"].tolist() == [0] * 5 + [1] * 5 and batch["num_rows"] == 2


segments = st.recursive(
    st.builds(Segment, st.lists(st.integers(0, 99), min_size=1, max_size=3)),
    lambda kids: st.builds(lambda ids, below: Segment(ids, children=below),
                           st.lists(st.integers(0, 99), min_size=1, max_size=3),
                           st.lists(kids, max_size=3)),
    max_leaves=8,
)


@given(st.lists(segments, min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_attention_equals_the_ancestors_that_parent_pointers_give(roots):
    batch = trees.pack([Tree(root) for root in roots])
    mask, parent = trees.attention_mask(batch["last"])[0, 0], batch["parent"].tolist()
    for i in range(len(parent)):
        path, j = set(), i
        while j >= 0:
            path.add(j)
            j = parent[j]
        assert set(mask[i].nonzero().flatten().tolist()) == path
        assert batch["position_ids"][0, i] == len(path) - 1


def test_flex_attention_uses_the_same_rule():
    """FlexAttention's mask_mod gives the same matrix, and its output equals SDPA's under it."""
    last = trees.pack([nine_tokens(), nine_tokens()])["last"]
    mask = trees.attention_mask(last)
    assert torch.equal(create_mask(trees.mask_mod(last), 1, 1, 18, 18, device="cpu"), mask)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 18, 16)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    flex = flex_attention(q, k, v, block_mask=trees.attention_mask(last, "flex_attention"))
    torch.testing.assert_close(flex, plain, rtol=1e-5, atol=1e-6)


def losses_and_gradients(model, forest, args, score):
    """Loss, its parts and every LoRA gradient, with log-probabilities from score(model, forest)."""
    model.zero_grad()
    logps, batch = score(model, forest), trees.pack(forest)
    loss, parts = training.possibility_loss(logps, batch, args.ul_weight)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()
                 if parameter.requires_grad}
    return loss.item(), parts, gradients


def relative_errors(got: dict, want: dict) -> tuple[dict, float]:
    """Of every gradient tensor by name, and of all of them as one vector."""
    off = {name: (got[name].double() - g).norm() for name, g in want.items()}
    each = {name: (off[name] / g.norm()).item() for name, g in want.items()}
    length = torch.stack([g.norm() for g in want.values()]).norm()
    return each, (torch.stack(list(off.values())).norm() / length).item()


def compare_with_padded_rows(model, tokenizer, rows, args):
    """Relative errors of the tree: in float32 loss, each gradient, all; in float64 each gradient.

    The padded rows are computed in float64, so that their rounding is not blamed on the tree.
    """
    forest = [training.build_tree(row, tokenizer, args, random.Random(3)) for row in rows]
    torch.manual_seed(0)
    with torch.no_grad():  # B is zero at first, which would leave A without gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    score_tree = lambda m, f: trees.score(m, trees.pack(f))  # noqa: E731
    loss, parts, gradients = losses_and_gradients(model, forest, args, score_tree)
    exact_loss, _, exact = losses_and_gradients(model.double(), forest, args, trees.score_rows)
    _, _, doubles = losses_and_gradients(model, forest, args, score_tree)
    assert parts["ul_loss"] > 0, "unlikelihood takes part"
    assert len(exact) == len(gradients) > 0, "adapters take part"
    loss_error = abs(loss - exact_loss) / exact_loss
    return loss_error, *relative_errors(gradients, exact), relative_errors(doubles, exact)[0]


@pytest.mark.parametrize("count", [1, 3])
def test_tree_losses_and_lora_gradients_equal_padded_rows_on_the_tiny_model(tokenizer, count):
    """One tree, and three packed trees whose prompts differ in length: relative 1e-5 in float32."""
    args = possibility_args()
    model = add_lora(make_model(len(tokenizer)), args)
    loss, each, total, _ = compare_with_padded_rows(model, tokenizer, DIALOGUES[:count], args)
    worst = max(each, key=each.get)
    assert loss < 1e-5 and total < 1e-5 and each[worst] < 1e-5, f"{worst}: {each[worst]:.1e}"


def test_tree_losses_and_lora_gradients_equal_padded_rows_on_the_embedded_model(embedded):
    """Float32: the loss and the gradient as one vector. Every single tensor: in float64.

    30 layers of float32 alone round single tensors by 2e-5 (and by 1.5e-4 in the padded rows).
    """
    model, tokenizer = embedded
    args = possibility_args(replies=2)
    wrapped = add_lora(copy.deepcopy(model), args)
    loss, _, total, each = compare_with_padded_rows(wrapped, tokenizer, DIALOGUES[:2], args)
    worst = max(each, key=each.get)
    assert loss < 1e-5 and total < 1e-5 and each[worst] < 1e-5, \
        f"{loss:.1e} {total:.1e} {worst}: {each[worst]:.1e}"


def test_only_the_logits_that_are_needed_are_asked_for(tiny_model):
    """The nine-token tree scores 5 tokens after 4 distinct parents (1, 2, 3, 6)."""
    positions = []

    def count(module, inputs, output):
        positions.append(output.shape[1])

    tiny_model.lm_head.register_forward_hook(count)
    trees.score(tiny_model, trees.pack([nine_tokens()]))
    assert positions == [4]


def test_attention_of_a_packed_row_is_computed_tree_by_tree(tiny_model, monkeypatch):
    """Trees of 9 and 3 tokens; the ends of leaves are not computed, so 5 and 2 keys are left.

    The log-probabilities are those of one dense call a layer.
    """
    forest = [nine_tokens(), three_tokens()]
    batch, lengths, plain = trees.pack(forest), [], trees.attention.sdpa_attention_forward

    def watched(module, query, key, *args, **kwargs):
        lengths.append(key.shape[2])
        return plain(module, query, key, *args, **kwargs)

    monkeypatch.setattr(trees.attention, "sdpa_attention_forward", watched)
    by_tree = trees.score(tiny_model, batch)
    assert lengths == [5, 2] * tiny_model.config.num_hidden_layers
    tiny_model.set_attn_implementation("sdpa")
    torch.testing.assert_close(by_tree, trees.score(tiny_model, batch), rtol=1e-5, atol=1e-6)


def test_a_loaded_model_computes_attention_tree_by_tree_unless_told_otherwise(tiny_dir):
    assert load_model(tiny_dir).config._attn_implementation == "sdpa_by_tree"
    assert load_model(tiny_dir, "eager").config._attn_implementation == "eager"


def test_importing_trees_changes_nothing_in_transformers():
    """The kernel is registered where a model is loaded, not by whoever imports a tree."""
    code = ("import trees; from transformers import AttentionInterface as known; "
            "assert 'sdpa_by_tree' not in known().valid_keys(); "
            "trees.attention.register(); assert 'sdpa_by_tree' in known().valid_keys()")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_forest_without_scored_tokens_gives_an_empty_score(tiny_model):
    batch = trees.pack([Tree(Segment([5, 6]))])
    assert trees.score(tiny_model, batch).shape == (0,)


def three_tokens() -> Tree:
    """Context 5 6, below it the leaf 7."""
    return Tree(Segment([5, 6], children=[Segment([7], LIKELIHOOD, branch=8)]))


def test_a_packed_batch_holds_its_trees_and_moves_with_its_tensors():
    forest = [nine_tokens(), three_tokens()]
    batch = trees.to_device(trees.pack(iter(forest)), "meta")
    assert batch["trees"] == forest and batch["num_rows"] == 2
    assert all(v.device.type == "meta" for v in batch.values() if torch.is_tensor(v))


@pytest.mark.parametrize(("max_tokens", "max_leaves"), [(2000, None), (12, None), (9, None),
                                                        (5, None), (1, None), (2000, 1)])
def test_a_forest_is_scored_tree_by_tree_whatever_the_blocks(tiny_model, max_tokens, max_leaves):
    """Trees of 9, 3, 9, 2 and 3 tokens: in one block, in some, and cut into parts of one leaf."""
    forest = [nine_tokens(), three_tokens(), nine_tokens(), Tree(Segment([5, 6])), three_tokens()]
    scored = trees.score_forest(tiny_model, iter(forest), max_tokens, max_leaves)
    assert len(scored) == 5 and len(scored[3].logps) == 0
    for tree, result in zip(forest, scored, strict=True):
        batch = trees.pack([tree])
        want = trees.score(tiny_model, batch)
        torch.testing.assert_close(result.logps, want.detach(), rtol=1e-5, atol=1e-6)
        assert not result.logps.requires_grad
        for name in ("role", "weight", "branch", "token"):
            assert torch.equal(getattr(result, name), batch[name]), name
        assert torch.equal(result.last, batch["last"][batch["token"]])


def test_the_sums_of_a_scored_tree_are_those_of_its_branches_and_leaves(tiny_model):
    """Branch 1 of the nine-token tree has the tokens 30 and 31, branches 2 to 4 one each; all end
    a leaf. Below a scored inner token, a leaf's sum holds that token's, too."""
    tree = nine_tokens()
    tree.root.children[2].children = [Segment([34], LIKELIHOOD, branch=5),
                                      Segment([35, 36], LIKELIHOOD, branch=6)]
    result, = trees.score_forest(tiny_model, [tree])
    logps = result.logps.double()
    assert result.branch.tolist() == [1, 1, 2, 3, 4, 5, 6, 6]
    sums = [0, logps[0] + logps[1], logps[2], logps[3], logps[4], logps[5], logps[6] + logps[7]]
    torch.testing.assert_close(result.branch_sums(7), torch.tensor(sums, dtype=torch.float64))
    branch, leaves = result.leaf_sums()
    assert branch.tolist() == [1, 2, 3, 5, 6], "branch 4 ends no leaf any more"
    sums = [sums[1], sums[2], sums[3], sums[4] + sums[5], sums[4] + sums[6]]
    torch.testing.assert_close(leaves, torch.tensor(sums, dtype=torch.float64))


def test_a_forest_is_consumed_block_by_block(tiny_model):
    """So a bar around it moves, and a generator of trees is never whole in memory."""
    calls = []
    tiny_model.register_forward_pre_hook(lambda module, args: calls.append(len(made)))
    made = []

    def grow():
        for _ in range(4):
            made.append(nine_tokens())
            yield made[-1]

    trees.score_forest(tiny_model, grow(), max_tokens=18)
    assert calls == [3, 4], "a block is scored when the first tree that does not fit is there"


def test_branch_prompts_give_back_every_prompt(tokenizer):
    texts = [f"Say something: possibility number #{k}" for k in (1, 12, 3)]
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    root = trees.branch_prompts(prompts, [1, 12, 3])
    assert [root.input_ids + child.input_ids for child in root.children] == prompts
    assert [child.branch for child in root.children] == [1, 12, 3]
    assert root.role == CONTEXT and len(root.input_ids) > len(prompts[0]) // 2
    same = trees.branch_prompts([prompts[0]] * 3, [1, 2, 3])
    assert [same.input_ids + child.input_ids for child in same.children] == [prompts[0]] * 3


@pytest.mark.parametrize("which", ["tiny", "embedded"])
def test_shared_prefill_generates_the_tokens_of_copied_prompts(
        which, request, tokenizer, tiny_model):
    """Rows and branch ends of different lengths (#9, #10), greedy: the same token ids."""
    model, tok = (tiny_model, tokenizer) if which == "tiny" else request.getfixturevalue("embedded")
    forest, prompts = [], []
    for row in DIALOGUES[:3]:
        texts = [f"{row['context']}\npossibility number #{k}" for k in (9, 10, 3)]
        branches = [encode_prompt(tok, text) for text in texts]
        forest.append(Tree(trees.branch_prompts(branches, [9, 10, 3])))
        prompts += branches
    ids, mask, cache = trees.prefill(model, forest, tok.pad_token_id)
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=tok.pad_token_id,
                   eos_token_id=None)
    shared = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    shared = shared[:, ids.shape[1]:]
    for i, prompt in enumerate(prompts):
        alone = torch.tensor([prompt])
        alone = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert alone[0, len(prompt):].tolist() == shared[i].tolist(), f"sequence {i}"
