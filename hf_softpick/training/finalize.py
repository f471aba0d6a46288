"""The end of a run: RUN/final as others load it, whether it is still whole, and its upload."""

import json
from pathlib import Path
from typing import Any

from hf_softpick.errors import CheckpointError, StorageError
from hf_softpick.files import clear, sync, write_text
from hf_softpick.training import checkpointing, resume
from hf_softpick.training.build import is_foreign
from hf_softpick.training.model_card import model_card
from hf_softpick.training.push import push
from hf_softpick.training.recipe import Recipe
from hf_softpick.training.trainer import SoftpickTrainer
from hf_softpick.versions import versions


def write_final(
    trainer: SoftpickTrainer, recipe: Recipe, results: dict[str, Any], data_report: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Save weights, configuration, tokenizer and model card beside RUN/final, and rename them into place.

    Every rank calls this, rank 0 writes.

    Returns:
        size and SHA-256 of every file of RUN/final; {} on other ranks than 0.

    Raises:
        StorageError: it could not be written; the checkpoints are untouched.
    """
    final = recipe.run.directory / "final"
    staging = recipe.run.directory / ".final-staging"
    main = trainer.is_world_process_zero()
    fault: Exception | None = None
    files: dict[str, dict[str, Any]] = {}
    if main:
        try:
            clear(staging)
        except OSError as error:
            fault = error
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    _agree(trainer, fault, final)
    try:
        # The Trainer turned the cache off for training; whoever generates with the saved model wants it.
        model.config.use_cache = True
        if model.generation_config is not None:
            model.generation_config.use_cache = True
        trainer.save_model(str(staging))
        if main:
            _write_card(staging, model, recipe, results, data_report)
            files = checkpointing.record_files(staging)
            _replace(staging, final)
    except Exception as error:
        if not checkpointing.is_storage_fault(error):
            raise
        fault = error
    finally:
        model.config.use_cache = False
    _agree(trainer, fault, final)
    return files


def _agree(trainer: SoftpickTrainer, fault: Exception | None, final: Path) -> None:
    """Raise on every rank what one of them met."""
    if any(trainer._agree(fault is not None)):
        raise StorageError(
            f"{final} could not be written: {fault or 'it failed on another rank'}. The last checkpoint is kept; "
            "make room and run the same command again."
        )


def _write_card(
    staging: Path, model: Any, recipe: Recipe, results: dict[str, Any], data_report: dict[str, Any]
) -> None:
    foreign = is_foreign(model.config)
    text = (recipe.run.directory / "recipe.yaml").read_text(encoding="utf-8")
    parameters = results.pop("parameters")
    write_text(staging / "README.md", model_card(recipe, text, results, data_report, versions(), parameters, foreign))


def _replace(staging: Path, final: Path) -> None:
    old = final.with_name(".final-replaced")
    clear(old)
    if final.exists() or final.is_symlink():
        final.rename(old)
    staging.rename(final)
    sync(final.parent)
    clear(old)


def faults(recipe: Recipe) -> list[str]:
    """What is wrong with RUN/final of a finished run, one line a file.

    Weights must be those that were written; what people edit (card, configuration) only has to be there.
    """
    final = recipe.run.directory / "final"
    recorded = resume.read_finished(recipe).get("final")
    if not isinstance(recorded, dict):  # finished by an older version
        try:
            index = json.loads((final / "model.safetensors.index.json").read_text(encoding="utf-8"))
            weights = set(index["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            weights = {"model.safetensors"}
        recorded = dict.fromkeys(["config.json", *sorted(weights)])
    weights = {name: file for name, file in recorded.items() if file and name.endswith(".safetensors")}
    gone = [name for name in recorded if name not in weights and not (final / name).is_file()]
    return [f"{name} is missing" for name in gone] + checkpointing.file_faults(final, weights)


def require_checkpoint(recipe: Recipe, step: int, found: int | None) -> None:
    """Refuse to write a damaged final/ again from anything but the checkpoint of its own step.

    Raises:
        CheckpointError: what is wrong with final/, and which checkpoint there is.
    """
    if found == step:
        return
    directory = recipe.run.directory
    newest = f"the newest that can be used is of step {found}" if found is not None else "there is none at all"
    raise CheckpointError(
        f"{directory / 'final'} is damaged ({'; '.join(faults(recipe))}), and no checkpoint of step {step}, where the "
        f"run finished, is left to write it again from: {newest}. Put the files back; or delete "
        f"{directory / resume.FINISHED} to train again from what there is; or choose another run.name."
    )


def is_uploaded(recipe: Recipe) -> bool:
    """Whether nothing is left to upload, because the recipe asks for no upload or the record says that it was made."""
    if not recipe.training.arguments.get("push_to_hub"):
        return True
    made = resume.read_finished(recipe).get("uploads", [])
    return any({name: each.get(name) for name in ("repo", "revision")} == _destination(recipe) for each in made)


def upload(recipe: Recipe) -> None:
    """Upload RUN/final, and write into the record that it was. For rank 0 to call.

    Raises:
        HubError: it failed; the same command tries again.
    """
    hub, destination = recipe.training.arguments, _destination(recipe)
    private = hub.get("hub_private_repo") is not False
    url = push(recipe.run.directory / "final", destination["repo"], private, destination["revision"])
    record = resume.read_finished(recipe)
    record["uploads"] = [*record.get("uploads", []), {**destination, "commit": url}]
    resume.save_finished(recipe, record)
    print("Uploaded:", url, flush=True)


def _destination(recipe: Recipe) -> dict[str, Any]:
    hub = recipe.training.arguments
    return {"repo": hub.get("hub_model_id") or recipe.run.name, "revision": hub.get("hub_revision")}
