"""The steps that most methods leave as they are, each a visible line in the method's file."""

from __future__ import annotations

import random
from pathlib import Path

from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

import utils
from modeling.adapters import resolve_lora
from scoring.evaluated import Evaluated, Table
from utils import USAGE, fail

# ---- training -----------------------------------------------------------------------------------

NO_DECAY = (  # as transformers.Trainer.get_decay_parameter_names has them
    r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


def leave_as_is(tokenizer, args) -> None:
    """prepare_tokenizer of a method without new tokens."""


def lora_settings(model, tokenizer, rows: list[dict], args) -> dict:
    """describe of a method with a LoRA adapter: what unset flags stand for with this model."""
    return resolve_lora(args, model)


def shuffled(rows: list[dict], args, rng: random.Random) -> list[int]:
    """order_rows: all rows in random order."""
    order = list(range(len(rows)))
    rng.shuffle(order)
    return order


def one_rate(model, args) -> list[dict]:
    """parameter_groups: what is trainable, with weight decay and, for biases and norms, without.

    The very groups of transformers.Trainer, the second one also where it is empty: the optimizer
    state of a checkpoint can only be loaded into groups of the same sizes.
    """
    names = set(get_parameter_names(model, [nn.LayerNorm], list(NO_DECAY)))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if name in names], "weight_decay": args.weight_decay},
        {"params": [p for name, p in trained if name not in names], "weight_decay": 0.0},
    ]


def no_figures(model, forest, rows: list[dict], args, saves: bool) -> tuple[bool, dict]:
    """after_pass of a method that neither measures its rows nor stops early."""
    return False, {}


def save_adapter(model, folder: str, state_dict: dict | None = None) -> None:
    """save: the adapter as PEFT writes it, without copies of frozen embeddings.

    state_dict: the weights gathered by FSDP, if the model itself holds only a share of them.
    """
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)


# ---- inference ----------------------------------------------------------------------------------


def same_method(args, run: dict) -> None:
    """Exit if the model was trained with another method than the one that is asked for."""
    if args.method != run["method"]:
        fail(USAGE, f"--method {args.method}, but {args.model_name_or_path} is a {run['method']} "
                    "model", f"drop --method, or pass --method {run['method']}")


def read_rows(args, run: dict) -> list[dict]:
    """load_rows: the first rows of --test_file, with context or prompt."""
    rows = utils.read_jsonl(args.test_file, lambda row: utils.check_row(row, candidates=False))
    return rows[: args.limit]


def rows_as_they_are(engine, rows: list[dict], args) -> list[dict]:
    """prepare_rows of a method that needs the model for nothing but its responses."""
    return rows


def next_is_eval(save_file: Path, summary: dict, args) -> None:
    """finish: say what scores the responses."""
    print(f"next: python eval.py --eval_file {save_file} "
          f"--save_file eval_logs/{save_file.stem}.json")


def no_talk(engine, args) -> None:
    """talk of a method that has no chat."""
    fail(USAGE, f"--interactive does not work with method {args.method}",
         "it talks to a persona of method spt")


# ---- evaluation ---------------------------------------------------------------------------------


def common_only(systems: dict[str, list[dict]], sources, args) -> Evaluated:
    """measure of a method that has no figures beside the common ones."""
    return Evaluated({}, [])


def no_tables(summary: dict) -> list[Table]:
    """tables of such a method."""
    return []
