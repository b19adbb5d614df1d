"""The tokens that stand for attribute=value. Loads nothing heavy, since flags.py needs it."""

from __future__ import annotations

import re

from utils import USAGE, fail

SPARE = re.compile(  # special tokens in reserve, or whose use (repositories, notebooks) is not chat
    r"<\|?(?:reserved_(?:special_)?token_\d+|reserved\d+|unused_?\d+|extra_?\d+)\|?>"
    r"|\[(?:control_\d+|unused\d+)\]|<SPECIAL_\d+>"
    r"|<(?:repo_?name|file_sep|filename|gh_stars|issue_(?:start|comment|closed)"
    r"|jupyter_(?:start|text|code|output|script)|empty_output)>")


def refuse_unknown(condition: dict[str, str | None], schema: dict, where: str) -> None:
    """Exit over attributes and values that a schema does not have; a value of None is any."""
    for name, value in condition.items():
        if name not in schema:
            fail(USAGE, f"{where} does not know the attribute {name!r}",
                 f"it knows {', '.join(schema)}")
        if value is not None and value not in schema[name]["values"]:
            fail(USAGE, f"{where}: {name} is never {value!r}",
                 f"its values are {', '.join(schema[name]['values'])}")


def assign_tokens(tokenizer, schema: dict) -> dict[str, str]:
    """{attribute=value: token} of a schema, in its order.

    Spare special tokens of the tokenizer are used if there are enough for all, else tokens are
    added to it. The same tokenizer and schema always give the same tokens, so it may be called
    again.
    """
    names = [f"{name}={value}" for name, labels in schema.items() for value in labels["values"]]
    ids = _added_tokens(tokenizer)
    spare = sorted((token for token in ids if SPARE.fullmatch(token)), key=ids.get)
    # spare tokens have rows already, so the embeddings keep their size
    if len(spare) >= len(names):
        return dict(zip(names, spare, strict=False))
    tokens = [f"<|{name}|>" for name in names]
    if any(token not in ids for token in tokens):
        # special, so that decoded text does not show them; the base's own special tokens stay
        tokenizer.add_special_tokens({"additional_special_tokens": tokens},
                                     replace_extra_special_tokens=False)
    return dict(zip(names, tokens, strict=True))


def start_ids(tokenizer) -> list[int]:
    """Where every text starts: what marks a new document in the base's data, twice.

    Why twice: see the package's docstring.
    """
    # bos comes second: SmolLM2's is <|im_start|>, which opens a turn and not a document
    start = _added_tokens(tokenizer).get("<|endoftext|>", tokenizer.bos_token_id)
    return [tokenizer.eos_token_id if start is None else start] * 2


def encode(tokenizer, condition: dict[str, str], control_tokens: dict[str, str],
           text: str) -> tuple[list[int], list[int]]:
    """(start and control tokens, text) as ids; one function for training and decoding.

    Tokens stand in the order of the schema. control_tokens: as assign_tokens gives them.
    """
    wanted = {f"{name}={value}" for name, value in condition.items()}
    tokens = [token for name, token in control_tokens.items() if name in wanted]
    # the text is encoded apart, so that its ids are the same under every condition and none
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return start_ids(tokenizer) + tokenizer.convert_tokens_to_ids(tokens), ids


def _added_tokens(tokenizer) -> dict[str, int]:
    """The ids of a tokenizer's special and added tokens."""
    return {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
