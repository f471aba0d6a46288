"""Where documents come from: the standard library, local files, or the package `datasets`. Knows texts, no tokens.

Every source is a list of shards in a fixed order, and knows what it holds: sample, progress bar and cache need both.
"""

import glob
import itertools
import re
import sysconfig
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hf_softpick.data.cache import local_path
from hf_softpick.data.library import NUM_SHARDS, open_library, open_saved
from hf_softpick.data.readers import ALLOWED, kind_of, parquet_text_bytes, read_file, read_text, suffix_of
from hf_softpick.data.settings import SourceSettings
from hf_softpick.data.shards import Shard, Source, SourceGone, refuse_options
from hf_softpick.errors import DataError

_SPLIT_NAMES = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_NOT_READ = f"passed over, as only {ALLOWED} are read"


def open_sources(settings: Sequence[SourceSettings]) -> list[Source]:
    """Resolve every source and read its first records, so that a wrong path or column is an error before any work.

    Raises:
        DataError: a source does not exist, has no readable file, lacks the text column, or takes no such option.
    """
    sources = [_open_source(one) for one in settings]
    for source in sources:
        for shard in source.shards[:NUM_SHARDS]:
            for _ in itertools.islice(shard.read(), 100):
                pass
    return sources


def _open_source(settings: SourceSettings) -> Source:
    if settings.path == "stdlib":
        return _standard_library(settings)
    path = local_path("source", settings.path)
    if path.is_file():
        return _files(settings, "a single file", [path])
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return open_saved(settings, path)
        if settings.name is None and settings.data_files is None:
            return _folder(path, settings)
        return open_library(settings, path)
    if glob.has_magic(str(path)):
        return _pattern(path, settings)
    if path.is_absolute() or kind_of(path) or settings.path.startswith((".", "~")):
        raise SourceGone(f"source '{settings.path}': no such file or folder (looked in {Path.cwd()}). Check the path.")
    return open_library(settings, None)


def _standard_library(settings: SourceSettings) -> Source:
    """The .py files of the running Python, its tests included where installed (about 31 MB), without site-packages."""
    refuse_options(settings, "the standard library")
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
        read = partial(read_text, file, encoding_errors_drop=True)
        shards.append(Shard(str(file), ["stdlib", name, stat.st_size, stat.st_mtime_ns], stat.st_size, read))
    return Source(settings, shards, lambda contents: ["stdlib", contents.digests(files)])


def _pattern(path: Path, settings: SourceSettings) -> Source:
    """Every readable file that matches, once; a folder that matches is read by a pattern with ** alone."""
    found: dict[Path, Path] = {}  # By where it really is: with links that form a loop, ** meets a file many times.
    doubts: dict[str, list[str]] = {}
    for name in sorted(glob.glob(str(path), recursive=True)):
        file = Path(name)
        if not file.is_file():
            if not file.is_dir():
                doubts.setdefault("passed over, as it is no file, or a link to none", []).append(name)
            elif "**" not in settings.path:
                doubts.setdefault("passed over, as only ** reads folders", []).append(name)
        elif kind_of(file):
            found.setdefault(file.resolve(), file)
        else:
            doubts.setdefault(_NOT_READ, []).append(name)
    if not found:
        raise SourceGone(f"source '{settings.path}': the pattern matches no file of a kind that is read ({ALLOWED}).")
    return _files(settings, "a pattern", list(found.values()), doubts)


def _folder(root: Path, settings: SourceSettings) -> Source:
    """Every readable file below `root`; where names say train, test or validation, only those of the split."""
    if not settings.split.isidentifier():
        raise DataError(
            f"source '{root}': a folder takes no slice (split={settings.split!r}) without data_files. Name the files, "
            "or remove the slice; max_documents limits a source."
        )
    files: list[Path] = []
    doubts: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*")):
        name = file.relative_to(root)
        hidden = next((part for part in name.parts if part.startswith((".", "_"))), None)
        if hidden is not None:
            if hidden == name.name:
                doubts.setdefault("passed over, as names with . or _ in front are hidden", []).append(str(name))
        elif file.is_dir():
            if file.is_symlink():
                doubts.setdefault("passed over, as links to folders are not followed", []).append(str(name))
        elif file.is_file() and kind_of(file):
            files.append(file)
        else:
            doubts.setdefault(_NOT_READ, []).append(str(name))
    if not files:
        raise DataError(f"source '{root}': no file of a kind that is read ({ALLOWED}) in this folder.")
    splits, titles = splits_in_names([file.relative_to(root) for file in files])
    wanted = _SPLIT_NAMES.get(settings.split, settings.split)
    # Where no file is named after it, training reads what is named after no split.
    of_split = wanted if wanted in splits.values() or wanted != "train" else None
    for name, split in splits.items():
        if split != of_split:
            reason = f"named after the split '{split}'" if split else f"not named after the split '{wanted}' as others"
            doubts.setdefault(f"passed over, as {reason}", []).append(str(name))
    files = [root / name for name, split in splits.items() if split == of_split]
    if not files:
        found = sorted({split for split in splits.values() if split}) or "no file named after a split"
        raise DataError(f"source '{root}': no file of split '{settings.split}'; found {found}.")
    if of_split is None and titles:
        doubts["read, though a split's name is a part of theirs"] = titles
    return _files(settings, "a folder", files, doubts, "split")


def splits_in_names(names: list[Path]) -> tuple[dict[Path, str | None], list[str]]:
    """The split that each file belongs to by its name, and the names that only contain such a word, as titles do.

    A split is the whole name of a folder, the last word of a file's name before its numbers, or a word in which two
    names differ (`train.en.txt` and `test.en.txt`). `the_great_train_robbery.txt` and `test_of_time.txt` are titles.
    """
    splits: dict[Path, str | None] = dict.fromkeys(names)
    alike: dict[tuple, list[tuple[Path, str]]] = {}
    for name in names:
        parts = [*name.parts[:-1], name.name.lower().removesuffix(suffix_of(name) or "")]
        for depth, part in enumerate(parts):
            words = re.split(r"[^a-z0-9]+|(?<=[a-z])(?=[0-9]+$)", part.lower())
            words = [word for word in words if word.isalpha() and word not in ("of", "part", "shard", "chunk")]
            is_file = depth == len(parts) - 1
            for at, word in enumerate(words):
                split = _SPLIT_NAMES.get(word)
                if split:
                    others = (*parts[:depth], is_file, *words[:at], None, *words[at + 1 :])
                    alike.setdefault(others, []).append((name, split))
                    if len(words) == 1 or (is_file and at == len(words) - 1):
                        splits[name] = splits[name] or split
    for members in alike.values():
        if len({split for _, split in members}) > 1:
            for name, split in members:
                splits[name] = splits[name] or split
    in_title = {name for members in alike.values() for name, _ in members if splits[name] is None}
    return splits, sorted(map(str, in_title))


def _files(
    settings: SourceSettings, what: str, files: list[Path], doubts: dict[str, list[str]] | None = None, *options: str
) -> Source:
    is_text = all(kind_of(file) == ".txt" for file in files)
    refuse_options(settings, f"{what} of text" if is_text else what, *options, *([] if is_text else ["text_column"]))
    shards = [_file_shard(file, settings.text_column) for file in files]
    suffixes = [suffix_of(file) for file in files]
    return Source(settings, shards, lambda contents: [suffixes, contents.digests(files)], doubts or {})


def _file_shard(path: Path, column: str) -> Shard:
    if kind_of(path) is None:
        raise DataError(
            f"source '{path}': unknown kind of file; allowed are {ALLOWED}. The package datasets reads others: "
            f"{{path: csv, data_files: {path}}}, for example."
        )
    stat = path.stat()
    num_bytes = parquet_text_bytes(path, column) if kind_of(path) == ".parquet" else stat.st_size
    origin = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    return Shard(str(path), origin, num_bytes, partial(read_file, path, column))
