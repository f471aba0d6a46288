"""From the recipe to transformers.TrainingArguments, with what every run here needs and a recipe cannot change."""

import os
from typing import Any

import torch
from transformers import TrainingArguments

from hf_softpick.errors import RecipeError
from hf_softpick.training.recipe import Recipe
from hf_softpick.training.strategy import use_float32_weights

# Uploading is the last step of a run (push.py), not something that happens beside training.
HUB = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision")


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """TrainingArguments for `recipe`; starts the process group when there is one.

    Must exist before the model: ZeRO-3 shards weights while they are made.

    Raises:
        RecipeError: transformers refuses a value.
    """
    given = {name: value for name, value in recipe.training.arguments.items() if name not in HUB}
    evaluates = recipe.eval.every > 0 and recipe.data.validation > 0
    if not torch.accelerator.is_available():
        # Without it, accelerate takes each of several CPU processes under DeepSpeed for a run of its own.
        given["use_cpu"] = True
    if "RANK" not in os.environ:
        given.pop("ddp_backend", None)  # One process has no group.
    # Every parameter of a causal LM takes part in every step; looking for others costs a pass over the graph.
    given.setdefault("ddp_find_unused_parameters", False)
    accelerator: dict[str, Any] = {**(given.pop("accelerator_config", None) or {}), "dispatch_batches": False}
    fixed: dict[str, Any] = {
        "output_dir": str(recipe.run.directory / "checkpoints"),
        "run_name": recipe.run.name,
        # The collator needs columns that the model's forward does not name.
        "remove_unused_columns": False,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": recipe.eval.every if evaluates else None,
        "accelerator_config": accelerator,
    }
    try:
        args = TrainingArguments(**given | fixed)
        args.device  # noqa: B018 - sets up the process group, whose errors belong here
        if args.deepspeed_plugin is not None:
            use_float32_weights(args)
            # ZeRO-3 reads the number of processes from DeepSpeed's own group while the model is made.
            import deepspeed

            deepspeed.init_distributed(dist_backend=args.distributed_state.backend, auto_mpi_discovery=False)
    except (ValueError, TypeError, ImportError, RuntimeError, FileNotFoundError) as error:
        port = ". Another launch has that port: deepspeed --master_port N, accelerate launch --main_process_port N."
        raise RecipeError(f"training: {error}{port if 'EADDRINUSE' in str(error) else ''}") from error
    return args


def global_batch(args: TrainingArguments) -> int:
    """Rows of one optimizer step over all processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
