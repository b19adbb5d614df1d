"""Flags of method diffuse."""

from __future__ import annotations

from pathlib import Path

import utils
from flags import (
    SECTIONS,
    FlagParser,
    add_alias,
    config_names,
    non_negative,
    optional,
    positive_int,
)
from training.flags import add_training_args
from utils import USAGE, fail, info

# These are the values of the paper's code, with PEFT's default alpha. All published configs ask
# for 50 passes; the default of the code itself is 10,000.
PUBLISHED = dict(
    learning_rate=5e-5, adam_epsilon=1e-5, weight_decay=0.01, max_grad_norm=1.0,
    num_train_epochs=50, max_steps=-1, lora_r=4, lora_alpha=8.0, lora_dropout=0.0,
    lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                         "down_proj"])


def add_train_args(parser: FlagParser) -> None:
    """Prompt files, early stopping, and sampling after training."""
    parser.set_defaults(**PUBLISHED)
    # the published YAML configs use these names
    add_alias(parser, "model_name", "--model")
    add_alias(parser, "num_train_epochs", "--n_iters")
    add_alias(parser, "train_file", "--train_prompts", nargs="+",
              help="prompt files, or folders with *.json")
    group = parser.add_argument_group("method diffuse")
    add_prompt_args(group)
    group.add_argument("--batch_size", type=positive_int,
                       help="targets computed at a time; bounds memory, not the result "
                            "(default: all)")
    group.add_argument("--max_batch_tokens", type=positive_int, default=4096,
                       help="tokens computed at a time; bounds memory, not the result "
                            "(default: %(default)s)")
    group.add_argument("--early_stop", action="store_true",
                       help="stop when every prompt's loss is at most (1 + gamma) times the "
                            "entropy of its targets")
    # the paper stops within 20 % of the minimum
    group.add_argument("--gamma", type=non_negative, default=0.2,
                       help="see --early_stop (default: %(default)s)")
    group.add_argument("--load_model", action="store_true",
                       help="start from the adapter in --ckpt_dir")
    group.add_argument("--ckpt_dir", metavar="FOLDER",
                       help="check_N folder, or a run's folder: its newest checkpoint")
    group.add_argument("--generate", action="store_true",
                       help="sample all prompts after training, as infer.py --mode lora does")
    # the paper counts coverage among 1,000 replies
    group.add_argument("--n_generations", type=positive_int, default=1000,
                       help="with --generate: replies per prompt (default: %(default)s)")
    group.add_argument("--max_new_tokens", type=positive_int, default=50,
                       help="with --generate: tokens per reply at most (default: %(default)s)")
    parser.derive(name_run)
    parser.derive(lambda args: {"draw_after": args.generate})


def add_prompt_args(group) -> None:
    """The flags of train.py and infer.py that say which prompts are trained on."""
    group.add_argument("--test_prompts", nargs="+", default=[],
                       help="prompts to sample that are not trained on")
    group.add_argument("--leave_out", metavar="TASK",
                       help="train on the other tasks (folders) and test on this one")
    group.add_argument("--leave_in", metavar="TASK",
                       help="train on this task (folder) alone")


def name_run(args) -> dict:
    """The run's folder: --exp_name and which task was left out or in, so that both can be kept."""
    if args.leave_out:
        return {"run_name": f"{args.exp_name}_without_{args.leave_out}"}
    return {"run_name": f"{args.exp_name}_only_{args.leave_in}" if args.leave_in else args.exp_name}


def check_tasks(args) -> None:
    """Exit over both ways to choose a task at once."""
    if args.leave_out and args.leave_in:
        fail(USAGE, "--leave_out and --leave_in exclude each other", "give one of them")


def check_train(args) -> None:
    """Exit over a task or an adapter to start from that is not clear."""
    check_tasks(args)
    if args.load_model and not args.ckpt_dir:
        fail(USAGE, "--load_model needs --ckpt_dir", "name the adapter to start from")
    if args.ckpt_dir and not args.load_model:
        info("--ckpt_dir is read with --load_model only; training starts from a new adapter")


def add_infer_args(parser: FlagParser) -> None:
    """Which prompts are sampled, from which model; a training config serves as it is."""
    # the config's prompts and the run's name stand in for these
    for name in ("test_file", "save_file"):
        optional(parser, name)
    parser.set_defaults(num_response_per_input=1000, max_new_tokens=50, batch_size=1,
                        model_name_or_path=None)
    add_alias(parser, "num_response_per_input", "--n_generations")
    group = parser.add_argument_group("method diffuse")
    group.add_argument("--mode", choices=["untuned", "lora"],
                       help="the model as it is, or with what train.py made of it "
                            "(default: lora where --model_name_or_path names a checkpoint)")
    group.add_argument("--model", "--model_name", dest="model_name", default=utils.EMBEDDED,
                       help="the untuned model (default: smollm2)")
    group.add_argument("--train_prompts", "--train_file", dest="train_file", nargs="+", default=[],
                       help="the prompts trained on")
    add_prompt_args(group)
    group.add_argument("--split", choices=["all", "train", "test"], default="all",
                       help="which prompts are sampled (default: all)")
    group.add_argument("--n_batch_size", type=positive_int, default=100,
                       help="replies drawn at a time under one prefill (default: 100)")
    group.add_argument("--output_dir", default="checkpoints",
                       help="where train.py put its runs (default: %(default)s)")
    group.add_argument("--exp_name", default="diffuse",
                       help="the run's folder; its newest checkpoint is used "
                            "(default: %(default)s)")
    # one config serves both scripts: keys that only train.py knows are skipped, not refused
    training = FlagParser(prog="train.py")
    add_training_args(training, "diffuse")
    add_train_args(training)
    parser.ignored = {*SECTIONS, *config_names(training)}
    # the order matters: the model is looked for in the run's folder
    parser.derive(name_run)
    parser.derive(_resolve_model)


def _resolve_model(args) -> dict:
    """The model of the mode, the base model or the run's newest checkpoint, and the file to write.

    Contradictions are kept as they are, for check_infer.
    """
    mode = args.mode or ("lora" if args.model_name_or_path else None)
    model = args.model_name_or_path
    if mode == "untuned" and not model:
        model = args.model_name
    elif mode == "lora" and not model:
        model = utils.newest_checkpoint(Path(args.output_dir) / args.run_name)
    save_file = args.save_file or f"outs/{args.run_name}_{mode}.jsonl"
    return {"mode": mode, "model_name_or_path": model and str(model), "save_file": save_file}


def check_infer(args) -> None:
    """Exit over a model that is not named, or named twice."""
    check_tasks(args)
    if args.mode is None:
        fail(USAGE, "--method diffuse needs --mode",
             "untuned: the model as it is; lora: the checkpoint of the run")
    # a server's model is named by --engine, so the flags below do not matter
    if args.engine != "hf":
        return
    if args.mode == "untuned" and args.model_name_or_path != args.model_name:
        fail(USAGE, "--mode untuned samples --model, not --model_name_or_path",
             "give --model NAME, or --mode lora")
    if args.model_name_or_path is None:
        fail(USAGE, f"{Path(args.output_dir) / args.run_name} holds no whole checkpoint",
             "train it with train.py, or give --model_name_or_path check_N")
