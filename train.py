"""Fine-tune a model so that one prompt has several good answers.

    python train.py --train_file data/train_dialogs_1k.jsonl --model_name smollm2 --exp_name my_peft \\
        --num_train_epochs 3 --max_steps 3000 --learning_rate 5e-4
    python train.py --config configs/possibility/mistral_peft.yaml
    accelerate launch --num_processes 8 train.py --config configs/possibility/mistral_peft.yaml

flags -> rows -> prompt trees -> packed batches -> loss -> checkpoints/NAME/check_N. Steps count
micro-batches of contexts, so check_1000 is one pass over 1,000 contexts at batch 1.
"""

from __future__ import annotations

import json
import math
import os
import random
import shlex
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import utils
from flags import FlagParser, parse_flags
from methods import METHODS, OWN_ADAPTER, OWN_INFERENCE, load_method
from modeling.adapters import add_tokens
from modeling.checkpoints import finish_adapter
from modeling.models import base_fingerprint, load_model, load_tokenizer, model_dir
from modeling.prompts import refuse_special_tokens
from training.flags import add_lora_args
from utils import DIVERGED, TRY_LATER, USAGE, fail, info, warn

CONFLICTS = ("method", "base_sha256", "data_sha256", "seed", "lora_r", "lora_alpha", "lora_target_modules")
SCHEDULES = ("constant_with_warmup", "linear", "cosine")


def build_parser(method: str | None) -> FlagParser:
    """All flags of training with a method (peft by default)."""
    method = method or "peft"
    trainable = [name for name in METHODS if name != "base"]
    if method not in trainable:
        fail(USAGE, f"--method {method} cannot be trained", f"one of {', '.join(trainable)}")
    parser = FlagParser(prog="train.py", description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--train_file", required=True, help="JSONL file or hub data set name")
    group.add_argument("--limit", type=int, help="use the first N rows only (default: all)")
    group.add_argument("--max_length", type=int, default=512, help="tokens of prompt and reply together (default: %(default)s)")
    group.add_argument("--max_input_length", type=int, default=250, help="words of the context; older turns go (default: %(default)s)")
    group = parser.add_argument_group("model")
    group.add_argument("--model_name", default=utils.EMBEDDED, help="hub id, folder, or smollm2 (default)")
    group.add_argument("--load_in_4bit", action="store_true", help="NF4 weights (needs bitsandbytes)")
    group.add_argument("--attn_implementation", default="sdpa", choices=["sdpa", "eager", "flex_attention"],
                       help="attention kernel; flex_attention on GPUs (default: %(default)s)")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, about a third slower")
    group.add_argument("--chat_template", metavar="FILE", help="Jinja chat template, or none for plain prompts")
    add_lora_args(group)
    group = parser.add_argument_group("training")
    group.add_argument("--method", default=method, choices=trainable, help="what is learnt (default: peft)")
    group.add_argument("--learning_rate", type=float, default=1e-5, help="AdamW learning rate (default: %(default)s)")
    group.add_argument("--lr_scheduler_type", choices=SCHEDULES, default=SCHEDULES[0],
                       help="constant (default, as published), or falling to 0 at the last step")
    group.add_argument("--per_device_train_batch_size", type=int, default=1, help="contexts per micro-step (default: 1)")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-steps per update (default: 1)")
    group.add_argument("--num_train_epochs", type=int, default=1, help="passes over the rows at most (default: %(default)s)")
    group.add_argument("--max_steps", type=int, default=1000, help="micro-steps at most, -1: no limit (default: %(default)s)")
    group.add_argument("--weight_decay", type=float, default=0.0, help="AdamW weight decay (default: %(default)s)")
    group.add_argument("--clip_norm", action="store_true", help="clip the gradient norm at 0.3")
    group.add_argument("--max_grad_norm", type=float, default=0.0, help="clip the gradient norm at this, 0 is off (default: %(default)s)")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="AdamW epsilon (default: %(default)s)")
    group.add_argument("--seed", type=int, default=42, help="order, numbers and dropout (default: 42)")
    load_method(method).add_args(parser.add_argument_group(f"method {method}"))
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="checkpoints", help="where runs lie (default: %(default)s)")
    group.add_argument("--exp_name", default=method, help="the run's folder (default: the method's name)")
    group.add_argument("--save_steps", type=int, default=500, help="micro-steps between checkpoints (default: 500)")
    group.add_argument("--loss_steps", type=int, default=100, help="micro-steps between log lines (default: 100)")
    group.add_argument("--report_to", default="none", help="tensorboard, wandb or trackio, beside metrics.jsonl")
    group.add_argument("--resume", nargs="?", const="newest", metavar="CHECKPOINT",
                       help="go on from the newest whole checkpoint, or from the one named")
    group.add_argument("--allow_data_change", action="store_true", help="resume although the rows differ")
    group.add_argument("--dry_run", action="store_true", help="show two examples and token counts, train nothing")
    return parser


def check_flags(args) -> None:
    """Die over flags that contradict each other, before anything is loaded."""
    at_least = {1: ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "save_steps",
                    "loss_steps", "max_length", "max_input_length", "limit", "lora_r"),
                0: ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "lora_alpha", "lora_dropout")}
    for least, names in at_least.items():
        for name in names:
            value = getattr(args, name)
            if value is not None and not least <= value < math.inf:
                fail(USAGE, f"--{name} {value} must be at least {least}")
    if args.max_steps == 0 or args.max_steps < -1:
        fail(USAGE, f"--max_steps {args.max_steps} trains nothing", "give a positive number, or -1 for whole epochs")
    accumulation = args.gradient_accumulation_steps
    if args.save_steps % accumulation:
        fail(USAGE, f"--save_steps {args.save_steps} is no multiple of --gradient_accumulation_steps {accumulation}",
                  f"checkpoints lie between updates; use {-(-args.save_steps // accumulation) * accumulation}")


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(build_parser, argv)
    check_flags(args)
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    method = load_method(args.method)
    rows = method.load_rows(args)[: args.limit]
    run_dir = Path(args.output_dir) / args.exp_name
    lock = None if args.dry_run else claim_run_dir(run_dir, args.resume)
    try:
        last = train(method, rows, run_dir, args)
    finally:
        if lock:
            lock.release()
    if args.dry_run:
        return
    infer_flags = method.infer_flags(args, last) if args.method in OWN_INFERENCE else [
        "--model_name_or_path", f"{last}/", "--num_response_per_input", "5", "--method", args.method,
        "--temperature", "0.75", "--decoding", "sampling", "--test_file", "data/test_dialogs.jsonl",
        "--save_file", f"outs/{args.exp_name}.jsonl"]
    print(f"checkpoint {last}\nnext: python infer.py {shlex.join(infer_flags)}")
    if vars(args).get("generate") and is_main_process():
        import infer

        infer.main(infer_flags)


def train(method, rows: list[dict], run_dir: Path, args) -> Path | None:
    """From rows to the last checkpoint, which is returned; with --dry_run only up to the trees."""
    base = model_dir(args.model_name)
    tokenizer = load_tokenizer(base, args.chat_template)
    refuse_special_tokens(rows, tokenizer, args.train_file)
    add_tokens(tokenizer, vars(args).get("new_tokens", []))
    rows, counts = first_pass(method, rows, tokenizer, args)
    print(f"method {args.method}: {counts['rows']} rows, {counts['tree_tokens']} tokens as trees, "
          f"{counts['padded_tokens']} as padded rows ({counts['padded_tokens'] / counts['tree_tokens']:.1f} times)")
    if args.dry_run:
        show_examples(method, rows, tokenizer, args)
        return None

    from transformers import set_seed

    set_seed(args.seed)  # adapters start from random weights
    model = method.prepare_model(load_model(base, args.attn_implementation, args.load_in_4bit), tokenizer, args)
    run = describe_run(args, base, rows)
    checkpoint = find_resume(run_dir, args, run)
    trainer = make_trainer(method, model, tokenizer, rows, args, run, run_dir)
    print(f"{args.model_name}: {sum(p.numel() for p in model.parameters() if p.requires_grad):,} trainable "
          f"parameters; {trainer.total_steps} micro-steps of {args.per_device_train_batch_size} contexts")
    return trainer.fit(checkpoint)


# ---- rows and trees -----------------------------------------------------------------------------


def build(method, row: dict, index: int, epoch: int, tokenizer, args):
    """A row's tree; its random choices depend on (seed, epoch, row) alone, so resuming is exact."""
    return method.build_tree(row, tokenizer, args, random.Random(f"{args.seed}-{epoch}-{index}"))


def first_pass(method, rows: list[dict], tokenizer, args) -> tuple[list[dict], Counter]:
    """Build every tree once: count tokens, truncated and dropped rows; returns the rows that fit."""
    import trees

    kept, counts = [], Counter()
    for index, row in enumerate(rows):
        tree = build(method, row, index, 0, tokenizer, args)
        if tree is None:
            counts["dropped"] += 1
            continue
        kept.append(row)
        counts["truncated"] += tree.dropped_turns > 0
        counts["tree_tokens"] += trees.num_tokens(tree)
        counts["padded_tokens"] += math.prod(trees.padded_shape(tree))
    counts["rows"] = len(kept)
    if counts["dropped"] or counts["truncated"]:
        print(f"{counts['truncated']} rows lost their oldest turns, {counts['dropped']} rows do not fit and are dropped")
    if not kept:
        fail(USAGE, f"{args.train_file}: no row fits into --max_length {args.max_length}", "raise --max_length")
    return kept, counts


def show_examples(method, rows: list[dict], tokenizer, args) -> None:
    """Print two trees; likelihood replies start with +, unlikelihood replies with - and mark ‹tokens›."""
    import trees

    for index, row in enumerate(rows[:2]):
        tree = build(method, row, index, 0, tokenizer, args)
        print(f"\n---- row {index + 1} ----")
        for path in trees.walk(tree.root):
            segment = path[-1]
            sign = {trees.CONTEXT: " ", trees.LIKELIHOOD: "+", trees.UNLIKELIHOOD: "-"}[segment.role]
            weights = segment.weights or [0.0] * len(segment.input_ids)
            text = "".join(f"‹{t}›" if w else t for t, w in zip(
                [tokenizer.decode([i]) for i in segment.input_ids], weights, strict=True))
            print(sign, text if segment.role == trees.CONTEXT else text.replace("\n", "\\n"))
        tokens, (count, longest) = trees.num_tokens(tree), trees.padded_shape(tree)
        print(f"tree {tokens} tokens, padded rows {count} x {longest} = {count * longest}: {count * longest / tokens:.1f} times")


class TreeStream:
    """The trees of all epochs in order, shuffled anew each epoch by (seed, epoch) alone."""

    def __init__(self, method, rows, tokenizer, args, length: int):
        self.build = lambda index, epoch: build(method, rows[index], index, epoch, tokenizer, args)
        self.num_rows, self.seed, self.length = len(rows), args.seed, length
        self.order_rows = (lambda rng: method.order_rows(rows, args, rng)) if "mix" in vars(args) else self.shuffled
        self.epoch, self.order = -1, []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int):
        epoch, place = divmod(item, self.num_rows)
        if epoch != self.epoch:  # shuffled once an epoch, not once an item
            self.epoch, self.order = epoch, self.order_rows(random.Random(f"{self.seed}-{epoch}"))
        return self.build(self.order[place], epoch)

    def shuffled(self, rng: random.Random) -> list[int]:
        order = list(range(self.num_rows))
        rng.shuffle(order)
        return order


# ---- the run's folder ---------------------------------------------------------------------------


def claim_run_dir(run_dir: Path, resume: str | None):
    """Make the run's folder ours: writable, not in use, and empty unless resumed.

    Returns the lock (None in the other processes of a distributed run); the kernel frees it after a kill.
    """
    from filelock import FileLock, Timeout

    if not is_main_process():
        return None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ".probe").touch()
        (run_dir / ".probe").unlink()
    except OSError as error:
        fail(USAGE, f"--output_dir {run_dir} cannot be written: {error.strerror}", "give another --output_dir")
    lock, owner = FileLock(run_dir / ".lock"), run_dir / ".owner"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = owner.read_text() if owner.exists() else "another process"
        fail(USAGE, f"{run_dir} is in use by {who}", "wait for it, or give another --exp_name")
    owner.write_text(f"pid {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
    shutil.rmtree(run_dir / ".staging", ignore_errors=True)  # half a checkpoint of a killed run
    done = utils.checkpoints_in(run_dir)
    if done and not resume:
        lock.release()
        fail(USAGE, f"{run_dir} already holds {done[0].name}", "--resume goes on with it; another --exp_name starts anew")
    return lock


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def describe_run(args, base: str, rows: list[dict]) -> dict:
    """What a checkpoint remembers: method, flags, base model, data fingerprint and versions."""
    skip = ("resume", "dry_run", "print_config", "config", "allow_data_change")
    return {
        "method": args.method,
        "base_model": args.model_name,
        "base_sha256": base_fingerprint(base),
        "data_sha256": utils.sha256(json.dumps(rows, sort_keys=True))[:16],
        "row_hashes": [utils.row_hash(row) for row in rows],
        "args": {k: v for k, v in vars(args).items() if k not in skip},
        "versions": utils.versions(),
    }


def find_resume(run_dir: Path, args, run: dict) -> Path | None:
    """The checkpoint to go on from; dies if it was made by another run, warns if not bit-exact."""
    if not args.resume:
        return None
    if args.resume == "newest":
        checkpoint = utils.newest_checkpoint(run_dir)
        if checkpoint is None:
            warn(f"{run_dir} holds no whole checkpoint, starting from step 0")
            return None
    else:
        checkpoint = Path(args.resume)
        missing = utils.missing_files(checkpoint)
        if missing:
            fail(USAGE, f"--resume {checkpoint}: incomplete, it lacks {', '.join(missing)}",
                      "name a whole checkpoint, or --resume alone for the newest one")
    saved = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
    for name in CONFLICTS:
        before = saved.get(name, saved["args"].get(name))
        now = run.get(name, run["args"].get(name))
        if before != now and not (name == "data_sha256" and args.allow_data_change):
            hint = "--allow_data_change goes on with the new rows" if name == "data_sha256" else \
                "use the same value, or another --exp_name"
            fail(USAGE, f"--resume {checkpoint}: {name} was {before}, now it is {now}", hint)
    falls = ("max_steps", "num_train_epochs") if args.lr_scheduler_type != SCHEDULES[0] else ()  # where the rate ends
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", *falls):
        before = saved["args"].get(name, SCHEDULES[0])  # runs before there was a choice of schedules had the first
        if before != run["args"][name]:
            warn(f"{name} was {before}, now {run['args'][name]}: "
                       "the run goes on, but not bit for bit as an uninterrupted one")
    print(f"resuming from {checkpoint}")
    return checkpoint


# ---- the loop -----------------------------------------------------------------------------------


def make_trainer(method, model, tokenizer, rows, args, run, run_dir):
    """transformers.Trainer with the method's loss, whole checkpoints, a progress bar and a NaN stop."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from trees import pack

    accumulation = args.gradient_accumulation_steps
    cuda = torch.cuda.is_available()
    settings = TrainingArguments(
        output_dir=str(run_dir / ".staging"),
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=args.learning_rate, weight_decay=args.weight_decay, lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=vars(args).get("lr_warmup_steps", 0),
        max_grad_norm=args.max_grad_norm or (0.3 if args.clip_norm else 0.0),
        optim="adamw_torch", adam_epsilon=args.adam_epsilon,
        max_steps=1,  # set below, when the number of processes is known
        save_strategy="steps", save_steps=args.save_steps // accumulation,
        logging_steps=max(1, args.loss_steps // accumulation), logging_nan_inf_filter=False,
        seed=args.seed, data_seed=args.seed, train_sampling_strategy="sequential",
        bf16=cuda and torch.cuda.is_bf16_supported(), use_cpu=not cuda, dataloader_pin_memory=cuda,
        activation_checkpointing=args.gradient_checkpointing,
        remove_unused_columns=False, report_to="none", disable_tqdm=True, ddp_find_unused_parameters=False,
    )
    contexts_per_step = args.per_device_train_batch_size * settings.world_size
    total = math.ceil(len(rows) * args.num_train_epochs / contexts_per_step)
    total = total if args.max_steps == -1 else min(total, args.max_steps)
    settings.max_steps = math.ceil(total / accumulation)
    needed = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad) * math.ceil(total / args.save_steps)
    free = shutil.disk_usage(run_dir).free
    if needed > free:  # adapter and two Adam moments, float32, per checkpoint
        fail(USAGE, f"checkpoints need about {needed / 1e6:.0f} MB in {run_dir}, {free / 1e6:.0f} MB are free",
                  "make room, or raise --save_steps")

    class TreeTrainer(Trainer):
        total_steps = total
        micro_step = 0
        sums: Counter = Counter()
        stopped_by = 0

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            args.micro_step = self.micro_step
            loss, metrics = method.compute_loss(model, inputs, args)
            if not torch.isfinite(loss):
                self.diverged(f"loss is {loss.item()}")
            self.micro_step += 1
            self.sums.update({name: value.item() for name, value in metrics.items()}, steps=1)
            return loss

        def diverged(self, what: str) -> None:
            last = utils.newest_checkpoint(run_dir)
            utils.append_jsonl(run_dir / "metrics.jsonl", [{"step": self.micro_step, "loss": None, "reason": what}])
            fail(DIVERGED, f"{what} at micro-step {self.micro_step} (learning rate {args.learning_rate})",
                      f"last good checkpoint: {last or 'none'}; try a lower --learning_rate or --clip_norm")

        def log(self, logs, start_time=None):
            """Add the mean losses since the last log and keep a line in metrics.jsonl."""
            steps = self.sums.pop("steps", 0)
            own = torch.tensor([value / max(1, steps) for value in self.sums.values()], device=self.args.device)
            shared = self.accelerator.reduce(own, "mean").tolist()  # over processes
            if steps and self.is_world_process_zero():
                means = dict(zip(self.sums, shared, strict=True))
                line = {"step": min(self.state.global_step * accumulation, total), **means, "time": round(time.time(), 1)}
                utils.append_jsonl(run_dir / "metrics.jsonl", [line])
                logs = {**logs, **means}
            self.sums.clear()
            super().log(logs, start_time)

        def _save(self, output_dir=None, state_dict=None):
            """Adapter and tokenizer only; no pickled arguments, no copies of frozen embeddings."""
            if any(not p.isfinite().all() for p in self.model.parameters() if p.requires_grad):
                self.diverged("a weight is not finite")
            if not self.args.should_save:  # Trainer calls this in every process
                return
            if args.method in OWN_ADAPTER:
                method.save_adapter(self.model, output_dir)
            else:
                self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)
            finish_adapter(Path(output_dir), tokenizer, run)

        def _load_from_checkpoint(self, checkpoint, model=None):
            if args.method in OWN_ADAPTER:
                method.restore_adapter(self.model, checkpoint)
            else:
                super()._load_from_checkpoint(checkpoint, model)

        def _save_checkpoint(self, model, trial):
            """Let Trainer write into the staging folder, then rename it to check_N when it is whole."""
            final = run_dir / f"check_{min(self.state.global_step * accumulation, total)}"
            staging = Path(self.args.output_dir)
            try:
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    if final.exists():  # an incomplete one that --resume passed over
                        shutil.rmtree(final)
                    utils.seal(staging / f"checkpoint-{self.state.global_step}", final)
                self.accelerator.wait_for_everyone()
            except Exception as error:  # torch and safetensors have types of their own for a full disk
                if not utils.is_disk_full(error):
                    raise
                size = sum(p.stat().st_size for p in staging.rglob("*") if p.is_file())
                shutil.rmtree(staging, ignore_errors=True)
                free = shutil.disk_usage(run_dir).free
                fail(TRY_LATER, f"disk full writing {final} (after {size / 1e6:.1f} MB, {free / 1e6:.0f} MB free)",
                          f"make room, then --resume; last good checkpoint: {utils.newest_checkpoint(run_dir)}")

        def fit(self, checkpoint: Path | None) -> Path:
            """Train to the end or to a signal; returns the last checkpoint."""
            metrics_file = run_dir / "metrics.jsonl"
            if checkpoint:
                self.micro_step = int(checkpoint.name[6:])
            if self.is_world_process_zero():
                keep_metrics(metrics_file, self.micro_step)
            if self.micro_step >= total or stopped_early(metrics_file):
                print("this run is finished")
                return checkpoint
            try:
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except Exception as error:
                if not utils.is_out_of_memory(error):
                    raise
                fail(TRY_LATER, f"out of memory at micro-step {self.micro_step}, {args.per_device_train_batch_size} "
                          f"contexts a step ({str(error)[:80]})",
                          "--resume with a smaller --per_device_train_batch_size or --max_length, with "
                          "--gradient_checkpointing or --load_in_4bit")
            self.accelerator.wait_for_everyone()
            last = utils.newest_checkpoint(run_dir)
            if self.is_world_process_zero():
                shutil.rmtree(self.args.output_dir, ignore_errors=True)
            if self.stopped_by:
                info(f"stopped by signal {self.stopped_by}, saved {last}; the same command with --resume goes on")
                raise SystemExit(128 + self.stopped_by)
            return last

    class Progress(TrainerCallback):
        """A bar over micro-steps with both losses; a signal saves and stops at the next update."""

        def on_train_begin(self, settings, state, control, **kwargs):
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=state.global_step * accumulation, unit="step",
                            desc=args.exp_name, disable=not state.is_world_process_zero)

            def stop(signum, frame):
                trainer.stopped_by = signum
                signal.signal(signum, signal.SIG_DFL if signum == signal.SIGTERM else signal.default_int_handler)

            self.handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}

        def on_step_end(self, settings, state, control, **kwargs):
            self.bar.update(min(accumulation, total - self.bar.n))
            steps = max(1, trainer.sums["steps"])
            self.bar.set_postfix({k: f"{v / steps:.3f}" for k, v in trainer.sums.items() if k != "steps"}, refresh=False)
            if trainer.stopped_by:
                control.should_save = control.should_training_stop = True

        def on_train_end(self, settings, state, control, **kwargs):
            self.bar.close()
            for signum, handler in self.handlers.items():
                signal.signal(signum, handler)

    class Passes(TrainerCallback):
        """Fresh figures of every row, after each pass with --early_stop and before each checkpoint."""

        def __init__(self):
            self.forest = [build(method, row, i, 0, tokenizer, args) for i, row in enumerate(rows)]

        def on_step_begin(self, settings, state, control, **kwargs):
            self.passes = trainer.micro_step * contexts_per_step // len(rows)

        def on_step_end(self, settings, state, control, **kwargs):
            passes = trainer.micro_step * contexts_per_step // len(rows)
            may_stop = args.early_stop and passes > self.passes
            if not control.should_save and not may_stop:
                return
            learnt, line = method.measure(trainer.model, rows, self.forest, args)
            stop = may_stop and learnt
            if state.is_world_process_zero:
                utils.append_jsonl(run_dir / "metrics.jsonl", [{"step": trainer.micro_step, "stopped": stop, **line}])
            if stop:
                print(f"stopped early after {passes} passes: every prompt is within its threshold")
                control.should_save = control.should_training_stop = True

    stream = TreeStream(method, rows, tokenizer, args, total * contexts_per_step)
    optimizer = None  # Trainer's own
    if args.method in OWN_ADAPTER:
        optimizer = torch.optim.AdamW(method.parameter_groups(model, args), args.learning_rate, eps=args.adam_epsilon, weight_decay=args.weight_decay)
    trainer = TreeTrainer(model=model, args=settings, train_dataset=stream, data_collator=pack, optimizers=(optimizer, None),
                          callbacks=[Progress, *trackers(args.report_to, settings)])
    if "early_stop" in vars(args):
        trainer.add_callback(Passes())
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean of contexts; Trainer divides by accumulation
    trainer.remove_callback(PrinterCallback)
    return trainer


def keep_metrics(path: Path, step: int) -> None:
    """Drop the log lines after a step, so that a resumed run does not log it twice."""
    if path.exists():
        utils.repair_tail(path)
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
        utils.atomic_write(path, "".join(line + "\n" for line in lines))


def stopped_early(path: Path) -> bool:
    """Whether the log, cut back to the checkpoint, holds the measurement that ended the run."""
    return path.exists() and any(json.loads(line).get("stopped") for line in path.read_text(encoding="utf-8").splitlines())


def trackers(report_to: str, settings) -> list:
    """The callback of an experiment tracker; one that cannot start is a warning, not the end of the run."""
    if report_to == "none":
        return []
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        return [make() for make in get_reporting_integration_callbacks([report_to])]
    except (ImportError, RuntimeError, ValueError) as error:
        warn(f"--report_to {report_to} does not start ({str(error)[:100]}); metrics.jsonl is written")
        return []


if __name__ == "__main__":
    utils.run(main)
