"""RUN/final: the finished model as others load it, written beside its place and renamed when it is whole."""

import shutil
from pathlib import Path
from typing import Any

from hf_softpick.errors import StorageError
from hf_softpick.files import umask
from hf_softpick.training.build import is_foreign
from hf_softpick.training.model_card import model_card
from hf_softpick.training.recipe import Recipe
from hf_softpick.training.trainer import SoftpickTrainer
from hf_softpick.versions import versions


def write_final(
    trainer: SoftpickTrainer, recipe: Recipe, results: dict[str, Any], data_report: dict[str, Any]
) -> Path:
    """Save weights, configuration, tokenizer and model card; every rank calls this, rank 0 writes.

    Returns:
        RUN/final, complete.

    Raises:
        StorageError: it could not be written; the checkpoints are untouched.
    """
    final = recipe.run.directory / "final"
    staging = recipe.run.directory / ".final-staging"
    main = trainer.is_world_process_zero()
    if main:
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    fault = None
    try:
        # The Trainer turned the cache off for training; whoever generates with the saved model wants it.
        model.config.use_cache = True
        if model.generation_config is not None:
            model.generation_config.use_cache = True
        trainer.save_model(str(staging))
        if main:
            _complete(staging, model, recipe, results, data_report)
            _replace(staging, final)
    except OSError as error:
        fault = error
    finally:
        model.config.use_cache = False
    if any(trainer._agree(fault is not None)):
        raise StorageError(
            f"{final} could not be written: {fault or 'it failed on another rank'}. The last checkpoint is kept; "
            "make room and run the same command again."
        )
    return final


def _complete(staging: Path, model: Any, recipe: Recipe, results: dict[str, Any], data_report: dict[str, Any]) -> None:
    foreign = is_foreign(model.config)
    text = (recipe.run.directory / "recipe.yaml").read_text(encoding="utf-8")
    parameters = results.pop("parameters")
    card = model_card(recipe, text, results, data_report, versions(), parameters, foreign)
    (staging / "README.md").write_text(card, encoding="utf-8")
    hidden = umask()
    for path in staging.rglob("*"):
        # safetensors writes 0600, which would shut out everybody else who may read this folder.
        path.chmod((0o777 if path.is_dir() else 0o666) & ~hidden)


def _replace(staging: Path, final: Path) -> None:
    old = final.with_name(".final-replaced")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    staging.rename(final)
    shutil.rmtree(old, ignore_errors=True)
