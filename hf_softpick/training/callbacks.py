"""Trainer callbacks: stop on a signal, one readable line a log step, metrics.jsonl, text samples."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_softpick.training.metrics import MetricsFile, duration


class StopRequest(TrainerCallback):
    """Turns SIGTERM, SIGINT and SIGUSR1 into "save this step and stop", once all ranks know of it.

    The handler only sets `requested` on its own rank; the trainer shares the flag at the end of the step as `agreed`.
    A second signal finds the former handler again and ends the process at once.
    """

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = self.agreed = False
        self._former: dict[int, Any] = {}
        self._pid = os.getpid()

    def install(self) -> None:
        """Listen from now on; does nothing outside the main thread, where Python allows no handlers."""
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in self.signals}

    def restore(self) -> None:
        """Give the signals back to whoever had them before."""
        while self._former:
            signal.signal(*self._former.popitem())

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:
            return  # A data worker that inherited the handler: its parent decides.
        self.requested = True
        self.restore()
        print(f"{signal.Signals(number).name}: finishing this step, saving, then stopping.", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        """Save now and leave; evaluation would only use up the time until the second signal."""
        if self.agreed and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


class MetricsLog(TrainerCallback):
    """Writes every log line to metrics.jsonl, and forgets lines after the step that a resumed run starts from."""

    def __init__(self, file: MetricsFile) -> None:
        self.file = file

    def on_train_begin(self, args, state, control, **kwargs):
        """Rewind to the step that training starts from."""
        if state.is_world_process_zero:
            self.file.rewind(state.global_step, state.log_history)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append one record."""
        if state.is_world_process_zero and logs:
            self.file.write({"step": state.global_step, "time": round(time.time(), 3), **logs})


def line(step: int, logs: dict[str, Any]) -> str:
    """One log record for a person: `step 20  loss 4.1234  grad 0.81  lr 3.00e-04  12,345 tok/s  ETA 0:02:11`."""
    shown = (
        ("loss", "loss {:.4f}"),
        ("eval_loss", "validation loss {:.4f}"),
        ("grad_norm", "grad {:.3g}"),
        ("learning_rate", "lr {:.2e}"),
        ("tokens_seen", "{:,} tokens"),
        ("tokens_per_second", "{:,.0f} tok/s"),
        ("mfu", "MFU {:.1%}"),
        ("memory_gib", "{:.1f} GiB"),
    )
    parts = [form.format(logs[name]) for name, form in shown if name in logs]
    if "eta_seconds" in logs and logs["eta_seconds"] < 1e9:
        parts.append(f"ETA {duration(logs['eta_seconds'])}")
    if logs.get("skipped_updates"):
        parts.append(f"{logs['skipped_updates']} updates skipped")
    return "  ".join([f"step {step}", *parts])


class Progress(TrainerCallback):
    """A progress bar with the remaining time (rank 0), and one line for each log record."""

    def __init__(self, show_bar: bool = True) -> None:
        self.show_bar = show_bar
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar at the step that training starts from."""
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=not self.show_bar)

    def on_step_end(self, args, state, control, **kwargs):
        """One step on."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n if self.show_bar else 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print loss and evaluation records; the summary at the end of training is left to the end of the run."""
        if state.is_world_process_zero and logs and ("loss" in logs or "eval_loss" in logs):
            tqdm.write(line(state.global_step, logs))

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Samples(TrainerCallback):
    """Calls `write(step)` every `every` steps (0: never), on all ranks: sharded models generate together."""

    def __init__(self, write: Callable[[int], Any], every: int) -> None:
        self.write = write
        self.every = every

    def on_step_end(self, args, state, control, **kwargs):
        """Write samples when it is time; those of the last step belong to the end of the run."""
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.write(state.global_step)
