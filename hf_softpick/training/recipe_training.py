"""What does not fit together in the section `training:`, and what would change a run without a word."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .recipe_model import Problem
from .recipe_scheduler import check_scheduler
from .recipe_text import shorten

if TYPE_CHECKING:
    from .recipe import Recipe

# Arguments of transformers that have one right value here.
FIXED: dict[str, tuple[bool, str]] = {
    "save_only_model": (False, "nobody could go on from a checkpoint without optimizer, schedule and random state"),
    "ignore_data_skip": (False, "a resumed run would read its first rows again"),
    "restore_callback_states_from_checkpoint": (False, "a run that a signal stopped would stop again at once"),
    "save_on_each_node": (False, "a checkpoint is one folder, which all nodes share"),
    "dataloader_in_order": (True, "the rows of a step would depend on the speed of the workers"),
    "average_tokens_across_devices": (True, "the loss is a mean over the tokens of all processes"),
}

# Fields of accelerate's configuration with one right value; the other ones change no row.
FIXED_ACCELERATOR: dict[str, tuple[bool, str]] = {
    "split_batches": (False, "per_device_train_batch_size would be shared out among the processes"),
    "dispatch_batches": (False, "every process reads its own rows"),
    "even_batches": (True, "every step takes a whole global batch"),
    "use_seedable_sampler": (True, "a resumed run would draw other rows"),
    "use_configured_state": (False, "there is no other state than that of this run"),
}


def check_training(recipe: "Recipe") -> Iterator[Problem]:
    """Settings that contradict each other, or what every run here promises."""
    given = recipe.training.written
    if ("max_steps" in given) == ("num_train_epochs" in given):
        what = "and num_train_epochs are both given" if "max_steps" in given else "is missing"
        yield ("training", "max_steps"), f"{what}; say how long to train by one of max_steps and num_train_epochs"
    if given.get("bf16") and given.get("fp16"):
        yield ("training", "fp16"), "is true beside training.bf16; choose one"
    if given.get("full_determinism") and recipe.model.attn_implementation == "triton_fast":
        yield (
            ("training", "full_determinism"),
            "is true, but gradients of model.attn_implementation 'triton_fast' differ between runs; use 'triton'",
        )
    if given.get("dataloader_prefetch_factor") and not given.get("dataloader_num_workers"):
        yield ("training", "dataloader_prefetch_factor"), "needs training.dataloader_num_workers >= 1"
    yield from _check_fixed(given)
    yield from _check_optimizer(given)
    yield from check_scheduler(given, evaluates=recipe.eval.every > 0 and recipe.data.validation > 0)


def _check_fixed(given: dict[str, Any]) -> Iterator[Problem]:
    for name, (value, reason) in FIXED.items():
        if given.get(name, value) != value:
            yield ("training", name), _must_be(value, reason)
    accelerator = given.get("accelerator_config") or {}
    path = ("training", "accelerator_config")
    for name, value in accelerator.items():
        fixed = FIXED_ACCELERATOR.get(name)
        if fixed is not None and value != fixed[0]:
            yield (*path, name), _must_be(*fixed)
        elif name == "gradient_accumulation_kwargs":
            unknown = value.keys() - {"sync_each_batch"} if isinstance(value, dict) else {"its value"}
            if unknown:
                yield (
                    (*path, name),
                    f"may hold sync_each_batch alone, not {', '.join(sorted(unknown))}; how many micro-batches an "
                    "update takes is training.gradient_accumulation_steps",
                )
        elif fixed is None and (name != "non_blocking" or not isinstance(value, bool)):
            allowed = ", ".join((*FIXED_ACCELERATOR, "gradient_accumulation_kwargs", "non_blocking"))
            yield (*path, name), f"is unknown or no true or false; allowed: {allowed}"


def _must_be(value: bool, reason: str) -> str:
    return f"must be {str(value).lower()}: {reason}"


def _check_optimizer(given: dict[str, Any]) -> Iterator[Problem]:
    optimizer = given.get("optim") or ""
    if optimizer.endswith("_layerwise") or optimizer in ("lomo", "adalomo"):
        yield (
            ("training", "optim"),
            f"is {optimizer!r}, which updates weights during the backward pass: before it is known whether the update "
            "is finite, and with a state that no checkpoint holds; choose another one",
        )
    if optimizer.startswith("schedule_free"):
        yield (
            ("training", "optim"),
            f"is {optimizer!r}, which trains other weights than it would save and evaluate; use adamw_torch_fused",
        )
    if given.get("optim_target_modules") and not optimizer.startswith(("galore", "apollo")):
        yield ("training", "optim_target_modules"), "belongs to the galore and apollo optimizers; leave it out"
    pairs = given.get("optim_args") or ""
    if pairs and not all(re.fullmatch(r" *[^ =][^=]*=[^=]*", pair) for pair in pairs.split(",")):
        yield (
            ("training", "optim_args"),
            f"is {shorten(repr(pairs))}, expected key=value pairs with commas between them, for example"
            " rank=64,scale=2",
        )
