"""Flags of method delia."""

from __future__ import annotations

import json
from pathlib import Path

from flags import many, non_negative
from utils import USAGE, fail

# The learning rate, batch and adapter of the published README run. Its 100 updates between
# checkpoints are 400 micro-batches here, since 4 of them make an update.
PUBLISHED = dict(
    learning_rate=2e-4, lr_warmup_steps=25, weight_decay=0.01, num_train_epochs=1, max_steps=-1,
    per_device_train_batch_size=16, gradient_accumulation_steps=4, save_steps=400, max_length=2048,
    lora_r=16, lora_alpha=16.0, lora_dropout=0.05,
    lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
TEMPERATURE, TOP_P = 0.7, 0.95  # published settings of self-sampling, with max_new_tokens 512
FORMAT = ('one line of JSON with the keys "thought" and "label", '
          'where the label is either "error" or "correct"')


def add_train_args(parser) -> None:
    """The mixture, and the new tokens."""
    parser.set_defaults(**PUBLISHED)
    group = parser.add_argument_group("method delia")
    group.add_argument("--diverse_file",
                       help="messages that the model itself wrote (infer.py --self_sample), "
                            "to be mixed in")
    group.add_argument("--diverse_ratio", type=non_negative, default=100.0,
                       help="diverse rows per task row; 0 is the control "
                            "(default: %(default)s, published run 260)")
    group.add_argument("--oversample", action="store_true",
                       help="repeat diverse rows where there are fewer than the ratio asks for")
    group.add_argument("--mix", choices=["shuffle", "stratified"], default="shuffle",
                       help="shuffle: all rows in random order, as published (default); "
                            "stratified: task rows evenly spread")
    group.add_argument("--allow_foreign_cache", action="store_true",
                       help="accept diverse rows that another model wrote")
    group.add_argument("--new_tokens", nargs="+", default=[], metavar="TOKEN",
                       help='tokens to add, such as "<sep>"')
    group.add_argument("--token_init", choices=["mean", "random", "description"], default="mean",
                       help="mean of all embeddings (default), a random draw with their mean and "
                            "deviation, or the mean of a description's tokens")
    group.add_argument("--token_description", nargs="+", default=[FORMAT], metavar="TEXT",
                       help="what each new token stands for, in words "
                            "(default: the JSON line of data/delia)")
    group.add_argument("--token_train", choices=["row", "lora"], default="row",
                       help="row: the new rows alone (default); lora: a low-rank update of all "
                            "embeddings, as published")


def check_train(args) -> None:
    """Exit over a ratio without a file, and over tokens that cannot be added."""
    if args.diverse_ratio and not args.diverse_file:
        fail(USAGE, "--diverse_ratio needs --diverse_file",
             "infer.py --method delia --self_sample writes one; --diverse_ratio 0 is the control")
    for token in args.new_tokens:
        if not token.strip() or token != token.strip() or args.new_tokens.count(token) > 1:
            fail(USAGE, f"--new_tokens {json.dumps(token)}: a token must have text, "
                        "no space at its ends, and stand once")
    # elsewhere a description only serves eval.py, where one may stand for all tokens
    count, described = len(args.new_tokens), len(args.token_description)
    if args.token_init == "description" and count != described:
        fail(USAGE, "--token_init description needs a --token_description for each of "
                    f"{count} new tokens, got {described}")


def add_infer_args(parser) -> None:
    """Self-sampling, and messages from several files."""
    parser.set_defaults(num_response_per_input=1, max_new_tokens=512)
    many(parser, "test_file")  # data/delia has unseen and seen phrasings in two files
    group = parser.add_argument_group("method delia")
    group.add_argument("--self_sample", action="store_true",
                       help="--test_file has queries with reference answers: write the model's own "
                            "answers, the diverse rows of train.py (sampling, temperature "
                            f"{TEMPERATURE}, top_p {TOP_P}, as published)")
    # this runs before infer.py's own derivations, which fill in its general defaults
    parser.derive(_published_sampling)


def _published_sampling(args) -> dict:
    """The temperature and top_p of self-sampling where no flag gives others."""
    if not args.self_sample or args.decoding != "sampling":  # the latter is refused by check_infer
        return {}
    return {"temperature": TEMPERATURE if args.temperature is None else args.temperature,
            "top_p": TOP_P if args.top_p is None else args.top_p}


def check_infer(args) -> None:
    """Exit over what self-sampling cannot do, and before it would overwrite a cache."""
    if not args.self_sample:
        return
    if args.decoding != "sampling" or args.overgenerate:
        fail(USAGE, "--self_sample draws from the model as it is",
             "drop --decoding and --overgenerate")
    # infer.py itself only refuses to overwrite the file that it writes, which is X.draws.jsonl
    # beside the cache, so the cache is looked for here
    cache = Path(args.save_file)
    # the names of the draws and of the manifest are made from this one
    if cache.suffix != ".jsonl":
        fail(USAGE, f"--save_file {cache} must end in .jsonl", f"{cache.with_suffix('.jsonl')}")
    if cache.exists() and not args.resume:
        fail(USAGE, f"{cache} is already there",
             "--resume goes on with it; or give another --save_file")
