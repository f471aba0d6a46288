"""Entries in transformers' registries. Not part of the Hub code of checkpoints."""

from .attention_softpick import register_attention


def register_all() -> None:
    """Attention and mask functions under every normalizer's name, and the Auto classes for model_type "softpick"."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from .configuration_softpick import SoftpickConfig
    from .modeling_softpick import SoftpickForCausalLM, SoftpickModel

    register_attention()
    AutoConfig.register(SoftpickConfig.model_type, SoftpickConfig, exist_ok=True)
    AutoModel.register(SoftpickConfig, SoftpickModel, exist_ok=True)
    AutoModelForCausalLM.register(SoftpickConfig, SoftpickForCausalLM, exist_ok=True)


__all__ = ["register_all", "register_attention"]
