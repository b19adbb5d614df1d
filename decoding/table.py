"""How responses can be made: one entry per --decoding.

What infer.py offers, checks and shows in --help follows from this table, so a new way to draw is
one entry here and one function in a module beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from flags import Args, natural, non_negative, number, positive, positive_int
from utils import USAGE, fail, info


class Flag(NamedTuple):
    """A flag that only some decodings know.

    default: its value if it is not given. The parser itself holds None, so that a flag that is
    given in vain can be told from one that was left out.
    server: whether an OpenAI-compatible server takes it.
    """

    name: str
    type: Callable[[str], object]
    default: object
    help: str
    choices: tuple[str, ...] | None = None
    server: bool = True
    aliases: tuple[str, ...] = ()


class Decoder(NamedTuple):
    """A way to draw the responses of a row.

    draw: "module.function" of this package. It is imported when it draws, since that imports torch.
    asks: whether the model is asked in words for several responses; else a row is a prompt tree.
    server: whether it works through a server, which gives neither beams nor logits.
    samples: whether --temperature has an effect.
    """

    draw: str
    flags: tuple[Flag, ...] = ()
    asks: bool = False
    server: bool = True
    samples: bool = True


# top_p 0 and min_p 1 would leave one token, which is greedy decoding under another name.
_at_most_1 = number(float, lambda value: 0 < value <= 1, "must be above 0 and at most 1")
_below_1 = number(float, lambda value: 0 <= value < 1, "must be at least 0 and below 1")

FILTERS = (
    Flag("top_p", _at_most_1, 1.0, "nucleus mass, 1 is off (default)"),
    Flag("top_k", natural, 0, "keep the k best tokens, 0 is off (default)"),
    Flag("min_p", _below_1, 0.0,
         "drop tokens below this share of the best one, 0 is off (default)"),
    # OpenAI-compatible servers have no common field for the last two.
    Flag("typical_p", _at_most_1, 1.0, "mass of locally typical tokens, 1 is off (default)",
         server=False),
    Flag("top_n_sigma", non_negative, 0.0,
         "keep logits within n deviations of the best, 0 is off (default)", server=False),
)
BEAMS = (
    Flag("num_beams", positive_int, None, "beams per row (default: the number of responses)"),
    Flag("length_penalty", float, 1.0,
         "scores are divided by length to this power (default: 1)"),
)
# The defaults are those of the code of arXiv:2412.03343, whose diverse search uses possibility
# number 1 alone; per_group is ours.
GROUPS = (
    Flag("num_beam_groups", positive_int, None,
         "groups that avoid each other (default: one per beam)"),
    Flag("diversity_penalty", positive, 5.0,
         "nats per token that an earlier group took (default: 5, as published)"),
    Flag("group_numbers", str, "first",
         "peft: all groups under possibility number 1, as published (default), or each group under "
         "a number of its own", choices=("first", "per_group"), aliases=("numbers",)),
)
RETRIES = (
    Flag("max_retries", natural, 3, "further rounds where replies are missing (default: 3)"),
)

# In the order of --help. The ways of asking share one function, which looks at args.decoding.
DECODERS = {
    "sampling": Decoder("drawing.draw_sampling", FILTERS),
    "greedy": Decoder("drawing.draw_greedy", samples=False),
    "beam": Decoder("drawing.draw_beam", BEAMS, server=False, samples=False),
    "diverse": Decoder("drawing.draw_diverse", (*BEAMS, *GROUPS), server=False, samples=False),
    "list": Decoder("asking.draw_in_words", (*FILTERS, *RETRIES), asks=True),
    "iterative": Decoder("asking.draw_in_words", (*FILTERS, *RETRIES), asks=True),
    "verbalized": Decoder("asking.draw_in_words", (*FILTERS, *RETRIES), asks=True),
}


def all_flags() -> dict[str, Flag]:
    """Every flag of some decoding by its name."""
    return {flag.name: flag for decoder in DECODERS.values() for flag in decoder.flags}


def decodings_with(name: str) -> list[str]:
    """The decodings that know a flag."""
    return [decoding for decoding, decoder in DECODERS.items()
            if any(flag.name == name for flag in decoder.flags)]


def draw_function(decoding: str) -> Callable:
    """The function that draws; importing it loads torch."""
    module, _, name = DECODERS[decoding].draw.partition(".")
    return vars(import_module(f"decoding.{module}"))[name]


def add_decoding_flags(parser) -> None:
    """--decoding, and a group of flags for every set of decodings that share them."""
    # By the set of decodings, so that a flag of several decodings is listed once.
    groups: dict[tuple[str, ...], object] = {}
    for flag in all_flags().values():
        users = tuple(decodings_with(flag.name))
        if users not in groups:
            groups[users] = parser.add_argument_group(f"--decoding {', '.join(users)}")
        names = [f"--{name}" for name in (flag.name, *flag.aliases)]
        groups[users].add_argument(*names, dest=flag.name, type=flag.type, choices=flag.choices,
                                   help=flag.help)


def resolve_decoding(args: Args) -> dict:
    """The flags of the decoding with their defaults; a flag that does nothing is refused."""
    values = {}
    for name, flag in all_flags().items():
        given = vars(args)[name]
        if given is not None and args.decoding not in decodings_with(name):
            fail(USAGE, f"--{name} does nothing with --decoding {args.decoding}",
                 f"drop it, or use {' or '.join(decodings_with(name))}")
        # Flags of other decodings get their defaults, too: code may read every flag without asking.
        values[name] = flag.default if given is None else given
    # Only a note: --temperature is a general flag and stands in many configs.
    if args.temperature is not None and not DECODERS[args.decoding].samples:
        info(f"--decoding {args.decoding} does not sample, so --temperature has no effect")
    values["temperature"] = 1.0 if args.temperature is None else args.temperature
    # In this form it also refuses nan, with which every comparison is false.
    if not 0 < values["temperature"] < math.inf:
        fail(USAGE, f"--temperature {args.temperature} with --decoding {args.decoding} "
                    "must be above 0",
             "0.75 is the published value; --decoding greedy takes the most probable token")
    return values


def resolve_beams(args: Args) -> dict:
    """Beams, groups and prompts per row that fit together.

    num_branches is the number of prompts below a row's context: one per response, but one for all
    beams, or one for each group of beams.
    """
    if args.decoding not in ("beam", "diverse"):
        return {"num_branches": args.num_drawn}
    num_beams = args.num_beams or args.num_drawn
    if args.num_drawn > num_beams:
        fail(USAGE, f"{args.num_drawn} responses from --num_beams {num_beams}",
             f"--num_beams {args.num_drawn} or more")
    if args.decoding == "beam":
        return {"num_beams": num_beams, "num_branches": 1}
    groups = args.num_beam_groups or num_beams
    if num_beams % groups:
        fail(USAGE, f"--num_beams {num_beams} is no multiple of --num_beam_groups {groups}",
             f"{groups * -(-num_beams // groups)} beams would do")
    return {"num_beams": num_beams, "num_beam_groups": groups,
            "num_branches": groups if args.group_numbers == "per_group" else 1}


def check_server(args: Args) -> None:
    """Refuse what no server can do."""
    if not DECODERS[args.decoding].server:
        fail(USAGE, f"--decoding {args.decoding} does not work through a server",
             "--engine hf, or another --decoding")
    for flag in FILTERS:
        # The defaults are filled in by now, and asking a server for what is off does no harm.
        if not flag.server and vars(args)[flag.name] != flag.default:
            fail(USAGE, f"--{flag.name} does not work through a server",
                 "--engine hf, or --top_p, --top_k, --min_p")


def filters_of(args: Args) -> dict[str, float]:
    """The settings of the sampling filters."""
    return {flag.name: vars(args)[flag.name] for flag in FILTERS}
