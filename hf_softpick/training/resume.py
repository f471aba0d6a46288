"""Where a run starts: fresh, from its newest whole checkpoint, or not at all because it is finished."""

import json
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hf_softpick.errors import CheckpointError, RecipeError
from hf_softpick.files import write_text
from hf_softpick.training import checkpointing
from hf_softpick.training.recipe import Recipe

logger = logging.getLogger(__name__)

FINISHED = "finished.json"
LENGTH = ("max_steps", "num_train_epochs")


def identity(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that a run cannot change on its way: what the model is and what it reads."""
    sections = json.loads(json.dumps(recipe.resolved()))
    data = {name: value for name, value in sections["data"].items() if name not in ("cache_dir", "num_proc")}
    # How attention is computed may change, for instance with the machine; what it computes may not.
    model = {name: value for name, value in sections["model"].items() if name != "attn_implementation"}
    # Another seed would draw other batches for the rest, another optimizer has another state.
    order = {name: recipe.training.arguments.get(name) for name in ("seed", "data_seed", "optim")}
    return {"model": model, "tokenizer": sections["tokenizer"], "data": data, "training": order}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ, as `model.hidden_size: 64 -> 32`."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {before} -> {after}")
    return found


def finished_step(recipe: Recipe) -> int | None:
    """Step at which this run ended, None when there is something left to do.

    Raises:
        RecipeError: the folder holds the finished run of another model, or one that cannot be extended.
    """
    record = read_finished(recipe)
    try:
        step, before, ended = record["step"], record["identity"], record["length"]
    except KeyError:
        return None
    _require_same(recipe.run.directory, before, identity(recipe))
    length = {name: recipe.training.arguments.get(name) for name in LENGTH}
    if length == ended:
        return step
    if not checkpointing.steps(recipe.run.directory / "checkpoints"):
        raise RecipeError(
            f"{recipe.run.directory} is finished at step {step} and has no checkpoint to go on from. Choose "
            "another run.name."
        )
    return None


def read_finished(recipe: Recipe) -> dict[str, Any]:
    """The record of the end of a run; {} where there is none that can be read."""
    try:
        record = json.loads((recipe.run.directory / FINISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def save_finished(recipe: Recipe, record: dict[str, Any]) -> None:
    """Write the record of the end of a run."""
    write_text(recipe.run.directory / FINISHED, json.dumps(record, indent=1) + "\n")


def write_finished(recipe: Recipe, step: int, results: dict[str, Any], final: dict[str, dict[str, Any]]) -> None:
    """The last file of a run: from now on the same command has nothing to do, but for an upload.

    Args:
        final: size and SHA-256 of every file of RUN/final.
    """
    length = {name: recipe.training.arguments.get(name) for name in LENGTH}
    record = {"step": step, "length": length, "results": results, "final": final, "identity": identity(recipe)}
    save_finished(recipe, record)


def find_checkpoint(root: Path, main: bool, world_size: int) -> Path | None:
    """The newest checkpoint that verifies; found by rank 0, the same on every rank.

    Raises:
        CheckpointError: on every rank, when there are checkpoints and none can be loaded.
    """
    found: list[Any] = [None, None]
    if main:
        checkpointing.sweep(root)
        try:
            found[0] = checkpointing.find_newest(root, logger.warning)
        except CheckpointError as error:
            found[1] = str(error)
    if world_size > 1:
        dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise CheckpointError(found[1])
    return found[0]


def check_resume(checkpoint: Path, facts: dict[str, Any], run: Path) -> dict[str, Any]:
    """The checkpoint's manifest, if a run described by `facts` can go on from it exactly.

    Raises:
        RecipeError: other model or data, another global batch, or a sharding that cannot be changed.
    """
    manifest = checkpointing.read_manifest(checkpoint)
    _require_same(run, manifest.get("identity", {}), facts["identity"])
    if manifest["data"] != facts["data"]:
        raise RecipeError(
            f"{run} was trained on {manifest['data']}, but the prepared data is now {facts['data']}: the sources have "
            "changed. Restore them, or choose another run.name."
        )
    if manifest["global_batch"] != facts["global_batch"]:
        raise RecipeError(_batch_message(checkpoint, manifest, facts))
    before, now = (
        ("replicated" if s in ("one process", "ddp") else s) for s in (manifest["strategy"], facts["strategy"])
    )
    if before != now or (now != "replicated" and manifest["world_size"] != facts["world_size"]):
        raise RecipeError(
            f"{checkpoint} was written by {manifest['world_size']} processes under {manifest['strategy']} and cannot "
            f"be loaded by {facts['world_size']} under {facts['strategy']}. Launch it as it was launched before."
        )
    return manifest


def _require_same(run: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = differences(before, now)
    if changed:
        raise RecipeError(
            f"{run} holds a run with other settings ({'; '.join(changed[:5])}{' ...' if len(changed) > 5 else ''}). "
            "Choose another run.name, or put the settings back to go on with it."
        )


def _batch_message(checkpoint: Path, manifest: dict[str, Any], facts: dict[str, Any]) -> str:
    before, now = manifest["global_batch"], facts["global_batch"]
    rows = facts["per_device_batch"] * facts["world_size"]
    advice = (
        f"training.gradient_accumulation_steps={before // rows} restores it"
        if before % rows == 0
        else "choose training.per_device_train_batch_size and gradient_accumulation_steps so that their product "
        f"times {facts['world_size']} processes is {before}"
    )
    return (
        f"{checkpoint} was trained with a global batch of {before} rows ({manifest['world_size']} processes), this "
        f"launch has {now} ({facts['world_size']} processes). Data order and learning rate would mean something else; "
        f"{advice}."
    )
