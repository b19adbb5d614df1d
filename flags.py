"""Flags and configs: argparse that names the nearest flag, and YAML files that hold the same flags.

Precedence: flag > config file > default. Another method's flag is an error, not a silent no-op.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path

from utils import USAGE, fail

RETIRED_FLAGS = {  # what people still type, and what replaces it
    "warmup_ratio": "use --warmup_steps (micro-steps of likelihood only)",
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


class FlagParser(argparse.ArgumentParser):
    """argparse that names the nearest flag, and leaves with exit code 2 and a hint."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.ignored: set[str] = set()  # config keys of another script that reads the same file

    def error(self, message: str) -> None:
        fail(USAGE, message, f"python {self.prog} --help lists all flags")

    def unknown(self, name: str, where: str) -> None:
        """Die over a flag or config key that this parser does not have."""
        if name in RETIRED_FLAGS:
            fail(USAGE, f"{where} was removed", RETIRED_FLAGS[name])
        known = [a.dest for a in self._actions]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean --{near[0]}?" if near else f"python {self.prog} --help lists all flags"
        fail(USAGE, f"{where} is unknown for this method", hint)

    def parse_args(self, argv=None, namespace=None):
        args, rest = self.parse_known_args(argv, namespace)
        for word in rest:
            if word.startswith("--"):
                name = word[2:].split("=")[0]
                self.unknown(name, f"option --{name}")
        if rest:
            fail(USAGE, f"unexpected argument {rest[0]!r}", f"python {self.prog} --help lists all flags")
        return args


SECTIONS = ("alg_config",)  # mappings that published configs nest; their keys count as if they stood outside


def add_alias(group, dest: str, option: str, **changes) -> None:
    """Give a flag that is there a second name, also as a config key, and maybe another nargs or help."""
    action = next(a for a in group._actions if a.dest == dest)
    action.option_strings.append(option)
    group._option_string_actions[option] = action
    vars(action).update(changes)


def config_names(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The actions of a parser by every name that a config may use for them."""
    return {name: action for action in parser._actions if action.dest not in ("help", "config", "print_config")
            for name in [action.dest, *(o[2:] for o in action.option_strings if action.nargs != 0)]}


def read_config(path: str) -> dict[str, tuple[object, int]]:
    """Read a YAML mapping as {key: (value, line)}. Only plain values; tags and duplicates are refused."""
    import yaml

    file = Path(path)
    if not file.is_file():
        fail(USAGE, f"config {path} is not a file", "give a YAML file; examples are in configs/")
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = key_lines(node, path) if isinstance(node, yaml.MappingNode) else {}
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an impossible date
        unsafe = "python/" in str(error)
        problem = "unsafe tag" if unsafe else "not valid YAML"
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        fail(USAGE, f"{place}: {problem}: {' '.join(str(error).split())[:200]}", "use plain key: value lines")
    if not isinstance(values, dict):
        fail(USAGE, f"{path}: must be a mapping of flag names to values, got {type(values).__name__}",
            "one key: value a line, keys as in --help")
    config = {key: (value, lines[key]) for key, value in values.items()}
    for key, inner in node.value:
        if key.value in SECTIONS and isinstance(inner, yaml.MappingNode):
            own, section = key_lines(inner, path), config.pop(key.value)[0]
            config |= {f"{key.value}.{name}": (value, own[name]) for name, value in section.items()}
    return config


def key_lines(node, path: str) -> dict[str, int]:
    """The line of every key of a YAML mapping; a key must be a plain name and stand once."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        place = f"{path}:{key.start_mark.line + 1}"
        if key.tag != "tag:yaml.org,2002:str":
            fail(USAGE, f"{place}: a key must be a flag's name, got {key.value!r}", "keys are the names in --help")
        if key.value in lines:
            fail(USAGE, f"{place}: key {key.value!r} stands twice", "keep one")
        lines[key.value] = key.start_mark.line + 1
    return lines


def apply_config(parser: FlagParser, config: dict[str, tuple[object, int]], path: str) -> None:
    """Make a config's values the parser's defaults, checked and coerced as if they were flags."""
    actions = config_names(parser)
    for key, (value, line) in config.items():
        section, _, name = key.replace("-", "_").rpartition(".")
        where = f"{path}:{line}: {key}"
        if section in parser.ignored or (name in parser.ignored and name not in actions):
            continue
        if name not in actions:
            parser.unknown(name, f'{path}:{line}: key "{key}"')
        action = actions[name]
        if value is not None:
            value = coerce(action, value, where)
        elif action.default is not None or action.required:
            fail(USAGE, f"{where} has no value", "give one, or delete the line")
        action.required = False
        parser.set_defaults(**{action.dest: value})


def coerce(action: argparse.Action, value: object, where: str) -> object:
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
        if any(isinstance(item, (bool, dict, list)) for item in items):
            raise ValueError
        items = [convert(str(item)) for item in items]
    except ValueError:
        fail(USAGE, f"{where} must be of type {convert.__name__}, got {value!r}", "quote words such as \"no\" and \"on\"")
    for item in items:
        if action.choices and item not in action.choices:
            fail(USAGE, f"{where} must be one of {', '.join(map(str, action.choices))}, got {item!r}")
    return items if many else items[0]


def parse_flags(build_parser: Callable[[str | None], FlagParser], argv: list[str] | None):
    """Two passes: --method and --config first, then only that method's flags.

    Precedence: flag > config file > default. Hyphens in flag names count as underscores.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method")
    first.add_argument("--config")
    known, _ = first.parse_known_args(argv)
    config = read_config(known.config) if known.config else {}
    method = known.method or config.get("method", (None,))[0]
    parser = build_parser(method)
    spelt = {o[2:].replace("-", "_"): o for o in parser._option_string_actions if o.startswith("--")}

    def spell(match: re.Match) -> str:  # argparse itself registers --no-number with a hyphen
        name = match[1].replace("-", "_")
        return spelt.get(name, f"--{name}")

    argv = [re.sub(r"^--([\w-]+)", spell, word) for word in argv]
    parser.add_argument("--config", metavar="FILE.yaml", help="read flags from a YAML file; flags win")
    parser.add_argument("--print_config", action="store_true", help="print the resolved flags and stop")
    apply_config(parser, config, known.config)
    args = parser.parse_args(argv)
    if args.print_config:
        import yaml

        skip = ("config", "print_config")
        print(yaml.safe_dump({k: v for k, v in vars(args).items() if k not in skip}), end="")
        raise SystemExit(0)
    return args
