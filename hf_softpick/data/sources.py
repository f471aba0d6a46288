"""Where documents come from: the standard library, local files, or `datasets.load_dataset`. Knows texts, no tokens.

Every source is a list of shards in a fixed order, and knows what it holds: sample, progress bar and cache need both.
"""

import glob
import hashlib
import itertools
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_softpick.data.cache import fingerprint, local_path
from hf_softpick.data.contents import Contents
from hf_softpick.data.readers import (
    SUFFIXES,
    Record,
    kind_of,
    missing_column,
    parquet_text_bytes,
    read_file,
    read_text,
    suffix_of,
)
from hf_softpick.data.settings import SourceSettings
from hf_softpick.errors import DataError

_SPLIT_NAMES = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_LIBRARY_SHARDS = 64


@dataclass(frozen=True)
class Shard:
    """A part of a source that can be read alone: usually a file."""

    label: str
    origin: list[Any] = field(repr=False)
    """Path, size and time, by which older versions knew it: nothing but their records is recognised by it."""
    num_bytes: int
    """Estimated bytes of text, for progress and sampling."""
    read: Callable[[], Iterator[Record]] = field(repr=False)


@dataclass(frozen=True)
class Source:
    """One entry of data.sources, resolved to shards."""

    settings: SourceSettings
    shards: list[Shard]
    content: Callable[[Contents], Any] = field(repr=False)
    """What the shards hold, wherever and since whenever it lies there, as a JSON value."""


class SourceGone(DataError):
    """A source is not where it was, or cannot be reached."""


def open_sources(settings: Sequence[SourceSettings]) -> list[Source]:
    """Resolve every source and read its first records, so that a wrong path or column is an error before any work.

    Raises:
        DataError: a source does not exist, has no readable file, or lacks the text column.
    """
    sources = [_open_source(one) for one in settings]
    for source in sources:
        for shard in source.shards[:_LIBRARY_SHARDS]:
            for _ in itertools.islice(shard.read(), 100):
                pass
    return sources


def _open_source(settings: SourceSettings) -> Source:
    if settings.path == "stdlib":
        return _standard_library(settings)
    path = local_path("source", settings.path)
    plain = settings.name is None and settings.data_files is None and settings.revision is None
    if path.is_file():
        if not plain or not settings.split.isidentifier():
            raise DataError(
                f"source '{path}': a single file takes no name, revision, data_files or split slice. "
                "Remove them; max_documents limits it."
            )
        return _files(settings, [path])
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _library(settings, saved=path)
        if plain and settings.split.isidentifier():
            return _folder(path, settings)
    elif glob.has_magic(str(path)):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        # By where it really is: with links that form a loop, ** meets a file many times.
        found: dict[Path, Path] = {}
        for file in files:
            if kind_of(file) and file.is_file():
                found.setdefault(file.resolve(), file)
        if not found:
            raise SourceGone(f"source '{settings.path}': the pattern matches no file ending in {', '.join(SUFFIXES)}.")
        return _files(settings, list(found.values()))
    elif path.is_absolute() or kind_of(path) or settings.path.startswith((".", "~")):
        raise SourceGone(f"source '{settings.path}': no such file or folder (looked in {Path.cwd()}). Check the path.")
    return _library(settings)


def _standard_library(settings: SourceSettings) -> Source:
    """The .py files of the running Python, its tests included where installed (about 31 MB), without site-packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    files = sorted(file for file in root.rglob("*.py") if not skipped & set(file.relative_to(root).parts))
    if not files:
        raise DataError(
            f"source 'stdlib': no .py files under {root} (a zipped or stripped Python?). Name local files instead."
        )
    shards = []
    for file in files:
        stat, name = file.stat(), file.relative_to(root).as_posix()
        read = _reader(read_text, file, encoding_errors_drop=True)
        shards.append(Shard(str(file), ["stdlib", name, stat.st_size, stat.st_mtime_ns], stat.st_size, read))
    return Source(settings, shards, lambda contents: ["stdlib", contents.digests(files)])


def _folder(root: Path, settings: SourceSettings) -> Source:
    """Every readable file below `root`; where names say train, test or validation, only those of the split."""
    files = [file for file in sorted(root.rglob("*")) if file.is_file() and kind_of(file)]
    files = [file for file in files if not any(part.startswith((".", "_")) for part in file.relative_to(root).parts)]
    if not files:
        raise DataError(f"source '{root}': no file ending in {', '.join(SUFFIXES)} in this folder.")
    splits = {file: _split_in_name(file.relative_to(root)) for file in files}
    wanted = _SPLIT_NAMES.get(settings.split, settings.split)
    if any(splits.values()) or wanted != "train":
        files = [file for file in files if splits[file] == wanted]
    if not files:
        found = sorted({split for split in splits.values() if split}) or "no file named after a split"
        raise DataError(f"source '{root}': no file of split '{settings.split}'; found {found}.")
    return _files(settings, files)


def _files(settings: SourceSettings, files: list[Path]) -> Source:
    shards = [_file_shard(file, settings.text_column) for file in files]
    return Source(settings, shards, lambda contents: [list(map(suffix_of, files)), contents.digests(files)])


def _split_in_name(path: Path) -> str | None:
    for word in re.findall(r"[a-z]+", path.as_posix().lower()):
        if word in _SPLIT_NAMES:
            return _SPLIT_NAMES[word]
    return None


def _file_shard(path: Path, column: str) -> Shard:
    if kind_of(path) is None:
        raise DataError(f"source '{path}': unknown kind of file; allowed are {', '.join(SUFFIXES)}.")
    stat = path.stat()
    num_bytes = parquet_text_bytes(path, column) if kind_of(path) == ".parquet" else stat.st_size
    origin = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    return Shard(str(path), origin, num_bytes, _reader(read_file, path, column))


def _reader(read: Callable[..., Iterator[Record]], *args: Any, **kwargs: Any) -> Callable[[], Iterator[Record]]:
    return lambda: read(*args, **kwargs)


def _library(settings: SourceSettings, saved: Path | None = None) -> Source:
    """What `datasets` loads: a Hub id, a local folder with arguments, or a folder made by save_to_disk."""
    import datasets

    place = f"source '{settings.path}'"
    try:
        if saved is not None:
            loaded = datasets.load_from_disk(str(saved))
            loaded = loaded[settings.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(
                settings.path,
                settings.name,
                data_files=settings.data_files,
                split=settings.split,
                revision=settings.revision,
            )
    except (
        Exception
    ) as error:  # datasets raises nearly everything here; each is the user's path, split, name or network
        reason = str(error.__cause__ or error).strip().splitlines() or [""]
        kind = SourceGone if isinstance(error, (FileNotFoundError, ConnectionError)) else DataError
        raise kind(
            f"{place}: datasets could not load it (name={settings.name}, split={settings.split}, "
            f"data_files={settings.data_files}, revision={settings.revision}): {type(error).__name__}: {reason[0]}"
        ) from error
    column = settings.text_column
    if column not in loaded.column_names:
        raise missing_column(place, column, loaded.column_names)
    kind = getattr(loaded.features[column], "dtype", None)
    if kind not in ("string", "large_string"):
        raise DataError(
            f"{place}: column '{column}' holds {loaded.features[column]}, expected strings. "
            "Set text_column to a text column."
        )
    loaded = loaded.select_columns([column]).with_format("arrow")
    num_shards = max(1, min(_LIBRARY_SHARDS, len(loaded)))
    num_bytes = loaded.data.nbytes
    edges = [len(loaded) * i // num_shards for i in range(num_shards + 1)]
    shards = [
        Shard(
            f"{settings.path} row",
            [
                settings.model_dump(include={"path", "name", "split", "revision", "data_files"}),
                loaded._fingerprint,
                begin,
                end,
            ],
            num_bytes // num_shards,
            _reader(_read_rows, loaded, begin, end),
        )
        for begin, end in itertools.pairwise(edges)
    ]
    return Source(settings, shards, lambda contents: ["datasets", _digest_of_rows(loaded, contents)])


def _digest_of_rows(dataset: Any, contents: Contents) -> str:
    """SHA-256 of the texts. The fingerprint of `datasets` names a path and a time, or what a folder says of itself."""
    states = [os.stat(file["filename"]) for file in dataset.cache_files]
    known_by = [dataset._fingerprint, [[s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for s in states]]
    key = f"datasets {fingerprint(known_by)}"
    known = contents.recall(key)
    if known is None:
        digest = hashlib.sha256()
        for record in _read_rows(dataset, 0, len(dataset)):
            text = record.text if record.text is None else record.text.encode()
            digest.update(b"\0" if text is None else b"%d:%b" % (len(text), text))
        known = digest.hexdigest()
        contents.remember(key, known)
    return known


def _read_rows(dataset: Any, begin: int, end: int) -> Iterator[Record]:
    number = begin
    for table in dataset.select(range(begin, end)).iter(batch_size=256):
        for text in table.column(0).to_pylist():
            number += 1
            yield Record(number, text, "" if text is not None else "null or missing")
