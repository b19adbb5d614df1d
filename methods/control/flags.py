"""Flags of method control."""

from __future__ import annotations

import json
from pathlib import Path

from flags import non_negative, optional
from methods.control.tokens import refuse_unknown
from utils import USAGE, fail

# Learning rate, one epoch and 64 tokens are the project's, which trained all weights of random
# models. The adapter is ours.
DEFAULTS = dict(
    learning_rate=5e-4, num_train_epochs=1, max_steps=-1, max_length=64,
    per_device_train_batch_size=16, weight_decay=0.0, lora_r=16, lora_alpha=32.0, lora_dropout=0.0,
    lora_target_modules=["all-linear"])


def add_train_args(parser) -> None:
    """Which attributes are trained, and on what weights."""
    parser.set_defaults(**DEFAULTS)
    group = parser.add_argument_group("method control")
    group.add_argument("--attributes", nargs="+", metavar="NAME",
                       help="whose tokens stand before the texts; none for no tokens "
                            "(default: all of the manifest)")
    group.add_argument("--manifest", metavar="FILE",
                       help="scorers and thresholds (default: manifest.json beside --train_file)")
    group.add_argument("--from_scratch", action="store_true",
                       help="random weights of the model's architecture, all trained, no adapter")
    parser.derive(_read_manifest)


def _read_manifest(args) -> dict:
    """manifest, schema and attributes: what the manifest says, and what --attributes choose of it.

    schema is {attribute: {values, thresholds, scorer, version}}. It is None where no manifest is
    there: load_rows refuses that, since a config must be readable before its data is built.
    """
    path = Path(args.manifest or Path(args.train_file).with_name("manifest.json"))
    if not path.is_file():
        return {"manifest": str(path), "schema": None}
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))["schema"]
    except (OSError, ValueError, KeyError, TypeError):
        fail(USAGE, f"{path} is not a manifest of data/build_control.py",
             "it lies beside the train file; or give --manifest FILE")
    names = list(schema) if args.attributes is None else args.attributes
    # nargs="+" takes at least one word, so an empty list needs a word of its own
    if names == ["none"]:
        names = []
    refuse_unknown(dict.fromkeys(names), schema, f"--attributes: {path}")
    # in the order of the manifest, whatever was typed: the tokens of a text stand in this order
    return {"manifest": str(path), "schema": schema,
            "attributes": [name for name in schema if name in names]}


def check_train(args) -> None:
    """Exit over weights that cannot be trained."""
    if args.from_scratch and args.load_in_4bit:
        fail(USAGE, "--from_scratch trains all weights, which 4-bit ones cannot be",
             "drop --load_in_4bit")


def add_infer_args(parser) -> None:
    """What the replies should be, and how strongly."""
    optional(parser, "test_file")  # without it, replies have no prompt
    parser.set_defaults(num_response_per_input=1, max_new_tokens=24)
    group = parser.add_argument_group("method control")
    group.add_argument("--condition", "--want", dest="condition", nargs="+", metavar="NAME=VALUE",
                       default=[],
                       help="attribute values of the replies, such as toxicity=nontoxic "
                            "sentiment=pos")
    # None means no sweep; an empty list, the flag without names, means all attributes
    group.add_argument("--sweep", nargs="*", metavar="NAME[=VALUE,VALUE]",
                       help="every combination of values, and of none, of these attributes "
                            "(default: all that were trained), with --num_response_per_input "
                            "replies to each (default: 1)")
    group.add_argument("--guidance_scale", "--guidance", dest="guidance_scale", type=non_negative,
                       default=1.0,
                       help="classifier-free guidance, 1 is off (default), 0 is unconditioned")
    group.add_argument("--unknown_attributes", "--untrained", dest="unknown_attributes",
                       choices=["skip", "token"],
                       help="allow attributes that the checkpoint was not trained on, for "
                            "baselines. skip: without their tokens, so what changes is chance; "
                            "token: with them, as published, though they mean nothing to it")


def check_infer(args) -> None:
    """Exit over ways to draw that control tokens cannot, and over malformed conditions."""
    if args.engine != "hf":
        fail(USAGE, f"--engine {args.engine} cannot send control tokens", "--engine hf")
    if args.overgenerate or args.decoding not in ("sampling", "greedy", "beam", "diverse"):
        fail(USAGE, "control tokens stand before plain text: no --overgenerate, "
                    "no decoding by asking", "--decoding sampling")
    # beam search ignores the unconditional branches of guided trees
    if args.guidance_scale != 1 and args.decoding not in ("sampling", "greedy"):
        fail(USAGE, f"--guidance_scale does nothing with --decoding {args.decoding}",
             "drop it, or --decoding sampling")
    # beams grow from a single prompt, and a sweep has one for each combination
    if args.sweep is not None and (args.condition or args.decoding in ("beam", "diverse")):
        fail(USAGE, "--sweep asks for all combinations, so it takes neither --condition nor beams",
             "drop one of them")
    pairs = [word.partition("=") for word in args.condition]
    for word, (name, equals, value) in zip(args.condition, pairs, strict=True):
        if not (name and equals and value):
            fail(USAGE, f"--condition {word} is not NAME=VALUE", "such as sentiment=pos")
    if len({name for name, _, _ in pairs}) < len(pairs):
        fail(USAGE, f"--condition {' '.join(args.condition)}: an attribute stands twice",
             "each text has one value of it")
