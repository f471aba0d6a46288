"""Transformers without attention sinks: softpick attention for the Hugging Face stack.

Importing this package is light (no torch). The attention names and the model classes are registered with transformers
as soon as transformers' own modeling code is imported, whichever comes first.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import wrapt

if TYPE_CHECKING:
    from .modeling.attention_reference import softpick
    from .modeling.configuration_softpick import SoftpickConfig
    from .modeling.modeling_softpick import (
        SoftpickForCausalLM,
        SoftpickForQuestionAnswering,
        SoftpickForSequenceClassification,
        SoftpickForTokenClassification,
        SoftpickModel,
    )


__version__ = "0.1.0"
__all__ = [
    "SoftpickConfig",
    "SoftpickForCausalLM",
    "SoftpickForQuestionAnswering",
    "SoftpickForSequenceClassification",
    "SoftpickForTokenClassification",
    "SoftpickModel",
    "register",
    "softpick",
]

_LAZY = {name: "modeling.modeling_softpick" for name in __all__ if name.startswith("Softpick")}
_LAZY |= {"SoftpickConfig": "modeling.configuration_softpick", "softpick": "modeling.attention_reference"}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register() -> None:
    """Register attention names, configuration and model classes with transformers. Idempotent, and runs by itself."""
    global _state
    _state = "registering"
    try:
        importlib.import_module(".modeling.registration", __name__).register_all()
        _state = "done"
    finally:
        if _state != "done":
            _state = "waiting"


def _register_when_ready(_module: object) -> None:
    """Hook of the modules below. They import each other in circles: while one is half-way, wait for its own hook."""
    if _state != "waiting":
        return
    try:
        register()
    except ImportError:
        if not any(_half_imported(name) for name in _HOOKED):
            raise


def _half_imported(name: str) -> bool:
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)


def _find_kernels_of_checkout() -> None:
    """Let `import softpick_attention` find the kernels beside this package, where they lie in a checkout.

    Ahead of site-packages, so that a checkout never runs the kernels of another, installed version; behind the
    folder of the running script.
    """
    folder = Path(__file__).parent.parent / "kernels/softpick_attention/torch-ext"
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.insert(1, str(folder))


_find_kernels_of_checkout()

_state = "waiting"
_HOOKED = (
    "transformers.modeling_utils",
    "transformers.masking_utils",
    "transformers.modeling_layers",
    "transformers.generation.utils",
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.configuration_llama",
    "transformers.models.llama.modeling_llama",
    f"{__name__}.modeling.configuration_softpick",
    f"{__name__}.modeling.modeling_backbone",
    f"{__name__}.modeling.modeling_softpick",
)
for _name in _HOOKED:
    wrapt.when_imported(_name)(_register_when_ready)


@wrapt.when_imported("peft.utils.constants")
def _tell_peft(constants: object) -> None:
    """Default target modules of PEFT's methods: Llama's, whose parameter names ours are."""
    for name, mapping in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in mapping:
            mapping.setdefault("softpick", mapping["llama"])


@wrapt.when_imported("peft.peft_model")
def _watch_adapters(peft_model: object) -> None:
    importlib.import_module(".modeling.attention_guard", __name__).watch_adapters(peft_model)
