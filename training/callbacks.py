"""What happens around the steps of a run: a bar, signals, figures after a pass, whole checkpoints.

Their order matters: whoever may ask for a checkpoint at the end of a step comes before AfterPass,
which looks whether one is about to be written; Checkpoints comes last and moves the folder that
trackers may want to read.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

import utils
from training.runs import metrics_file
from utils import warn


class Bar(TrainerCallback):
    """A bar over micro-steps, with the mean of every logged number since the last log line."""

    def __init__(self, trainer, name: str):
        self.trainer, self.name = trainer, name

    def on_train_begin(self, settings, state, control, **kwargs):
        schedule = self.trainer.schedule
        self.bar = tqdm(total=schedule.total, initial=schedule.micro_steps(state.global_step),
                        unit="step", desc=self.name, disable=not state.is_world_process_zero)

    def on_step_end(self, settings, state, control, **kwargs):
        schedule = self.trainer.schedule
        # The last update may have fewer micro-steps than the others.
        self.bar.update(min(schedule.accumulation, schedule.total - self.bar.n))
        means = {name: f"{value:.3f}" for name, value in self.trainer.means().items()}
        self.bar.set_postfix(means, refresh=False)

    def on_train_end(self, settings, state, control, **kwargs):
        self.bar.close()


class Signals(TrainerCallback):
    """Ctrl-C and SIGTERM save and stop at the end of the update; a second one stops at once."""

    received = 0

    def on_train_begin(self, settings, state, control, **kwargs):
        self.handlers = {number: signal.signal(number, self._remember)
                         for number in (signal.SIGINT, signal.SIGTERM)}

    def _remember(self, number, frame):
        # Only noted, since a save in the middle of an update could not be resumed from. A second
        # signal acts as in any program, because an update and its save may take minutes.
        self.received = number
        again = signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler
        signal.signal(number, again)

    def on_step_end(self, settings, state, control, **kwargs):
        if self.received:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, settings, state, control, **kwargs):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class AfterPass(TrainerCallback):
    """The method's after_pass hook, at the end of every pass and before every checkpoint.

    The run stops early only at the end of a pass, so that when it does depends on neither
    --save_steps nor signals.
    """

    def __init__(self, trainer, rows: list[dict], forest):
        self.trainer, self.rows, self.forest = trainer, rows, forest

    def _passes(self) -> int:
        """Passes over the rows that are complete."""
        contexts = self.trainer.micro_step * self.trainer.schedule.contexts_per_step
        return contexts // len(self.rows)

    def on_step_begin(self, settings, state, control, **kwargs):
        self.passes = self._passes()

    def on_step_end(self, settings, state, control, **kwargs):
        passes, trainer = self._passes(), self.trainer
        ended = passes > self.passes
        # Trainer's own callback comes first and has decided by now whether a save is due.
        if not ended and not control.should_save:
            return
        learnt, figures = trainer.method.after_pass(
            trainer.model, self.forest, self.rows, trainer.flags, control.should_save)
        stop = ended and learnt
        if figures and state.is_world_process_zero:
            # Written before the save that follows. A resumed run cuts its log at the checkpoint's
            # step and reads from "stopped" that there is nothing left to do.
            line = {"step": trainer.micro_step, "stopped": stop, **figures}
            utils.append_jsonl(metrics_file(trainer.run_dir), [line])
        if stop:
            print(f"stopped early after {passes} passes: the rows are learnt")
            control.should_save = control.should_training_stop = True


class Checkpoints(TrainerCallback):
    """Make what Trainer has written into its staging folder a whole check_N, which is then final.

    A kill at any moment leaves either no check_N or a whole one.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, settings, state, control, **kwargs):
        # All processes write into the staging folder: their random states, and shares of a model.
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            final = self.trainer.checkpoint_dir()
            if final.exists():  # an incomplete one that --resume passed over
                shutil.rmtree(final)
            utils.seal(Path(settings.output_dir) / f"checkpoint-{state.global_step}", final)
        self.trainer.accelerator.wait_for_everyone()


def trackers(report_to: str) -> list[TrainerCallback]:
    """The callback of an experiment tracker; one that cannot start is no reason to stop the run."""
    if report_to == "none":
        return []
    try:
        return [make() for make in get_reporting_integration_callbacks([report_to])]
    except (ImportError, RuntimeError, ValueError) as error:  # not installed, no server, unknown
        warn(f"--report_to {report_to} does not start ({str(error)[:100]}); "
             "metrics.jsonl is written")
        return []
