"""Fine-tune a model so that one prompt has several good answers.

    python train.py --train_file data/train_dialogs_1k.jsonl --model_name smollm2 \\
        --exp_name my_peft --num_train_epochs 3 --max_steps 3000 --learning_rate 5e-4
    python train.py --config configs/possibility/mistral_peft.yaml
    accelerate launch --num_processes 8 train.py --config configs/possibility/mistral_peft.yaml

flags -> rows -> prompt trees -> packed batches -> loss -> checkpoints/NAME/check_N. Steps count
micro-batches of contexts, so check_1000 is one pass over 1,000 contexts at batch 1.
"""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

import methods
import utils
from flags import Args, FlagParser, first_pass, parse_flags
from training.flags import add_training_args, check_training_args
from utils import USAGE, fail

TRAINABLE = [name for name in methods.METHODS if name != "base"]


def build_parser(method: str) -> FlagParser:
    """All flags of training with a method."""
    parser = FlagParser(prog="train.py", description=__doc__)
    group = parser.add_argument_group("method")
    group.add_argument("--method", default=method, choices=TRAINABLE,
                       help="what is learnt (default: peft)")
    add_training_args(parser, method)
    methods.load(method, "flags").add_train_args(parser)
    return parser


def read_flags(argv: list[str] | None) -> Args:
    """The flags of a command; exits over those that are unknown or contradict each other."""
    # Which other flags there are depends on the method, so it is read first.
    method = first_pass(argv, "method")["method"] or "peft"
    if method not in TRAINABLE:
        fail(USAGE, f"--method {method} cannot be trained", f"one of {', '.join(TRAINABLE)}")
    args = parse_flags(build_parser(method), argv)
    check_training_args(args)
    methods.load(method, "flags").check_train(args)
    return args


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    from training import runs  # torch is loaded from here on, when the flags are known to be sound

    method = methods.load(args.method, "training")
    run_dir = Path(args.output_dir) / args.run_name
    with runs.only_main_process_prints():
        rows = method.load_rows(args)  # before the folder is claimed: a bad row leaves no folder
        claim = contextlib.nullcontext() if args.dry_run else \
            runs.claim_run_dir(run_dir, args.resume)
        with claim:
            last = train(method, rows, run_dir, args)
        if args.dry_run:
            return
        command = methods.load(args.method, "inference").next_command(args, last)
        print(f"checkpoint {last}\nnext: python infer.py {shlex.join(command)}")
        if args.draw_after and runs.is_main_process():
            import infer  # only here: it loads what decoding needs

            infer.main(command)


def train(method, rows: list[dict], run_dir: Path, args: Args) -> Path | None:
    """From rows to the last checkpoint, which is returned; with --dry_run only up to the trees."""
    from transformers import set_seed

    from modeling.models import load_model, load_tokenizer, model_dir
    from modeling.prompts import refuse_special_tokens
    from training import preview, runs, trainer

    base = model_dir(args.model_name)
    tokenizer = load_tokenizer(base, args.chat_template)
    # Before the method adds its own tokens, which rows may contain.
    refuse_special_tokens(rows, tokenizer, args.train_file)
    method.prepare_tokenizer(tokenizer, args)

    # Every tree is built once before the model is loaded, because the number of steps depends on
    # the rows that fit.
    fitting, counts = preview.rows_that_fit(method, rows, tokenizer, args)
    print(f"method {args.method}: {counts['rows']} rows, {counts['tree_tokens']} tokens as trees, "
          f"{counts['padded_tokens']} as padded rows "
          f"({counts['padded_tokens'] / counts['tree_tokens']:.1f} times)")
    if args.dry_run:
        preview.print_examples(method, fitting, tokenizer, args)
        return None

    set_seed(args.seed)  # before the model: adapters and soft prompts start from random weights
    model = load_model(base, args.attn_implementation, args.load_in_4bit)
    # prepare_model and describe get all rows, so that what a method takes from them (a mean, the
    # ratio of a mixture) does not depend on --max_length.
    model = method.prepare_model(model, tokenizer, rows, args)
    # After prepare_model: only the prepared model says which values open flags have taken.
    run = runs.describe_run(args, base, fitting, method.describe(model, tokenizer, rows, args))
    checkpoint = runs.find_resume(run_dir, args, run)
    loop = trainer.make_trainer(method, model, tokenizer, fitting, args, run, run_dir)
    print(f"{args.model_name}: {trainer.num_trained(model):,} trainable parameters; "
          f"{loop.schedule.total} micro-steps of {args.per_device_train_batch_size} contexts")
    return loop.fit(checkpoint)


if __name__ == "__main__":
    utils.run(main)
