"""What is measured while training: a throughput clock, memory, and metrics.jsonl. Nothing here touches the model."""

import contextlib
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hf_softpick.files import plain, read_json_lines


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
    """metrics.jsonl: one JSON object a line, appended and flushed, so that a killed run keeps what it measured."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(record), ensure_ascii=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All records; a line that a crash cut off or spoilt is left out."""
        return read_json_lines(self.path)

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: a resumed run measures those steps again."""
        if not self.path.exists():
            return
        kept = [record for record in self.read() if record.get("step", 0) <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8"
        )
        os.replace(temporary, self.path)


def duration(seconds: float) -> str:
    """`3725` as "1:02:05"."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"
