"""Flags of train.py that every method has."""

from __future__ import annotations

from flags import FlagParser, natural, non_negative, positive_int, share
from utils import EMBEDDED, USAGE, fail

# The first one is the default, and that of runs from before there was a choice.
SCHEDULES = ("constant_with_warmup", "linear", "cosine")


# The numbers are the defaults of the code of arXiv:2412.03343. Its published commands give other
# values for some, such as --learning_rate 5e-5.
def add_training_args(parser: FlagParser, method: str) -> None:
    """Add the flags; method only gives the run's folder its default name.

    Two values are derived for all methods, and a method may derive others: run_name, the run's
    folder in --output_dir, and draw_after, whether infer.py follows at once.
    """
    _add_data_args(parser.add_argument_group("data"))
    _add_model_args(parser.add_argument_group("model"))
    _add_optimizer_args(parser.add_argument_group("training"))
    _add_output_args(parser.add_argument_group("output"), method)
    # First of all derivations, so that a method's own, which run later, can replace both.
    parser.derive(lambda args: {"run_name": args.exp_name, "draw_after": False})


def _add_data_args(group) -> None:
    group.add_argument("--train_file", required=True, help="JSONL file or hub data set name")
    group.add_argument("--limit", type=positive_int,
                       help="use the first N rows only (default: all)")
    group.add_argument("--max_length", type=positive_int, default=512,
                       help="tokens of prompt and reply together (default: %(default)s)")
    group.add_argument("--max_input_length", type=positive_int, default=250,
                       help="words of the context; the oldest turns are dropped "
                            "(default: %(default)s)")


def _add_model_args(group) -> None:
    group.add_argument("--model_name", default=EMBEDDED,
                       help="hub id, folder, or smollm2 (default)")
    group.add_argument("--load_in_4bit", action="store_true",
                       help="NF4 weights (needs bitsandbytes)")
    group.add_argument("--attn_implementation", default="sdpa",
                       choices=["sdpa", "eager", "flex_attention"],
                       help="attention kernel; flex_attention on GPUs (default: %(default)s)")
    group.add_argument("--gradient_checkpointing", action="store_true",
                       help="less memory, about a third slower")
    group.add_argument("--chat_template", metavar="FILE",
                       help="Jinja chat template, or none for plain prompts")
    # If not given, these depend on the model's family: modeling.adapters.resolve_lora.
    group.add_argument("--lora_r", type=positive_int,
                       help="rank (default: 64 for Llama models, else 16)")
    group.add_argument("--lora_alpha", type=non_negative,
                       help="scale is alpha / r (default: 16 for Llama, else 32)")
    group.add_argument("--lora_dropout", type=share,
                       help="probability (default: 0.1 for Llama, else 0.05)")
    group.add_argument("--lora_target_modules", nargs="+", metavar="NAME",
                       help="module names, or all-linear "
                            "(default: q v for Llama, else q k v lm_head)")


def _add_optimizer_args(group) -> None:
    group.add_argument("--learning_rate", type=non_negative, default=1e-5,
                       help="AdamW learning rate (default: %(default)s)")
    group.add_argument("--lr_scheduler_type", choices=SCHEDULES, default=SCHEDULES[0],
                       help="constant (default, as published), or falling to 0 at the last step")
    group.add_argument("--lr_warmup_steps", "--warmup_steps", type=natural, default=0,
                       help="updates until the learning rate is reached (default: %(default)s)")
    group.add_argument("--per_device_train_batch_size", type=positive_int, default=1,
                       help="contexts per micro-step (default: 1)")
    group.add_argument("--gradient_accumulation_steps", type=positive_int, default=1,
                       help="micro-steps per update (default: 1)")
    group.add_argument("--num_train_epochs", type=positive_int, default=1,
                       help="passes over the rows at most (default: %(default)s)")
    # Micro-steps, as published: with accumulation there are fewer updates.
    group.add_argument("--max_steps", type=int, default=1000,
                       help="micro-steps at most, -1: no limit (default: %(default)s)")
    group.add_argument("--weight_decay", type=non_negative, default=0.0,
                       help="AdamW weight decay (default: %(default)s)")
    group.add_argument("--clip_norm", action="store_true", help="clip the gradient norm at 0.3")
    group.add_argument("--max_grad_norm", type=non_negative, default=0.0,
                       help="clip the gradient norm at this, 0 is off (default: %(default)s)")
    group.add_argument("--adam_epsilon", type=non_negative, default=1e-8,
                       help="AdamW epsilon (default: %(default)s)")
    group.add_argument("--seed", type=int, default=42,
                       help="order, numbers and dropout (default: 42)")


def _add_output_args(group, method: str) -> None:
    group.add_argument("--output_dir", default="checkpoints",
                       help="the folder of all runs (default: %(default)s)")
    group.add_argument("--exp_name", default=method,
                       help="the run's folder (default: the method's name)")
    group.add_argument("--save_steps", type=positive_int, default=500,
                       help="micro-steps between checkpoints (default: 500)")
    group.add_argument("--loss_steps", type=positive_int, default=100,
                       help="micro-steps between log lines (default: 100)")
    group.add_argument("--report_to", default="none",
                       help="tensorboard, wandb or trackio, beside metrics.jsonl")
    group.add_argument("--resume", nargs="?", const="newest", metavar="CHECKPOINT",
                       help="go on from the newest whole checkpoint, or from the one named")
    group.add_argument("--allow_data_change", action="store_true",
                       help="resume although the rows differ")
    group.add_argument("--dry_run", action="store_true",
                       help="show two examples and token counts, train nothing")


def check_training_args(args) -> None:
    """Exit over shared flags that contradict each other, before anything is loaded."""
    if args.max_steps == 0 or args.max_steps < -1:
        fail(USAGE, f"--max_steps {args.max_steps} trains nothing",
             "give a positive number, or -1 for whole epochs")
    accumulation = args.gradient_accumulation_steps
    if args.save_steps % accumulation:
        rounded_up = -(-args.save_steps // accumulation) * accumulation
        fail(USAGE, f"--save_steps {args.save_steps} is no multiple of "
                    f"--gradient_accumulation_steps {accumulation}",
             f"checkpoints are made between updates; use {rounded_up}")
