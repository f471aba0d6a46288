"""Where a checkpoint comes from: a folder, a folder of a distributed checkpoint, or a repository on the Hub."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from hf_softpick.conversion.dcp import DistributedStore
from hf_softpick.errors import CheckpointError, RecipeError
from hf_softpick.files import sha256_of

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DEEPEST = 32  # levels of JSON
TOKENIZER_FILES = tuple(
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model vocab.json "
    "merges.txt chat_template.jinja chat_template.json".split()
)
# Patterns of the Hub match across folders, so none begins with a star.
_CONFIGS = ("config.json", "generation_config.json")
_MODEL_PATTERNS = (*_CONFIGS, WEIGHTS, "model-*-of-*.safetensors", INDEX, ".metadata", "__*.distcp")


class Source(NamedTuple):
    """folder: where the files lie. config: its config.json. store: its tensors. revision: the commit of a Hub id."""

    given: str
    folder: Path
    config: dict[str, Any]
    config_file: Path
    store: "SafetensorsStore | DistributedStore"
    revision: str | None


class SafetensorsStore:
    """The tensors of model.safetensors or of its shards: `tensors` name -> (shape, dtype), `read(name)`, `files`.

    Raises:
        CheckpointError: unreadable, incomplete, or of a type that is not a floating one.
    """

    format = "safetensors"
    left: tuple[str, ...] = ()

    def __init__(self, folder: Path):
        self.tensors, self._file_of = {}, {}
        index = folder / INDEX
        if index.is_file() and (folder / WEIGHTS).is_file():
            raise CheckpointError(
                f"{folder} has both {WEIGHTS} and {INDEX}. Remove the one that does not belong there."
            )
        shards, named = [folder / WEIGHTS], None
        if index.is_file():
            named = read_json(index).get("weight_map")
            if not isinstance(named, dict) or not all(
                isinstance(n, str) and Path(n).name == n for n in named.values()
            ):
                raise CheckpointError(f"{index} has no weight_map from names to files of its folder.")
            shards = [folder / name for name in sorted(set(named.values()))]
        self.files = shards if named is None else [index, *shards]
        for shard in shards:
            for name, shape, kind in _header(shard):
                if kind not in DTYPES:
                    raise CheckpointError(
                        f"{shard.name}: {name} has the type {kind}, expected one of {', '.join(DTYPES)}. Quantized "
                        "weights cannot be converted."
                    )
                if name in self.tensors or (named is not None and named.get(name) != shard.name):
                    raise CheckpointError(f"{shard.name} holds {name}, which belongs elsewhere by {INDEX}.")
                self.tensors[name], self._file_of[name] = (tuple(shape), DTYPES[kind]), shard
        missing = sorted(set(named or ()) - set(self.tensors))
        if missing:
            raise CheckpointError(
                f"{index} promises {len(missing)} tensors that no shard holds, such as {missing[0]}."
            )

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored."""
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)


def _header(shard: Path) -> list[tuple[str, list[int], str]]:
    try:
        with safe_open(shard, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return [(name, part.get_shape(), part.get_dtype()) for name, part in slices.items()]
    except FileNotFoundError:
        raise CheckpointError(f"{shard} is missing. Copy the whole checkpoint.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard} cannot be read: {error}") from None


def open_source(
    given: str, *, config: Path | None = None, revision: str | None = None, subfolder: str | None = None
) -> Source:
    """Find the checkpoint and read its configuration and the headers of its tensors.

    Args:
        given: a folder with config.json and safetensors, a folder of a distributed checkpoint, or a Hub id.
        config: config.json of a distributed checkpoint, which has none of its own.
        revision: branch, tag or commit on the Hub.
        subfolder: a folder inside `given`, as trainers write one per step.

    Raises:
        CheckpointError: nothing there can be converted. RecipeError: arguments that do not fit.
    """
    folder, commit = locate(given, revision, subfolder, (*_MODEL_PATTERNS, *TOKENIZER_FILES))
    distributed = (folder / ".metadata").is_file() and not (folder / WEIGHTS).is_file()
    own = folder / "config.json"
    if config is not None and own.is_file():
        raise RecipeError(f"{folder} has a config.json of its own. Leave --config out.")
    if not distributed and not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        raise CheckpointError(f"{folder} holds no {WEIGHTS}, {INDEX} or .metadata{_hint(folder)}")
    config_file = config or own
    if not config_file.is_file():
        wanted = "Give the model's configuration by --config FILE." if distributed else "It belongs to the weights."
        raise CheckpointError(f"{config_file} is missing. {wanted}")
    store = DistributedStore(folder) if distributed else SafetensorsStore(folder)
    return Source(given, folder, read_json(config_file), config_file, store, commit)


def locate(
    given: str, revision: str | None, subfolder: str | None, patterns: tuple[str, ...]
) -> tuple[Path, str | None]:
    """The folder that is meant and the commit of a Hub id; files matching `patterns` are downloaded.

    Raises:
        CheckpointError: neither a folder nor a repository that can be reached. RecipeError: revision of a folder.
    """
    folder, commit = Path(given).expanduser(), None
    if folder.is_file():
        raise CheckpointError(f"{given} is a file. Give the folder that holds it.")
    if folder.is_dir():
        if revision is not None:
            raise RecipeError(f"{given} is a folder here, which has no --revision.")
    else:
        if given.count("/") != 1 or given.startswith((".", "/", "~")):
            raise CheckpointError(f"{given} is neither a folder nor a Hub id (owner/name).")
        folder = _download(given, revision, subfolder, patterns)
        commit = folder.name
    if subfolder is not None:
        folder = folder / subfolder
        if not folder.is_dir():
            raise CheckpointError(f"{given} has no folder {subfolder}{_hint(folder.parent)}")
    return folder, commit


def _download(given: str, revision: str | None, subfolder: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
    try:
        return Path(snapshot_download(given, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the network, the Hub and the cache each raise kinds of their own
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"{given} is no folder, and cannot be had from the Hub: {reason}") from error


def _hint(folder: Path) -> str:
    inside = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if any(p.suffix in (".bin", ".pt", ".pth") for p in folder.glob("*")):
        return ". Pickled weights (*.bin, *.pt) are not read: save the model as safetensors first."
    return f". It has folders: {', '.join(inside[:8])}; give one by --subfolder." if inside else "."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: it is not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path} cannot be read: its values are nested too deeply.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [
            inner for v in level if isinstance(v, dict | list) for inner in (v.values() if isinstance(v, dict) else v)
        ]
    if level:  # what copies it later calls itself once or more per level
        raise CheckpointError(f"{path} cannot be read: its values are nested more than {_DEEPEST - 1} deep.")
    return value


def fingerprint(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
