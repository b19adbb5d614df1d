"""Flags of possibility exploration fine-tuning."""

from __future__ import annotations

from argparse import BooleanOptionalAction

from flags import FlagParser, natural, non_negative, positive_int
from utils import USAGE, fail


def add_train_args(parser: FlagParser) -> None:
    """Replies and numbers, unlikelihood; from them follows which of peft, otm and oto is learnt."""
    # "resolve": the paper's code calls the likelihood-only steps --warmup_steps, which is an alias
    # of --lr_warmup_steps for all other methods
    group = parser.add_argument_group("methods peft, otm, oto", conflict_handler="resolve")
    group.add_argument("--num_response_per_input", type=positive_int,
                       help="replies n per context (default: 4, oto 1)")
    group.add_argument("--replies", choices=["first", "random"], default="first",
                       help="which n of a row's candidates are learnt: the first, as published "
                            "(default), or n drawn afresh every epoch")
    group.add_argument("--max_pos_number", type=positive_int, default=9,
                       help="possibility numbers are drawn from 1..M (default: %(default)s)")
    # n replies have n (n - 1) such pairs, so 50 only cuts where there are 8 replies or more
    group.add_argument("--max_num_negatives_per_sample", type=natural, default=50,
                       help="wrong (number, reply) pairs per context at most "
                            "(default: %(default)s)")
    group.add_argument("--ul_weight", type=non_negative, default=0.5,
                       help="weight of the unlikelihood loss (default: %(default)s)")
    group.add_argument("--ul_words", choices=["content", "distinct"], default="content",
                       help="content: unlearn the content words of the other replies, as published "
                            "(default); distinct: only those that neither the context nor the "
                            "right reply has")
    group.add_argument("--no_ul", action="store_true",
                       help="no unlikelihood, and no number unless --numbered_prompts is given "
                            "(as published)")
    # the paper's code ties the number to --no_ul, so it cannot test the number alone
    group.add_argument("--numbered_prompts", "--number", action=BooleanOptionalAction,
                       help="put the possibility number into the prompt (default: unless --no_ul)")
    group.add_argument("--likelihood_only_steps", "--warmup_steps", type=int, default=-1,
                       help="micro-steps before unlikelihood sets in (-1: none)")
    parser.derive(_resolve_method)


def _resolve_method(args) -> dict:
    """What --method, --no_ul, --numbered_prompts and the number of replies mean together.

    Contradictions are kept as they are, for check_train.
    """
    no_ul = args.no_ul or args.method != "peft"
    numbered = not no_ul if args.numbered_prompts is None else args.numbered_prompts
    replies = args.num_response_per_input or (1 if args.method == "oto" else 4)
    method = args.method
    # without a number in the prompt, the rows are those of one-to-many training
    if method == "peft" and not numbered:
        method = "otm"
    if method == "otm" and replies == 1:
        method = "oto"
    return {"method": method, "no_ul": no_ul, "numbered_prompts": numbered,
            "num_response_per_input": replies}


def check_train(args) -> None:
    """Exit over flags of methods that exclude each other, and over too few numbers."""
    replies = args.num_response_per_input
    if args.method != "peft" and args.numbered_prompts:
        fail(USAGE, f"--method {args.method} has no number in its prompt",
             "drop --numbered_prompts, or use --method peft")
    if args.numbered_prompts and replies > args.max_pos_number:
        fail(USAGE, f"--num_response_per_input {replies} needs {replies} distinct numbers, "
                    f"--max_pos_number is {args.max_pos_number}",
             f"raise --max_pos_number to {replies} or more")
    if not args.no_ul and not args.numbered_prompts:
        fail(USAGE, "--no_numbered_prompts without --no_ul: replies could not be told apart",
             "add --no_ul")
    if args.method == "oto" and replies > 1:
        fail(USAGE, "--method oto learns one reply per context, "
                    f"--num_response_per_input is {replies}", "use --method otm")


def add_infer_args(parser: FlagParser) -> None:
    """No flags beside those of infer.py."""


def check_infer(args) -> None:
    """Nothing to check beside what infer.py checks."""
