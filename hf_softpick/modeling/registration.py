"""Entries in transformers' registries, each made when the module that owns the registry is there. Not part of Hub code."""


def register_attention() -> None:
    """Attention and mask functions under every normalizer's name."""
    from . import attention_softpick

    attention_softpick.register_attention()


def register_config() -> None:
    """AutoConfig for model_type "softpick"."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from .configuration_softpick import SoftpickConfig

    AutoConfig.register("softpick", SoftpickConfig, exist_ok=True)


def register_models() -> None:
    """AutoModel and AutoModelForCausalLM for SoftpickConfig."""
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

    from .configuration_softpick import SoftpickConfig
    from .modeling_softpick import SoftpickForCausalLM, SoftpickModel

    AutoModel.register(SoftpickConfig, SoftpickModel, exist_ok=True)
    AutoModelForCausalLM.register(SoftpickConfig, SoftpickForCausalLM, exist_ok=True)


def register_all() -> None:
    """Everything above."""
    register_attention()
    register_config()
    register_models()
