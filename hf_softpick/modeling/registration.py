"""Entries in transformers' registries. Not part of the Hub code of checkpoints."""

from .attention_guard import install
from .attention_interface import register_attention


def register_all() -> None:
    """Attention and mask functions under every normalizer's name, the guard of models that run them, and the Auto
    classes for model_type "softpick"."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    from .configuration_softpick import SoftpickConfig
    from .modeling_softpick import (
        SoftpickForCausalLM,
        SoftpickForQuestionAnswering,
        SoftpickForSequenceClassification,
        SoftpickForTokenClassification,
        SoftpickModel,
    )

    register_attention()
    install()
    AutoConfig.register(SoftpickConfig.model_type, SoftpickConfig, exist_ok=True)
    for auto, model in (
        (AutoModel, SoftpickModel),
        (AutoModelForCausalLM, SoftpickForCausalLM),
        (AutoModelForQuestionAnswering, SoftpickForQuestionAnswering),
        (AutoModelForSequenceClassification, SoftpickForSequenceClassification),
        (AutoModelForTokenClassification, SoftpickForTokenClassification),
    ):
        auto.register(SoftpickConfig, model, exist_ok=True)


__all__ = ["register_all", "register_attention"]
