"""Forcing diffuse distributions: method diffuse.

"Forcing Diffuse Distributions out of Language Models", arXiv:2404.10859 (COLM 2024). For a request x, targets y
with a wanted distribution w(y), and the model's probability p(y | x) of the whole token sequence of y,

    L(x) = - sum_y w(y) log p(y | x) = KL(w || p) + H(w)          in nats, so H(w) is the floor

One tree holds a request with all its targets: they share the request and every common prefix (a token trie), and a
shared token carries the sum of its targets' weights. That is the same loss as one row per target, to rounding.

A prompt file is a JSON object: `request` (the user message), `response` (a prefix of the answer, or several),
`targets`, and maybe `weights` (default: uniform; normalised) and `eos` (default true: the end token is learnt, too).

Differences from the paper's code:
- Targets are tokenised apart from the request and end with the template's own end-of-turn token.
- Files are checked: unknown keys, empty or equal targets, weights, and token sequences that start one another.
- Several response prefixes are all learnt at once, each with its share of the weight (the floor is then H(w) + ln R);
  the code draws one per target and pass, which has the same mean.
- `batch_size` only bounds memory: it is the number of targets computed at a time, all by default.
- Early stopping looks at fresh losses, measured after a pass, and every prompt must be within (1 + gamma) H(w); the
  code adds up losses from before and after the updates of the pass.
- Everything is seeded, and files are taken in the order of their names; the order of prompts is drawn every pass.
- `load_model` starts from `ckpt_dir`; sampling needs `--mode`, and draws as many as asked (the code drops a remainder).
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import utils
from flags import add_alias

# trees imports torch, so it is imported where it is used: --help must answer in half a second.

KEYS = ("request", "response", "targets", "weights", "eos")
DEFAULTS = dict(  # as published
    learning_rate=5e-5, adam_epsilon=1e-5, weight_decay=0.01, max_grad_norm=1.0, num_train_epochs=50, max_steps=-1,
    lora_r=4, lora_alpha=8.0, lora_dropout=0.0,
    lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


def add_args(group) -> None:
    group.set_defaults(**DEFAULTS)
    add_alias(group, "model_name", "--model")
    add_alias(group, "num_train_epochs", "--n_iters")
    add_alias(group, "train_file", "--train_prompts", nargs="+", help="prompt files, or folders with *.json")
    add_prompt_args(group)
    group.add_argument("--batch_size", type=int, help="targets computed at a time; bounds memory, not the result (default: all)")
    group.add_argument("--max_batch_tokens", type=int, default=4096,
                       help="tokens computed at a time; bounds memory, not the result (default: %(default)s)")
    group.add_argument("--early_stop", action="store_true",
                       help="stop when every prompt's loss is at most (1 + gamma) times the entropy of its targets")
    group.add_argument("--gamma", type=float, default=0.2, help="see --early_stop (default: %(default)s)")
    group.add_argument("--load_model", action="store_true", help="start from the adapter in --ckpt_dir")
    group.add_argument("--ckpt_dir", metavar="FOLDER", help="check_N folder, or a run's folder: its newest checkpoint")
    group.add_argument("--generate", action="store_true", help="sample all prompts after training, as infer.py --mode lora does")
    group.add_argument("--n_generations", type=int, default=1000, help="with --generate: replies per prompt (default: %(default)s)")
    group.add_argument("--max_new_tokens", type=int, default=50, help="with --generate: tokens per reply at most (default: %(default)s)")


def add_prompt_args(group) -> None:
    """The flags of train.py and infer.py that say which prompts, and those of sampling."""
    group.add_argument("--test_prompts", nargs="+", default=[], help="prompts to sample that are not trained on")
    group.add_argument("--leave_out", metavar="TASK", help="train on the other tasks (folders) and test on this one")
    group.add_argument("--leave_in", metavar="TASK", help="train on this task (folder) alone")


# ---- prompt files -------------------------------------------------------------------------------


def load_rows(args) -> list[dict]:
    """The training prompts; the test prompts are checked as well."""
    for name, least in (("batch_size", 1), ("max_batch_tokens", 1), ("gamma", 0)):
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            utils.die(2, f"--{name} {value} must be at least {least}")
    if args.load_model and not args.ckpt_dir:
        utils.die(2, "--load_model needs --ckpt_dir", "name the adapter to start from")
    if args.ckpt_dir and not args.load_model:
        utils.note("note: --ckpt_dir is read with --load_model only; training starts from a new adapter")
    rows, _ = read_prompts(args)
    bare = [row["file"] for row in rows if not row["targets"]]
    if bare:
        utils.die(2, f'{bare[0]}: field "targets" is empty', "there is nothing to learn; name it in --test_prompts")
    return rows


def read_prompts(args) -> tuple[list[dict], list[dict]]:
    """The rows of --train_prompts and --test_prompts after --leave_out or --leave_in, which also name the run."""
    train_files = prompt_files(args.train_file)
    train = [read_prompt(path) for path in train_files]
    test = [read_prompt(path) for path in prompt_files(args.test_prompts) if path not in train_files]
    task = args.leave_out or args.leave_in
    if not task:
        return train, test
    tasks = sorted({row["task"] for row in train})
    if args.leave_out and args.leave_in:
        utils.die(2, "--leave_out and --leave_in exclude each other", "give one of them")
    if task not in tasks or (args.leave_out and len(tasks) == 1):
        utils.die(2, f"--{'leave_out' if args.leave_out else 'leave_in'} {task}: the training prompts are of the tasks "
                  f"{', '.join(tasks)}", "a task is the name of the folder that holds the files")
    own = [row for row in train if row["task"] == task]
    if args.leave_in:
        args.exp_name += f"_only_{task}"
        return own, test
    args.exp_name += f"_without_{task}"
    return [row for row in train if row["task"] != task], test + own


def prompt_files(names: list[str]) -> list[Path]:
    """The prompt files that names of files and folders stand for, each once, folders in the order of their paths."""
    files: list[Path] = []
    for name in names:
        path = Path(name)
        found = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            utils.die(2, f"{path} {'holds no *.json' if path.is_dir() else 'is not there'}", "give prompt files or folders of them")
        files += [file for file in found if file not in files]
    return files


def read_prompt(path: Path) -> dict:
    """A prompt file as a row: prompt, response (list), targets, weights (sum 1), eos, file and task; dies over faults."""
    try:
        prompt = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=utils.unique_keys)
        problem = check_prompt(prompt)
    except UnicodeDecodeError:
        problem = "not UTF-8"
    except (ValueError, RecursionError) as error:
        problem = f"not JSON: {error}"
    if problem:
        utils.die(2, f"{path}: {problem}", f"a prompt file holds {', '.join(KEYS)}")
    targets, response = prompt["targets"], prompt["response"]
    weights = prompt.get("weights") or [1.0] * len(targets)
    return {
        "prompt": prompt["request"], "response": [response] if isinstance(response, str) else response, "targets": targets,
        "weights": [w / math.fsum(weights) for w in weights], "eos": prompt.get("eos", True),
        "file": path.as_posix(), "task": path.resolve().parent.name}


def check_prompt(prompt: object) -> str | None:
    """What is wrong with a prompt file's content, or None."""
    if not isinstance(prompt, dict):
        return f"must be one JSON object, got {type(prompt).__name__}"
    unknown = [key for key in prompt if key not in KEYS]
    missing = [key for key in KEYS[:3] if key not in prompt]
    if unknown or missing:
        return f'key "{unknown[0]}" is unknown' if unknown else f'field "{missing[0]}" is missing'
    request, response, targets, weights, eos = (prompt.get(key) for key in KEYS)
    if not isinstance(request, str) or not request.strip():
        return f'field "request" must be a string with text, got {json.dumps(request)[:40]}'
    prefixes = [response] if isinstance(response, str) else response
    if not isinstance(prefixes, list) or not prefixes or not all(isinstance(p, str) for p in prefixes):
        return f'field "response" must be a string or a list of strings, got {json.dumps(response)[:40]}'
    if len(set(prefixes)) < len(prefixes):
        return 'field "response": a prefix stands twice'
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        return f'field "targets" must be a list of strings, got {json.dumps(targets)[:40]}'
    for number, target in enumerate(targets, 1):
        if not target.strip():
            return f'field "targets": target {number} is empty'
        if target in targets[: number - 1]:
            return f'field "targets": {json.dumps(target, ensure_ascii=False)} stands twice, as {targets.index(target) + 1} and {number}'
    if "eos" in prompt and not isinstance(eos, bool):
        return f'field "eos" must be true or false, got {json.dumps(eos)[:40]}'
    return check_weights(weights, len(targets)) if "weights" in prompt else None


def check_weights(weights: object, count: int) -> str | None:
    """What is wrong with the weights of so many targets, or None."""
    if not isinstance(weights, list) or any(isinstance(w, bool) or not isinstance(w, (int, float)) for w in weights):
        return f'field "weights" must be a list of numbers, got {json.dumps(weights)[:40]}'
    if len(weights) != count:
        return f'field "weights" has {len(weights)} numbers for {count} targets'
    for number, weight in enumerate(weights, 1):
        if not 0 <= weight < math.inf:  # false for nan
            return f'field "weights": number {number} is {weight}, it must be at least 0'
    return 'field "weights": all are 0' if weights and not any(weights) else None


# ---- training -----------------------------------------------------------------------------------


def prepare_model(model, tokenizer, args):
    """A new LoRA adapter, or with --load_model the one in --ckpt_dir, trained on."""
    if not args.load_model:
        return utils.add_lora(model, tokenizer, args)
    folder = Path(args.ckpt_dir)
    if folder.is_dir() and not (folder / "adapter_config.json").exists():
        folder = utils.newest_checkpoint(folder) or folder
    utils.check_adapter(folder)
    from peft import PeftModel, prepare_model_for_kbit_training

    if args.load_in_4bit:
        model = prepare_model_for_kbit_training(model, args.gradient_checkpointing)
    model = PeftModel.from_pretrained(model, folder, is_trainable=True)
    config = model.peft_config["default"]
    args.lora_r, args.lora_alpha, args.lora_dropout = config.r, config.lora_alpha, config.lora_dropout
    args.lora_target_modules = sorted(config.target_modules)
    return model


def target_sequences(row: dict, tokenizer) -> list[list[int]]:
    """Token ids of every target under every response prefix, [target x prefix], targets first; dies over clashes."""
    from trees import prefix_clash

    texts = [prefix + target for target in row["targets"] for prefix in row["response"]]
    end = [utils.end_of_turn(tokenizer)] if row["eos"] else []
    sequences = [tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in texts]
    clash = prefix_clash(sequences)
    if clash:
        first, second = (json.dumps(texts[i], ensure_ascii=False) for i in clash)
        hint = "make one of them longer" if row["eos"] else 'let every target end in a mark of its own, or set "eos" to true'
        utils.die(2, f'{row["file"]}: field "targets": the tokens of {first} equal or start those of {second}', hint)
    return sequences


def distribution_tree(row: dict, tokenizer, weights: list[float]):
    """A request with its targets as a trie, a weight each (their prefixes share it); targets of weight 0 are left out.

    The leaf of target i under prefix r carries branch i * R + r.
    """
    from trees import Segment, Tree, target_trie

    num_prefixes = len(row["response"])
    shares = [w / num_prefixes for w in weights for _ in range(num_prefixes)]
    kept = [i for i, share in enumerate(shares) if share]
    sequences = target_sequences(row, tokenizer)
    root = Segment(utils.encode_prompt(tokenizer, row["prompt"]))
    root.children = target_trie([sequences[i] for i in kept], [shares[i] for i in kept])
    for segment in leaves(root):
        segment.branch = kept[segment.branch]
    return Tree(root)


def leaves(segment) -> list:
    from trees import walk

    return [path[-1] for path in walk(segment) if not path[-1].children]


def build_tree(row: dict, tokenizer, args, rng: random.Random):
    """The request and the trie of its targets; None if the longest target does not fit into --max_length."""
    from trees import padded_shape

    tree = distribution_tree(row, tokenizer, row["weights"])
    return tree if padded_shape(tree)[1] <= args.max_length else None


def compute_loss(model, batch: dict, args):
    """Mean over prompts of -sum_y w(y) log p(y | x), in nats; also logged: its floor H(w) and KL(w || p) = loss - floor."""
    losses, floors = losses_and_floors(model, batch, args)
    loss, floor = losses.mean(), floors.mean()
    return loss, {"loss": loss.detach(), "kl": (loss - floor).detach(), "floor": floor}


def losses_and_floors(model, batch: dict, args):
    """Per prompt of a packed batch: the loss and the entropy of its targets' weights, both (num_rows,), in nats."""
    import trees

    logps = trees.score_in_parts(model, batch, args.batch_size or len(batch["last"]), args.max_batch_tokens)
    weight, row, token = batch["weight"], batch["row"], batch["token"]
    is_leaf = batch["last"][token] == token  # the weight of a target's last token is the target's own
    entropy = -weight * weight.log() * is_leaf
    return trees.sum_by_row(-weight * logps, row, batch["num_rows"]), trees.sum_by_row(entropy, row, batch["num_rows"])


def measure(model, rows: list[dict], forest: list, args) -> tuple[bool, dict]:
    """Fresh figures of every prompt: whether all are within the threshold of --gamma, and a line for the log."""
    import torch

    import trees

    was_training, figures = model.training, {}
    model.eval()
    with torch.no_grad():
        for row, tree in zip(rows, forest, strict=True):
            batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in trees.pack([tree]).items()}
            losses, floors = losses_and_floors(model, batch, args)
            figures[row["file"]] = losses.item(), floors.item()
    model.train(was_training)
    line = {"prompts": {file: {"loss": round(loss, 6), "kl": round(loss - floor, 6), "floor": round(floor, 6)}
                        for file, (loss, floor) in figures.items()}}
    return all(is_learnt(loss, floor, args.gamma) for loss, floor in figures.values()), line


def is_learnt(loss: float, floor: float, gamma: float) -> bool:
    """Whether a loss is within the published threshold, (1 + gamma) times its floor."""
    return loss <= (1 + gamma) * floor


# ---- sampling -----------------------------------------------------------------------------------


def decode_tree(row: dict, tokenizer, args):
    """A row's request, as it is, once, with num_branches equal branches."""
    from trees import Tree, branch_prompts

    prompts, dropped = utils.fit_prompts(row, [None], tokenizer, args.max_input_length, args.max_length - args.max_new_tokens)
    if not prompts:
        return None
    return Tree(branch_prompts(prompts * args.num_branches, list(range(1, args.num_branches + 1))), dropped)


def decode_messages(row: dict, args) -> list[str]:
    """The same as a user message, for a server."""
    return [utils.build_prompt(row)]


def add_infer_args(parser) -> None:
    """The flags that infer.py has for this method; a training config serves as it is, its other keys are ignored."""
    import train

    group = parser.add_argument_group("method diffuse")
    for name in ("test_file", "save_file"):
        next(a for a in parser._actions if a.dest == name).required = False
    group.set_defaults(num_response_per_input=1000, max_new_tokens=50, batch_size=1, model_name_or_path=None)
    add_alias(group, "num_response_per_input", "--n_generations")
    group.add_argument("--mode", choices=["untuned", "lora"], help="the model as it is, or with what train.py made of it")
    group.add_argument("--model", "--model_name", dest="model_name", default=utils.EMBEDDED, help="the untuned model (default: smollm2)")
    group.add_argument("--train_prompts", "--train_file", dest="train_file", nargs="+", default=[], help="the prompts trained on")
    add_prompt_args(group)
    group.add_argument("--split", choices=["all", "train", "test"], default="all", help="which prompts are sampled (default: all)")
    group.add_argument("--n_batch_size", type=int, default=100, help="replies drawn at a time under one prefill (default: 100)")
    group.add_argument("--output_dir", default="checkpoints", help="where train.py put its runs (default: %(default)s)")
    group.add_argument("--exp_name", default="diffuse", help="the run's folder; its newest checkpoint is used (default: %(default)s)")
    known = train.build_parser("diffuse")
    parser.ignored = {"alg_config", *(a.dest for a in known._actions)}


def inference_rows(args) -> list[dict]:
    """The prompts to sample; settles the checkpoint, the file to write and how many replies share a prefill."""
    if args.n_batch_size < 1:
        utils.die(2, f"--n_batch_size {args.n_batch_size} must be at least 1")
    if args.mode is None:
        utils.die(2, "--method diffuse needs --mode", "untuned: the model as it is; lora: the checkpoint of the run")
    if args.decoding == "sampling":
        args.num_branches = min(args.num_drawn, args.n_batch_size)
    if args.test_file:
        rows = utils.read_jsonl(args.test_file, lambda row: utils.check_row(row, candidates=False))
    else:
        train, test = read_prompts(args)
        rows = [row | {"split": "train"} for row in train] * (args.split != "test")
        rows += [row | {"split": "test"} for row in test] * (args.split != "train")
        args.test_file = " ".join(args.train_file + args.test_prompts)
        if not rows:
            utils.die(2, "no prompts to sample", "--config FILE.yaml, --train_prompts or --test_prompts name them")
    settle_model(args)
    args.save_file = args.save_file or f"outs/{args.exp_name}_{args.mode}.jsonl"
    utils.note(f"mode {args.mode}: {args.model_name_or_path}")
    return [row | {"mode": args.mode} for row in rows[: args.limit]]


def settle_model(args) -> None:
    """--model_name_or_path of the mode: the base model, or the newest checkpoint of the run."""
    if args.engine == "openai":
        return
    if args.mode == "untuned":
        if args.model_name_or_path:
            utils.die(2, "--mode untuned samples --model, not --model_name_or_path", "give --model NAME, or --mode lora")
        args.model_name_or_path = args.model_name
    elif args.model_name_or_path is None:
        run_dir = Path(args.output_dir) / args.exp_name
        checkpoint = utils.newest_checkpoint(run_dir)
        if checkpoint is None:
            utils.die(2, f"{run_dir} holds no whole checkpoint", "train it with train.py, or give --model_name_or_path check_N")
        args.model_name_or_path = str(checkpoint)


def infer_flags(args, checkpoint: Path) -> list[str]:
    """The flags of infer.py that sample what was trained."""
    where = ["--config", args.config] if args.config else ["--train_prompts", *args.train_file, "--model", args.model_name]
    name = args.exp_name
    for flag in ("leave_out", "leave_in"):
        if task := getattr(args, flag):
            where += [f"--{flag}", task]
            name = name.removesuffix(f"_{'without' if flag == 'leave_out' else 'only'}_{task}")
    return ["--method", "diffuse", *where, "--mode", "lora", "--output_dir", args.output_dir, "--exp_name", name,
            "--n_generations", str(args.n_generations), "--max_new_tokens", str(args.max_new_tokens)]
