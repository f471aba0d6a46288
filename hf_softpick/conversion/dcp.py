"""Tensors of a torch distributed checkpoint (DCP) in one process, without running what its pickle says.

`.metadata` is a pickle, and torch's reader unpickles it as it is, which can run any code. Here a pickle may name the
few classes that torch itself writes there and nothing else; the tensors are read by torch.load(weights_only=True), and
entries that are not tensors are never opened. Layout: torch.distributed.checkpoint.metadata.
"""

import math
import pickle
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, load, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from hf_softpick.errors import CheckpointError
from hf_softpick.modeling.compat import checkpoint_names

_METADATA_CLASSES = (
    "Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata BytesStorageMetadata "
    "ChunkStorageMetadata"
).split()
_PRIVATE = checkpoint_names()
_ALLOWED = {
    **{("torch.distributed.checkpoint.metadata", name): getattr(metadata, name) for name in _METADATA_CLASSES},
    ("torch", "Size"): torch.Size,
    **{(name.__module__, name.__qualname__): name for name in _PRIVATE},
    # The folder that it was written to; only its text matters, on any system.
    **{
        (module, name): PurePosixPath
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}
# What a trainer keeps beside the model. Never opened.
_TRAINING_STATE = {"optimizer", "optimizers", "lr_scheduler", "lr_schedulers", "dataloader", "train_state"}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_EMBEDDINGS = ("model.embeddings.weight", "model.embed_tokens.weight")


class _MetadataUnpickler(pickle.Unpickler):
    """Refuses every class and function that is not in `_ALLOWED` or a dtype of torch."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(
            f".metadata names {module}.{name}, which does not belong into a distributed checkpoint and could run "
            "code. If you trust its origin, convert it to safetensors with the program that wrote it."
        )


class _Reader(FileSystemReader):
    """torch's reader of one folder, with metadata that were read already."""

    def __init__(self, folder: Path, known: Metadata):
        super().__init__(folder)
        self._known = known

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        return self._known


class DistributedStore:
    """The model's tensors of a DCP folder: `tensors` name -> (shape, dtype), `read(name)`, `files`, and `left`, the
    names of the training state beside them.

    Names are the model's own, whether the trainer saved it under "model" or at the top.

    Raises:
        CheckpointError: unreadable, incomplete, unsafe, or without a model that is known here.
    """

    format = "torch distributed checkpoint"

    def __init__(self, folder: Path):
        self.folder = folder
        self.metadata = _read_metadata(folder / ".metadata")
        entries = self.metadata.state_dict_metadata
        prefix = next((p for p in ("model.", "") if any(p + name in entries for name in _EMBEDDINGS)), None)
        if prefix is None:
            raise CheckpointError(
                f"{folder} holds no model that is known here: none of its {len(entries)} entries is "
                f"{' or '.join(_EMBEDDINGS)}, by itself or under model."
            )
        self.left = sorted(name for name in entries if name.split(".")[0] in _TRAINING_STATE)
        self._entries = {}
        for name, entry in entries.items():
            if name in self.left:
                continue
            if not name.startswith(prefix) or not isinstance(entry, TensorStorageMetadata):
                raise CheckpointError(
                    f"{folder} has the entry {name!r}, which is neither a tensor of the model nor known."
                )
            self._entries[name.removeprefix(prefix)] = (name, entry)
        self.tensors = {
            name: (tuple(entry.size), entry.properties.dtype) for name, (_, entry) in self._entries.items()
        }
        for name, (_, entry) in self._entries.items():
            if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
                raise CheckpointError(f"{folder}: the pieces of {name} do not add up to its size {list(entry.size)}.")
            if entry.properties.dtype not in _DTYPES:
                raise CheckpointError(
                    f"{folder}: {name} has the type {entry.properties.dtype}, expected one of "
                    f"{', '.join(map(str, _DTYPES))}."
                )
        self.files = [folder / ".metadata", *(folder / name for name in _data_files(self.metadata, folder))]
        held = sum(file.stat().st_size for file in self.files)
        packed = any(info.transform_descriptors for info in self.metadata.storage_data.values())
        for name, (shape, dtype) in self.tensors.items():
            if math.prod(shape) * dtype.itemsize > held and not packed:  # before memory is taken for it
                raise CheckpointError(f"{folder}: {name} has the size {list(shape)}, more than all files hold.")

    def read(self, name: str) -> torch.Tensor:
        """The tensor, put together from its pieces."""
        key, entry = self._entries[name]
        try:
            # A hole between overlapping pieces is found by the check for NaN.
            tensor = torch.full(entry.size, float("nan"), dtype=entry.properties.dtype)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
                load({key: tensor}, storage_reader=_Reader(self.folder, self.metadata), no_dist=True)
        except (CheckpointException, Exception) as error:  # torch's own is no Exception, and wraps any other
            cause = next((failure[0] for failure in getattr(error, "failures", {}).values()), error)
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {reason}") from error
        return tensor


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            found = _MetadataUnpickler(file).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    wrong = _misshapen(found)
    if wrong is not None:
        raise CheckpointError(f"{path} does not hold the metadata of a distributed checkpoint: {wrong}.")
    return found


def _misshapen(found: Any) -> str | None:
    """What is not as torch writes it. A pickle can give every field any value, or leave it out."""
    entries, places = getattr(found, "state_dict_metadata", None), getattr(found, "storage_data", None)
    if not isinstance(found, Metadata) or not isinstance(entries, dict) or not isinstance(places, dict):
        return "its tables of entries and files are missing"
    for name, entry in entries.items():
        if not isinstance(name, str):
            return f"the name of an entry is of type {type(name).__name__}"
        if isinstance(entry, BytesStorageMetadata):
            continue
        properties = getattr(entry, "properties", None)
        dtype = getattr(properties, "dtype", None)
        chunks = getattr(entry, "chunks", None)
        if not isinstance(entry, TensorStorageMetadata) or not isinstance(properties, TensorProperties):
            return f"the entry {name!r} is neither a tensor nor bytes"
        if not isinstance(dtype, torch.dtype):
            return f"the entry {name!r} has no dtype"
        if not _is_size(getattr(entry, "size", None)) or not isinstance(chunks, list):
            return f"the entry {name!r} has no size or no list of pieces"
        for chunk in chunks:
            parts = (getattr(chunk, "offsets", None), getattr(chunk, "sizes", None))
            if not isinstance(chunk, ChunkStorageMetadata) or not all(
                _is_size(part) and len(part) == len(entry.size) for part in parts
            ):
                return f"a piece of {name!r} has no offsets or sizes"
    for info in places.values():
        if not isinstance(info, _PRIVATE[0]) or not isinstance(getattr(info, "relative_path", None), str):
            return "a piece has no file"
        numbers = (getattr(info, "offset", None), getattr(info, "length", None))
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            return f"a piece in {info.relative_path!r} has no offset or length"
    return None


def _is_size(value: Any) -> bool:
    return isinstance(value, torch.Size) and all(side >= 0 for side in value)


def _data_files(found: Metadata, folder: Path) -> list[str]:
    names = sorted({info.relative_path for info in found.storage_data.values()})
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{folder}/.metadata points to {name!r}, outside its folder.")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is incomplete: {name} is missing. Copy the whole folder.")
    return names
