"""Where a run starts: fresh, from its newest whole checkpoint, or not at all because it is finished."""

import logging
import math
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments

from hf_softpick.data.preparing import PreparedData
from hf_softpick.errors import CheckpointError, RecipeError, StorageError, UserError
from hf_softpick.files import read_object, write_json
from hf_softpick.training import checkpointing, strategy
from hf_softpick.training.recipe import Recipe
from hf_softpick.training.recipe_record import Settings, differences, read_settings, settings
from hf_softpick.training.resume_rules import refused

logger = logging.getLogger(__name__)

FINISHED = "finished.json"
LENGTH = ("training.max_steps", "training.num_train_epochs")
UPLOAD = ("training.push_to_hub", "training.hub_")

Changes = dict[str, tuple[Any, Any]]


def finished_step(recipe: Recipe) -> int | None:
    """Step at which this run ended, None when there is something left to do.

    Raises:
        RecipeError: the folder holds the finished run of another model, a longer one, or one that cannot be extended.
    """
    run, record = recipe.run.directory, read_finished(recipe)
    try:
        step, old = int(record["step"]), read_settings(record, run)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    new = settings(recipe)
    changes = differences(old, new)
    _refuse(run, changes, old, new)
    if not changes.keys() & set(LENGTH):
        idle = {name: pair for name, pair in changes.items() if not name.startswith(("run.", *UPLOAD))}
        if idle and strategy.is_main():
            print(f"{run} is finished; without effect on it: {describe(idle)}.")
        return step
    check_length(run, step, new["training.max_steps"])
    if not checkpointing.steps(run / "checkpoints"):
        raise RecipeError(
            f"{run} is finished at step {step} and has no checkpoint to go on from. Choose another run.name."
        )
    return None


def check_length(run: Path, step: int, total: int) -> None:
    """Raise RecipeError when the run is past the end that the recipe gives it (-1: not known yet)."""
    if 0 < total < step:
        raise RecipeError(
            f"{run} is at step {step} already, and the recipe (training.max_steps, num_train_epochs) ends it at step "
            f"{total}. Train at least {step} steps, or choose another run.name."
        )


def total_steps(args: TrainingArguments, rows: int, global_batch: int) -> int:
    """Optimizer steps of the whole run, as transformers counts them."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * (rows // global_batch))


def read_finished(recipe: Recipe) -> dict[str, Any]:
    """The record of the end of a run; {} where there is none that can be read."""
    return read_object(recipe.run.directory / FINISHED)


def write_finished(
    recipe: Recipe, step: int, results: dict[str, Any], final: dict[str, dict[str, Any]], changes: list[dict[str, Any]]
) -> None:
    """The last file of a run: from now on the same command has nothing to do, but for an upload.

    Args:
        final: size and SHA-256 of every file of RUN/final.
        changes: settings that the run did not have from its first step on, see `listed`.
    """
    record = {"step": step, "results": results, "final": final, "changes": changes}
    write_json(recipe.run.directory / FINISHED, record | {"recipe": settings(recipe).record()})


def find_checkpoint(root: Path, main: bool, world_size: int) -> Path | None:
    """The newest checkpoint that verifies; found by rank 0, the same on every rank.

    Raises:
        CheckpointError: on every rank, when there are checkpoints and none can be loaded.
        StorageError: on every rank, when one cannot be read or moved.
    """
    found: list[Any] = [None, None]
    if main:
        try:
            checkpointing.sweep(root)
            found[0] = checkpointing.find_newest(root, logger.warning)
        except UserError as error:
            found[1] = error
        except OSError as error:
            found[1] = StorageError(f"{root} cannot be read and written: {error}. Make it usable and try again.")
    if world_size > 1:
        dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def check_resume(
    checkpoint: Path, facts: dict[str, Any], recipe: Recipe, data: PreparedData, total: int
) -> tuple[dict[str, Any], Changes]:
    """The checkpoint's manifest and what the recipe changes, if a run described by `facts` can go on from there.

    Args:
        total: steps of the whole run.

    Raises:
        RecipeError: other model or data, another global batch, a sharding that cannot be changed, or a shorter run.
        CheckpointError: the manifest of an older version that lacks what every one has.
    """
    run, manifest = recipe.run.directory, checkpointing.read_manifest(checkpoint)
    try:
        old, rows = read_settings(manifest, run), manifest["data"]
        batch, step, before, processes = (
            manifest[name] for name in ("global_batch", "step", "strategy", "world_size")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / checkpointing.MANIFEST} lacks {error}. Restore or remove it.") from error
    new = settings(recipe)
    changes = differences(old, new)
    _refuse(run, changes, old, new, facts["strategy"])
    if not data.matches(rows):
        raise RecipeError(
            f"{run} was trained on {rows}, but the prepared data is now {facts['data']}: the sources have changed. "
            "Restore them, or choose another run.name."
        )
    if batch != facts["global_batch"]:
        raise RecipeError(_batch_message(checkpoint, manifest, facts))
    kinds = ["replicated" if s in ("one process", "ddp") else s for s in (before, facts["strategy"])]
    if kinds[0] != kinds[1] or (kinds[1] != "replicated" and processes != facts["world_size"]):
        raise RecipeError(
            f"{checkpoint} was written by {processes} processes under {before} and cannot be loaded by "
            f"{facts['world_size']} under {facts['strategy']}. Launch it as it was launched before."
        )
    check_length(run, step, total)
    return manifest, changes


def listed(changes: Changes, step: int) -> list[dict[str, Any]]:
    """`changes` as manifests, finished.json and the model card hold them, but for where the run is kept."""
    kept = {name: values for name, values in changes.items() if not name.startswith("run.")}
    return [{"step": step, "setting": name, "before": old, "after": new} for name, (old, new) in kept.items()]


def describe(changes: Changes) -> str:
    """`changes` for a person: `training.weight_decay: 0.1 -> 0; ...`."""
    return "; ".join(f"{name}: {old} -> {new}" for name, (old, new) in changes.items())


def _refuse(run: Path, changes: Changes, old: Settings, new: Settings, sharding: str | None = None) -> None:
    reasons = refused(changes, old, new, sharding)
    if not reasons:
        return
    named = {name: changes[name] for name in list(reasons)[:5]}
    why = ", ".join(dict.fromkeys(reasons[name] for name in named))
    raise RecipeError(
        f"{run} holds a run with other settings ({describe(named)}{' ...' if len(reasons) > 5 else ''}): {why}. "
        "Choose another run.name, or put the settings back to go on with it."
    )


class ApplySettings(TrainerCallback):
    """Makes what the recipe says now hold over what the checkpoint brought back.

    transformers restores the optimizer's settings and the steps between logs, saves and evaluations with it.

    Args:
        trainer: its `group_options` are what the optimizer was made with, before the checkpoint was loaded.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        """Checkpoint and scheduler are loaded, the first step is not made yet."""
        state.compute_steps(args, state.max_steps)
        before = float(optimizer.param_groups[0]["lr"])
        apply_options(optimizer, lr_scheduler, self.trainer.group_options)
        after = float(optimizer.param_groups[0]["lr"])
        if after != before and state.is_world_process_zero:
            print(f"Learning rate of the next step: {after:.3g}; the checkpoint left it at {before:.3g}.", flush=True)
        if hasattr(getattr(optimizer, "optimizer", None), "clip_grad"):
            optimizer.optimizer.clip_grad = args.max_grad_norm  # ZeRO restores that of the checkpoint.


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Of each parameter group, what a recipe says of it; a loaded checkpoint overwrites it."""
    names = ("lr", "weight_decay", "betas", "eps")
    return [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]


def apply_options(optimizer: Optimizer, scheduler: Any, options: list[dict[str, Any]]) -> None:
    """Give the groups `options` again, and the learning rate that the schedule has at its present step."""
    for group, option in zip(optimizer.param_groups, options, strict=True):
        group.update({name: value for name, value in option.items() if name != "lr"})
    if not isinstance(scheduler, LambdaLR):
        return
    scheduler.base_lrs = [float(option["lr"]) for option in options]
    for group, base in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
        group["initial_lr"] = base
    scheduler.last_epoch -= 1
    scheduler.step()


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
