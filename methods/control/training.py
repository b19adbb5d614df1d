"""Control tokens: method control.

Conditional training after Korbak et al., "Pretraining Language Models with Human Preferences", arXiv:2302.08582, with
several attributes as in a UCL COMP0087 project (2023). Every text is labelled by scorers (attributes.py), its values
stand before it as tokens of their own, and the model learns the text and its end:

    L = mean over tokens of -log p(x_t | c, x_<t)        c: the control tokens, in nats

With c the text is asked for; without, the model is unconditioned (a share of the texts has no tokens). Guidance g
(classifier-free; Ho and Salimans, arXiv:2207.12598; for language models Sanchez et al., arXiv:2306.17806) draws from

    z = z_unconditioned + g (z_conditioned - z_unconditioned)

A row is plain text, no chat: start, start, control tokens, text, end of turn. The start stands twice so that a branch
without tokens and prompt has one of its own below the shared context.

Differences from the project's code:
- Pretrained weights and an adapter; random weights only with --from_scratch (the project's models all start from them).
- Tokens stand first, also where a prompt follows (there they stand after it, where no text ever had them).
- Scorer and threshold are one for training and evaluation; VADER has a neutral band (there ties are negative).
- Unused special tokens of the tokenizer serve, if it has enough, else rows are added; all start at the mean row.
- Control tokens are never generated: their logits are put to -1e9 in any decoding.
- The learning rate is constant (there a cosine after 1 % of warm-up), and all models get equally many updates.
- Texts of any document are in one split; equal texts stand once; prompts are left-padded and not scored.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import trees
import utils
from methods.control.tokens import encode, refuse_unknown, settle_tokens
from modeling.adapters import add_lora, ban_tokens, fit_embeddings
from modeling.prompts import end_of_turn
from utils import USAGE, fail


def load_rows(args) -> list[dict]:
    """The labelled texts; settles the schema, the attributes and, later, the tokens."""
    path = Path(args.manifest or Path(args.train_file).with_name("manifest.json"))
    try:
        args.schema = json.loads(path.read_text(encoding="utf-8"))["schema"]
    except (OSError, ValueError, KeyError, TypeError):
        fail(USAGE, f"{path} is no manifest of data/build_control.py", "it lies beside the train file; or give --manifest FILE")
    asked = list(args.schema) if args.attributes is None else [] if args.attributes == ["none"] else args.attributes
    refuse_unknown({name: None for name in asked}, args.schema, f"--attributes: {path}")
    args.attributes = [name for name in args.schema if name in asked]  # one order, whatever was typed
    args.control_tokens = args.banned_ids = None
    if args.from_scratch and args.load_in_4bit:
        fail(USAGE, "--from_scratch trains all weights, which 4-bit ones cannot be", "drop --load_in_4bit")
    return utils.read_jsonl(args.train_file, lambda row: check_row(row, args.schema))


def check_row(row: dict, schema: dict) -> str | None:
    """What is wrong with a labelled text, or None."""
    if not isinstance(row.get("text"), str) or not any(c.isalpha() for c in row["text"]):
        return 'field "text" must be a string with letters'
    values = row.get("values")
    if not isinstance(values, dict):
        return 'needs "values", one for each attribute; data/build_control.py writes them'
    for name, own in schema.items():
        if values.get(name) not in own["values"]:
            return f'"values": {name} must be one of {", ".join(own["values"])}, got {json.dumps(values.get(name))}'
    return None


def prepare_model(model, tokenizer, args):
    """An adapter and the rows of the control tokens, all else frozen; with --from_scratch all weights, at random."""
    import torch

    settle_tokens(tokenizer, args)
    if args.from_scratch:
        model = type(model)(model.config).to(model.device)  # float32, as initialised by the architecture
        fit_embeddings(model, tokenizer)
        return model
    fit_embeddings(model, tokenizer)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[args.banned_ids] = weight.mean(0)
    model = add_lora(model, tokenizer, args, trainable_token_indices=args.banned_ids)
    ban_tokens(model.get_base_model(), args.banned_ids)  # they are only read: tied rows learn nothing as outputs
    return model


def build_tree(row: dict, tokenizer, args, rng: random.Random):
    """Start and tokens as context, text and end as likelihood; None if it does not fit into --max_length."""
    from trees import LIKELIHOOD, Segment, Tree, padded_shape

    settle_tokens(tokenizer, args)
    want = {} if row.get("unconditioned") else {name: row["values"][name] for name in args.attributes}
    context, text = encode(tokenizer, want, args.control_tokens, row["text"])
    tree = Tree(Segment(context, children=[Segment(text + [end_of_turn(tokenizer)], LIKELIHOOD)]))
    return tree if padded_shape(tree)[1] <= args.max_length else None


def compute_loss(model, batch: dict, args):
    """Mean of -log p over all tokens of texts and their ends, in nats."""

    loss = -trees.score(model, batch).mean()
    return loss, {"loss": loss.detach()}
