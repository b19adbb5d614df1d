"""Flags of method delia."""

from __future__ import annotations

import json

from utils import USAGE, fail

DEFAULTS = dict(  # as published
    learning_rate=2e-4, weight_decay=0.01, num_train_epochs=1, max_steps=-1, per_device_train_batch_size=16,
    gradient_accumulation_steps=4, save_steps=400, max_length=2048,
    lora_r=16, lora_alpha=16.0, lora_dropout=0.05, lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
SELF_SAMPLING = dict(temperature=0.7, top_p=0.95)  # as published, with max_new_tokens 512
FORMAT = 'one line of JSON with the keys "thought" and "label", where the label is either "error" or "correct"'


def add_args(group) -> None:
    group.set_defaults(**DEFAULTS)
    group.add_argument("--diverse_file", help="messages that the model itself wrote (infer.py --self_sample), to be mixed in")
    group.add_argument("--diverse_ratio", type=float, default=100.0,
                       help="diverse rows per task row; 0 is the control (default: %(default)s, published run 260)")
    group.add_argument("--oversample", action="store_true", help="repeat diverse rows where there are fewer than asked")
    group.add_argument("--mix", choices=["shuffle", "stratified"], default="shuffle",
                       help="shuffle: all rows in random order, as published (default); stratified: task rows evenly spread")
    group.add_argument("--allow_foreign_cache", action="store_true", help="take diverse rows that another model wrote")
    group.add_argument("--new_tokens", nargs="+", default=[], metavar="TOKEN", help='tokens to add, such as "<sep>"')
    group.add_argument("--token_init", choices=["mean", "random", "description"], default="mean",
                       help="mean of all embeddings (default), a random draw like them, or the mean of a description's tokens")
    group.add_argument("--token_description", nargs="+", default=[FORMAT], metavar="TEXT",
                       help="what each new token stands for, in words (default: the JSON line of data/delia)")
    group.add_argument("--token_train", choices=["row", "lora"], default="row",
                       help="row: the new rows alone (default); lora: a low-rank update of all embeddings, as published")
    group.add_argument("--lr_warmup_steps", type=int, default=25, help="updates until the learning rate is reached (default: 25)")


def check_new_tokens(args) -> None:
    for token in args.new_tokens:
        if not token.strip() or token != token.strip() or args.new_tokens.count(token) > 1:
            fail(USAGE, f"--new_tokens {json.dumps(token)}: a token must have text, no space at its ends, and stand once")
    if args.token_init == "description" and len(args.token_description) != len(args.new_tokens):
        fail(USAGE, f"--token_init description needs a --token_description for each of {len(args.new_tokens)} new tokens, "
                  f"got {len(args.token_description)}")


def add_infer_args(parser) -> None:
    group = parser.add_argument_group("method delia")
    group.set_defaults(num_response_per_input=1, max_new_tokens=512)
    next(a for a in parser._actions if a.dest == "test_file").nargs = "+"
    group.add_argument("--self_sample", action="store_true",
                       help="--test_file has queries with reference answers: write the model's own answers, the diverse rows of train.py "
                            f"(sampling, temperature {SELF_SAMPLING['temperature']}, top_p {SELF_SAMPLING['top_p']}, as published)")


def self_sampling_defaults(args) -> None:
    """Published sampling settings where the command says nothing else."""
    if args.decoding != "sampling" or args.overgenerate:
        fail(USAGE, "--self_sample draws from the model as it is", "drop --decoding and --overgenerate")
    for name, value in SELF_SAMPLING.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
