"""Parameters, exactly, and memory, roughly, of the model that a recipe describes. Arithmetic on settings; no torch."""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..files import read_object
from ..modeling.normalizers import NORMALIZERS
from .recipe import Recipe
from .recipe_model import ModelSettings

# Bytes of optimizer state for each parameter; an optimizer that is not here is named as not counted.
_OPTIMIZER_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "adamw_torch_8bit": 2,
    "adagrad": 4,
    "lion_32bit": 4,
    "sgd": 0,
}


@dataclass(frozen=True)
class Memory:
    """Bytes for each process."""

    weights: float
    gradients: float
    optimizer: float | None
    """None: not known for this optimizer."""
    activations: float
    """Tensors that the layers keep for the backward pass."""
    logits: float
    """Logits, their float32 copy and their gradient."""

    @property
    def total(self) -> float:
        """Sum of what is counted."""
        return self.weights + self.gradients + (self.optimizer or 0) + self.activations + self.logits


@dataclass(frozen=True)
class Disk:
    """Bytes below the run folder, of all processes together."""

    checkpoint: float
    """One of them: float32 weights and the optimizer's state."""
    checkpoints: int | None
    """How many there are at most, one of them being written; None: not known before the data is prepared."""
    final: float
    missing: float | None
    """What the disk lacks beyond what the folder holds already; None where that is not known, 0 where it has room."""

    @property
    def total(self) -> float | None:
        """Bytes at most."""
        return None if self.checkpoints is None else self.checkpoints * self.checkpoint + self.final


def _widths(model: ModelSettings) -> tuple[int, int, int]:
    """Heads, and the width of all queries and of all keys."""
    heads = model.num_attention_heads
    head_dim = model.head_dim or model.hidden_size // heads
    return heads, heads * head_dim, (model.num_key_value_heads or heads) * head_dim


def count_parameters(model: ModelSettings, vocabulary: int) -> int:
    """Number of parameters of a new model with `vocabulary` tokens, exactly."""
    hidden, inner = model.hidden_size, model.intermediate_size
    heads, queries, keys = _widths(model)
    attention = hidden * (2 * queries + 2 * keys)
    if model.attention_bias:
        attention += queries + 2 * keys + hidden
    attention += heads * len(NORMALIZERS[model.normalizer].parameters)
    mlp = 3 * hidden * inner + (2 * inner + hidden if model.mlp_bias else 0)
    layer = attention + mlp + 2 * hidden
    embeddings = vocabulary * hidden * (1 if model.tie_word_embeddings else 2)
    return embeddings + model.num_hidden_layers * layer + hidden


def count_saved_parameters(folder: Path) -> int | None:
    """Number of values in the safetensors files of `folder`, read from their headers; None where there are none."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as tensors:
                total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
        except (OSError, SafetensorError):
            return None
    return total or None


def estimate_memory(recipe: Recipe, parameters: int, vocabulary: int, processes: int) -> Memory:
    """Memory of one process in training, in bytes: float32 weights, mixed precision by autocast.

    Activations are counted tensor by tensor for a Llama block. Only `eager` attention keeps matrices of T x T.
    With training.activation_checkpointing each layer keeps its input, and one layer at a time the rest.
    """
    given, model = recipe.training.written, recipe.model
    sharded = processes if _is_zero3(given.get("deepspeed")) else 1
    per_parameter = _OPTIMIZER_BYTES.get(given.get("optim", "adamw_torch_fused"))
    half = bool(given.get("bf16") or given.get("fp16"))
    tokens = given.get("per_device_train_batch_size", 8) * recipe.data.seq_len
    layer = tokens * _kept_by_layer(model, recipe.data.seq_len, 2 if half else 4)
    layers = model.num_hidden_layers
    if given.get("activation_checkpointing"):
        activations = layers * tokens * model.hidden_size * (2 if half else 4) + layer
    else:
        activations = layers * layer
    copies = 2 * parameters if half else 0
    state = None if per_parameter is None else per_parameter * parameters
    return Memory(
        weights=(4 * parameters + copies) / sharded,
        gradients=4 * parameters / sharded,
        optimizer=None if state is None else state / sharded,
        activations=activations,
        logits=tokens * vocabulary * ((2 if half else 4) + 4 + 4),
    )


def _kept_by_layer(model: ModelSettings, seq_len: int, width: int) -> float:
    """Bytes that a layer keeps for each token, with `width` bytes for a value of the compute type."""
    hidden, inner = model.hidden_size, model.intermediate_size
    heads, queries, keys = _widths(model)
    # Two norms: the float32 input, the normalized value and its scaled form; then what projections and rotation keep.
    norms = 2 * hidden * (4 + 4 + width)
    attention = width * (2 * queries + 2 * keys + keys + queries)
    if model.attn_implementation == "eager":
        attention += heads * seq_len * NORMALIZERS[model.normalizer].eager_bytes
    return norms + attention + width * 4 * inner


def _is_zero3(configuration: object) -> bool:
    """Whether the recipe or the launcher asks for ZeRO-3."""
    path = configuration or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if isinstance(path, str):
        configuration = read_object(Path(path))
    stage = configuration.get("zero_optimization", {}) if isinstance(configuration, dict) else {}
    return isinstance(stage, dict) and stage.get("stage") == 3


def estimate_disk(recipe: Recipe, parameters: int) -> Disk:
    """What checkpoints and final/ of a run take, and whether the disk has it.

    A checkpoint is written beside those that are kept, and only then the oldest goes.
    """
    given = recipe.training.written
    state = _OPTIMIZER_BYTES.get(given.get("optim", "adamw_torch_fused"))
    checkpoint, final = (4 + (state or 0)) * parameters, 4 * parameters
    saves, limit = _saves(given), given.get("save_total_limit")
    kept = None if limit is None else max(limit, 2) + 1
    checkpoints = min((number for number in (saves, kept) if number is not None), default=None)
    missing, directory = None, recipe.run.directory.resolve()
    if checkpoints is not None:
        need = checkpoints * checkpoint + final
        try:
            held = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
            while not directory.exists() and directory != directory.parent:
                directory = directory.parent
            missing = max(0.0, need - held - shutil.disk_usage(directory).free)
        except OSError:
            pass  # changing under our eyes, or out of reach
    return Disk(checkpoint, checkpoints, final, missing)


def _saves(given: dict[str, Any]) -> int | None:
    """How many checkpoints a run writes; None where that depends on the size of the data."""
    strategy, every, steps = given.get("save_strategy", "steps"), given.get("save_steps", 500), given.get("max_steps")
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return None if steps is not None else math.ceil(given["num_train_epochs"])
    if every < 1:  # a share of all steps
        return math.ceil(1 / every)
    return None if steps is None else math.ceil(steps / every)
