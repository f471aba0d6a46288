"""The `model:` section: SoftpickConfig's fields, verbatim, or a model to go on from; and what must fit together."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from ..data.settings import Section
from ..modeling.normalizers import NORMALIZERS

Problem = tuple[tuple[str | int, ...], str]

# Implementations of ours compute every normalizer; the others compute softmax and nothing else.
Implementation = Literal[
    "auto", "eager", "tiled", "triton", "triton_fast", "sdpa", "flash_attention_2", "flex_attention"
]
SOFTMAX_ONLY = ("sdpa", "flash_attention_2", "flex_attention")
GPU_ONLY = ("triton", "triton_fast", "flash_attention_2")

HINTS = {
    "rope_theta": "write model.rope_parameters: {rope_type: default, rope_theta: 10000.0}",
    "rope_scaling": "write model.rope_parameters: {rope_type: linear, factor: 2.0}",
    "use_cache": "it is always true in the saved configuration",
    "torch_dtype": "weights are float32; write training.bf16: true for mixed precision",
    "dtype": "weights are float32; write training.bf16: true for mixed precision",
    "softpick_eps": "it belongs to the definition of softpick, 1e-6",
    "model_type": "it is always softpick",
    "num_layers": "it is called model.num_hidden_layers",
    "num_heads": "it is called model.num_attention_heads",
}


class RopeSettings(Section):
    """Rotary position embedding, with the names of transformers' `rope_parameters`."""

    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"] = "default"
    rope_theta: float = Field(default=10000.0, gt=0)
    factor: float | None = Field(default=None, ge=1)
    original_max_position_embeddings: int | None = Field(default=None, ge=1)
    attention_factor: float | None = Field(default=None, gt=0)
    beta_fast: float | None = Field(default=None, gt=0)
    beta_slow: float | None = Field(default=None, gt=0)
    low_freq_factor: float | None = Field(default=None, gt=0)
    high_freq_factor: float | None = Field(default=None, gt=0)
    short_factor: list[float] | None = None
    long_factor: list[float] | None = None


_ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_ROPE_OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow")}


class ModelSettings(Section):
    """A new model (hidden_size, num_hidden_layers, ...) or `from`, a causal language model to go on from."""

    from_: str | None = Field(default=None, alias="from", min_length=1)
    """Folder or Hub id; its architecture is kept, so most fields of the architecture below must be left out."""
    revision: str | None = Field(default=None, min_length=1)
    """Commit, tag or branch of `from` on the Hub."""
    normalizer: Literal[tuple(NORMALIZERS)] = "softpick"
    """What turns scores into attention weights; saved with the model. Must be written out with `from`."""
    attn_implementation: Implementation = "auto"
    """How it is computed; not saved."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Rows of the embedding; unset: the tokenizer's size. Larger than that to pad it, never smaller. Beside `from` it
    adds rows for new tokens."""
    hidden_size: int | None = Field(default=None, ge=1)
    intermediate_size: int | None = Field(default=None, ge=1)
    """Width of the gated MLP."""
    num_hidden_layers: int | None = Field(default=None, ge=1)
    num_attention_heads: int | None = Field(default=None, ge=1)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    """Fewer than num_attention_heads: grouped queries; 1: one shared head. Unset: as many."""
    head_dim: int | None = Field(default=None, ge=2, multiple_of=2)
    """Unset: hidden_size / num_attention_heads."""
    hidden_act: Literal["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "tanh"] | None = None
    """Unset: silu."""
    max_position_embeddings: int | None = Field(default=None, ge=1)
    """Longest sequence in tokens; unset: data.seq_len, or with `from` what that model says."""
    initializer_range: float | None = Field(default=None, ge=0, le=1)
    """Standard deviation of new weights; unset: 0.02."""
    rms_norm_eps: float | None = Field(default=None, gt=0, lt=1)
    """Unset: 1e-6."""
    tie_word_embeddings: bool | None = None
    """Unset: false, the output has a matrix of its own."""
    rope_parameters: RopeSettings | None = None
    attention_bias: bool | None = None
    attention_dropout: float | None = Field(default=None, ge=0, lt=1)
    mlp_bias: bool | None = None
    sliding_window: int | None = Field(default=None, ge=2)
    """Tokens that a query sees, itself included; unset: all before it."""

    def config_fields(self) -> dict[str, Any]:
        """Keyword arguments for SoftpickConfig that the recipe decides; without the vocabulary, see `vocab_size`."""
        elsewhere = {"from_", "revision", "attn_implementation", "vocab_size"}
        return self.model_dump(exclude=elsewhere, exclude_none=True)


_OUTSIDE_ARCHITECTURE = {"from_", "revision", "normalizer", "attn_implementation"}
# What a model to go on from may be extended by; see continuing.py.
_OUTSIDE_ARCHITECTURE |= {"vocab_size", "max_position_embeddings", "rope_parameters", "attention_dropout"}
_ARCHITECTURE = [name for name in ModelSettings.model_fields if name not in _OUTSIDE_ARCHITECTURE]
REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def check_model(model: ModelSettings) -> Iterator[Problem]:
    """What does not fit together inside the section."""
    if model.attn_implementation in SOFTMAX_ONLY and not NORMALIZERS[model.normalizer].is_plain_softmax:
        yield (
            ("model", "attn_implementation"),
            f"is {model.attn_implementation!r}, which computes softmax, but model.normalizer is {model.normalizer!r};"
            " use 'auto', 'triton', 'tiled' or 'eager'",
        )
    if model.attention_dropout and model.attn_implementation not in ("eager", "sdpa"):
        yield (
            ("model", "attention_dropout"),
            f"is {model.attention_dropout:g}, which model.attn_implementation {model.attn_implementation!r} cannot"
            " compute; set it to 0, or use 'eager' ('sdpa' too where normalizer is 'softmax')",
        )
    if model.from_ is None:
        yield from _check_new(model)
    else:
        yield from _check_continued(model)


def _check_continued(model: ModelSettings) -> Iterator[Problem]:
    for name in _ARCHITECTURE:
        if getattr(model, name) is not None:
            yield ("model", name), "cannot be set beside model.from, which brings its own architecture; leave it out"
    if "normalizer" not in model.model_fields_set:
        yield (
            ("model", "normalizer"),
            "is missing; say which normalizer the loaded model shall go on with, for example softpick",
        )
    if model.rope_parameters is not None:
        yield from _check_rope(model.rope_parameters)


def _check_new(model: ModelSettings) -> Iterator[Problem]:
    if model.revision is not None:
        yield ("model", "revision"), "belongs to model.from, which is not set"
    missing = [name for name in REQUIRED if getattr(model, name) is None]
    for name in missing:
        yield ("model", name), "is missing; a new model needs it (or give model.from, a model to go on from)"
    if missing:
        return
    heads = model.num_attention_heads
    if model.hidden_size % heads:
        yield ("model", "hidden_size"), f"is {model.hidden_size}, not divisible by model.num_attention_heads = {heads}"
    elif model.head_dim is None and model.hidden_size // heads % 2:
        yield (
            ("model", "hidden_size"),
            f"gives heads of {model.hidden_size // heads} dimensions; rotary positions need an even number",
        )
    if model.num_key_value_heads is not None and heads % model.num_key_value_heads:
        yield (
            ("model", "num_key_value_heads"),
            f"is {model.num_key_value_heads}, but must divide model.num_attention_heads = {heads}",
        )
    if model.rope_parameters is not None:
        yield from _check_rope(model.rope_parameters)


def _check_rope(rope: RopeSettings) -> Iterator[Problem]:
    if rope.rope_type in ("dynamic", "longrope"):
        yield (
            ("model", "rope_parameters", "rope_type"),
            f"is {rope.rope_type!r}, whose frequencies depend on the longest row of a batch; use 'linear', 'yarn' or"
            " 'llama3'",
        )
        return
    required, optional = _ROPE_REQUIRED[rope.rope_type], _ROPE_OPTIONAL.get(rope.rope_type, ())
    for name in RopeSettings.model_fields:
        given = getattr(rope, name) is not None
        if name in required and not given:
            yield ("model", "rope_parameters", name), f"is missing; rope_type {rope.rope_type!r} needs it"
        elif given and name not in (*required, *optional, "rope_type", "rope_theta"):
            yield ("model", "rope_parameters", name), f"has no meaning for rope_type {rope.rope_type!r}; leave it out"
