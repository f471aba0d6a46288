"""What whole-or-absent files and strict JSON need, wherever they are written."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from hf_softpick.errors import StorageError


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link, never what it points to; nothing there is fine."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def replace(staged: Path, target: Path, aside: Path) -> None:
    """Give `staged` the name of `target`; what had it moves `aside` and then goes: one of both is always whole."""
    clear(aside)
    if target.exists() or target.is_symlink():
        target.rename(aside)
    staged.rename(target)
    sync(target.parent)
    with contextlib.suppress(OSError):
        clear(aside)


def settle(folder: Path) -> None:
    """Give all in `folder` the permissions of new files (safetensors writes 0600); wait until it is on the disk."""
    hidden = os.umask(0)
    os.umask(hidden)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~hidden)
        sync(path)
    sync(folder)


def plain(value: Any) -> Any:
    """`value` as strict JSON: non-finite numbers become the strings "nan", "inf", "-inf", never 0 or null."""
    if hasattr(value, "tolist"):  # tensors and arrays
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; {} where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line, without lines that a crash spoilt; [] where there is no file."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Add `plain(value)` as one line, whole or not at all; the file is made, a link is never followed.

    Raises:
        StorageError: it cannot be written.
    """
    line = (json.dumps(plain(value), ensure_ascii=False) + "\n").encode("utf-8")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            if os.write(descriptor, line) < len(line):
                os.ftruncate(descriptor, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}.") from None


def write_json(path: Path, value: Any) -> None:
    """Write `plain(value)`; the rest as in `write_text`."""
    write_text(path, json.dumps(plain(value), ensure_ascii=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8; the rest as in `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, and wait until it is on the disk; folders are made, links never followed.

    Raises:
        StorageError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"{path} cannot be written: {error.strerror}. Make room, or choose another folder."
        ) from None
