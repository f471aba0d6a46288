"""A folder that either holds a whole, verified result or does not exist: lock, staging, manifest."""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_softpick.data.contents import Contents
from hf_softpick.errors import DataError, StorageError
from hf_softpick.files import replace, sync

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def cache_root(setting: str | None) -> Path:
    """data.cache_dir, else $HF_SOFTPICK_CACHE, else ~/.cache/hf_softpick."""
    name = "data.cache_dir" if setting else "HF_SOFTPICK_CACHE"
    return local_path(name, setting or os.environ.get("HF_SOFTPICK_CACHE") or "~/.cache/hf_softpick")


def local_path(what: str, name: str) -> Path:
    """The path that `name` means; `what` it is for is named in messages.

    Raises:
        DataError: no system could hold a file of that name, or there is no such user.
    """
    try:
        path = Path(name).expanduser()
        path.stat()
    except (ValueError, RuntimeError) as error:  # a NUL or half of a surrogate pair; ~user
        raise DataError(f"{what} {name!r}: not a usable path ({error}). Correct it.") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise DataError(f"{what} {name!r}: not a usable path ({error.strerror}). Correct it.") from error
    return path


def fingerprint(content: Any) -> str:
    """32 hexadecimal digits of a JSON-like value."""
    serialized = json.dumps(content, sort_keys=True, ensure_ascii=False).encode()
    return hashlib.sha256(serialized).hexdigest()[:32]


def build_once(
    directory: Path, build: Callable[[Path], dict[str, Any]], contents: Contents
) -> tuple[dict[str, Any], bool]:
    """The manifest of `directory`, built first if it is missing or damaged.

    Of several processes that ask at once, one builds and the others wait. `build` fills a staging folder and returns
    what the manifest should say; one rename gives it its name, so a killed build leaves nothing that looks whole.

    Returns:
        The manifest, and whether this call built it.

    Raises:
        StorageError: no space or no permission to write.
    """
    manifest = read_manifest(directory, contents)
    if manifest is not None:
        return manifest, False
    with _storage_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            manifest = read_manifest(directory, contents)
            if manifest is not None:
                return manifest, False
            for leftover in directory.parent.glob(f"{directory.name}.staging*"):
                shutil.rmtree(leftover, ignore_errors=True)
            staging = directory.with_name(f"{directory.name}.staging-{os.getpid()}")
            staging.mkdir()
            try:
                manifest = build(staging)
                _finish(staging, manifest, contents)
                if directory.exists():
                    logger.warning("%s is damaged or incomplete and is replaced", directory)
                replace(staging, directory, directory.with_name(f"{directory.name}.staging-replaced"))
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return manifest, True


def read_manifest(directory: Path, contents: Contents) -> dict[str, Any] | None:
    """The manifest of `directory` if every byte in it still is what was written, else None."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        is_whole = manifest["seal"] == _seal(manifest) and all(
            (directory / name).stat().st_size == entry["bytes"] for name, entry in files.items()
        )
        is_whole = is_whole and contents.digests([directory / name for name in files]) == [
            entry["sha256"] for entry in files.values()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, DataError):
        return None
    return manifest if is_whole else None


def _locked(directory: Path) -> AbstractContextManager:
    lock = FileLock(directory.with_name(directory.name + ".lock"))
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        logger.warning("waiting for another process that prepares %s", directory)
        return lock.acquire()


@contextmanager
def _storage_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"no space left while preparing {directory}. Free some, or set data.cache_dir."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise StorageError(
                f"{directory} cannot be written ({error}). Set data.cache_dir to a writable folder."
            ) from error
        raise StorageError(f"preparing {directory} failed: {error}.") from error


def _finish(staging: Path, manifest: dict[str, Any], contents: Contents) -> None:
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    manifest["files"] = {
        path.relative_to(staging).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, contents.digests(files), strict=True)
    }
    manifest["seal"] = _seal(manifest)
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in (staging / MANIFEST, staging):
        sync(path)


def _seal(manifest: dict[str, Any]) -> str:
    """What tells a manifest that was changed or made by hand."""
    return fingerprint({name: value for name, value in manifest.items() if name != "seal"})
