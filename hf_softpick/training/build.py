"""The model of a run: new, or going on from another one. Parameters are float32 whatever a configuration file says."""

import contextlib
import logging

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hf_softpick.conversion.settings import read_settings
from hf_softpick.data.settings import DataSettings
from hf_softpick.errors import CheckpointError, RecipeError
from hf_softpick.modeling.attention_guard import GUARDED, unmark
from hf_softpick.modeling.configuration_softpick import SoftpickConfig
from hf_softpick.modeling.normalizers import NORMALIZERS, OWN_PARAMETERS
from hf_softpick.modeling.proving import prove_causal, prove_normalizer, refusal
from hf_softpick.training.continuing import apply_settings, check_isolation, fit_vocabulary, id_count
from hf_softpick.training.recipe_model import ModelSettings

logger = logging.getLogger(__name__)

_WRONG_SETTINGS = (ValueError, OSError, KeyError, StrictDataclassError)
# What transformers raises for weights that are cut off or do not fit.
_UNREADABLE = (*_WRONG_SETTINGS, RuntimeError, SafetensorError)


def build_model(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, seed: int, data: DataSettings | None = None
) -> PreTrainedModel:
    """The model that `settings` describe, on CPU (or sharded by ZeRO-3), float32, the same on every rank.

    Args:
        data: the rows that it will be trained on; a model to go on from must be able to read them.

    Raises:
        RecipeError: the settings do not make a model, or it does not fit the tokenizer or the rows.
    """
    set_seed(seed)
    expected = _WRONG_SETTINGS if settings.from_ is None else _UNREADABLE
    try:
        if settings.from_ is None:
            model = _new(settings, tokenizer, seed)
        else:
            model = _continued(settings, tokenizer, data)
    except expected as error:
        origin = f"model.from {settings.from_}" if settings.from_ is not None else "model"
        reason = str(error)
        if "trust_remote_code" in reason:  # transformers' advice, which no recipe can follow
            reason = f"{reason.splitlines()[0]} It is never run here; give a model that transformers has the code of."
        raise RecipeError(f"{origin}: {reason}") from error
    wrong = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if wrong:
        raise RecipeError(f"model: parameters must be float32, these are {wrong}; use training.bf16 for speed.")
    return model


def _new(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    needed = id_count(tokenizer)
    if settings.vocab_size is not None and settings.vocab_size < needed:
        raise ValueError(
            f"vocab_size is {settings.vocab_size}, but the tokenizer has {needed} tokens. Leave vocab_size out."
        )
    config = SoftpickConfig(
        **settings.config_fields(),
        vocab_size=settings.vocab_size or needed,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # ZeRO-3 shards while it builds and draws the weights afterwards, module by module.
    sharded, implementation = is_deepspeed_zero3_enabled(), settings.attn_implementation
    with contextlib.nullcontext() if sharded else no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation, dtype=torch.float32, trust_remote_code=False
        )
    if not sharded:
        # The same draws in the same order: a run starts from the same weights however it is distributed.
        set_seed(seed)
        with torch.no_grad():
            model.init_weights()
    return model


def _continued(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, data: DataSettings | None
) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(settings.from_, revision=settings.revision, trust_remote_code=False)
    implementation = settings.attn_implementation
    softmax = NORMALIZERS[settings.normalizer].is_plain_softmax
    if is_foreign(config) and not softmax:
        config = _as_ours(settings) or config
    if is_foreign(config):
        unmark(config)  # whatever the source was trained with
        implementation = foreign_attention(settings)
    else:
        config.normalizer = settings.normalizer
    apply_settings(config, settings, data.seq_len if data else 0)
    if not is_foreign(config):
        _check_dropout(config, settings)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            settings.from_,
            revision=settings.revision,
            trust_remote_code=False,
            config=config,
            dtype=torch.float32,
            attn_implementation=implementation,
            output_loading_info=True,
            use_safetensors=True,  # nothing that is downloaded is ever unpickled
        )
    except KeyError as error:
        if error.args != (implementation,):
            raise
        raise refusal(config.model_type, settings.normalizer, error) from error
    missing = sorted(name for name in loading["missing_keys"] if name.rpartition(".")[2] not in OWN_PARAMETERS)
    if missing:
        raise ValueError(
            f"{settings.from_} has no weights for {len(missing)} parameters ({', '.join(missing[:3])}, ...), which "
            "would start at random. Its config.json does not belong to its weights."
        )
    fit_vocabulary(model, settings, tokenizer)
    if is_foreign(config):
        prove_causal(model) if softmax else prove_normalizer(model, settings.normalizer)
        if data and data.isolate_documents and data.packing != "one_document":
            check_isolation(model, settings.normalizer)
    return model


def _as_ours(settings: ModelSettings) -> SoftpickConfig | None:
    """Our configuration with which the weights of `model.from` compute what they do now, if they fit our blocks.

    What is trained then is a model of ours, which no class and no engine takes for a Llama.
    """
    saved, _ = PreTrainedConfig.get_config_dict(settings.from_, revision=settings.revision)
    try:
        return SoftpickConfig(**read_settings(saved).config)
    except (CheckpointError, StrictDataclassError) as error:
        logger.info("%s is trained in its own architecture: %s", settings.from_, error)
        return None


def _check_dropout(config: SoftpickConfig, settings: ModelSettings) -> None:
    able = ("eager", "sdpa") if NORMALIZERS[settings.normalizer].is_plain_softmax else ("eager",)
    if config.attention_dropout and settings.attn_implementation not in able:
        raise ValueError(
            f"it was saved with attention_dropout = {config.attention_dropout:g}, which attn_implementation "
            f"{settings.attn_implementation!r} cannot compute. Set model.attention_dropout=0, or use 'eager'."
        )


def is_foreign(config: object) -> bool:
    """Whether the architecture is not ours, so that its configuration has no place for the normalizer."""
    return getattr(config, "model_type", None) != SoftpickConfig.model_type


def foreign_attention(settings: ModelSettings) -> str | None:
    """The attn_implementation that runs a foreign architecture with the recipe's normalizer."""
    normalizer = NORMALIZERS[settings.normalizer]
    if normalizer.is_plain_softmax:
        return None if settings.attn_implementation == "auto" else settings.attn_implementation
    if settings.attn_implementation != "auto":
        raise RecipeError(
            f"model.attn_implementation is '{settings.attn_implementation}', but a {settings.from_} model runs with "
            f"normalizer '{settings.normalizer}' only under attn_implementation 'auto'; leave it out."
        )
    if normalizer.parameters:
        raise RecipeError(
            f"model.normalizer '{settings.normalizer}' has parameters of its own, and {settings.from_} has no place "
            f"for them. Use {' or '.join(GUARDED)}, or train a new model."
        )
    return settings.normalizer
