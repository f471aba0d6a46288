"""One run from recipe to finished model: the order of its parts, and nothing that one of them could do itself."""

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import patch_environment
from filelock import FileLock, Timeout
from torch.utils.data import Subset
from transformers.trainer_utils import IntervalStrategy

from hf_softpick.data.collating import PackedCollator
from hf_softpick.data.preparing import PreparedData, prepare_data
from hf_softpick.errors import RecipeError, Stopped, StorageError
from hf_softpick.files import write_text
from hf_softpick.modeling import compat
from hf_softpick.modeling.attention_interface import resolve_auto
from hf_softpick.training import environment, finalize, finished, resume, strategy
from hf_softpick.training.arguments import global_batch, training_arguments
from hf_softpick.training.build import build_model
from hf_softpick.training.callbacks import MetricsLog, Progress, Samples
from hf_softpick.training.generation import write_samples
from hf_softpick.training.metrics import MetricsFile
from hf_softpick.training.plots import plot_losses
from hf_softpick.training.recipe import Recipe, dump_recipe
from hf_softpick.training.recipe_record import settings
from hf_softpick.training.rehearsal import rehearse
from hf_softpick.training.statistics import StatisticsLog
from hf_softpick.training.trainer import SoftpickTrainer
from hf_softpick.versions import versions


@dataclass(frozen=True)
class RunResult:
    """How a run ended: its folder, its last step, and the measured results."""

    directory: Path
    step: int
    results: dict[str, Any]


def run(recipe: Recipe, *, debug: bool = False) -> RunResult:
    """Train as `recipe` says, or go on where the same recipe stopped. Every process of a launch calls this.

    Args:
        debug: let transformers log what it does.

    Raises:
        UserError: one of its classes, for everything that a user can put right.
    """
    main = strategy.is_main()
    step = resume.finished_step(recipe)
    damage = [] if step is None else finished.faults(recipe)
    if damage:
        saved = resume.checkpointing.steps(recipe.run.directory / "checkpoints")
        finished.require_checkpoint(recipe, step, saved[0] if saved else None)
        if main:
            print(f"{recipe.run.directory / 'final'} is damaged ({'; '.join(damage)}): writing it again.", flush=True)
    if step is None or damage:
        with _locked(recipe.run.directory, main):
            return _train(recipe, main, debug, ended=step)
    if main and finished.is_uploaded(recipe):
        print(f"{recipe.run.directory}: already finished at step {step}; nothing to do.")
    elif main:
        print(f"{recipe.run.directory}: already finished at step {step}, and not uploaded.")
        with _locked(recipe.run.directory, main):
            finished.upload(recipe)
    return RunResult(recipe.run.directory, step, {})


@contextlib.contextmanager
def _locked(directory: Path, main: bool) -> Iterator[None]:
    """Keep a second launch out of the run folder. The system frees the lock when the process dies, however it dies."""
    if not main:
        yield
        return
    lock = FileLock(directory / ".lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RecipeError(
            f"{directory} is in use by another process on this run. Wait for it, or choose another run.name."
        ) from error
    except OSError as error:
        raise StorageError(f"{directory} cannot be written: {error}. Choose another run.root.") from error
    try:
        refuse_links(directory)
        yield
    finally:
        lock.release()


def _train(recipe: Recipe, main: bool, debug: bool, ended: int | None = None) -> RunResult:
    """All of a run from its start or its newest checkpoint; of a run that `ended` at a step, its end alone."""
    if not debug:
        transformers.logging.disable_progress_bar()  # One bar, that of the training steps, is enough.
        # DeepSpeed calls deprecated collectives several times a step, each with a warning.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    asked = strategy.asked_for(os.environ, recipe.training.arguments)
    strategy.check_launch(asked, os.environ)
    strategy.check_precision(os.environ, recipe.training.arguments)
    args = training_arguments(recipe)
    active = strategy.check(asked, args)
    rehearse(recipe.model, args)
    data = prepare_data(recipe.data, recipe.tokenizer, progress=main and not args.disable_tqdm)
    data.require_rows(global_batch(args))
    facts = {
        "recipe": settings(recipe).record(),
        "changes": [],
        "data": data.content,
        "strategy": active,
        "world_size": args.world_size,
        "global_batch": global_batch(args),
        "per_device_batch": args.per_device_train_batch_size,
        "versions": versions(),
    }
    checkpoint = resume.find_checkpoint(Path(args.output_dir), main, args.world_size)
    manifest: dict[str, Any] = {}
    changes: resume.Changes = {}
    if checkpoint is not None:
        total = resume.total_steps(args, len(data.train), global_batch(args))
        manifest, changes = resume.check_resume(checkpoint, facts, recipe, data, total)
        facts["changes"] = manifest.get("changes", []) + resume.listed(changes, manifest["step"])
    if ended is not None:
        finished.require_checkpoint(recipe, ended, manifest.get("step"))
    if checkpoint is not None and main:
        print(f"Resuming {recipe.run.directory} from step {manifest['step']}.", flush=True)
        if changes:
            print(f"Changed from here on: {resume.describe(changes)}.", flush=True)
    _prepare_folder(recipe, environment.describe(active, args.world_size), facts["changes"], main)
    with _reporters(recipe.run.directory):
        trainer = _make_trainer(recipe, args, data, facts)
        if main:
            environment.record_commits(recipe.run.directory / "environment.json", environment.hub_commits(recipe))
        finalize.check_saving(trainer, recipe, data.report)
        if checkpoint is not None:
            trainer.guard.consecutive = manifest.get("consecutive_skips", 0)
            trainer.add_callback(resume.ApplySettings(trainer))
        if main:
            print(_what_runs(recipe, trainer, active), flush=True)
        trainer.stop.install()
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        finally:
            trainer.stop.restore()
    step = trainer.state.global_step
    finalize.require_measurements(trainer)
    trainer.guard.require_training(step)
    if step < trainer.state.max_steps:
        saved = resume.checkpointing.steps(Path(args.output_dir))
        if main:
            records = trainer.metrics.read()
            plot_losses(records, recipe.run.directory / "report" / "loss.png", recipe.run.name)
        # A launcher ends the other processes as soon as one of them leaves with an error code.
        trainer.accelerator.wait_for_everyone()
        raise Stopped(
            f"Stopped by a signal at step {step} of {trainer.state.max_steps}, saved as checkpoint-{saved[0]}. "
            "Run the same command again to go on."
        )
    return RunResult(recipe.run.directory, step, finalize.finish(trainer, recipe, data))


def _what_runs(recipe: Recipe, trainer: SoftpickTrainer, active: str) -> str:
    """One line on what is about to run where, so that nobody trains something else than he thinks."""
    args, model = trainer.args, trainer.model
    device = args.device.type
    attention = compat.attention_of(model.config)
    if attention == "auto":
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        attention = f"auto ({resolve_auto(args.device, dtype, model.config.head_dim)})"
    where = active if active == "one process" else f"{active} on {args.world_size} processes"
    parts = [
        f"{recipe.model.normalizer} attention by {attention}",
        f"{finalize.count(model) / 1e6:.1f}M parameters",
        where,
    ]
    if device == "cpu":
        threads, cores = torch.get_num_threads(), os.cpu_count() or 1
        idle = threads == 1 < cores and active == "one process"
        advice = f" (OMP_NUM_THREADS={cores} would use all {cores} cores)" if idle else ""
        parts.append(f"cpu with {threads} threads a process{advice}")
    else:
        parts.append(device)
    return f"{recipe.run.name}: " + ", ".join(parts)


def _prepare_folder(recipe: Recipe, launch: dict[str, Any], changes: list[dict[str, Any]], main: bool) -> None:
    """The run folder with recipe.yaml, environment.json and what must be the same after a resume."""
    directory = recipe.run.directory
    if not main:
        return
    try:
        for folder in (directory / "checkpoints", directory / "report"):
            folder.mkdir(parents=True, exist_ok=True)
        run_id = directory / "report" / "wandb_run_id"
        if not run_id.exists():
            write_text(run_id, os.urandom(6).hex())
        environment.record_launch(directory / "environment.json", launch)
    except OSError as error:
        raise StorageError(
            f"{directory} cannot be written: {error}. Choose another run.root, or make room."
        ) from error
    dump_recipe(recipe, directory / "recipe.yaml", [f"changed at {json.dumps(change)}" for change in changes])


def refuse_links(directory: Path) -> None:
    """Refuse symbolic links among what a run writes: what they point to is not the run's to change.

    RUN/final may be one, it is replaced and never written to; what reporters keep in folders of their own is theirs.
    """
    for folder in (directory, directory / "report", directory / "checkpoints"):
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_symlink() and path != directory / "final":
                raise StorageError(
                    f"{path} is a symbolic link, and a run writes into its own folder only. Remove it; to keep runs "
                    "on another disk, set run.root."
                )


def _reporters(directory: Path) -> contextlib.AbstractContextManager:
    """Tell transformers' TensorBoard and wandb callbacks to report into the run folder, unless the user said where."""
    run_id = directory / "report" / "wandb_run_id"
    ours = {
        "TENSORBOARD_LOGGING_DIR": str(directory / "tensorboard"),
        "WANDB_DIR": str(directory),
        "WANDB_PROJECT": "hf_softpick",
        # A resumed run goes on in the same wandb run instead of opening another one.
        "WANDB_RESUME": "allow",
        "WANDB_RUN_ID": run_id.read_text(encoding="utf-8").strip() if run_id.exists() else "",
    }
    return patch_environment(**{name: value for name, value in ours.items() if value and name not in os.environ})


def _make_trainer(recipe: Recipe, args: Any, data: PreparedData, facts: dict[str, Any]) -> SoftpickTrainer:
    model = build_model(recipe.model, data.tokenizer, args.seed, recipe.data)
    # Whole global batches only: every step then means the same on any number of processes.
    rows = len(data.train) // global_batch(args) * global_batch(args)
    validation = data.validation
    if validation is not None and recipe.eval.max_rows is not None:
        validation = Subset(validation, range(min(recipe.eval.max_rows, len(validation))))
    if not validation:
        args.eval_strategy, validation = IntervalStrategy.NO, None
    metrics = MetricsFile(recipe.run.directory / "metrics.jsonl")
    trainer = SoftpickTrainer(
        model=model,
        args=args,
        train_dataset=Subset(data.train, range(rows)),
        eval_dataset=validation,
        data_collator=PackedCollator(),
        processing_class=data.tokenizer,
        metrics=metrics,
        max_consecutive_skips=recipe.training.max_consecutive_skips,
        manifest_facts=facts,
        callbacks=[MetricsLog(metrics), Progress(show_bar=not args.disable_tqdm and sys.stderr.isatty())],
    )
    trainer.add_callback(
        Samples(lambda step: write_samples(trainer, recipe, data.tokenizer, step), recipe.eval.generate_every)
    )
    if recipe.eval.statistics:
        trainer.add_callback(StatisticsLog(trainer, recipe.eval.statistics))
    return trainer
