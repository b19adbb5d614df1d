"""The tokens that stand for attribute=value."""

from __future__ import annotations

import re

from utils import USAGE, fail

SPARE = re.compile(  # special tokens that a tokenizer keeps in reserve, or whose use (repositories, notebooks) is not chat
    r"<\|?(?:reserved_(?:special_)?token_\d+|reserved\d+|unused_?\d+|extra_?\d+)\|?>|\[(?:control_\d+|unused\d+)\]|<SPECIAL_\d+>"
    r"|<(?:repo_?name|file_sep|filename|gh_stars|issue_(?:start|comment|closed)|jupyter_(?:start|text|code|output|script)|empty_output)>")


def refuse_unknown(want: dict[str, str | None], schema: dict, where: str) -> None:
    """Die over attributes and values that a schema does not have."""
    for name, value in want.items():
        if name not in schema:
            fail(USAGE, f"{where} does not know the attribute {name!r}", f"it knows {', '.join(schema)}")
        if value is not None and value not in schema[name]["values"]:
            fail(USAGE, f"{where}: {name} is never {value!r}", f"its values are {', '.join(schema[name]['values'])}")


def assign_tokens(tokenizer, schema: dict) -> dict[str, str]:
    """The token of every attribute=value of a schema, in its order: spare special tokens, or tokens added to the tokenizer.

    Spare ones serve only if there are enough for all. The same tokenizer and schema always give the same tokens.
    """
    names = [f"{name}={value}" for name, own in schema.items() for value in own["values"]]
    own = [f"<|{name}|>" for name in names]
    known = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    spare = sorted((token for token in known if SPARE.fullmatch(token)), key=known.get)
    if len(spare) < len(names):
        tokenizer.add_special_tokens({"additional_special_tokens": own}, replace_extra_special_tokens=False)
        spare = own
    return dict(zip(names, spare, strict=False))


def settle_tokens(tokenizer, args) -> None:
    """Fix args.control_tokens and args.banned_ids, once a run."""
    if args.control_tokens is None:
        args.control_tokens = assign_tokens(tokenizer, args.schema)
        args.banned_ids = tokenizer.convert_tokens_to_ids(list(args.control_tokens.values()))


def start_ids(tokenizer) -> list[int]:
    """Where every text starts: the mark between documents that the base was trained with, twice (module docstring)."""
    known = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    start = known.get("<|endoftext|>", tokenizer.bos_token_id)
    return [tokenizer.eos_token_id if start is None else start] * 2


def encode(tokenizer, want: dict[str, str], control_tokens: dict[str, str], text: str) -> tuple[list[int], list[int]]:
    """(start and control tokens, text) as ids, tokens in the order of the schema; one function for training and decoding."""
    tokens = [token for name, token in control_tokens.items() if name.split("=")[1] == want.get(name.split("=")[0])]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return start_ids(tokenizer) + tokenizer.convert_tokens_to_ids(tokens), ids
