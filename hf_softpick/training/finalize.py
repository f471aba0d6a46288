"""The end of a run: its last measurements, and RUN/final as others load it, which is tried before the first step."""

import contextlib
import json
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_softpick.data.preparing import PreparedData
from hf_softpick.errors import RecipeError, StorageError
from hf_softpick.files import clear, replace, write_text
from hf_softpick.generation_settings import mend_generation_config
from hf_softpick.modeling import compat
from hf_softpick.modeling.attention_guard import SEALED
from hf_softpick.training import checkpointing, environment, finished, resume
from hf_softpick.training.dry_run import disk_warnings
from hf_softpick.training.estimates import estimate_disk
from hf_softpick.training.generation import write_samples
from hf_softpick.training.model_card import model_card
from hf_softpick.training.plots import plot_losses
from hf_softpick.training.recipe import Recipe
from hf_softpick.training.trainer import SoftpickTrainer
from hf_softpick.versions import versions

logger = logging.getLogger(__name__)

# Weights up to this size are written in the trial too: a second at most.
_TRIAL_BYTES = 2**28


def check_saving(trainer: SoftpickTrainer, recipe: Recipe, data_report: dict[str, Any]) -> None:
    """Write what a checkpoint and RUN/final hold into a folder that goes away again, before anything is trained.

    Every rank calls this, rank 0 writes; of large or sharded models everything but the weights. Generation settings
    that cannot be saved are left out of the model, and named in the log.

    Raises:
        RecipeError: something of the model, the tokenizer or the recipe cannot be saved.
        StorageError: the run folder cannot be written.
    """
    changed, scratch = mend_generation_config(trainer.model), recipe.run.directory / ".trial-staging"
    parameters = list(trainer.model.parameters())
    sharded = any(map(compat.is_sharded, parameters))
    is_small = not sharded and sum(parameter.nbytes for parameter in parameters) <= _TRIAL_BYTES

    def write() -> None:
        if not trainer.is_world_process_zero():
            return
        for sentence in changed:
            logger.warning("model.from %s: %s", recipe.model.from_, sentence)
        for sentence in disk_warnings(estimate_disk(recipe, count(trainer.model))):
            logger.warning("%s", sentence)
        try:
            clear(scratch)
            with _for_generation(trainer.model):
                trainer.model.save_pretrained(scratch, state_dict=None if is_small else {"trial": torch.zeros(1)})
                trainer.processing_class.save_pretrained(scratch)
            _write_card(scratch, recipe, {"parameters": 0}, data_report, ())
        finally:
            with contextlib.suppress(OSError):
                clear(scratch)

    # Whatever the writers of others raise: here it costs nothing yet.
    fault = trainer.together(write, lambda error: True)
    if fault is None:
        return
    reason = f"{type(fault).__name__}: {' '.join(str(fault).split())}"
    if checkpointing.is_storage_fault(fault):
        raise StorageError(f"{recipe.run.directory} cannot hold a checkpoint: {reason}. Make room, then try again.")
    raise RecipeError(
        f"The model of this run cannot be saved, so nothing was trained ({reason}). Mend what it names in "
        f"{recipe.model.from_ or 'the recipe'}."
    )


def count(model: torch.nn.Module) -> int:
    """Parameters of a model, sharded ones whole."""
    return sum(compat.whole_shape(p).numel() for p in model.parameters())


@contextlib.contextmanager
def _for_generation(model: Any) -> Iterator[None]:
    """The Trainer turns the cache off for training; whoever generates with the saved model wants it."""
    model.config.use_cache = True
    if model.generation_config is not None:
        model.generation_config.use_cache = True
    try:
        yield
    finally:
        model.config.use_cache = False


def require_measurements(trainer: SoftpickTrainer) -> None:
    """Stop, on every rank, a run whose metrics or samples could not be written; its state is saved by now.

    Raises:
        StorageError: which file, and where the run goes on.
    """
    metrics = trainer.metrics
    metrics.flush()
    if any(trainer.agree(metrics.fault is not None)):
        saved = checkpointing.steps(Path(trainer.args.output_dir))
        raise StorageError(
            f"{metrics.fault or 'A file of the run could not be written by rank 0.'} Training stopped at step "
            f"{trainer.state.global_step}; "
            + (f"the newest checkpoint is of step {saved[0]}. " if saved else "there is no checkpoint. ")
            + "Make room and run the same command again to go on."
        )


def finish(trainer: SoftpickTrainer, recipe: Recipe, data: PreparedData) -> dict[str, Any]:
    """The end of a run that trained all its steps: last evaluation, samples, final/, upload.

    Returns:
        step, tokens_seen, losses, ... of the last step.
    """
    directory, step = recipe.run.directory, trainer.state.global_step
    evaluation = trainer.final_evaluation()
    samples = write_samples(trainer, recipe, data.tokenizer, step)
    require_measurements(trainer)
    # A run too short for a log line has the mean alone.
    losses = [entry[key] for key in ("train_loss", "loss") for entry in trainer.state.log_history if key in entry]
    results = {
        "step": step,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "last_loss": losses[-1] if losses else math.nan,
        **evaluation,
        "parameters": count(trainer.model),
    }
    final = write_final(trainer, recipe, dict(results), data.report)
    if trainer.is_world_process_zero():
        plot_losses(trainer.metrics.read(), directory / "report" / "loss.png", recipe.run.name)
        resume.write_finished(recipe, step, results, final, trainer.manifest_facts["changes"])
        _print_end(directory, results, samples, len(data.tokenizer))
    # Uploading may take long, and may fail: nobody else has to wait for it.
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero() and not finished.is_uploaded(recipe):
        finished.upload(recipe)
    return results


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
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    files: dict[str, dict[str, Any]] = {}

    def write() -> None:
        with _for_generation(model):
            trainer.save_model(str(staging))
        if main:
            if recipe.training.export_dtype != "float32":
                _cast(staging, getattr(torch, recipe.training.export_dtype), compat.float32_modules(model))
            _write_card(staging, recipe, results, data_report, trainer.manifest_facts.get("changes", ()))
            files.update(checkpointing.record_files(staging))
            replace(staging, final, final.with_name(".final-replaced"))

    fault = trainer.together(lambda: clear(staging) if main else None) or trainer.together(write)
    if fault is None:
        return files
    with contextlib.suppress(OSError):
        clear(staging)
    raise StorageError(
        f"{final} could not be written: {fault}. The last checkpoint is kept; make room and run the same command "
        "again."
    )


def _cast(folder: Path, dtype: torch.dtype, keep: Collection[str]) -> None:
    """Rewrite the saved float32 weights as `dtype`, one file at a time; modules in `keep` stay float32."""
    total = 0
    for path in folder.glob("*.safetensors"):
        weights = {
            name: tensor.to(dtype) if tensor.is_floating_point() and not set(keep) & set(name.split(".")) else tensor
            for name, tensor in load_file(path).items()
        }
        staged = path.with_suffix(".cast")  # not in place: what stays float32 is still read from the file
        save_file(weights, staged, metadata={"format": "pt"})
        staged.replace(path)
        total += sum(tensor.nbytes for tensor in weights.values())
    for index in folder.glob("*.safetensors.index.json"):
        written = json.loads(index.read_text(encoding="utf-8"))
        written["metadata"]["total_size"] = total
        index.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for said in config.get(SEALED, [config]):
        said["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_card(
    staging: Path,
    recipe: Recipe,
    results: dict[str, Any],
    data_report: dict[str, Any],
    changes: Sequence[dict[str, Any]],
) -> None:
    parameters = results.pop("parameters")
    commits = environment.trained_from(recipe.run.directory / "environment.json")
    card = model_card(recipe, results, data_report, versions(), parameters, changes, commits)
    write_text(staging / "README.md", card)


def _print_end(directory: Path, results: dict[str, Any], samples: list[dict[str, str]], vocabulary: int) -> None:
    if samples:
        print(f"\nSample for {samples[0]['prompt']!r}:\n{samples[0]['text']}\n")
    if "eval_loss" in results:
        uniform = math.log(vocabulary)
        print(f"Validation loss {results['eval_loss']:.4f} nats a token; ln(vocabulary size) is {uniform:.4f}.")
    print(f"Loss plot: {directory / 'report' / 'loss.png'}")
    print(f"Model: {directory / 'final'}")
    print(f"Run folder: {directory}", flush=True)
