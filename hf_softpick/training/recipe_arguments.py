"""The `training:` section: transformers.TrainingArguments, verbatim, plus our own few settings.

Names and types are read from the installed transformers' source without importing it, so that a recipe is checked in
milliseconds and against the version that will run it. Ranges, and what a recipe may not set, are ours.
"""

import ast
import importlib.util
import os
from collections.abc import Mapping
from functools import cache, reduce
from operator import or_
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, Field, create_model

from ..data.settings import Section

# Arguments that we set unless the recipe does; everything else that matters stands in the recipe itself.
DEFAULTS: dict[str, Any] = {
    # 500 upstream: a short run would log nothing.
    "logging_steps": 10,
    # True upstream: a NaN loss would be logged as 0.0.
    "logging_nan_inf_filter": False,
    # None upstream: every checkpoint is kept until the disk is full.
    "save_total_limit": 2,
    "report_to": "none",
}

RANGES: dict[str, tuple[Any, ...]] = {
    name: bounds
    for bounds, names in (
        ((Ge(0), Lt(1)), "adam_beta1 adam_beta2"),
        ((Ge(0), Le(1)), "weight_decay"),
        ((Ge(0), Lt(2**32)), "data_seed seed"),
        ((Gt(0),), "adam_epsilon learning_rate logging_steps num_train_epochs save_steps"),
        (
            (Ge(1),),
            "dataloader_prefetch_factor ddp_timeout gradient_accumulation_steps max_steps per_device_eval_batch_size "
            "per_device_train_batch_size save_total_limit torch_empty_cache_steps",
        ),
    )
    for name in names.split()
}

# Narrower than upstream, where a wrong value is found late or does something that we promise never to do.
TYPES: dict[str, Any] = {
    # Upstream also takes the name of a JSON file, which could change from one launch to the next unseen.
    "accelerator_config": dict[str, Any] | None,
    "deepspeed": dict[str, Any] | Annotated[str, AfterValidator(os.path.expanduser)] | None,
    "ddp_backend": Literal["nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl"] | None,
    # Upstream annotates a string, deprecates it, and documents `fsdp: true`.
    "fsdp": bool,
    "log_level": Literal["debug", "info", "warning", "error", "critical", "passive"],
    "log_level_replica": Literal["debug", "info", "warning", "error", "critical", "passive"],
    "lr_scheduler_kwargs": dict[str, Any],
    "logging_nan_inf_filter": Literal[False],
    "report_to": Literal["none", "tensorboard", "wandb"] | list[Literal["tensorboard", "wandb"]],
    "save_strategy": Literal["no", "steps", "epoch"],
}

EXAMPLES: dict[str, Any] = {"learning_rate": "3e-4", "adam_epsilon": "1e-8", "warmup_steps": "100"}

# Names, separated by spaces, and why a recipe may not set them.
_REFUSED = {
    "output_dir": "the run folder is run.root/run.name",
    "run_name": "it is run.name",
    "remove_unused_columns label_names train_sampling_strategy length_column_name group_by_length": (
        "rows are packed by the section 'data:' and all have the same length and columns"
    ),
    "auto_find_batch_size": "it would change the global batch, and with it the run, without a word",
    "label_smoothing_factor": "the loss is plain cross entropy per token",
    "use_cache": "training never caches keys; the saved configuration has use_cache: true",
    "use_liger_kernel liger_kernel_config": "Liger does not know this model and would be ignored",
    "include_num_input_tokens_seen": "tokens are always counted and logged",
    "enable_jit_checkpoint": "signals are handled by the trainer itself",
    "parallelism_config": "the launcher's configuration file says how to distribute",
    "hub_strategy hub_always_push": (
        "the finished folder is uploaded once, at the end (push_to_hub, hub_model_id, hub_private_repo)"
    ),
    "resume_from_checkpoint": "the same command goes on from the newest whole checkpoint by itself",
    "local_rank": "the launcher (accelerate, torchrun, deepspeed) sets it",
    "do_train do_eval do_predict": "the command says what is done",
    "load_best_model_at_end": "final/ holds the last step; checkpoints/ keeps the others",
    "metric_for_best_model greater_is_better": "final/ holds the last step",
    "bf16_full_eval": "validation computes as training does (training.bf16)",
    "fp16_full_eval": "validation computes as training does (training.fp16)",
    "trackio_space_id trackio_bucket_id trackio_static_space_id": "report_to knows tensorboard and wandb",
    "eval_strategy eval_steps eval_delay eval_on_start evaluation_strategy prediction_loss_only include_for_metrics "
    "batch_eval_metrics eval_do_concat_batches eval_use_gather_object eval_accumulation_steps": (
        "evaluation is token-weighted and planned by the section 'eval:' (eval.every, eval.max_rows)"
    ),
}
REFUSED: dict[str, str] = {name: reason for names, reason in _REFUSED.items() for name in names.split()}

# Anywhere in a recipe: it is saved in the run folder, beside what people publish.
SECRETS: dict[str, str] = dict.fromkeys(
    "hub_token token hf_token use_auth_token auth_token api_key wandb_api_key password".split(),
    "a recipe is saved and shared; log in with `hf auth login` or set HF_TOKEN instead",
) | {"trust_remote_code": "a recipe must not be able to run code from the Hub"}

REMOVED: dict[str, str] = dict.fromkeys(
    "tpu_num_cores half_precision_backend past_index use_ipex jit_mode_eval".split(), "it is gone from transformers 5"
) | {
    "warmup_ratio": "write training.warmup_steps, where a value below 1 is a share of all steps",
    "overwrite_output_dir": "it is gone from transformers 5; choose another run.name",
    "logging_dir": "it is gone from transformers 5; logs are in the run folder",
    "include_tokens_per_second": "it is gone from transformers 5; tokens/s is always logged",
    "save_safetensors": "it is gone from transformers 5; weights are always safetensors",
    "no_cuda": "it is gone from transformers 5; write training.use_cpu: true",
    "fp16_backend": "it is gone from transformers 5; write training.fp16",
    "torchdynamo": "it is gone from transformers 5; write training.torch_compile_backend",
    "use_mps_device": "it is gone from transformers 5; the device is found by itself",
    "fsdp_min_num_params": "it is gone from transformers 5; write training.fsdp_config: {min_num_params: ...}",
    "fsdp_transformer_layer_cls_to_wrap": "it is gone from transformers 5; write it inside training.fsdp_config",
    "gradient_checkpointing": "it is called training.activation_checkpointing",
    "gradient_checkpointing_kwargs": "it is called training.activation_checkpointing_kwargs",
    "lr": "it is called training.learning_rate",
    "steps": "it is called training.max_steps",
    "batch_size": "it is called training.per_device_train_batch_size, rows per device and micro-step",
    "clip_grad_norm": "it is called training.max_grad_norm",
    "min_lr": "write training.lr_scheduler_kwargs: {min_lr_rate: 0.1} with lr_scheduler_type: cosine_with_min_lr",
    "compile": "it is called training.torch_compile",
    "mixed_precision": "write training.bf16: true",
}


# Recipes keep one name over the supported versions of transformers; 5.17 has only the older one.
_INSTALLED_NAMES: dict[str, str] = {}


def installed_name(name: str) -> str:
    """The name that the installed transformers has for an argument of a recipe."""
    return _INSTALLED_NAMES.get(name, name)


class _OwnTrainingSettings(Section):
    """What the trainer adds to TrainingArguments."""

    max_consecutive_skips: int = Field(default=10, ge=0)
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights in final/; checkpoints hold float32."""

    @property
    def own(self) -> dict[str, Any]:
        """The settings that are not TrainingArguments."""
        return {name: getattr(self, name) for name in _OwnTrainingSettings.model_fields}

    @property
    def written(self) -> dict[str, Any]:
        """What the recipe set for TrainingArguments, and DEFAULTS, under the names that recipes use."""
        own = _OwnTrainingSettings.model_fields
        names = (name for name in type(self).model_fields if name not in own)
        return {name: getattr(self, name) for name in names if name in self.model_fields_set or name in DEFAULTS}

    @property
    def arguments(self) -> dict[str, Any]:
        """Keywords for the installed transformers.TrainingArguments: what the recipe set, and DEFAULTS."""
        return {installed_name(name): value for name, value in self.written.items()}


@cache
def package_folder(package: str) -> Path:
    """An installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is not installed: pip install hf_softpick")
    return Path(spec.submodule_search_locations[0])


def read_module(file: str, package: str = "transformers") -> ast.Module:
    """The syntax tree of one file of an installed package."""
    return ast.parse((package_folder(package) / file).read_text(encoding="utf-8"))


def _read_classes(file: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in read_module(file).body if isinstance(node, ast.ClassDef)}


def string_members(enum: ast.ClassDef) -> dict[str, str]:
    """Names and values of an enum of strings."""
    return {
        ast.unparse(node.targets[0]): node.value.value
        for node in enum.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


_PLAIN = {"bool": bool, "int": int, "float": float, "str": str, "Any": Any, "dict": dict[str, Any], "list": list[Any]}


def annotated_type(node: ast.expr, enums: Mapping[str, ast.ClassDef] = MappingProxyType({})) -> Any:
    """The type that an annotation means; an enum means its values, even where upstream adds `| str`."""
    parts = []
    while isinstance(node, ast.BinOp):
        parts.append(node.right)
        node = node.left
    parts.append(node)
    has_enum = any(isinstance(part, ast.Name) and part.id in enums for part in parts)
    kept = (part for part in reversed(parts) if not (has_enum and ast.unparse(part) == "str"))
    return reduce(or_, (_single_type(part, enums) for part in kept))


def _single_type(node: ast.expr, enums: Mapping[str, ast.ClassDef]) -> Any:
    match node:
        case ast.Constant(value=None):
            return type(None)
        case ast.Name(id=name) if name in _PLAIN:
            return _PLAIN[name]
        case ast.Name(id=name) if name in enums and string_members(enums[name]):
            return Literal[tuple(string_members(enums[name]).values())]
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return list[annotated_type(item, enums)]
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[_, item])):
            return dict[str, annotated_type(item, enums)]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Constant(value=value)):
            return Literal[value]
    return Any


def _fields() -> dict[str, Any]:
    classes = _read_classes("training_args.py")
    enums = classes | _read_classes("trainer_utils.py") | _read_classes("debug_utils.py")
    del enums["TrainingArguments"]
    fields: dict[str, Any] = {}
    refused = REFUSED.keys() | SECRETS.keys() | REMOVED.keys()
    for node in classes["TrainingArguments"].body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)) or node.target.id in refused:
            continue
        name = node.target.id
        kind = TYPES.get(name) or annotated_type(node.annotation, enums)
        bounds = RANGES.get(name)
        if bounds is None and {int, float} & ({kind} | set(getattr(kind, "__args__", ()))) and kind is not bool:
            bounds = (Ge(0),)
        example = [EXAMPLES[name]] if name in EXAMPLES else None
        fields[name] = (_bounded(kind, bounds or ()), Field(default=DEFAULTS.get(name), examples=example))
    for name, kind in (("", bool | None), ("_kwargs", dict[str, Any] | str | None)):
        if f"activation_checkpointing{name}" not in fields:
            _INSTALLED_NAMES[f"activation_checkpointing{name}"] = f"gradient_checkpointing{name}"
            fields[f"activation_checkpointing{name}"] = (kind, None)
    return fields


def _bounded(kind: Any, bounds: tuple[Any, ...]) -> Any:
    """`kind` with the bounds on its numbers only, so that `float | None` still takes None."""
    if not bounds:
        return kind
    parts = (kind,) if kind in (int, float) else kind.__args__
    return reduce(or_, (Annotated[(part, *bounds)] if part in (int, float) else part for part in parts))


TrainingSettings = create_model("TrainingSettings", __base__=_OwnTrainingSettings, __module__=__name__, **_fields())
