"""How the work is spread over processes: what was asked for, what is in force, and an error where they differ."""

import contextlib
import copy
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from torch.utils.cpp_extension import get_default_build_root
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from hf_softpick.errors import RecipeError


def asked_for(environment: Mapping[str, str], arguments: Mapping[str, Any]) -> dict[str, str]:
    """Strategies that the launcher's environment or the recipe names, each with who named it.

    To be read before TrainingArguments exists, which changes the environment.
    """
    found = {}
    for strategy in ("fsdp", "deepspeed"):
        if environment.get(f"ACCELERATE_USE_{strategy.upper()}", "false").lower() in ("true", "1"):
            found[strategy] = "the accelerate configuration"
        if arguments.get(strategy):
            found[strategy] = f"training.{strategy}"
    return found


def check_launch(asked: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Refuse what cannot start: DeepSpeed in a process without a launcher, or after a killed build."""
    if "deepspeed" in asked and "RANK" not in environment:
        raise RecipeError(
            f"DeepSpeed was asked for by {asked['deepspeed']}, but one process without a launcher is in force. Start "
            "it with: deepspeed --module hf_softpick.train ..., or: accelerate launch --config_file "
            "recipes/accelerate/zero3.yaml -m hf_softpick.train ..."
        )
    if "deepspeed" in asked:
        _check_builds()


def _check_builds() -> None:
    """Refuse to wait for ever: torch builds DeepSpeed's operators behind a lock file, which a killed build leaves.

    Raises:
        RecipeError: no process of this machine holds one of these locks.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = {*root.glob("*/lock"), *root.glob("*/*/lock")}
    for process in psutil.process_iter() if locks else ():
        with contextlib.suppress(psutil.Error):
            locks -= {Path(file.path) for file in process.open_files()}
    if locks:
        time.sleep(1)  # between its last two calls a build holds a lock no longer that is still there
    if locks := sorted(path for path in locks if path.exists()):
        raise RecipeError(
            f"{', '.join(map(str, locks))} was left by a killed build of an extension, and DeepSpeed would wait for "
            "it without end. Delete it, unless another machine is building in that folder now."
        )


def check_precision(environment: Mapping[str, str], arguments: Mapping[str, Any]) -> None:
    """Refuse a precision from the launcher that the recipe, the record of what ran, does not say."""
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    wanted = next((name for name in ("bf16", "fp16") if arguments.get(name)), None)
    if launched in ("no", wanted):
        return
    given = f"training.{wanted}=true" if wanted else "no mixed precision"
    remedy = f", or add training.{launched}=true to the recipe or the command" if launched in ("bf16", "fp16") else ""
    raise RecipeError(
        f"The launcher asks for mixed precision '{launched}' and the recipe for {given}. The recipe says what runs: "
        f"launch with --mixed_precision {wanted or 'no'}{remedy}."
    )


def use_float32_weights(args: TrainingArguments) -> None:
    """Let DeepSpeed compute in bf16 as every other strategy does: float32 weights, autocast in the forward pass.

    Its own bf16 mode trains bfloat16 copies of the weights, saves those, and draws new weights in bfloat16. To be
    called before the model is made.

    Raises:
        RecipeError: DeepSpeed's configuration and the recipe disagree.
    """
    plugin = args.deepspeed_plugin
    config = plugin.deepspeed_config
    _check_configuration(config, args)
    if args.bf16:
        # No "enabled": transformers compares it with training.bf16, which stays true.
        config["bf16"] = {}
        config["torch_autocast"] = {**config.get("torch_autocast", {}), "enabled": True, "dtype": "bfloat16"}
    plugin.set_deepspeed_weakref()  # What transformers gives to zero.Init.


def _check_configuration(config: Mapping[str, Any], args: TrainingArguments) -> None:
    """Refuse what transformers would refuse after the data is prepared, and what it would not see."""
    compared = HfTrainerDeepSpeedConfig(copy.deepcopy(dict(config)))
    compared.trainer_config_process(args)
    wrong = [line.removeprefix("- ds ").replace(" vs hf ", " where the recipe has ") for line in compared.mismatches]
    autocast = config.get("torch_autocast", {})
    if autocast.get("enabled") and not (args.bf16 and autocast.get("dtype") == "bfloat16"):
        wrong.append("torch_autocast, which training.bf16 turns on")
    extra = sorted(config.get("bf16", {}).keys() - {"enabled"})
    if extra and args.bf16:
        wrong.append(f"bf16.{extra[0]}, which has no meaning here: weights are float32")
    sections = {"optimizer": "training.optim", "scheduler": "training.lr_scheduler_type"}
    wrong += [f"{name}, which would win over {said}; remove it" for name, said in sections.items() if name in config]
    if args.fp16:
        wrong.append("fp16, which would train float16 copies of the weights; write training.bf16=true instead")
    if wrong:
        raise RecipeError(
            f'The DeepSpeed configuration does not fit the recipe: {"; ".join(wrong)}. Set what differs to "auto" '
            "there, as in recipes/deepspeed/zero3.json, or change the recipe."
        )


def in_force(args: TrainingArguments) -> str:
    """The strategy that this process runs under: one of 'one process', 'ddp', 'zero1', 'zero2', 'zero3'."""
    if args.deepspeed_plugin is not None:
        return f"zero{args.deepspeed_plugin.zero_stage}"
    return "ddp" if args.world_size > 1 else "one process"


def check(asked: Mapping[str, str], args: TrainingArguments) -> str:
    """The strategy in force.

    Raises:
        RecipeError: another one was asked for, or it cannot do what every run here promises.
    """
    active = in_force(args)
    if "fsdp" in asked:
        device = args.device.type
        why = (
            f"in force is {active} on {device}: accelerate has FSDP on accelerators only and ignores it elsewhere"
            if device == "cpu"
            else "it is not supported yet: its saved models would miss files"
        )
        raise RecipeError(
            f"FSDP was asked for by {asked['fsdp']}, but {why}. Use recipes/accelerate/zero3.yaml (shards, on CPU "
            "too) or recipes/accelerate/ddp.yaml."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise RecipeError(
            f"{launched} processes were launched, but {args.world_size} would train together ({active} is in force)."
        )
    if "deepspeed" in asked and not active.startswith("zero"):
        raise RecipeError(f"DeepSpeed was asked for by {asked['deepspeed']}, but {active} is in force.")
    if args.fp16 and args.device.type == "cpu":
        raise RecipeError("training.fp16 needs a GPU; on a CPU it would train in float32. Use training.bf16=true.")
    if args.n_gpu > 1:
        raise RecipeError(
            f"One process sees {args.n_gpu} GPUs. Start one process for each: accelerate launch --num_processes "
            f"{args.n_gpu} -m hf_softpick.train ...; or set CUDA_VISIBLE_DEVICES=0."
        )
    if active.startswith("zero"):
        _check_deepspeed(args)
    return active


def _check_deepspeed(args: TrainingArguments) -> None:
    plugin = args.deepspeed_plugin
    if plugin.zero_stage == 0:
        raise RecipeError(
            "DeepSpeed with ZeRO stage 0 shards nothing and cannot refuse a non-finite update. Use "
            "recipes/accelerate/ddp.yaml instead, or stage 1, 2 or 3."
        )
    if plugin.zero_stage == 3 and not plugin.hf_ds_config.is_true(
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ):
        raise RecipeError(
            "DeepSpeed ZeRO-3 without zero_optimization.stage3_gather_16bit_weights_on_model_save (accelerate: "
            "zero3_save_16bit_model) would write a final/ without weights. Set it to true, as in "
            "recipes/deepspeed/zero3.json."
        )


def is_main() -> bool:
    """Whether this is the process that speaks for all, also before torch.distributed is there."""
    return int(os.environ.get("RANK", "0")) == 0
