"""Transformers without attention sinks: softpick attention for the Hugging Face stack.

Importing this package is light (no torch). The attention names and the model classes are registered with transformers as
soon as transformers' own modeling code is imported, whichever comes first.
"""

import importlib
from typing import TYPE_CHECKING

import wrapt


if TYPE_CHECKING:
    from .modeling.configuration_softpick import SoftpickConfig
    from .modeling.modeling_softpick import SoftpickForCausalLM, SoftpickModel
    from .modeling.normalizers import softpick


__version__ = "0.1.0"
__all__ = ["SoftpickConfig", "SoftpickForCausalLM", "SoftpickModel", "register", "softpick"]

_LAZY = {
    "SoftpickConfig": "modeling.configuration_softpick",
    "SoftpickForCausalLM": "modeling.modeling_softpick",
    "SoftpickModel": "modeling.modeling_softpick",
    "softpick": "modeling.normalizers",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register() -> None:
    """Register attention names, configuration and model classes with transformers. Idempotent, and runs by itself."""
    importlib.import_module(".modeling.registration", __name__).register_all()


def _when_imported(module: str, function: str) -> None:
    def hook(_):
        getattr(importlib.import_module(".modeling.registration", __name__), function)()

    wrapt.when_imported(module)(hook)


_when_imported("transformers.modeling_utils", "register_attention")
_when_imported("transformers.models.auto.configuration_auto", "register_config")
_when_imported("transformers.models.auto.modeling_auto", "register_models")
