"""From the configuration of a source to the fields of `SoftpickConfig`, with nothing guessed.

What follows of the ancestor was read in its source (TransformerConfig, Attention, GatedMLP and RotaryEmbedding of the
repository zaydzuhri/flash-linear-attention): rotary embedding over the whole head with the halves paired, as Llama
does; scaled variants multiply queries by s_h * log(position + 2), as here; a window is read by flash_attn alone, and
means the query itself and the window_size - 1 tokens before it, as here.
"""

import math
from typing import Any, NamedTuple

from hf_softpick.errors import CheckpointError
from hf_softpick.modeling.attention_guard import unseal
from hf_softpick.modeling.normalizers import NORMALIZERS

ANCESTOR = "transformer"
# attn_impl of the ancestor -> normalizer. The naive_ twins compute the same, densely.
NORMALIZER_OF = {
    "flash_attn": "softmax",
    **{f"{how}_{n.ancestor}": n.name for how in ("parallel", "naive") for n in NORMALIZERS.values()},
}

# The ancestor's defaults, which hold where its config.json leaves a field out.
_DEFAULTS = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_heads": 32,
    "num_kv_heads": None,
    "qkv_bias": False,
    "qk_norm": False,
    "window_size": None,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "initializer_range": 0.006,
    "elementwise_affine": True,
    "norm_eps": 1e-6,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "attn_impl": "flash_attn",
}
# Only these values can be expressed. attention_bias stands in the published configs, and no code of theirs reads it.
_ONLY = {
    "qkv_bias": (False, "biases in the query, key and value projections alone"),
    "qk_norm": (False, "norms of queries and keys"),
    "elementwise_affine": (True, "norms without weights"),
    "hidden_act": ("swish", "another activation than swish"),
    "attention_bias": (False, "biases in attention"),
}
# How the source computes, or what it writes of itself: the function is the same with any value.
_WITHOUT_EFFECT = set(
    "_attn_implementation_autoset _flash_attn_2_enabled _model_name_or_path _name_or_path architectures "
    "bad_words_ids cls_token_id dtype fuse_cross_entropy fuse_linear_cross_entropy fuse_norm fuse_swiglu "
    "is_llama_config mask_token_id max_window_layers model_max_length model_type neftune_noise_alpha pretraining_tp "
    "sep_token_id tokenizer_class torch_dtype transformers.js_config transformers_version unk_token_id "
    "unsloth_fixed unsloth_version use_cache use_flash_attention use_l2warp".split()
)
# Keys of published folders that would change the function with any other value than the one that stands here.
_HARMLESS_AT = {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "partial_rotary_factor": 1.0,
    "qk_norm": False,
    "residual_multiplier": 1.0,
    "rope_interleaved": False,
    "rope_interleave": False,
    "use_qk_norm": False,
    "use_sliding_window": False,
}
_CARRIED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings initializer_range rms_norm_eps pad_token_id bos_token_id eos_token_id "
    "tie_word_embeddings rope_parameters attention_bias mlp_bias attention_dropout sliding_window"
).split()
_ARCHITECTURES = {
    "transformer": "TransformerForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
_REFUSED_TYPES = {
    "qwen2": "its query, key and value projections have biases and its output projection has none",
    "softpick": "it is one of ours already. To train it with another normalizer, give it to a recipe as model.from",
}
_REFUSED_KEYS = {
    "auto_map": "its model is code of its own, which may compute anything",
    "quantization_config": "its weights are quantized",
}


class Settings(NamedTuple):
    """config: fields of SoftpickConfig. source_normalizer: what the weights were trained with. mapping: one record
    per field, from where it came. without_effect: settings of the source that do not change the function. notes:
    what a reader of the result should know."""

    model_type: str
    config: dict[str, Any]
    source_normalizer: str
    mapping: list[dict[str, Any]]
    without_effect: dict[str, Any]
    notes: list[str]


def read_settings(raw: dict[str, Any]) -> Settings:
    """The settings of the `config.json` of a source, sealed or not (`modeling.attention_guard`).

    Raises:
        CheckpointError: a model type, field or value that our configuration cannot express.
    """
    raw = dict(unseal(raw))
    trained = raw.pop("normalizer", None)
    if trained is not None:
        if trained not in NORMALIZERS:
            raise CheckpointError(f"normalizer is {trained!r}, expected one of {', '.join(NORMALIZERS)}.")
        raw.pop("attn_implementation", None)
        raw["architectures"] = [name.removeprefix("Softpick") for name in raw.get("architectures") or []]
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"model_type is {model_type!r}, expected one of {', '.join(map(repr, _ARCHITECTURES))}.")
    if model_type not in _ARCHITECTURES:
        why = _REFUSED_TYPES.get(model_type, "it is not one of " + ", ".join(map(repr, _ARCHITECTURES)))
        raise CheckpointError(f"model_type {model_type!r} cannot be converted: {why}.")
    for key, why in _REFUSED_KEYS.items():
        if raw.get(key) is not None:
            raise CheckpointError(f"config.json has {key}: {why}. Give a checkpoint without it.")
    architectures = raw.get("architectures") or [_ARCHITECTURES[model_type]]
    if architectures != [_ARCHITECTURES[model_type]]:
        raise CheckpointError(
            f"config.json says architectures {architectures}, expected {_ARCHITECTURES[model_type]} for model_type "
            f"{model_type!r}. Only causal language models can be converted."
        )
    if model_type == ANCESTOR:
        return _ancestor(raw)
    settings = _llama_family(raw, model_type)
    if trained is None:
        return settings
    return settings._replace(config={**settings.config, "normalizer": trained}, source_normalizer=trained)


def override_normalizer(settings: Settings, normalizer: str | None) -> tuple[Settings, list[str]]:
    """`settings` with the normalizer that was asked for, and the warnings that go with it."""
    if normalizer is None or normalizer == settings.source_normalizer:
        return settings, []
    warnings = [
        f"The weights were trained with {settings.source_normalizer}. With {normalizer} the model computes another "
        "function, and its predictions are bad until it is trained further."
    ]
    return settings._replace(config={**settings.config, "normalizer": normalizer}), warnings


def _ancestor(raw: dict[str, Any]) -> Settings:
    values = {**_DEFAULTS, **raw}
    unknown = _unknown(raw, {*_DEFAULTS, *_ONLY})
    if unknown:
        raise CheckpointError(_say_unknown(unknown))
    for key, (allowed, what) in _ONLY.items():
        if values.get(key, allowed) != allowed:
            raise CheckpointError(
                f"{key} is {values[key]!r}: {what} cannot be expressed. Only {allowed!r} is possible."
            )
    implementation = values["attn_impl"]
    if not isinstance(implementation, str) or implementation not in NORMALIZER_OF:
        raise CheckpointError(
            f"attn_impl {implementation!r} is unknown, expected one of {', '.join(NORMALIZER_OF)}. Its mathematics "
            "cannot be guessed."
        )
    if values["window_size"] is not None and implementation != "flash_attn":
        raise CheckpointError(
            f"window_size is {values['window_size']}, but {implementation} of the source does not look at it: the "
            "model was trained without a window and would be run with one. Set window_size to null to convert what "
            "was trained."
        )
    for key in ("hidden_size", "num_hidden_layers", "num_heads", "norm_eps", "rope_theta", "max_position_embeddings"):
        _check_positive(key, values[key])
    if values["hidden_ratio"] is not None:
        _check_positive("hidden_ratio", values["hidden_ratio"])
    if values["hidden_size"] % values["num_heads"]:
        raise CheckpointError(
            f"hidden_size {values['hidden_size']} is not a multiple of num_heads {values['num_heads']}."
        )

    normalizer = NORMALIZER_OF[implementation]
    renamed = {"num_heads": "num_attention_heads", "norm_eps": "rms_norm_eps", "window_size": "sliding_window"}
    config, mapping = {}, []

    def put(source: str, target: str, value: Any) -> None:
        config[target] = value
        given = source in raw
        mapping.append({"source": source, "value": values.get(source), "given": given, "target": target, "as": value})

    same = (
        "hidden_size num_hidden_layers max_position_embeddings initializer_range vocab_size pad_token_id bos_token_id "
        "eos_token_id tie_word_embeddings"
    ).split()
    for key in (*same, *renamed):
        put(key, renamed.get(key, key), values[key])
    put("num_kv_heads", "num_key_value_heads", values["num_kv_heads"] or values["num_heads"])
    put("rope_theta", "rope_parameters", {"rope_type": "default", "rope_theta": float(values["rope_theta"])})
    put("intermediate_size", "intermediate_size", values["intermediate_size"] or intermediate_size(values))
    put("hidden_act", "hidden_act", "silu")
    put("attn_impl", "normalizer", normalizer)
    config.update(attention_bias=False, mlp_bias=False)
    notes = _ancestor_notes(implementation, normalizer)
    return Settings(ANCESTOR, config, normalizer, mapping, _without_effect(raw, mapping), notes)


def intermediate_size(values: dict[str, Any]) -> int:
    """The ancestor's width of the MLP: two thirds of hidden_ratio * hidden_size, up to the next multiple of 256."""
    ratio = 4 if values["hidden_ratio"] is None else values["hidden_ratio"]
    return -(-int(values["hidden_size"] * ratio * 2 / 3) // 256) * 256


def _ancestor_notes(implementation: str, normalizer: str) -> list[str]:
    notes = []
    if NORMALIZERS[normalizer].constant:
        # With S = sum|e^x - 1| and the largest score m > 0, S >= e^m - 1 bounds (S + 1e-6) / (S + eps e^m) - 1.
        naive = implementation.startswith("naive_")
        eps, bound = ("1e-8", "1e-8 + 1e-6 / sum|e^x - 1|") if naive else ("1e-6", "1e-6")
        notes.append(
            f"The source adds {eps} to the denominator after the shift by the row's largest score; here 1e-6 is added "
            f"before it. A row of weights differs by a share of at most {bound}."
        )
    if NORMALIZERS[normalizer].scaled:
        notes.append(
            "In packed rows the source counts the length n in log(n) from the start of the row, and has no value "
            "beyond 4 * max_position_embeddings; here n counts from the start of the document, without an end."
        )
    return notes


def _llama_family(raw: dict[str, Any], model_type: str) -> Settings:
    from transformers import LlamaConfig, MistralConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config_class = {"llama": LlamaConfig, "mistral": MistralConfig}[model_type]
    own = set(config_class(num_attention_heads=2, num_key_value_heads=1, hidden_size=4).to_dict()) & set(_CARRIED)
    unknown = _unknown(raw, own | {"rope_theta", "rope_scaling"})
    if unknown:
        raise CheckpointError(_say_unknown(unknown))
    try:
        read = config_class(**{key: value for key, value in raw.items() if key not in ("architectures", "model_type")})
    except Exception as error:  # the strict configuration classes raise several kinds
        reason = " ".join(str(error).split())
        raise CheckpointError(f"config.json is no configuration of {model_type}: {reason}") from None
    _check_positive("rms_norm_eps", read.rms_norm_eps)
    if raw.get("rope_theta") is not None:
        _check_positive("rope_theta", raw["rope_theta"])
    rope = read.rope_parameters
    _check_positive("rope_theta in rope_parameters", rope.get("rope_theta"))
    for key, value in rope.items():
        if isinstance(value, dict):
            raise CheckpointError(f"rope_parameters has {key}: parameters for some of the layers alone are not ours.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise CheckpointError(f"{key} in rope_parameters is {value!r}, expected finite numbers.")
    kinds = ["default", *(kind for kind in ROPE_INIT_FUNCTIONS if kind != "default")]
    if rope.get("rope_type", "default") not in kinds:
        raise CheckpointError(f"rope_type {rope['rope_type']!r} is unknown, expected one of {', '.join(kinds)}.")
    partial = rope.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise CheckpointError(f"partial_rotary_factor is {partial}: rotary embedding of a part of a head is not ours.")
    config = {key: getattr(read, key) for key in _CARRIED if key in own}
    mapping = [
        {"source": key, "value": value, "given": key in raw, "target": key, "as": value}
        for key, value in config.items()
    ]
    for key in ("rope_theta", "rope_scaling"):
        if key in raw:
            value = config["rope_parameters"]
            mapping.append({"source": key, "value": raw[key], "given": True, "target": "rope_parameters", "as": value})
    config.update(normalizer="softmax")
    return Settings(model_type, config, "softmax", mapping, _without_effect(raw, mapping), [])


def _check_positive(key: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # NaN fails both
        raise CheckpointError(f"{key} is {value!r}, expected a finite number above 0.")


def _unknown(raw: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """The fields that nothing here understands. Generic ones at transformers' own default say nothing."""
    from transformers import PreTrainedConfig

    generic = PreTrainedConfig().to_dict()
    return {
        key: value
        for key, value in raw.items()
        if key not in known
        and key not in _WITHOUT_EFFECT
        and value is not None
        and not (key in _HARMLESS_AT and value == _HARMLESS_AT[key])
        and not (key in generic and generic[key] == value)
    }


def _without_effect(raw: dict[str, Any], mapping: list[dict[str, Any]]) -> dict[str, Any]:
    used = {entry["source"] for entry in mapping}
    return {key: value for key, value in raw.items() if key not in used}


def _say_unknown(unknown: dict[str, Any]) -> str:
    listed = ", ".join(f"{key}={value!r}" for key, value in sorted(unknown.items()))
    return (
        f"config.json has settings that are not understood: {listed}. They may change what the model computes. Remove "
        "them from a copy of the config if you know that they do not."
    )
