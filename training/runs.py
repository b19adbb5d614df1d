"""The folder of a run: who holds it, what its checkpoints remember, and where a run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

import utils
from modeling.models import base_fingerprint
from training.flags import SCHEDULES
from utils import USAGE, fail, warn

# A run goes on from a checkpoint only if these are as they were.
CONFLICTS = ("method", "base_sha256", "data_sha256", "seed", "lora_r", "lora_alpha",
             "lora_target_modules")
# If one of these differs it goes on, but ends in other weights than an uninterrupted run.
WARNINGS = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
            "lr_scheduler_type", "lr_warmup_steps")
OLDER_RUNS = {"lr_scheduler_type": SCHEDULES[0], "lr_warmup_steps": 0}  # before they were flags
# These say how a run was started and not what it is, so run.json leaves them out.
STARTS = ("resume", "dry_run", "print_config", "config", "allow_data_change")


# ---- processes ----------------------------------------------------------------------------------


def is_main_process() -> bool:
    """Whether this process speaks for all of a distributed run.

    From the variable that torchrun and accelerate launch set: accelerate.PartialState knows it only
    once the processes have met, and a bad row is to be told before that.
    """
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def only_main_process_prints() -> Iterator[None]:
    """Drop what the other processes of a distributed run would print."""
    if is_main_process():
        yield
        return
    # stderr stays: an error in any process must be seen.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


# ---- the folder ---------------------------------------------------------------------------------


@contextlib.contextmanager
def claim_run_dir(run_dir: Path, resume: str | None) -> Iterator[None]:
    """Hold a run's folder: writable, not in use, and empty unless the run is resumed.

    Of a distributed run, the main process holds it. The lock is the kernel's, so a kill frees it.
    """
    if not is_main_process():
        yield
        return
    _make_writable(run_dir)
    lock, owner = FileLock(run_dir / ".lock"), run_dir / ".owner"  # who holds it, for the message
    try:
        # No waiting: whoever holds the folder may train for days.
        lock.acquire(timeout=0)
    except Timeout:
        who = owner.read_text() if owner.exists() else "another process"
        fail(USAGE, f"{run_dir} is in use by {who}", "wait for it, or give another --exp_name")
    try:
        since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        owner.write_text(f"pid {os.getpid()} on {socket.gethostname()} since {since}")
        shutil.rmtree(run_dir / ".staging", ignore_errors=True)  # half a save of a killed run
        saved = utils.checkpoints_in(run_dir)
        if saved and not resume:
            fail(USAGE, f"{run_dir} already holds {saved[0].name}",
                 "--resume goes on with it; another --exp_name starts anew")
        yield
    finally:
        lock.release()


def _make_writable(run_dir: Path) -> None:
    """Make the folder, or exit; a file written and deleted proves more than its permissions."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ".probe").touch()
        (run_dir / ".probe").unlink()
    except OSError as error:
        fail(USAGE, f"--output_dir {run_dir} cannot be written: {error.strerror}",
             "give another --output_dir")


def refuse_too_little_disk(run_dir: Path, num_trained: int, num_checkpoints: int) -> None:
    """Exit unless the checkpoints of a run will fit."""
    # All checkpoints are kept, so all of them have to fit.
    # 4 bytes each for a float32 weight and for the two moments of Adam.
    needed = 12 * num_trained * num_checkpoints
    free = shutil.disk_usage(run_dir).free
    if needed > free:
        fail(USAGE, f"checkpoints need about {needed / 1e6:.0f} MB in {run_dir}, "
                    f"{free / 1e6:.0f} MB are free", "make room, or raise --save_steps")


# ---- what a checkpoint remembers ----------------------------------------------------------------


def describe_run(args, base: str, rows: list[dict], settled: dict) -> dict:
    """The run.json of every checkpoint: method, flags, base model, data fingerprint, versions.

    base: the folder of the base model. rows: those that are trained on. settled: what the method
    made of flags that were left open.
    """
    given = dict(vars(args))
    flags = {name: given[name] for name in given if name not in STARTS}
    return {
        "method": args.method,
        "base_model": args.model_name,
        "base_sha256": base_fingerprint(base),
        "data_sha256": utils.sha256(json.dumps(rows, sort_keys=True))[:16],
        "row_hashes": [utils.row_hash(row) for row in rows],  # infer.py warns of trained rows
        "args": flags | settled,
        "versions": utils.versions(),
    }


def find_resume(run_dir: Path, args, run: dict) -> Path | None:
    """The checkpoint to go on from, or None to start anew; exits if another run made it.

    Warns of flags that differ and are no obstacle.
    """
    if not args.resume:
        return None
    checkpoint = _named_checkpoint(run_dir, args.resume)
    if checkpoint is None:
        warn(f"{run_dir} holds no whole checkpoint, starting from step 0")
        return None
    saved = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
    for name in CONFLICTS:
        # The hashes stand at the top of run.json, the seed and the adapter's settings in its args.
        before, now = (some.get(name, some["args"].get(name)) for some in (saved, run))
        if before == now or (name == "data_sha256" and args.allow_data_change):
            continue
        hint = "use the same value, or another --exp_name"
        if name == "data_sha256":
            hint = "--allow_data_change goes on with the new rows"
        fail(USAGE, f"--resume {checkpoint}: {name} was {before}, now it is {now}", hint)
    # A falling learning rate depends on the length of the run, a constant one does not.
    length = () if args.lr_scheduler_type == SCHEDULES[0] else ("max_steps", "num_train_epochs")
    for name in (*WARNINGS, *length):
        before, now = saved["args"].get(name, OLDER_RUNS.get(name)), run["args"][name]
        if before != now:
            warn(f"{name} was {before}, now {now}: the run goes on, "
                 "but not bit for bit as an uninterrupted one")
    print(f"resuming from {checkpoint}")
    return checkpoint


def _named_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The newest whole checkpoint of the run, or the one that is named, which must be whole."""
    if resume == "newest":
        return utils.newest_checkpoint(run_dir)
    checkpoint = Path(resume)
    missing = utils.missing_files(checkpoint)
    if missing:
        fail(USAGE, f"--resume {checkpoint}: incomplete, it lacks {', '.join(missing)}",
             "name a whole checkpoint, or --resume alone for the newest one")
    return checkpoint


# ---- metrics.jsonl ------------------------------------------------------------------------------


def metrics_file(run_dir: Path) -> Path:
    return run_dir / "metrics.jsonl"


def keep_metrics(path: Path, step: int) -> None:
    """Drop the log lines after a step, so that a resumed run does not log it twice."""
    if not path.exists():
        return
    utils.repair_tail(path)  # a kill may have cut the last line
    lines = path.read_text(encoding="utf-8").splitlines()
    # The steps after the checkpoint are learnt and logged again.
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    utils.atomic_write(path, "".join(line + "\n" for line in kept))


def stopped_early(path: Path) -> bool:
    """Whether the log, cut back to the checkpoint, holds the line that ended the run."""
    if not path.exists():
        return False
    lines = path.read_text(encoding="utf-8").splitlines()
    return any(json.loads(line).get("stopped") for line in lines)
