"""What files hold, by a digest of every byte, and no file read twice for it. Knows no documents."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from hf_softpick.errors import DataError, StorageError
from hf_softpick.files import read_object, sha256_of, write_text

_TICK = 2_000_000_000
"""Nanoseconds within which two changes of a file may get the same time."""


class Contents:
    """Digests of files, remembered in the cache folder by what the system says of each file, so that a start is fast.

    A change moves the ctime, whatever `utime` or `cp --preserve` do to the mtime. A digest taken within two seconds of
    it could miss a second change, and is taken again.
    """

    def __init__(self, root: Path, progress: bool = False):
        self.path = root / "contents.json"
        self.progress = progress
        self.known = read_object(self.path)

    def digests(self, files: Sequence[Path]) -> list[str]:
        """SHA-256 of each file; of several processes that ask at once, one reads.

        Raises:
            DataError: a file cannot be read, or changes while it is.
        """
        found = {file: self._trusted(file) for file in files}
        missing = [file for file, digest in found.items() if digest is None]
        if missing:
            total = sum(file.stat().st_size for file in missing)
            with self._changing(), progress_bar(total, "Reading", "B", self.progress, delay=1) as bar:
                for file in missing:
                    found[file] = self._trusted(file) or self._read(file)
                    bar.update(file.stat().st_size)
        return [found[file] for file in files]

    def recall(self, key: str) -> Any:
        """What `remember` was given for `key`, else None."""
        return self.known.get(key)

    def remember(self, key: str, value: Any) -> None:
        """Keep a JSON value for later starts."""
        if self.known.get(key) != value:
            with self._changing():
                self.known[key] = value

    def _trusted(self, file: Path) -> str | None:
        try:
            name, state = _state(os.stat(file))
            *before, seen, digest = self.known[name]
            is_same = state == before and seen - state[-1] > _TICK
        except (OSError, KeyError, TypeError, ValueError):
            return None
        return digest if is_same else None

    def _read(self, file: Path) -> str:
        try:
            name, state = _state(os.stat(file))
            digest = sha256_of(file)
            is_same = (name, state) == _state(os.stat(file))
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read ({error.strerror}). Check the path and its permissions."
            ) from error
        if not is_same:
            raise DataError(f"{file} changes while it is read. Start again when it is written.")
        self.known[name] = [*state, time.time_ns(), digest]
        return digest

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Alone, and with what others found meanwhile. A folder that cannot be written costs time at every start."""
        lock = FileLock(self.path.with_suffix(".lock"))
        with suppress(OSError, NotImplementedError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        try:
            self.known |= read_object(self.path)
            yield
            with suppress(StorageError):
                write_text(self.path, json.dumps(self.known))
        finally:
            lock.release()


def progress_bar(total: int, what: str, unit: str, shown: bool, **options: float) -> Any:
    """A bar of tqdm that goes away at its end; `options` are tqdm's."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=not shown, leave=False, **options)


def _state(stat: os.stat_result) -> tuple[str, list[int]]:
    """Which file it is, wherever it is named, and what every change moves."""
    return f"{stat.st_dev}-{stat.st_ino}", [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
