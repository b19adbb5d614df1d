"""The loop: rows in a seeded order become trees, and transformers.Trainer learns them.

Trainer is used for what it does well: devices, processes, mixed precision, FSDP, exact resume.
Ours are the loss, which is the method's, and what a checkpoint is.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

import utils
from modeling import checkpoints
from training.callbacks import AfterPass, Bar, Checkpoints, Signals, trackers
from training.runs import keep_metrics, metrics_file, refuse_too_little_disk, stopped_early
from trees import Tree, pack
from utils import DIVERGED, TRY_LATER, fail, info

# ---- rows and trees -----------------------------------------------------------------------------


def build(method, row: dict, index: int, epoch: int, tokenizer, args) -> Tree | None:
    """A row's tree; its random choices depend on (seed, epoch, row) alone, so resuming is exact."""
    # As a string all three count. A sum would give neighbouring rows and epochs the same draws.
    rng = random.Random(f"{args.seed}-{epoch}-{index}")
    return method.build_tree(row, tokenizer, args, rng)


class Forest(Sequence):
    """The trees of all rows in the first epoch, each built when it is first looked at."""

    def __init__(self, method, rows: list[dict], tokenizer, args):
        self._build = lambda index: build(method, rows[index], index, 0, tokenizer, args)
        # Most methods never look at a tree after a pass, so none is built in advance.
        self._trees: list[Tree | None] = [None] * len(rows)

    def __len__(self) -> int:
        return len(self._trees)

    def __getitem__(self, index: int) -> Tree:
        if self._trees[index] is None:
            self._trees[index] = self._build(index)
        return self._trees[index]

    def __iter__(self) -> Iterator[Tree]:
        return (self[index] for index in range(len(self)))


class TreeStream(torch.utils.data.Dataset):
    """The trees of all epochs in a row, ordered anew each epoch by (seed, epoch) alone.

    One long sequence and not a data set that Trainer shuffles: an order that is a function of the
    place needs no state, so a resumed run sees what an uninterrupted one would.
    """

    def __init__(self, method, rows: list[dict], tokenizer, args, length: int):
        self.method, self.rows, self.tokenizer, self.args = method, rows, tokenizer, args
        self.length = length
        self.epoch, self.order = -1, []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> Tree:
        epoch, place = divmod(item, len(self.rows))
        # Ordered once an epoch and not once an item.
        if epoch != self.epoch:
            rng = random.Random(f"{self.args.seed}-{epoch}")
            self.epoch, self.order = epoch, self.method.order_rows(self.rows, self.args, rng)
        index = self.order[place]
        return build(self.method, self.rows[index], index, epoch, self.tokenizer, self.args)


# ---- the schedule -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How long a run is. Users count micro-steps, as published, Trainer counts updates.

    contexts_per_step: rows of a micro-step, over all processes. total: micro-steps of the run.
    accumulation: micro-steps of an update; the last one may have fewer.
    """

    contexts_per_step: int
    total: int
    accumulation: int

    @property
    def updates(self) -> int:
        return math.ceil(self.total / self.accumulation)

    def micro_steps(self, updates: int) -> int:
        """Micro-steps of so many updates."""
        return min(updates * self.accumulation, self.total)


def make_schedule(num_rows: int, args, num_processes: int) -> Schedule:
    """The schedule of --num_train_epochs over the rows, cut at --max_steps."""
    contexts_per_step = args.per_device_train_batch_size * num_processes
    # Rounded up: the last micro-step is filled with rows of a further pass, not cut short.
    total = math.ceil(num_rows * args.num_train_epochs / contexts_per_step)
    if args.max_steps != -1:
        total = min(total, args.max_steps)
    return Schedule(contexts_per_step, total, args.gradient_accumulation_steps)


# ---- the trainer --------------------------------------------------------------------------------


def num_trained(model) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def make_trainer(method, model, tokenizer, rows: list[dict], args, run: dict, run_dir: Path):
    """A TreeTrainer with its data, schedule and callbacks; exits if the disk is too small."""
    settings = _training_arguments(args, run_dir)
    schedule = make_schedule(len(rows), args, settings.world_size)
    # Only the settings know how many processes there are, and the schedule depends on that.
    settings.max_steps = schedule.updates
    num_checkpoints = math.ceil(schedule.total / args.save_steps)
    refuse_too_little_disk(run_dir, num_trained(model), num_checkpoints)
    length = schedule.total * schedule.contexts_per_step  # so Trainer sees one epoch of trees
    trainer = TreeTrainer(
        method, run, run_dir, schedule, args, tokenizer,
        model=model, args=settings, data_collator=pack,
        train_dataset=TreeStream(method, rows, tokenizer, args, length))
    after_pass = AfterPass(trainer, rows, Forest(method, rows, tokenizer, args))
    for callback in (Bar(trainer, args.run_name), trainer.signals, *trackers(args.report_to),
                     after_pass, Checkpoints(trainer)):  # the order: training/callbacks.py
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)  # it prints a dict a log line into the bar
    return trainer


def _training_arguments(args, run_dir: Path) -> TrainingArguments:
    """Our flags as Trainer's; max_steps is set when the number of processes is known."""
    cuda = torch.cuda.is_available()
    accumulation = args.gradient_accumulation_steps
    return TrainingArguments(
        # Not the run's folder: Trainer writes straight into its own, and a kill would leave half a
        # checkpoint there, from which it would then try to resume.
        output_dir=str(run_dir / ".staging"),
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.lr_warmup_steps,
        weight_decay=args.weight_decay,
        # 0.3 is the published norm; 0 is off, as published without --clip_norm.
        max_grad_norm=args.max_grad_norm or (0.3 if args.clip_norm else 0.0),
        # Published is a paged AdamW of the same arithmetic, which needs bitsandbytes and a GPU.
        optim="adamw_torch",
        adam_epsilon=args.adam_epsilon,
        max_steps=1,
        save_strategy="steps",
        # In updates. check_training_args has refused a remainder.
        save_steps=args.save_steps // accumulation,
        logging_steps=max(1, args.loss_steps // accumulation),
        logging_nan_inf_filter=False,  # else a loss that is not finite would be logged as 0
        seed=args.seed,
        data_seed=args.seed,
        train_sampling_strategy="sequential",  # TreeStream has the order
        bf16=cuda and torch.cuda.is_bf16_supported(),
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        # Since transformers 5.23 this is the name of gradient_checkpointing.
        activation_checkpointing=args.gradient_checkpointing,
        remove_unused_columns=False,  # items are trees, not columns
        report_to="none",  # trackers() adds one that starts
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # every loss reaches every trainable parameter
    )


class TreeTrainer(Trainer):
    """transformers.Trainer with a method's loss on packed trees, whole checkpoints, a stop at NaN.

    method: the module with the training hooks. run: the run.json of its checkpoints. flags: those
    of train.py. micro_step: batches learnt since the start of the run, also before a resume.
    """

    def __init__(
        self, method, run: dict, run_dir: Path, schedule: Schedule, flags, tokenizer, **kwargs
    ):
        super().__init__(**kwargs)
        self.method, self.run, self.run_dir = method, run, run_dir
        self.schedule, self.flags, self.tokenizer = schedule, flags, tokenizer
        # Kept here, because fit has to know after training whether a signal has ended it.
        self.signals = Signals()
        self.micro_step = 0
        self.sums: Counter = Counter()  # of what the loss reports, and "steps", since the last log
        # The loss is a mean over contexts, so Trainer must divide it by the accumulation.
        self.model_accepts_loss_kwargs = False

    def means(self) -> dict[str, float]:
        """The means of what the loss reported since the last log line."""
        steps = max(1, self.sums["steps"])
        return {name: value / steps for name, value in self.sums.items() if name != "steps"}

    def checkpoint_dir(self) -> Path:
        """The final folder of the checkpoint at this step."""
        return self.run_dir / f"check_{self.schedule.micro_steps(self.state.global_step)}"

    # -- what Trainer asks for --

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, metrics = self.method.compute_loss(model, inputs, self.flags, self.micro_step)
        if not torch.isfinite(loss):  # before its gradient makes every weight nan
            self._stop_diverged(f"loss is {loss.item()}")
        self.micro_step += 1
        self.sums.update({name: value.item() for name, value in metrics.items()}, steps=1)
        return loss

    def create_optimizer(self, model=None):
        """AdamW on the method's groups; a group without a rate or decay has the flags'.

        model: the wrapped one if Trainer wraps first, as FSDP needs it.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = self.method.parameter_groups(model, self.flags)
            self.optimizer = optimizer(groups, weight_decay=self.args.weight_decay, **settings)
        return self.optimizer

    def log(self, logs, start_time=None):
        """Add the means over processes since the last log, and keep a line in metrics.jsonl."""
        steps, means = self.sums["steps"], self.means()
        # Every process takes part, also those that write nothing: reduce waits for all of them.
        values = torch.tensor(list(means.values()), device=self.args.device)
        shared = self.accelerator.reduce(values, "mean").tolist()
        if steps and self.is_world_process_zero():
            means = dict(zip(means, shared, strict=True))
            step = self.schedule.micro_steps(self.state.global_step)
            line = {"step": step, **means, "time": round(time.time(), 1)}
            utils.append_jsonl(metrics_file(self.run_dir), [line])
            logs = {**logs, **means}
        self.sums.clear()
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        """What the method learnt, tokenizer and run.json; no pickled arguments.

        Private, but the one place that has the weights that FSDP gathers (state_dict).
        """
        # No loss follows the last update, so only the weights can show that it has diverged.
        if any(not p.isfinite().all() for p in self.model.parameters() if p.requires_grad):
            self._stop_diverged("a weight is not finite")
        if not self.args.should_save:  # Trainer calls this in every process
            return
        self.method.save(self.model, output_dir, state_dict)
        checkpoints.finish_adapter(Path(output_dir), self.tokenizer, self.run)

    def _load_from_checkpoint(self, checkpoint, model=None):
        """Trainer reads whole models and PEFT's adapters, but not soft prompts."""
        if not checkpoints.restore(self.model, Path(checkpoint)):
            super()._load_from_checkpoint(checkpoint, model)

    # -- from start to end --

    def fit(self, checkpoint: Path | None) -> Path:
        """Train to the end or to a signal; returns the last checkpoint."""
        if checkpoint:
            self.micro_step = int(checkpoint.name.removeprefix("check_"))
        # The log is cut first and read then: a line that ended a run does not count if the run was
        # killed before the checkpoint that belongs to it.
        metrics = metrics_file(self.run_dir)
        if self.is_world_process_zero():
            keep_metrics(metrics, self.micro_step)
        if self.micro_step >= self.schedule.total or stopped_early(metrics):
            print("this run is finished")
            return checkpoint
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Exception as error:  # torch and safetensors have types of their own for both
            if utils.is_disk_full(error):
                self._stop_disk_full()
            if utils.is_out_of_memory(error):
                self._stop_out_of_memory(error)
            raise
        self.accelerator.wait_for_everyone()  # else another process may look before it is sealed
        last = utils.newest_checkpoint(self.run_dir)
        if self.is_world_process_zero():
            shutil.rmtree(self.args.output_dir, ignore_errors=True)
        if self.signals.received:
            info(f"stopped by signal {self.signals.received}, saved {last}; "
                 "the same command with --resume goes on")
            # The code that a shell gives for a process which a signal has ended.
            raise SystemExit(128 + self.signals.received)
        return last

    def _stop_diverged(self, what: str) -> None:
        line = {"step": self.micro_step, "loss": None, "reason": what}
        utils.append_jsonl(metrics_file(self.run_dir), [line])
        last = utils.newest_checkpoint(self.run_dir)
        fail(DIVERGED, f"{what} at micro-step {self.micro_step} "
                       f"(learning rate {self.flags.learning_rate})",
             f"last good checkpoint: {last or 'none'}; "
             "try a lower --learning_rate or --clip_norm")

    def _stop_disk_full(self) -> None:
        staging = Path(self.args.output_dir)
        size = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
        target = self.checkpoint_dir() if size else metrics_file(self.run_dir)
        shutil.rmtree(staging, ignore_errors=True)  # makes room, and is of no use
        free = shutil.disk_usage(self.run_dir).free
        fail(TRY_LATER, f"disk full writing {target} "
                        f"(after {size / 1e6:.1f} MB, {free / 1e6:.0f} MB free)",
             "make room, then --resume; last good checkpoint: "
             f"{utils.newest_checkpoint(self.run_dir)}")

    def _stop_out_of_memory(self, error: Exception) -> None:
        fail(TRY_LATER, f"out of memory at micro-step {self.micro_step}, "
                        f"{self.flags.per_device_train_batch_size} contexts a step "
                        f"({str(error)[:80]})",
             "--resume with a smaller --per_device_train_batch_size or --max_length, with "
             "--gradient_checkpointing or --load_in_4bit")
