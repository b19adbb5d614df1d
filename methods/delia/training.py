"""Condensing instructions into a new token, among the model's own samples: method delia.

"DELIA", arXiv:2408.10841. Fine-tuning on a narrow task learns the surface of the task. Here N task rows are mixed with
r * N rows that the model itself wrote in answer to unrelated queries, so that what the task alone would bend is held in
place. The loss is plain next-token cross-entropy on the reply, for both sources. A new token such as <sep> stands in the
task's prompts in place of a format description; it is never a target and learns through the replies that look back at it.

    infer.py --method delia --self_sample    queries -> the model's own answers, the cache
    train.py --method delia                  task rows + diverse_ratio * task rows of the cache -> check_N
    infer.py --method delia, eval.py         does the token ask for the format, and only where it should?

Rows are `{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}`, maybe with a system
turn first and several exchanges; the last turn is learnt, the others are its context.

Differences from the paper's code:
- Every new id is initialised itself (there: only the padding rows behind it), and has a row of its own to learn, in the
  input embedding and, where that is another matrix, in the output embedding (`--token_train row`). `lora` is the
  published way: a low-rank update of the whole embedding, which moves all tokens.
- The end token is learnt; prompts are token ids with a generation prompt, and the reply is stripped, not cut by two characters.
- Own samples that are cut, empty, refusals or repeated are left out and counted, and a manifest says which model wrote them.
- Fewer cached rows than asked is an error, or `--oversample`; the realised ratio is printed and logged.
- One query in ten is never trained on, whatever the ratio, so that forgetting can be measured (`is_held_out`).
- A batch's loss is the mean over its rows of the mean over the reply's tokens, so that a batch of 4 equals 4 accumulated
  batches of 1; there it is the mean over all tokens of a batch, which long replies dominate.
- `--mix stratified` spreads the task rows evenly; random batches of 64 at r = 260 hold no task row in 78 of 100 steps.
"""

from __future__ import annotations

import json
import random

import trees
from methods.delia.flags import check_new_tokens
from methods.delia.messages import encode, read_messages
from methods.delia.mixing import is_held_out, mix_in, read_cache
from modeling.adapters import add_lora, grow_embeddings
from modeling.prompts import end_of_turn
from utils import USAGE, fail

TASK, DIVERSE = 0, 1  # the `branch` of a reply's tokens


def load_rows(args) -> list[dict]:
    """Task rows, then the diverse rows drawn for them; --limit counts task rows. Prints the realised ratio."""
    if not 0 <= args.diverse_ratio < float("inf"):
        fail(USAGE, f"--diverse_ratio {args.diverse_ratio} must be at least 0")
    if args.lr_warmup_steps < 0:
        fail(USAGE, f"--lr_warmup_steps {args.lr_warmup_steps} must be at least 0")
    if args.diverse_ratio and not args.diverse_file:
        fail(USAGE, "--diverse_ratio needs --diverse_file", "infer.py --method delia --self_sample writes one; --diverse_ratio 0 is the control")
    check_new_tokens(args)
    task = read_messages(args.train_file, args.new_tokens, strict=True)[: args.limit]
    args.limit = None  # it counts task rows, and they are cut
    text = json.dumps([row["messages"] for row in task], ensure_ascii=False)
    unused = [token for token in args.new_tokens if json.dumps(token, ensure_ascii=False)[1:-1] not in text]
    if unused:
        fail(USAGE, f"--new_tokens {unused[0]}: no row of {args.train_file} mentions it", "a token learns from rows that hold it")
    cache = [row for row in read_cache(args) if not is_held_out(row)] if args.diverse_file else []
    diverse = mix_in(len(task), cache, args)
    args.num_task_rows, args.num_diverse_rows = len(task), len(diverse)
    print(f"{len(task)} task rows + {len(diverse)} diverse rows (of {len(cache)}): ratio {len(diverse) / len(task):g}")
    return [row | {"source": "task"} for row in task] + [row | {"source": "diverse"} for row in diverse]


def prepare_model(model, tokenizer, args):
    """LoRA, and the new tokens' rows as trained parameters of their own (or LoRA on the embedding, too)."""
    if not args.new_tokens:
        return add_lora(model, tokenizer, args)
    grow_embeddings(model, tokenizer, vars(args))
    layers = [model.get_input_embeddings()]
    if model.get_output_embeddings().weight is not layers[0].weight:
        layers.append(model.get_output_embeddings())
    names = [name.rpartition(".")[2] for layer in layers for name, module in model.named_modules() if module is layer]
    if args.token_train == "row":
        ids = tokenizer.convert_tokens_to_ids(args.new_tokens)
        return add_lora(model, tokenizer, args, trainable_token_indices={name: ids for name in names})
    args.lora_target_modules = [*(t for t in args.lora_target_modules if t != names[0]), names[0]]
    return add_lora(model, tokenizer, args)


def build_tree(row: dict, tokenizer, args, rng: random.Random):
    """The turns before the reply, and the reply with its end token; None if both do not fit into --max_length."""
    from trees import LIKELIHOOD, Segment, Tree

    *context, reply = row["messages"]
    prompt = encode(tokenizer, context)
    ids = [*tokenizer(reply["content"], add_special_tokens=False)["input_ids"], end_of_turn(tokenizer)]
    if len(prompt) + len(ids) > args.max_length:
        return None
    branch = DIVERSE if row["source"] == "diverse" else TASK
    return Tree(Segment(prompt, children=[Segment(ids, LIKELIHOOD, branch=branch)]))


def compute_loss(model, batch: dict, args):
    """Mean over rows of -log p(token | before), averaged over the reply's tokens, in nats.

    Also logged, a micro-step: task_rows, and task_loss, the sum of their losses (so task_loss / task_rows is their mean).
    """

    logps = trees.score(model, batch)
    row, num_rows = batch["row"], batch["num_rows"]
    counts = trees.sum_by_row(logps.new_ones(len(row)), row, num_rows)
    losses = trees.sum_by_row(-logps, row, num_rows) / counts  # every row has its end token, so counts are above 0
    is_task = trees.sum_by_row((batch["branch"] == TASK).to(losses), row, num_rows) > 0
    loss = losses.mean()
    return loss, {"loss": loss.detach(), "task_rows": is_task.sum(), "task_loss": (losses.detach() * is_task).sum()}
