"""Flags of possibility exploration fine-tuning."""

from __future__ import annotations

from argparse import BooleanOptionalAction

from utils import USAGE, fail


def add_args(group) -> None:
    group.add_argument("--num_response_per_input", type=int,
                       help="replies per context, the first n of its candidates (default: 4, oto 1)")
    group.add_argument("--max_pos_number", type=int, default=9,
                       help="possibility numbers are drawn from 1..M (default: %(default)s)")
    group.add_argument("--max_num_negatives_per_sample", type=int, default=50,
                       help="wrong (number, reply) pairs per context at most (default: %(default)s)")
    group.add_argument("--ul_weight", type=float, default=0.5,
                       help="weight of the unlikelihood loss (default: %(default)s)")
    group.add_argument("--ul_words", choices=["content", "distinct"], default="content",
                       help="content: unlearn the content words of the other replies, as published (default); "
                            "distinct: only those that neither the context nor the right reply has")
    group.add_argument("--no_ul", action="store_true",
                       help="no unlikelihood, and no number unless --number is given (as published)")
    group.add_argument("--number", action=BooleanOptionalAction,
                       help="put the possibility number into the prompt (default: unless --no_ul)")
    group.add_argument("--warmup_steps", type=int, default=-1,
                       help="micro-steps of likelihood only, before unlikelihood sets in (-1: none)")


def settle_method(args) -> str:
    """Resolve --method, --no_ul, --number and the number of replies; returns the method that results."""
    if args.method in ("otm", "oto"):
        if args.number:
            fail(USAGE, f"--method {args.method} has no number in its prompt", "drop --number, or use --method peft")
        args.no_ul = True
    if args.number is None:
        args.number = not args.no_ul
    if args.num_response_per_input is None:
        args.num_response_per_input = 1 if args.method == "oto" else 4
    n = args.num_response_per_input
    if n < 1:
        fail(USAGE, f"--num_response_per_input {n} must be at least 1")
    if args.max_num_negatives_per_sample < 0 or args.ul_weight < 0:
        fail(USAGE, f"--max_num_negatives_per_sample {args.max_num_negatives_per_sample} and --ul_weight "
                  f"{args.ul_weight} must be at least 0", "--no_ul switches unlikelihood off")
    if args.number and n > args.max_pos_number:
        fail(USAGE, f"--num_response_per_input {n} needs {n} distinct numbers, --max_pos_number is {args.max_pos_number}",
                  f"raise --max_pos_number to {n} or more")
    if not args.no_ul and not args.number:
        fail(USAGE, "--no_number without --no_ul: replies could not be told apart", "add --no_ul")
    if args.method == "oto" and n > 1:
        fail(USAGE, f"--method oto learns one reply per context, --num_response_per_input is {n}", "use --method otm")
    if args.number:
        return "peft"
    return "oto" if n == 1 else "otm"
