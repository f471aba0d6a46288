"""What is measured while training: a throughput clock, memory, and metrics.jsonl. Nothing here touches the model."""

import contextlib
import json
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_softpick.errors import StorageError
from hf_softpick.files import append_line, plain, read_json_lines, write_text


class Clock:
    """Seconds spent training since the last reading; evaluation, saving and sampling are left out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a new window now."""
        self._start = time.perf_counter()
        self._paused = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside this block out of the window."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def read(self) -> float:
        """Seconds of the window so far."""
        return max(time.perf_counter() - self._start - self._paused, 1e-9)


def memory_gib() -> float:
    """Peak memory of this process in GiB: of its GPU where there is one, else its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MetricsFile:
    """metrics.jsonl: one JSON object a line, appended and flushed, so that a killed run keeps what it measured.

    What cannot be written waits in `pending`, with the reason in `fault`: the trainer then saves its state and stops.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pending: list[tuple[Path, dict[str, Any]]] = []
        self.fault: StorageError | None = None

    def write(self, record: dict[str, Any], path: Path | None = None) -> None:
        """Append one record, here or to another file of the run at `path`."""
        self.pending.append((path or self.path, record))
        self.flush()

    def flush(self) -> None:
        """Write what waits, in its order."""
        self.fault = None
        try:
            while self.pending:
                append_line(*self.pending[0])
                del self.pending[0]
        except StorageError as error:
            self.fault = error

    def read(self) -> list[dict[str, Any]]:
        """All records; a line that a crash cut off or spoilt is left out."""
        return read_json_lines(self.path)

    def rewind(self, step: int, history: Sequence[dict[str, Any]] = ()) -> None:
        """Forget what was logged after `step`, which a resumed run measures again, and put back what is missing.

        Args:
            history: the log records of the checkpoint; a full disk may have kept them out of this file.
        """
        kept = [record for record in self.read() if record.get("step", 0) <= step]
        known = {_kind(record) for record in kept}
        missing = [plain(entry) for entry in history if entry.get("step", 0) <= step and _kind(entry) not in known]
        if not self.path.exists() and not missing:
            return
        if missing:
            kept = sorted([*kept, *missing], key=lambda record: record.get("step", 0))
        write_text(self.path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def _kind(record: dict[str, Any]) -> tuple[int, frozenset[str]]:
    return record.get("step", 0), frozenset(record) - {"step", "time", "epoch"}


def duration(seconds: float) -> str:
    """`3725` as "1:02:05"."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"
