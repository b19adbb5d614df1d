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
import re
from collections import Counter
from pathlib import Path

import utils

# trees imports torch, so it is imported where it is used: --help must answer in half a second.

DEFAULTS = dict(  # as published
    learning_rate=2e-4, weight_decay=0.01, num_train_epochs=1, max_steps=-1, per_device_train_batch_size=16,
    gradient_accumulation_steps=4, save_steps=400, max_length=2048,
    lora_r=16, lora_alpha=16.0, lora_dropout=0.05, lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
SELF_SAMPLING = dict(temperature=0.7, top_p=0.95)  # as published, with max_new_tokens 512
SYSTEM = "You are a helpful AI assistant."
FORMAT = 'one line of JSON with the keys "thought" and "label", where the label is either "error" or "correct"'
TAG = re.compile(r"<[^\s<>]+>")
REFUSAL = re.compile(r"(?:i['’]?m|i am|we are) (?:very |so )?sorry\b|sorry, (?:but )?i\b|i apologi[sz]e\b|unfortunately, i\b|as an? (?:ai|artificial)\b"
                     r"|i (?:can['’]?t|cannot|can not|won['’]?t|am unable|['’]?m unable|am not able|don['’]?t have|do not have)\b", re.IGNORECASE)
TASK, DIVERSE = 0, 1  # the `branch` of a reply's tokens


def add_args(group) -> None:
    group.set_defaults(**DEFAULTS)
    group.add_argument("--diverse_file", help="messages that the model itself wrote (infer.py --self_sample), to be mixed in")
    group.add_argument("--diverse_ratio", type=float, default=100.0,
                       help="diverse rows per task row; 0 is the control (default: %(default)s, published run 260)")
    group.add_argument("--oversample", action="store_true", help="repeat diverse rows where there are fewer than asked")
    group.add_argument("--mix", choices=["shuffle", "stratified"], default="shuffle",
                       help="shuffle: all rows in random order, as published (default); stratified: task rows evenly spread")
    group.add_argument("--allow_foreign_cache", action="store_true", help="take diverse rows that another model wrote")
    group.add_argument("--new_tokens", nargs="+", default=[], metavar="TOKEN", help='tokens to add, such as "<sep>"')
    group.add_argument("--token_init", choices=["mean", "random", "description"], default="mean",
                       help="mean of all embeddings (default), a random draw like them, or the mean of a description's tokens")
    group.add_argument("--token_description", nargs="+", default=[FORMAT], metavar="TEXT",
                       help="what each new token stands for, in words (default: the JSON line of data/delia)")
    group.add_argument("--token_train", choices=["row", "lora"], default="row",
                       help="row: the new rows alone (default); lora: a low-rank update of all embeddings, as published")
    group.add_argument("--lr_warmup_steps", type=int, default=25, help="updates until the learning rate is reached (default: 25)")


# ---- rows ---------------------------------------------------------------------------------------


def load_rows(args) -> list[dict]:
    """Task rows, then the diverse rows drawn for them; --limit counts task rows. Prints the realised ratio."""
    if not 0 <= args.diverse_ratio < float("inf"):
        utils.die(2, f"--diverse_ratio {args.diverse_ratio} must be at least 0")
    if args.lr_warmup_steps < 0:
        utils.die(2, f"--lr_warmup_steps {args.lr_warmup_steps} must be at least 0")
    if args.diverse_ratio and not args.diverse_file:
        utils.die(2, "--diverse_ratio needs --diverse_file", "infer.py --method delia --self_sample writes one; --diverse_ratio 0 is the control")
    check_new_tokens(args)
    task = read_messages(args.train_file, args.new_tokens, strict=True)[: args.limit]
    args.limit = None  # it counts task rows, and they are cut
    text = json.dumps([row["messages"] for row in task], ensure_ascii=False)
    unused = [token for token in args.new_tokens if json.dumps(token, ensure_ascii=False)[1:-1] not in text]
    if unused:
        utils.die(2, f"--new_tokens {unused[0]}: no row of {args.train_file} mentions it", "a token learns from rows that hold it")
    cache = [row for row in read_cache(args) if not is_held_out(row)] if args.diverse_file else []
    diverse = mix_in(len(task), cache, args)
    args.num_task_rows, args.num_diverse_rows = len(task), len(diverse)
    print(f"{len(task)} task rows + {len(diverse)} diverse rows (of {len(cache)}): ratio {len(diverse) / len(task):g}")
    return [row | {"source": "task"} for row in task] + [row | {"source": "diverse"} for row in diverse]


def check_new_tokens(args) -> None:
    for token in args.new_tokens:
        if not token.strip() or token != token.strip() or args.new_tokens.count(token) > 1:
            utils.die(2, f"--new_tokens {json.dumps(token)}: a token must have text, no space at its ends, and stand once")
    if args.token_init == "description" and len(args.token_description) != len(args.new_tokens):
        utils.die(2, f"--token_init description needs a --token_description for each of {len(args.new_tokens)} new tokens, "
                  f"got {len(args.token_description)}")


def read_messages(path: str, new_tokens: list[str], strict: bool) -> list[dict]:
    """Rows of a messages file with `prompt`, the last user turn, and `file`, where they stand."""
    rows = utils.read_jsonl(path, lambda row: check_messages(row) or check_tokens(row, new_tokens, strict))
    return [{"messages": row["messages"], "prompt": row["messages"][-2]["content"], "file": f"{path}:{number}"}
            for number, row in enumerate(rows, 1)]


def check_messages(row: dict) -> str | None:
    """What is wrong with a row's messages, or None: maybe a system turn, then user and assistant by turns, assistant last."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return f'field "messages" must be a list of turns, got {json.dumps(messages)[:60]}'
    for number, turn in enumerate(messages, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            return f'field "messages": turn {number} needs "role" and "content", both strings'
        if not turn["content"].strip():
            return f'field "messages": turn {number} is empty'
    roles = [turn["role"] for turn in messages]
    first = 1 if roles[0] == "system" else 0
    for place, role in enumerate(roles[first:]):
        wanted = ("user", "assistant")[place % 2]
        if role != wanted:
            return f'field "messages": turn {first + place + 1} is by {json.dumps(role)}, its place is the {wanted}\'s'
    if roles[-1] != "assistant":
        return 'field "messages": the assistant\'s turn is missing at the end'
    return None


def check_tokens(row: dict, new_tokens: list[str], strict: bool) -> str | None:
    """What is wrong with the marks in a row, or None. strict: a task's row, whose <marks> must all be new tokens.

    A diverse row may hold any mark (code, HTML) but a new token.
    """
    for number, turn in enumerate(row["messages"], 1):
        if strict:
            unknown = [tag for tag in TAG.findall(turn["content"]) if tag not in new_tokens]
            if unknown:
                return f'turn {number} mentions {unknown[0]}, which is none of --new_tokens {" ".join(new_tokens) or "(none given)"}'
        else:
            found = [token for token in new_tokens if token in turn["content"]]
            if found:
                return f"turn {number} mentions {found[0]}, a new token; diverse rows must not"
    return None


def read_cache(args) -> list[dict]:
    """The rows of --diverse_file; dies unless its manifest says that the model to be trained wrote them."""
    rows = read_messages(args.diverse_file, args.new_tokens, strict=False)
    if args.allow_foreign_cache or not args.diverse_ratio:
        return rows
    manifest = Path(args.diverse_file).with_suffix(".json")
    hint = "write it with infer.py --method delia --self_sample, or pass --allow_foreign_cache"
    if not manifest.is_file():
        utils.die(2, f"{args.diverse_file}: no manifest {manifest.name} beside it, so nobody knows which model wrote it", hint)
    try:
        written_by = json.loads(manifest.read_text(encoding="utf-8"))["weights"]
    except (ValueError, KeyError, TypeError):
        utils.die(2, f"{manifest} is not a manifest of infer.py --self_sample", hint)
    own = utils.base_fingerprint(utils.model_dir(args.model_name))
    if written_by != own:
        by = f"by model {written_by}" if written_by else "through a server, by a model without fingerprint"
        utils.die(2, f"{args.diverse_file} was written {by}, {args.model_name} is {own}", hint)
    return rows


def is_held_out(row: dict) -> bool:
    """Whether a diverse row is kept for measuring what is forgotten: one query in ten, by its hash alone."""
    return int(utils.row_hash(row), 16) % 10 == 0


def mix_in(num_task: int, cache: list[dict], args) -> list[dict]:
    """diverse_ratio * num_task rows of the cache (to the nearest), each as often as any other but for the last round."""
    wanted = round(num_task * args.diverse_ratio)
    if wanted > len(cache) and not (args.oversample and cache):
        utils.die(2, f"--diverse_ratio {args.diverse_ratio:g} wants {wanted} diverse rows for {num_task} task rows, "
                  f"{args.diverse_file} has {len(cache)} (without its held-out tenth)",
                  f"draw more, --diverse_ratio {len(cache) / num_task:.4g}, or --oversample")
    rng, chosen = random.Random(f"{args.seed}-diverse"), []
    while len(chosen) < wanted:
        chosen += rng.sample(cache, min(len(cache), wanted - len(chosen)))
    return chosen


def order_rows(rows: list[dict], args, rng: random.Random) -> list[int]:
    """The order of a pass over the rows: shuffled, and for --mix stratified with the task rows evenly spread.

    Then any n successive rows hold the task's share of n, give or take one row.
    """
    order = list(range(len(rows)))
    rng.shuffle(order)
    if args.mix == "shuffle":
        return order
    task = [i for i in order if rows[i]["source"] == "task"]
    diverse = [i for i in order if rows[i]["source"] != "task"]
    total, count = len(rows), len(task)
    return [task.pop() if (place + 1) * count // total > place * count // total else diverse.pop() for place in range(total)]


# ---- training -----------------------------------------------------------------------------------


def prepare_model(model, tokenizer, args):
    """LoRA, and the new tokens' rows as trained parameters of their own (or LoRA on the embedding, too)."""
    if not args.new_tokens:
        return utils.add_lora(model, tokenizer, args)
    utils.grow_embeddings(model, tokenizer, vars(args))
    layers = [model.get_input_embeddings()]
    if model.get_output_embeddings().weight is not layers[0].weight:
        layers.append(model.get_output_embeddings())
    names = [name.rpartition(".")[2] for layer in layers for name, module in model.named_modules() if module is layer]
    if args.token_train == "row":
        ids = tokenizer.convert_tokens_to_ids(args.new_tokens)
        return utils.add_lora(model, tokenizer, args, trainable_token_indices={name: ids for name in names})
    args.lora_target_modules = [*(t for t in args.lora_target_modules if t != names[0]), names[0]]
    return utils.add_lora(model, tokenizer, args)


def build_tree(row: dict, tokenizer, args, rng: random.Random):
    """The turns before the reply, and the reply with its end token; None if both do not fit into --max_length."""
    from trees import LIKELIHOOD, Segment, Tree

    *context, reply = row["messages"]
    prompt = encode(tokenizer, context)
    ids = [*tokenizer(reply["content"], add_special_tokens=False)["input_ids"], utils.end_of_turn(tokenizer)]
    if len(prompt) + len(ids) > args.max_length:
        return None
    branch = DIVERSE if row["source"] == "diverse" else TASK
    return Tree(Segment(prompt, children=[Segment(ids, LIKELIHOOD, branch=branch)]))


def encode(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of turns up to where the reply starts; a template without a system role has it in the first user turn."""
    from jinja2 import TemplateError

    try:
        return utils.encode_messages(tokenizer, messages)
    except TemplateError:
        if messages[0]["role"] != "system":
            raise
        system, first, *rest = messages
        first = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
        return utils.encode_messages(tokenizer, [first, *rest])


def compute_loss(model, batch: dict, args):
    """Mean over rows of -log p(token | before), averaged over the reply's tokens, in nats.

    Also logged, a micro-step: task_rows, and task_loss, the sum of their losses (so task_loss / task_rows is their mean).
    """
    import trees

    logps = trees.score(model, batch)
    row, num_rows = batch["row"], batch["num_rows"]
    counts = trees.sum_by_row(logps.new_ones(len(row)), row, num_rows)
    losses = trees.sum_by_row(-logps, row, num_rows) / counts  # every row has its end token, so counts are above 0
    is_task = trees.sum_by_row((batch["branch"] == TASK).to(losses), row, num_rows) > 0
    loss = losses.mean()
    return loss, {"loss": loss.detach(), "task_rows": is_task.sum(), "task_loss": (losses.detach() * is_task).sum()}


# ---- inference ----------------------------------------------------------------------------------


def decode_tree(row: dict, tokenizer, args):
    """The turns before the reply, once, with num_branches equal branches."""
    from trees import Tree, branch_prompts

    prompt = encode(tokenizer, context_of(row))
    if len(prompt) > args.max_length - args.max_new_tokens:
        return None
    return Tree(branch_prompts([prompt] * args.num_branches, list(range(1, args.num_branches + 1))))


def decode_messages(row: dict, args) -> list[list[dict]]:
    """The same turns, for a server."""
    return [context_of(row)]


def context_of(row: dict) -> list[dict]:
    messages = row["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def add_infer_args(parser) -> None:
    group = parser.add_argument_group("method delia")
    group.set_defaults(num_response_per_input=1, max_new_tokens=512)
    next(a for a in parser._actions if a.dest == "test_file").nargs = "+"
    group.add_argument("--self_sample", action="store_true",
                       help="--test_file has queries with reference answers: write the model's own answers, the diverse rows of train.py "
                            f"(sampling, temperature {SELF_SAMPLING['temperature']}, top_p {SELF_SAMPLING['top_p']}, as published)")


def self_sampling_defaults(args) -> None:
    """Published sampling settings where the command says nothing else."""
    if args.decoding != "sampling" or args.overgenerate:
        utils.die(2, "--self_sample draws from the model as it is", "drop --decoding and --overgenerate")
    for name, value in SELF_SAMPLING.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def inference_rows(args) -> list[dict]:
    """Messages to answer, or with --self_sample queries to answer again; settles files and whether the model is untuned."""
    files, args.test_file = args.test_file, " ".join(args.test_file)
    if args.engine == "hf" and not (Path(args.model_name_or_path) / "adapter_config.json").is_file():
        args.mode = "untuned"
    if not args.self_sample:
        rows = [row for path in files for row in utils.read_jsonl(path, check_messages)]
        return [row | {"prompt": row["messages"][-2]["content"]} for row in rows[: args.limit]]
    cache = Path(args.save_file)
    if cache.suffix != ".jsonl":
        utils.die(2, f"--save_file {cache} must end in .jsonl", f"{cache.with_suffix('.jsonl')}")
    if cache.exists() and not args.resume:
        utils.die(2, f"{cache} is already there", "--resume goes on with it; or give another --save_file")
    args.save_file = str(cache.with_suffix(".draws.jsonl"))
    rows = [row for path in files for row in utils.read_jsonl(path, check_query)]
    return [{"prompt": row["query"], "answer": row["answer"], "messages": reanswer_messages(row["query"], row["answer"])}
            for row in rows[: args.limit]]


def check_query(row: dict) -> str | None:
    for name in ("query", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f'field "{name}" must be a string with text, got {json.dumps(row.get(name))[:60]}'
    return None


def reanswer_messages(query: str, answer: str) -> list[dict]:
    """The query with its reference answer as an example, then the same query again: the model answers in its own words."""
    turns = [("system", SYSTEM), ("user", query), ("assistant", answer), ("user", query)]
    return [{"role": role, "content": content} for role, content in turns]


def write_cache(draws_file: Path, summary: dict, run: dict, args) -> None:
    """From X.draws.jsonl the cache X.jsonl, messages of the answers that are kept, and X.json, its manifest."""
    cache = draws_file.with_name(draws_file.name.removesuffix(".draws.jsonl") + ".jsonl")
    rows, counts = keep_answers(utils.read_jsonl(draws_file))
    utils.atomic_write(cache, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    keep = ("method", "base_model", "base_sha256", "weights")
    manifest = {"kind": "self-samples", **{name: run.get(name) for name in keep}, "queries": args.test_file,
                "settings": {name: getattr(args, name) for name in ("engine", "temperature", "top_p", "max_new_tokens",
                                                                    "num_response_per_input", "seed")},
                "counts": counts, "versions": utils.versions()}
    utils.atomic_write(cache.with_suffix(".json"), json.dumps(manifest, indent=1))
    said = ", ".join(f"{number} {name}" for name, number in counts.items())
    print(f"{cache}: {said}; manifest {cache.with_suffix('.json')}\n"
          f"next: python train.py --method delia --train_file data/delia/train.jsonl --new_tokens \"<sep>\" --diverse_file {cache}")


def keep_answers(draws: list[dict]) -> tuple[list[dict], dict]:
    """The message rows of answers that are whole, not empty, no refusal and new, and the counts of all others.

    copied: answers that are kept although they say no more than the reference, word for word.
    """
    rows, seen = [], set()
    counts = Counter(dict.fromkeys(("drawn", "missing", "truncated", "empty", "refused", "duplicate", "kept", "copied"), 0))
    for draw in draws:
        counts["missing"] += draw.get("warnings", {}).get("missing", 0)
        for place, answer in enumerate(draw["preds"]):
            counts["drawn"] += 1
            plain = utils.normalise(answer)
            fault = ("truncated" if place in draw["cut_at"] else "empty" if not plain else
                     "refused" if REFUSAL.match(answer) else "duplicate" if plain in seen else None)
            counts[fault or "kept"] += 1
            if fault:
                continue
            seen.add(plain)
            counts["copied"] += plain == utils.normalise(draw["answer"])
            rows.append({"messages": [{"role": "user", "content": draw["prompt"]}, {"role": "assistant", "content": answer}]})
    return rows, dict(counts)


def infer_flags(args, checkpoint: Path) -> list[str]:
    """The flags of infer.py that answer the test set with what was trained."""
    return ["--method", "delia", "--model_name_or_path", f"{checkpoint}/", "--test_file", "data/delia/test.jsonl",
            "data/delia/test_seen.jsonl", "--decoding", "greedy", "--max_new_tokens", "96",
            "--save_file", f"outs/{args.exp_name}.jsonl"]
