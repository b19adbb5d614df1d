"""Flags and configs: argparse that names the nearest flag, and YAML files that hold the same flags.

Precedence: flag > config file > default. Another method's flag is an error, not a silent no-op.
What a script gets is read-only: flags that depend on other flags are derived at the end of parsing.

jsonargparse and ConfigArgParse read configs, too. They do not say file:line of a bad key, and know
no retired flags, which is what people need when they move a config from another toolkit.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from utils import USAGE, fail

# What people still type, and what replaces it: flags of older transformers and of other toolkits.
RETIRED_FLAGS = {
    "warmup_ratio": "use --lr_warmup_steps (updates)",
    "overwrite_output_dir": "use --resume to go on, or another --exp_name",
    "evaluation_strategy": "score finished checkpoints with infer.py and eval.py",
    "eval_strategy": "score finished checkpoints with infer.py and eval.py",
    "no_cuda": "set CUDA_VISIBLE_DEVICES= to run on the CPU",
    "logging_dir": "metrics.jsonl lies in the run's folder; see --report_to",
    "save_safetensors": "adapters are always safetensors",
    "group_by_length": "drop it: trees are packed, nothing is padded",
    "fp16": "drop it: bf16 is used where the GPU has it, else float32",
    "bf16": "drop it: bf16 is used where the GPU has it, else float32",
}
SECTIONS = ("alg_config",)  # nested mappings of published configs; their keys count as if outside
META = ("help", "config", "print_config")  # about the flags, not flags of the work


class Args(argparse.Namespace):
    """The parsed flags, read-only, so that what a function sees never depends on who ran before.

    `with_values` gives a new object, for what a checkpoint or a file settles later.
    """

    def __init__(self, **values):
        # Past __setattr__, which refuses every name.
        vars(self).update(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"args is read-only after parsing, so {name} cannot be set")

    def with_values(self, **values) -> Args:
        return Args(**vars(self) | values)


class FlagParser(argparse.ArgumentParser):
    """argparse that names the nearest flag, and leaves with exit code 2 and a hint."""

    def __init__(self, **kwargs):
        super().__init__(
            # No abbreviations: one that is clear today is another flag once a method adds its own.
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.ignored: set[str] = set()  # config keys of another script that reads the same file
        self.derivations: list[Callable[[argparse.Namespace], dict]] = []

    def derive(self, function: Callable[[argparse.Namespace], dict]) -> None:
        """Have function(args) settle flags that depend on other flags, at the end of parsing.

        It returns {name: value}. Functions run in the order in which they were given; each sees
        what those before it settled.
        """
        self.derivations.append(function)

    def action(self, dest: str) -> argparse.Action:
        """The flag that is stored under a name."""
        return next(action for action in self._actions if action.dest == dest)

    def error(self, message: str) -> None:
        # "argument --limit/--n: 0 must be at least 1" -> "--limit 0 must be at least 1"
        message = re.sub(r"^argument (--\w+)[^:]*: ", r"\1 ", message)
        fail(USAGE, message, f"python {self.prog} --help lists all flags")

    def unknown(self, name: str, where: str) -> None:
        """Fail over a flag or config key that this parser does not have."""
        # Before the search for a near name, which would be a wrong guess for these.
        if name in RETIRED_FLAGS:
            fail(USAGE, f"{where} was removed", RETIRED_FLAGS[name])
        near = difflib.get_close_matches(name, config_names(self), n=1)
        hint = f"did you mean --{near[0]}?" if near else \
            f"python {self.prog} --help lists all flags"
        fail(USAGE, f"{where} is unknown for this method", hint)

    def parse_args(self, argv=None, namespace=None):
        # argparse's own parse_args lists unknown flags without saying what they may have meant.
        args, rest = self.parse_known_args(argv, namespace)
        for word in rest:
            if word.startswith("--"):
                name = word[2:].split("=")[0]
                self.unknown(name, f"option --{name}")
        if rest:
            fail(USAGE, f"unexpected argument {rest[0]!r}",
                 f"python {self.prog} --help lists all flags")
        return args


# ---- kinds of values ----------------------------------------------------------------------------


def number(kind: type, accepts: Callable[[float], bool], rule: str) -> Callable[[str], float]:
    """An argparse type: a number for which accepts(value) holds; rule says so in words."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text} {rule}")
        return value

    # argparse and configs name the type in their messages.
    convert.__name__ = kind.__name__
    return convert


positive_int = number(int, lambda value: value >= 1, "must be at least 1")
natural = number(int, lambda value: value >= 0, "must be at least 0")
positive = number(float, lambda value: 0 < value < math.inf, "must be above 0")
non_negative = number(float, lambda value: 0 <= value < math.inf, "must be at least 0")
share = number(float, lambda value: 0 <= value <= 1, "must be a share, 0 to 1")


# ---- flags that several parsers have ------------------------------------------------------------


def add_alias(parser: FlagParser, dest: str, option: str, **changes) -> None:
    """Give a flag that is there a second name, also as a config key, and maybe another help."""
    action = parser.action(dest)
    # argparse has no public way to give a flag another name; two flags would be two values.
    action.option_strings.append(option)
    parser._option_string_actions[option] = action
    vars(action).update(changes)


def optional(parser: FlagParser, dest: str) -> None:
    """Let a required flag be left out."""
    parser.action(dest).required = False


def many(parser: FlagParser, dest: str) -> None:
    """Let a flag take several values."""
    parser.action(dest).nargs = "+"


def add_server_flags(group, max_connections: int = 8) -> None:
    """What a script needs to know of an OpenAI-compatible server, whoever is asked there."""
    group.add_argument("--base_url", metavar="URL",
                       help="the server's address, such as http://127.0.0.1:8000/v1 "
                            "(default: the provider's)")
    group.add_argument("--key_file", metavar="FILE", help="lines NAME=KEY, mode 600")
    group.add_argument("--max_connections", type=positive_int, default=max_connections,
                       help="calls at a time (default: %(default)s)")
    group.add_argument("--timeout", type=positive, default=120,
                       help="seconds without a byte until a call is tried again (default: 120)")
    group.add_argument("--timeout_total", type=positive, default=600,
                       help="seconds of tries until the run stops (default: 600)")


# ---- configs ------------------------------------------------------------------------------------


def config_names(parser: FlagParser) -> dict[str, argparse.Action]:
    """The flags of a parser by every name that a config may use for them."""
    # Of --x and --no-x only the first is a key: a config says x: false.
    return {name: action for action in parser._actions if action.dest not in META
            for name in [action.dest, *(option[2:] for option in action.option_strings
                                        if not option.startswith("--no-"))]}


def read_config(path: str) -> dict[str, tuple[object, int]]:
    """Read a YAML mapping as {key: (value, line)}; refuses tags and keys that stand twice."""
    file = Path(path)
    if not file.is_file():
        fail(USAGE, f"config {path} is not a file", "give a YAML file; examples are in configs/")
    try:
        text = file.read_text(encoding="utf-8")
        # Read twice: only the nodes know their lines, and only the values have their types.
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = _key_lines(node, path) if isinstance(node, yaml.MappingNode) else {}
        values = yaml.safe_load(text)
    # ValueError: the file is not UTF-8, or holds a date that does not exist.
    except (yaml.YAMLError, ValueError) as error:
        unsafe = "python/" in str(error)
        problem = "unsafe tag" if unsafe else "not valid YAML"
        marked = isinstance(error, yaml.MarkedYAMLError) and error.problem_mark
        place = f"{path}:{marked.line + 1}" if marked else path
        fail(USAGE, f"{place}: {problem}: {' '.join(str(error).split())[:200]}",
             "use plain key: value lines")
    if not isinstance(values, dict):
        fail(USAGE, f"{path}: must be a mapping of flag names to values, "
                    f"got {type(values).__name__}",
             "one key: value a line, keys as in --help")
    config = {key: (value, lines[key]) for key, value in values.items()}
    for key, inner in node.value:
        if key.value in SECTIONS and isinstance(inner, yaml.MappingNode):
            own, section = _key_lines(inner, path), config.pop(key.value)[0]
            config |= {f"{key.value}.{name}": (value, own[name]) for name, value in section.items()}
    return config


def _key_lines(node, path: str) -> dict[str, int]:
    """The line of every key of a YAML mapping; a key must be a plain name and stand once."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        place = f"{path}:{key.start_mark.line + 1}"
        # YAML 1.1 reads the keys on, off, yes and no as truth values.
        if key.tag != "tag:yaml.org,2002:str":
            fail(USAGE, f"{place}: a key must be a flag's name, got {key.value!r}",
                 "keys are the names in --help")
        if key.value in lines:
            fail(USAGE, f"{place}: key {key.value!r} stands twice", "keep one")
        lines[key.value] = key.start_mark.line + 1
    return lines


def _apply_config(parser: FlagParser, config: dict[str, tuple[object, int]], path: str) -> None:
    """Make a config's values the parser's defaults, checked and coerced as if they were flags."""
    actions = config_names(parser)
    for key, (value, line) in config.items():
        section, _, name = key.replace("-", "_").rpartition(".")
        where = f"{path}:{line}: {key}"
        # One config may serve training and drawing, so each script skips keys that are the other's.
        if section in parser.ignored or (name in parser.ignored and name not in actions):
            continue
        if name not in actions:
            parser.unknown(name, f'{path}:{line}: key "{key}"')
        action = actions[name]
        # An empty value stands for None, which only a flag without a default may be.
        if value is not None:
            value = _coerce(action, value, where)
        elif action.default is not None or action.required:
            fail(USAGE, f"{where} has no value", "give one, or delete the line")
        # As the parser's default: a flag still wins over it, and a required flag counts as given.
        action.required = False
        parser.set_defaults(**{action.dest: value})


def _coerce(action: argparse.Action, value: object, where: str) -> object:
    """A config value as its flag would have read it (YAML 1.1 reads 1e-4 as a string)."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            fail(USAGE, f"{where} must be true or false, got {value!r}")
        return value
    if action.nargs == "?" and isinstance(value, bool):
        return action.const if value else None
    many = action.nargs in ("+", "*")
    if many != isinstance(value, list):
        fail(USAGE, f"{where} must be {'a list' if many else 'one value'}, got {value!r}")
    convert = action.type or str
    try:
        items = value if many else [value]
        # As text, a bool or a list would pass for the value of a flag that takes any word.
        if any(isinstance(item, (bool, dict, list)) for item in items):
            raise ValueError
        # Back to text and through the flag's own type, so that both ways accept the same values.
        items = [convert(str(item)) for item in items]
    except argparse.ArgumentTypeError as error:
        fail(USAGE, f"{where}: {error}")
    except ValueError:
        fail(USAGE, f"{where} must be of type {convert.__name__}, got {value!r}",
             'quote words such as "no" and "on"')
    for item in items:
        if action.choices and item not in action.choices:
            fail(USAGE, f"{where} must be one of {', '.join(map(str, action.choices))}, "
                        f"got {item!r}")
    return items if many else items[0]


def _spell(parser: FlagParser, argv: list[str]) -> list[str]:
    """The words of a command with hyphens in flag names read as underscores."""
    spelt = {option[2:].replace("-", "_"): option for option in parser._option_string_actions
             if option.startswith("--")}

    def spell(match: re.Match) -> str:  # argparse itself registers --no-number with a hyphen
        name = match[1].replace("-", "_")
        return spelt.get(name, f"--{name}")

    return [re.sub(r"^--([\w-]+)", spell, word) for word in argv]


def first_pass(argv: list[str] | None, *names: str) -> dict[str, object]:
    """The values of a few flags before the parser that checks them can be built; None if not given.

    They are read from the command, else from its --config file: which other flags there are depends
    on them (a method has flags of its own).
    """
    argv = sys.argv[1:] if argv is None else argv
    # Without --help, which must be answered by the whole parser.
    parser = FlagParser(add_help=False)
    for name in ("config", *names):
        # A value or none: not known here whether the flag takes one (--interview does not).
        parser.add_argument(f"--{name}", nargs="?", const=True)
    args, _ = parser.parse_known_args(_spell(parser, argv))
    config = read_config(args.config) if args.config else {}
    given = dict(vars(args))
    return {name: config.get(name, (None,))[0] if given[name] is None else given[name]
            for name in names} | {"config": args.config}


def parse_flags(parser: FlagParser, argv: list[str] | None) -> Args:
    """Read a command and its --config file into read-only flags.

    Precedence: flag > config file > default. Hyphens in flag names count as underscores.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser.add_argument("--config", metavar="FILE.yaml",
                        help="read flags from a YAML file; flags win")
    parser.add_argument("--print_config", action="store_true",
                        help="print the resolved flags and stop")
    if config := first_pass(argv)["config"]:
        _apply_config(parser, read_config(config), config)
    args = parser.parse_args(_spell(parser, argv))
    # Before anything is derived, so that what is printed can be read again as a config.
    if args.print_config:
        flags = dict(vars(args))
        print(yaml.safe_dump({name: flags[name] for name in flags if name not in META}), end="")
        raise SystemExit(0)
    for function in parser.derivations:
        args = argparse.Namespace(**vars(args) | function(args))
    return Args(**vars(args))
