"""Forcing diffuse distributions: method diffuse.

"Forcing Diffuse Distributions out of Language Models", arXiv:2404.10859 (COLM 2024). For a request x, targets y
with a wanted distribution w(y), and the model's probability p(y | x) of the whole token sequence of y,

    L(x) = - sum_y w(y) log p(y | x) = KL(w || p) + H(w)          in nats, so H(w) is the floor

One tree holds a request with all its targets: they share the request and every common prefix (a token trie), and a
shared token carries the sum of its targets' weights. That is the same loss as one row per target, to rounding.

A prompt file is a JSON object: `request` (the user message), `response` (a prefix of the answer, or several),
`targets`, and maybe `weights` (default: uniform; normalised) and `eos` (default true: the end token is learnt, too).

Differences from the paper's code:
- Targets are tokenised apart from the request and end with the template's own end-of-turn token.
- Files are checked: unknown keys, empty or equal targets, weights, and token sequences that start one another.
- Several response prefixes are all learnt at once, each with its share of the weight (the floor is then H(w) + ln R);
  the code draws one per target and pass, which has the same mean.
- `batch_size` only bounds memory: it is the number of targets computed at a time, all by default.
- Early stopping looks at fresh losses, measured after a pass, and every prompt must be within (1 + gamma) H(w); the
  code adds up losses from before and after the updates of the pass.
- Everything is seeded, and files are taken in the order of their names; the order of prompts is drawn every pass.
- `load_model` starts from `ckpt_dir`; sampling needs `--mode`, and draws as many as asked (the code drops a remainder).
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import trees
import utils
from methods.diffuse.prompts import read_prompts
from modeling.adapters import add_lora
from modeling.checkpoints import check_adapter
from modeling.prompts import encode_prompt, end_of_turn
from utils import USAGE, fail, info


def load_rows(args) -> list[dict]:
    """The training prompts; the test prompts are checked as well."""
    for name, least in (("batch_size", 1), ("max_batch_tokens", 1), ("gamma", 0)):
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            fail(USAGE, f"--{name} {value} must be at least {least}")
    if args.load_model and not args.ckpt_dir:
        fail(USAGE, "--load_model needs --ckpt_dir", "name the adapter to start from")
    if args.ckpt_dir and not args.load_model:
        info("--ckpt_dir is read with --load_model only; training starts from a new adapter")
    rows, _ = read_prompts(args)
    bare = [row["file"] for row in rows if not row["targets"]]
    if bare:
        fail(USAGE, f'{bare[0]}: field "targets" is empty', "there is nothing to learn; name it in --test_prompts")
    return rows


def prepare_model(model, tokenizer, args):
    """A new LoRA adapter, or with --load_model the one in --ckpt_dir, trained on."""
    if not args.load_model:
        return add_lora(model, tokenizer, args)
    folder = Path(args.ckpt_dir)
    if folder.is_dir() and not (folder / "adapter_config.json").exists():
        folder = utils.newest_checkpoint(folder) or folder
    check_adapter(folder)
    from peft import PeftModel, prepare_model_for_kbit_training

    if args.load_in_4bit:
        model = prepare_model_for_kbit_training(model, args.gradient_checkpointing)
    model = PeftModel.from_pretrained(model, folder, is_trainable=True)
    config = model.peft_config["default"]
    args.lora_r, args.lora_alpha, args.lora_dropout = config.r, config.lora_alpha, config.lora_dropout
    args.lora_target_modules = sorted(config.target_modules)
    return model


def target_sequences(row: dict, tokenizer) -> list[list[int]]:
    """Token ids of every target under every response prefix, [target x prefix], targets first; dies over clashes."""
    from trees import prefix_clash

    texts = [prefix + target for target in row["targets"] for prefix in row["response"]]
    end = [end_of_turn(tokenizer)] if row["eos"] else []
    sequences = [tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in texts]
    clash = prefix_clash(sequences)
    if clash:
        first, second = (json.dumps(texts[i], ensure_ascii=False) for i in clash)
        hint = "make one of them longer" if row["eos"] else 'let every target end in a mark of its own, or set "eos" to true'
        fail(USAGE, f'{row["file"]}: field "targets": the tokens of {first} equal or start those of {second}', hint)
    return sequences


def distribution_tree(row: dict, tokenizer, weights: list[float]):
    """A request with its targets as a trie, a weight each (their prefixes share it); targets of weight 0 are left out.

    The leaf of target i under prefix r carries branch i * R + r.
    """
    from trees import Segment, Tree, target_trie

    num_prefixes = len(row["response"])
    shares = [w / num_prefixes for w in weights for _ in range(num_prefixes)]
    kept = [i for i, share in enumerate(shares) if share]
    sequences = target_sequences(row, tokenizer)
    root = Segment(encode_prompt(tokenizer, row["prompt"]))
    root.children = target_trie([sequences[i] for i in kept], [shares[i] for i in kept])
    for segment in leaves(root):
        segment.branch = kept[segment.branch]
    return Tree(root)


def leaves(segment) -> list:
    from trees import walk

    return [path[-1] for path in walk(segment) if not path[-1].children]


def build_tree(row: dict, tokenizer, args, rng: random.Random):
    """The request and the trie of its targets; None if the longest target does not fit into --max_length."""
    from trees import padded_shape

    tree = distribution_tree(row, tokenizer, row["weights"])
    return tree if padded_shape(tree)[1] <= args.max_length else None


def compute_loss(model, batch: dict, args):
    """Mean over prompts of -sum_y w(y) log p(y | x), in nats; also logged: its floor H(w) and KL(w || p) = loss - floor."""
    losses, floors = losses_and_floors(model, batch, args)
    loss, floor = losses.mean(), floors.mean()
    return loss, {"loss": loss.detach(), "kl": (loss - floor).detach(), "floor": floor}


def losses_and_floors(model, batch: dict, args):
    """Per prompt of a packed batch: the loss and the entropy of its targets' weights, both (num_rows,), in nats."""

    logps = trees.score_in_parts(model, batch, args.batch_size or len(batch["last"]), args.max_batch_tokens)
    weight, row, token = batch["weight"], batch["row"], batch["token"]
    is_leaf = batch["last"][token] == token  # the weight of a target's last token is the target's own
    entropy = -weight * weight.log() * is_leaf
    return trees.sum_by_row(-weight * logps, row, batch["num_rows"]), trees.sum_by_row(entropy, row, batch["num_rows"])


def measure(model, rows: list[dict], forest: list, args) -> tuple[bool, dict]:
    """Fresh figures of every prompt: whether all are within the threshold of --gamma, and a line for the log."""
    import torch


    was_training, figures = model.training, {}
    model.eval()
    with torch.no_grad():
        for row, tree in zip(rows, forest, strict=True):
            batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in trees.pack([tree]).items()}
            losses, floors = losses_and_floors(model, batch, args)
            figures[row["file"]] = losses.item(), floors.item()
    model.train(was_training)
    line = {"prompts": {file: {"loss": round(loss, 6), "kl": round(loss - floor, 6), "floor": round(floor, 6)}
                        for file, (loss, floor) in figures.items()}}
    return all(is_learnt(loss, floor, args.gamma) for loss, floor in figures.values()), line


def is_learnt(loss: float, floor: float, gamma: float) -> bool:
    """Whether a loss is within the published threshold, (1 + gamma) times its floor."""
    return loss <= (1 + gamma) * floor
