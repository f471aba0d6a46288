"""Sources that the package `datasets` reads: the Hub, a builder or a folder with arguments, and save_to_disk."""

import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hf_softpick.data.cache import fingerprint
from hf_softpick.data.contents import Contents
from hf_softpick.data.readers import Record, missing_column
from hf_softpick.data.settings import SourceSettings
from hf_softpick.data.shards import Shard, Source, SourceGone, refuse_options
from hf_softpick.errors import DataError

NUM_SHARDS = 64


def open_library(settings: SourceSettings, folder: Path | None) -> Source:
    """What `datasets.load_dataset` gives for the settings. A text file is one document, as everywhere here.

    Args:
        folder: the path of the settings where it is a local folder.
    """
    import datasets

    place = f"source '{settings.path}'"
    try:
        load = partial(
            datasets.load_dataset_builder,
            str(folder or settings.path),
            settings.name,
            data_files=settings.data_files,
            revision=settings.revision,
        )
        builder = load()
        if builder.name == "text":
            builder = load(sample_by="document")
        if builder.repo_id is None:
            allowed = ("split", "data_files", "text_column", *(["name"] if folder else []))
            refuse_options(settings, "a folder" if folder else f"the builder '{settings.path}' of datasets", *allowed)
        builder.download_and_prepare(download_mode="force_redownload" if _is_stale(builder) else None)
        loaded = builder.as_dataset(split=settings.split)
    except DataError:
        raise
    except Exception as error:  # nearly everything; each is the user's path, split, name or network
        reason = str(error.__cause__ or error).strip().splitlines() or [""]
        kind = SourceGone if isinstance(error, (FileNotFoundError, ConnectionError)) else DataError
        raise kind(
            f"{place}: datasets could not load it (name={settings.name}, split={settings.split}, "
            f"data_files={settings.data_files}, revision={settings.revision}): {type(error).__name__}: {reason[0]}"
        ) from error
    return _source(settings, loaded, commit_of(builder.hash, builder.config.data_files))


def open_saved(settings: SourceSettings, folder: Path) -> Source:
    """What `save_to_disk` wrote into `folder`."""
    import datasets

    refuse_options(settings, "a folder of save_to_disk", "split", "text_column")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged folder makes of it
        raise DataError(f"source '{folder}': datasets could not load it: {type(error).__name__}: {error}") from error
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
    if settings.split not in splits and (settings.split != "train" or splits is loaded):
        raise DataError(
            f"source '{folder}': no split '{settings.split}'; found {sorted(splits)}. A saved data set takes no "
            "slices; max_documents limits it."
        )
    return _source(settings, splits[settings.split] if settings.split in splits else loaded, None)


def commit_of(builder_hash: str | None, data_files: dict[str, Any] | None) -> str | None:
    """The commit of the Hub's repository that a builder reads, None where it reads local files."""
    names = itertools.chain.from_iterable((data_files or {}).values())
    found = [re.match(r"hf://datasets/[^@]+@([0-9a-f]{40})/", str(name)) for name in names]
    if found and found[0]:
        return found[0][1]
    return builder_hash if re.fullmatch("[0-9a-f]{40}", builder_hash or "") else None


def _is_stale(builder: Any) -> bool:
    """Whether a local file changed after `datasets` made its copy, which it knows by path and modification time."""
    files = map(str, itertools.chain.from_iterable((builder.config.data_files or {}).values()))
    copy = Path(builder.cache_dir)
    changed = max((os.stat(file).st_ctime for file in files if os.path.isfile(file)), default=0)
    return copy.is_dir() and changed >= copy.stat().st_mtime


def _source(settings: SourceSettings, loaded: Any, commit: str | None) -> Source:
    place, column = f"source '{settings.path}'", settings.text_column
    if column not in loaded.column_names:
        raise missing_column(place, column, loaded.column_names)
    kind = getattr(loaded.features[column], "dtype", None)
    if kind not in ("string", "large_string"):
        raise DataError(
            f"{place}: column '{column}' holds {loaded.features[column]}, expected strings. "
            "Set text_column to a text column."
        )
    loaded = loaded.select_columns([column]).with_format("arrow")
    num_shards = max(1, min(NUM_SHARDS, len(loaded)))
    num_bytes = loaded.data.nbytes
    edges = [len(loaded) * i // num_shards for i in range(num_shards + 1)]
    asked = settings.model_dump(include={"path", "name", "split", "revision", "data_files"})
    shards = [
        Shard(
            f"{settings.path} row",
            [asked, loaded._fingerprint, begin, end],
            num_bytes // num_shards,
            partial(_read_rows, loaded, begin, end),
        )
        for begin, end in itertools.pairwise(edges)
    ]
    return Source(settings, shards, lambda contents: ["datasets", _digest(loaded, contents)], commit=commit)


def _digest(dataset: Any, contents: Contents) -> str:
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
