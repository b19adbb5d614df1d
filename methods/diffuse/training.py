"""Training of method diffuse: cross-entropy to a target distribution, on a trie of its targets.

Shapes: S scored tokens of a packed batch, R response prefixes of a prompt.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import Tensor

import trees
import utils
from methods import defaults
from methods.diffuse.prompts import read_prompts
from modeling.adapters import add_lora, resolve_lora
from modeling.checkpoints import check_adapter
from modeling.prompts import encode_prompt, end_of_turn
from trees import Segment, Tree
from utils import USAGE, fail


def load_rows(args) -> list[dict]:
    """The training prompts; the test prompts are only checked."""
    rows, _ = read_prompts(args)
    empty = [row["file"] for row in rows if not row["targets"]]
    if empty:
        fail(USAGE, f'{empty[0]}: field "targets" is empty',
             "there is nothing to learn; name it in --test_prompts")
    return rows[: args.limit]


prepare_tokenizer = defaults.leave_as_is


def prepare_model(model, tokenizer, rows: list[dict], args):
    """A new LoRA adapter, or with --load_model the one in --ckpt_dir, trained on."""
    if not args.load_model:
        return add_lora(model, args)
    folder = Path(args.ckpt_dir)
    if folder.is_dir() and not (folder / "adapter_config.json").exists():
        folder = utils.newest_checkpoint(folder) or folder
    check_adapter(folder)
    if args.load_in_4bit:
        model = prepare_model_for_kbit_training(model, args.gradient_checkpointing)
    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def describe(model, tokenizer, rows: list[dict], args) -> dict:
    """The adapter's settings; with --load_model those of --ckpt_dir and not the flags'."""
    if not args.load_model:
        return resolve_lora(args, model)
    config = model.peft_config["default"]
    return {"lora_r": config.r, "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "lora_target_modules": sorted(config.target_modules)}


def build_tree(row: dict, tokenizer, args, rng: random.Random) -> Tree | None:
    """The request and the trie of its targets; None if a target does not fit into --max_length."""
    tree = distribution_tree(row, tokenizer, row["weights"])
    _, longest = trees.padded_shape(tree)
    return tree if longest <= args.max_length else None


def compute_loss(model, batch: dict, args, step: int) -> tuple[Tensor, dict]:
    """Mean over prompts of -sum_y w(y) log p(y | x), in nats.

    Also logged: its floor H(w), and KL(w || p) = loss - floor.
    """
    losses, floors = losses_and_floors(model, batch, args.batch_size, args.max_batch_tokens)
    loss, floor = losses.mean(), floors.mean()
    return loss, {"loss": loss.detach(), "kl": (loss - floor).detach(), "floor": floor}


order_rows = defaults.shuffled
parameter_groups = defaults.one_rate


@torch.no_grad()
def after_pass(model, forest, rows: list[dict], args, saves: bool) -> tuple[bool, dict]:
    """Whether every prompt is within the threshold of --gamma, and a line for the log.

    The losses are fresh ones, computed without dropout. Without --early_stop they are only computed
    where a checkpoint is made, to be read in the log.
    """
    if not (args.early_stop or saves):
        return False, {}
    was_training, figures = model.training, {}
    model.eval()
    # one prompt at a time: all together may have tens of thousands of tokens
    for row, tree in zip(rows, forest, strict=True):
        batch = trees.to_device(trees.pack([tree]), model.device)
        losses, floors = losses_and_floors(model, batch, args.batch_size, args.max_batch_tokens)
        figures[row["file"]] = losses.item(), floors.item()
    model.train(was_training)
    learnt = all(is_learnt(loss, floor, args.gamma) for loss, floor in figures.values())
    return args.early_stop and learnt, {"prompts": {
        file: {"loss": round(loss, 6), "kl": round(loss - floor, 6), "floor": round(floor, 6)}
        for file, (loss, floor) in figures.items()}}


save = defaults.save_adapter


# ---- a request and its targets as a tree --------------------------------------------------------


def target_sequences(row: dict, tokenizer) -> list[list[int]]:
    """Token ids of target i under response prefix r, at i * R + r; exits over clashes.

    No sequence may start another one: their probabilities would overlap.
    """
    texts = [prefix + target for target in row["targets"] for prefix in row["response"]]
    end = [end_of_turn(tokenizer)] if row["eos"] else []
    sequences = [tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in texts]
    clash = trees.prefix_clash(sequences)
    if clash:
        first, second = (json.dumps(texts[i], ensure_ascii=False) for i in clash)
        hint = "make one of them longer" if row["eos"] else \
            'let every target end in a mark of its own, or set "eos" to true'
        fail(USAGE, f'{row["file"]}: field "targets": the tokens of {first} equal or start '
                    f"those of {second}", hint)
    return sequences


def distribution_tree(row: dict, tokenizer, weights: list[float]) -> Tree:
    """A request with its targets as a trie; branch i * R + r is target i under prefix r.

    A target's weight is shared evenly by its prefixes. Targets of weight 0 are left out: they have
    no part in the loss.
    """
    num_prefixes = len(row["response"])
    shares = [weight / num_prefixes for weight in weights for _ in range(num_prefixes)]
    kept = [i for i, share in enumerate(shares) if share]
    sequences = target_sequences(row, tokenizer)
    root = Segment(encode_prompt(tokenizer, row["prompt"]))
    root.children = trees.target_trie([sequences[i] for i in kept], [shares[i] for i in kept])
    for leaf in leaves(root):  # the trie counts the kept sequences, the caller all of them
        leaf.branch = kept[leaf.branch]
    return Tree(root)


def leaves(segment: Segment) -> list[Segment]:
    """The segments below one that have no children."""
    return [path[-1] for path in trees.walk(segment) if not path[-1].children]


# ---- losses -------------------------------------------------------------------------------------


def losses_and_floors(
    model, batch: dict, max_targets: int | None, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Per prompt of a packed batch: the loss and the entropy of its targets' weights, in nats.

    max_targets and max_tokens bound what is in memory at a time. Both results: (num_rows,).
    """
    logps = trees.score_in_parts(model, batch, max_targets or len(batch["last"]), max_tokens)
    weight, row, token = batch["weight"], batch["row"], batch["token"]  # (S,)
    # the last token of a target has the weight of that target alone
    is_leaf = batch["last"][token] == token
    entropy = -weight * weight.log() * is_leaf
    num_rows = batch["num_rows"]
    return (trees.sum_by_row(-weight * logps, row, num_rows),
            trees.sum_by_row(entropy, row, num_rows))


def is_learnt(loss: float, floor: float, gamma: float) -> bool:
    """Whether a loss is within the published threshold, (1 + gamma) times its floor."""
    return loss <= (1 + gamma) * floor
