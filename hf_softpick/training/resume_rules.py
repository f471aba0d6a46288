"""What a changed setting means for a run that goes on: one rule for every key of a recipe. docs/resume.md shows it."""

import fnmatch

from hf_softpick.training.recipe_record import Settings
from hf_softpick.training.recipe_scheduler import ADAPTIVE

APPLIES, REFUSED, REPLICATED = "takes effect", "refused", "refused under DeepSpeed"

# Names, separated by spaces (`*` stands for the rest of a name), what happens to a change of one of them, and why.
RULES: tuple[tuple[str, str, str], ...] = (
    ("model.attn_implementation", APPLIES, "the same attention, computed by something else; last bits may differ"),
    ("model.*", REFUSED, "it would be another model"),
    (
        "tokenizer.from tokenizer.revision data.sources.*",
        APPLIES,
        "as long as the rows have the same content: sources may move",
    ),
    ("data.num_proc data.cache_dir", APPLIES, "how and where the rows are made"),
    ("tokenizer.* data.*", REFUSED, "the rows would be others"),
    ("training.seed training.data_seed", REFUSED, "the rest of the run would draw other rows"),
    (
        "training.optim training.optim_args training.optim_target_modules",
        REFUSED,
        "another optimizer cannot read the state of this one",
    ),
    (
        "training.per_device_train_batch_size training.gradient_accumulation_steps",
        APPLIES,
        "their product with the number of processes must stay",
    ),
    (
        "training.max_steps training.num_train_epochs",
        APPLIES,
        "the schedule follows the new length; refused where the run is already longer",
    ),
    (
        "training.learning_rate training.lr_scheduler_type training.lr_scheduler_kwargs training.warmup_steps",
        APPLIES,
        "the schedule is that of the new settings at the present step; refused for reduce_lr_on_plateau and greedy,"
        " whose state is the learning rate",
    ),
    (
        "training.weight_decay training.adam_beta1 training.adam_beta2 training.adam_epsilon training.max_grad_norm",
        APPLIES,
        "from the next update on",
    ),
    (
        "training.max_consecutive_skips training.neftune_noise_alpha training.full_determinism training.tf32"
        " training.activation_checkpointing training.activation_checkpointing_kwargs training.torch_compile*"
        " training.torch_empty_cache_steps training.debug",
        APPLIES,
        "from the next update on",
    ),
    ("training.bf16", REPLICATED, "DeepSpeed shards the state of one precision"),
    ("training.fp16", REFUSED, "the state of its loss scaler is part of the checkpoint"),
    (
        "training.save_strategy training.save_steps training.save_total_limit training.logging_* training.log_*"
        " training.disable_tqdm training.report_to training.project training.per_device_eval_batch_size"
        " training.skip_memory_metrics eval.*",
        APPLIES,
        "what is saved, logged and measured, and when",
    ),
    (
        "training.dataloader_* training.accelerator_config training.use_cpu training.ddp_* training.fsdp*"
        " training.deepspeed",
        APPLIES,
        "how the same rows are read and computed; another sharding of the checkpoint is refused",
    ),
    (
        "training.export_dtype training.push_to_hub training.hub_* run.*",
        APPLIES,
        "where the run is kept, and what is made of it at the end",
    ),
    ("training.*", REFUSED, "what a change on the way would mean is not known here"),
)

SCHEDULE = {
    f"training.{name}" for name in ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
}


def rule(name: str) -> tuple[str, str]:
    """What a change of the setting `name` means, and why; a setting that nobody knows is refused."""
    for names, meaning, why in RULES:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in names.split()):
            return meaning, why
    return REFUSED, RULES[-1][2]


def refused(changes: dict, old: Settings, new: Settings, strategy: str | None = None) -> dict[str, str]:
    """The names among `changes` that a run cannot take on its way, each with the reason."""
    found = {}
    for name in changes:
        meaning, why = rule(name)
        if meaning == REFUSED or (meaning == REPLICATED and (strategy or "").startswith("zero")):
            found[name] = why
    adaptive = next((s for each in (old, new) if (s := each["training.lr_scheduler_type"]) in ADAPTIVE), None)
    if adaptive is not None:
        found.update({name: f"the state of {adaptive} is the learning rate" for name in SCHEDULE & changes.keys()})
    return found
