"""Checkpoints that are whole or absent: staging, manifest, verification, discovery, rotation. Knows files, not models.

RUN/checkpoints/.staging-N/checkpoint-N/   being written; a crash leaves it here, where nobody looks for checkpoints
RUN/checkpoints/checkpoint-N/              renamed into place after manifest.json, which is written last
RUN/checkpoints/checkpoint-N.corrupt/      failed its verification, kept for a look
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hf_softpick.errors import CheckpointError, StorageError
from hf_softpick.files import clear, replace, settle, sha256_of, sync

MANIFEST = "manifest.json"
FORMAT = 2
"""1, of older versions, is read too: it has no digest of the manifest itself."""
_FACTS: dict[str, type] = {"step": int, "world_size": int, "global_batch": int, "data": str, "strategy": str}
_FACTS |= {"recipe": dict, "changes": list, "consecutive_skips": int}


def is_storage_fault(error: Exception) -> bool:
    """Whether `error` is how one of the writers (Python, safetensors, torch, tokenizers) says that a disk is full."""
    if isinstance(error, (OSError, SafetensorError, StorageError)):
        return True
    return any(sign in str(error) for sign in ("PytorchStreamWriter", "unexpected pos", "(os error "))


def staging_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written, on the same file system as its final place."""
    return root / f".staging-{step}"


def checkpoint_directory(root: Path, step: int) -> Path:
    """The final place of the checkpoint of `step`."""
    return root / f"checkpoint-{step}"


def record_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of `directory`, by name; all of it is on disk afterwards."""
    settle(directory)
    return {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def write_manifest(directory: Path, facts: dict[str, Any]) -> None:
    """Describe every file of `directory` together with `facts`; everything is on disk afterwards."""
    files = record_files(directory)
    manifest = directory / MANIFEST
    content = {"format": FORMAT, **facts, "files": files}
    text = json.dumps(content | {"digest": _digest(content)}, indent=1)
    manifest.write_text(text + "\n", encoding="utf-8")
    sync(manifest)
    sync(directory)


def publish(root: Path, step: int) -> Path:
    """Rename the staged checkpoint of `step` into place and return the place."""
    staging, target = staging_directory(root, step), checkpoint_directory(root, step)
    # It may be there: the same step again, after a resume from an older checkpoint.
    replace(staging / target.name, target, staging / "replaced")
    shutil.rmtree(staging, ignore_errors=True)
    return target


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; {} where there is none that is one."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    files = manifest.get("files") if isinstance(manifest, dict) else None
    whole = isinstance(files, dict) and files and all(isinstance(file, dict) for file in files.values())
    return manifest if whole else {}


def _digest(manifest: dict[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify(directory: Path) -> list[str]:
    """What is wrong with a checkpoint, one line a fault.

    Empty when the manifest is as it was written, every file that it lists has its size and SHA-256, and it lists all
    that a resume needs.
    """
    manifest = read_manifest(directory)
    if not manifest:
        return [f"{MANIFEST} is missing or unreadable"]
    version = manifest.get("format")
    if version not in (1, FORMAT):
        return [f"{MANIFEST} has format {version}, this version reads {FORMAT}"]
    if version == FORMAT and manifest.get("digest") != _digest(manifest):
        return [f"{MANIFEST} is not as it was written"]
    if wrong := [name for name, kind in _FACTS.items() if not isinstance(manifest.get(name, kind()), kind)]:
        return [f"{MANIFEST} has no {wrong[0]} that a resume can read"]
    faults = file_faults(directory, manifest["files"])
    return faults or [f"{name}, which a resume needs, was never written" for name in _lacking(directory, manifest)]


def _lacking(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """What a resume reads and the manifest does not list: transformers would go on without it, from something else."""
    names, world = manifest["files"].keys(), manifest.get("world_size", 1)
    index = "model.safetensors.index.json"
    needed = ["trainer_state.json", "scheduler.pt"]
    needed += ["rng_state.pth"] if world == 1 else [f"rng_state_{rank}.pth" for rank in range(world)]
    if str(manifest.get("strategy")).startswith("zero"):
        states = [name for name in names if name.endswith("_optim_states.pt")]
        models = [name for name in names if name.endswith("_model_states.pt")]
        counts = (("optimizer states", states, world), ("model states", models, 1))
        lacking = [f"one of the {what} of {world} ranks" for what, found, least in counts if len(found) < least]
        needed += ["latest"]
    else:
        weights = ["model.safetensors"]
        if index in names:
            weights = sorted(set(json.loads((directory / index).read_text(encoding="utf-8"))["weight_map"].values()))
        lacking, needed = [], [*needed, *weights, "optimizer.pt"]
        said = manifest.get("recipe", {}).get("settings")
        if isinstance(said, dict) and said.get("training.fp16"):
            needed += ["scaler.pt"]
    return lacking + [name for name in needed if name not in names]


def file_faults(directory: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """How `directory` differs from what `record_files` saw there, one line a file; new files are no fault."""
    faults = []
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != expected.get("size"):
            faults.append(f"{name} has {path.stat().st_size} bytes instead of {expected.get('size')}")
        elif sha256_of(path) != expected.get("sha256"):
            faults.append(f"sha256 mismatch in {name}")
    return faults


def steps(root: Path) -> list[int]:
    """Steps of the published checkpoints, newest first, verified or not."""
    names = (path.name.removeprefix("checkpoint-") for path in root.glob("checkpoint-*") if path.is_dir())
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def find_newest(root: Path, warn: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint that verifies, None when the run has none at all. For one process to call.

    A checkpoint that does not verify is renamed to *.corrupt, named in a warning, and the next older one is tried.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be loaded.
        StorageError: this user may not read one of them: nothing is known against it.
    """
    reasons = []
    for step in steps(root):
        directory = checkpoint_directory(root, step)
        try:
            faults = verify(directory)
        except PermissionError as error:
            raise StorageError(
                f"{directory} cannot be read: {error}. Let this user read it, or move it out of the way."
            ) from error
        except OSError as error:
            faults = [f"it cannot be read: {error}"]
        if not faults:
            return directory
        aside = directory.with_name(directory.name + ".corrupt")
        clear(aside)
        directory.rename(aside)
        reasons.append(f"{aside.name}: {'; '.join(faults)}")
        warn(f"{directory} cannot be used ({'; '.join(faults)}); kept as {aside.name}, trying the one before.")
    if not reasons:
        reasons = [f"{path.name}: set aside earlier" for path in sorted(root.glob("checkpoint-*.corrupt"))]
    if reasons:
        raise CheckpointError(
            "\n  ".join([f"No checkpoint under {root} can be loaded:", *reasons])
            + "\nPut a good copy back, or delete that folder to start again from step 0."
        )
    return None


def sweep(root: Path) -> None:
    """Remove what a crashed save left behind. For one process to call, before anybody saves."""
    for path in root.glob(".staging-*"):
        # Killed between the two renames of `publish`: the older checkpoint of that step is still whole.
        replaced, target = path / "replaced", root / path.name.replace(".staging-", "checkpoint-")
        if replaced.is_dir() and not target.exists():
            replaced.rename(target)
        clear(path)


def rotate(root: Path, limit: int | None) -> None:
    """Keep the `limit` newest checkpoints, at least two: the newest may be hit by a fault that its writing missed."""
    if limit is None:
        return
    for step in steps(root)[max(limit, 2) :]:
        shutil.rmtree(checkpoint_directory(root, step), ignore_errors=True)
