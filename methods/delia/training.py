"""Training of method delia: task rows and the model's own samples, learnt alike."""

from __future__ import annotations

import json
import random

from torch import nn
from transformers.pytorch_utils import Conv1D

import trees
from methods import defaults
from methods.delia import mixing
from methods.delia.messages import encode, read_messages
from modeling.adapters import add_lora, add_tokens, grow_embeddings, resolve_lora
from modeling.prompts import end_of_turn
from trees import LIKELIHOOD, Segment, Tree
from utils import USAGE, fail

TASK, DIVERSE = 0, 1  # the `branch` of a reply's tokens
ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the output embedding


def load_rows(args) -> list[dict]:
    """Task rows, then the diverse rows drawn for them; prints the realised ratio.

    --limit counts task rows, since the number of diverse rows follows from theirs.
    """
    task = read_messages(args.train_file, args.new_tokens, strict=True)[: args.limit]
    # after --limit: a token must stand in a row that is trained on
    text = json.dumps([row["messages"] for row in task], ensure_ascii=False)
    # both sides are JSON, so a quote or backslash in a token is escaped in both
    unused = [token for token in args.new_tokens
              if json.dumps(token, ensure_ascii=False)[1:-1] not in text]
    if unused:
        fail(USAGE, f"--new_tokens {unused[0]}: no row of {args.train_file} mentions it",
             "a token learns from rows that hold it")
    cache = mixing.read_cache(args.diverse_file, args.new_tokens) if args.diverse_file else []
    # at ratio 0, the control run, a cache may be named but no row of it is trained on
    if args.diverse_ratio and not args.allow_foreign_cache:
        mixing.check_author(args.diverse_file, args.model_name)
    # the paper's code cuts the fraction off, and is silent where the cache is too small
    count = round(len(task) * args.diverse_ratio)
    if count > len(cache) and not (args.oversample and cache):
        fail(USAGE, f"--diverse_ratio {args.diverse_ratio:g} wants {count} diverse rows for "
                    f"{len(task)} task rows, {args.diverse_file} has {len(cache)} "
                    "(without its held-out tenth)",
             f"draw more, --diverse_ratio {len(cache) / len(task):.4g}, or --oversample")
    diverse = mixing.draw_diverse(cache, count, args.seed)
    print(f"{len(task)} task rows + {len(diverse)} diverse rows (of {len(cache)}): "
          f"ratio {len(diverse) / len(task):g}")
    return [row | {"source": "task"} for row in task] + \
        [row | {"source": "diverse"} for row in diverse]


def prepare_tokenizer(tokenizer, args) -> None:
    """Add the new tokens."""
    add_tokens(tokenizer, args.new_tokens)


def prepare_model(model, tokenizer, rows: list[dict], args):
    """LoRA, and the new tokens' rows as trained parameters (or LoRA on the embedding, too)."""
    if args.new_tokens:
        # before LoRA, which copies the rows it trains
        grow_embeddings(model, tokenizer, vars(args))
    targets = _lora_targets(model, args)
    if _is_mixed(targets):
        targets = [*_linear_names(model), *(name for name in targets if name != ALL_LINEAR)]
    args = args.with_values(lora_target_modules=targets)
    if not args.new_tokens or args.token_train == "lora":
        return add_lora(model, args)
    ids = tokenizer.convert_tokens_to_ids(args.new_tokens)
    return add_lora(model, args,
                    trainable_token_indices=dict.fromkeys(_embedding_names(model), ids))


def describe(model, tokenizer, rows: list[dict], args) -> dict:
    """The settings of LoRA, and the realised mixture."""
    lora = resolve_lora(args, model)
    targets = _lora_targets(model, args)
    if _is_mixed(targets):  # the wrapped model says what all-linear stands for
        targets = sorted(model.peft_config["default"].target_modules)
    lora["lora_target_modules"] = targets
    num_task = sum(row["source"] == "task" for row in rows)
    return lora | {"num_task_rows": num_task, "num_diverse_rows": len(rows) - num_task}


def build_tree(row: dict, tokenizer, args, rng: random.Random) -> Tree | None:
    """The turns before the reply, and the reply with its end token; None if they do not fit."""
    *context, reply = row["messages"]
    prompt = encode(tokenizer, context)
    # the reply is encoded apart, since inference encodes the prompt without it
    ids = tokenizer(reply["content"], add_special_tokens=False)["input_ids"]
    ids = [*ids, end_of_turn(tokenizer)]
    if len(prompt) + len(ids) > args.max_length:
        return None
    # of a packed batch, only the branch still tells which source a token is from
    branch = DIVERSE if row["source"] == "diverse" else TASK
    return Tree(Segment(prompt, children=[Segment(ids, LIKELIHOOD, branch=branch)]))


def compute_loss(model, batch: dict, args, step: int):
    """Mean over rows of -log p(token | before), averaged over the reply's tokens, in nats.

    Also logged, per micro-step: task_rows, and task_loss, the sum of their losses (so that
    task_loss / task_rows is their mean over any number of steps).
    """
    logps = trees.score(model, batch)
    row, num_rows = batch["row"], batch["num_rows"]
    # every row has its end token, so no count is 0
    counts = trees.sum_by_row(logps.new_ones(len(row)), row, num_rows)
    # each row has a mean of its own: in one over all tokens, long replies would dominate
    losses = trees.sum_by_row(-logps, row, num_rows) / counts
    is_task = trees.sum_by_row((batch["branch"] == TASK).to(losses), row, num_rows) > 0
    loss = losses.mean()
    return loss, {"loss": loss.detach(), "task_rows": is_task.sum(),
                  "task_loss": (losses.detach() * is_task).sum()}


def order_rows(rows: list[dict], args, rng: random.Random) -> list[int]:
    """The rows of a pass in random order, for --mix stratified with the task rows evenly spread."""
    order = defaults.shuffled(rows, args, rng)
    if args.mix == "shuffle":
        return order
    return mixing.spread(order, [row["source"] == "task" for row in rows])


parameter_groups = defaults.one_rate
after_pass = defaults.no_figures
save = defaults.save_adapter


def _embedding_names(model) -> list[str]:
    """The names of the input embedding and, where it is another matrix, of the output embedding."""
    layers = [model.get_input_embeddings()]
    # a tied output matrix is the same matrix, whose rows are trained once
    if model.get_output_embeddings().weight is not layers[0].weight:
        layers.append(model.get_output_embeddings())
    return [name.rpartition(".")[2] for layer in layers
            for name, module in model.named_modules() if module is layer]


def _lora_targets(model, args) -> list[str]:
    """The modules with LoRA: those of the flag and, last for --token_train lora, the embedding."""
    names = resolve_lora(args, model)["lora_target_modules"]
    if not args.new_tokens or args.token_train != "lora":
        return names
    embedding = _embedding_names(model)[0]
    return [*(name for name in names if name != embedding), embedding]


def _is_mixed(targets: list[str]) -> bool:
    """Whether all-linear stands among other names, where PEFT takes it for a module's name.

    PEFT finds no such module, and says nothing, since the other names match.
    """
    return ALL_LINEAR in targets and len(targets) > 1


def _linear_names(model) -> list[str]:
    """What all-linear stands for in a model without adapters, by the last part of the names."""
    output = model.get_output_embeddings()
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules()
                   if isinstance(module, (nn.Linear, Conv1D)) and module is not output})
