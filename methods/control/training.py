"""Training of method control: labelled texts, each behind the tokens of its values."""

from __future__ import annotations

import json
import random

import torch
from torch import Tensor

import trees
import utils
from methods import defaults
from methods.control.tokens import assign_tokens, encode
from modeling.adapters import add_lora, ban_tokens, fit_embeddings, resolve_lora
from modeling.prompts import end_of_turn
from trees import LIKELIHOOD, Segment, Tree, padded_shape
from utils import USAGE, fail


def load_rows(args) -> list[dict]:
    """The labelled texts; every row must have a value of every attribute of the manifest."""
    if args.schema is None:
        fail(USAGE, f"{args.manifest} is not there", "data/build_control.py writes it beside the "
                                                     "train file; or give --manifest FILE")
    rows = utils.read_jsonl(args.train_file, lambda row: _check_row(row, args.schema))
    return rows[: args.limit]


def _check_row(row: dict, schema: dict) -> str | None:
    """What is wrong with a labelled text, or None."""
    if not isinstance(row.get("text"), str) or not any(c.isalpha() for c in row["text"]):
        return 'field "text" must be a string with letters'
    values = row.get("values")
    if not isinstance(values, dict):
        return 'needs "values", one for each attribute; data/build_control.py writes them'
    # attributes that are not trained are checked, too: one file serves all models compared
    for name, labels in schema.items():
        if values.get(name) not in labels["values"]:
            return (f'"values": {name} must be one of {", ".join(labels["values"])}, '
                    f"got {json.dumps(values.get(name))}")
    return None


def prepare_tokenizer(tokenizer, args) -> None:
    """Add the control tokens, unless the tokenizer has spare ones."""
    assign_tokens(tokenizer, args.schema)


def prepare_model(model, tokenizer, rows: list[dict], args):
    """An adapter and the rows of the control tokens, all else frozen.

    With --from_scratch all weights, at random.
    """
    if args.from_scratch:
        # float32, as initialised by the architecture
        model = type(model)(model.config).to(model.device)
        fit_embeddings(model, tokenizer)
        return model
    fit_embeddings(model, tokenizer)
    ids = _banned_ids(tokenizer, args.schema)
    # spare tokens have rows of their own, which may be untrained noise; all start alike
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[ids] = weight.mean(0)
    model = add_lora(model, args, trainable_token_indices=ids)
    # Control tokens are only read. Banned, their rows get no gradient from the output layer, which
    # shares them where embeddings are tied.
    ban_tokens(model.get_base_model(), ids)
    return model


def describe(model, tokenizer, rows: list[dict], args) -> dict:
    """The control tokens, and their ids, which a reloaded model must not generate."""
    lora = {} if args.from_scratch else resolve_lora(args, model)
    return lora | {"schema": args.schema, "attributes": args.attributes,
                   "control_tokens": assign_tokens(tokenizer, args.schema),
                   "banned_ids": _banned_ids(tokenizer, args.schema)}


def build_tree(row: dict, tokenizer, args, rng: random.Random) -> Tree | None:
    """Start and tokens as context, text and end as likelihood; None if they do not fit."""
    condition = {} if row.get("unconditioned") else \
        {name: row["values"][name] for name in args.attributes}
    # asked for every row: some 20 microseconds, a quarter of what encoding its text takes
    control_tokens = assign_tokens(tokenizer, args.schema)
    context, text = encode(tokenizer, condition, control_tokens, row["text"])
    text = [*text, end_of_turn(tokenizer)]
    tree = Tree(Segment(context, children=[Segment(text, LIKELIHOOD)]))
    return tree if padded_shape(tree)[1] <= args.max_length else None


def compute_loss(model, batch: dict, args, step: int) -> tuple[Tensor, dict]:
    """Mean of -log p over all tokens of texts and their ends, in nats."""
    # the mean is over tokens, as in the project, so long texts count more
    loss = -trees.score(model, batch).mean()
    return loss, {"loss": loss.detach()}


order_rows = defaults.shuffled
parameter_groups = defaults.one_rate
after_pass = defaults.no_figures
save = defaults.save_adapter


def _banned_ids(tokenizer, schema: dict) -> list[int]:
    """The ids of the control tokens, in the order of the schema."""
    return tokenizer.convert_tokens_to_ids(list(assign_tokens(tokenizer, schema).values()))
