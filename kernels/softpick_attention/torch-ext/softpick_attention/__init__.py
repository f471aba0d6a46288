"""Softpick attention in Triton: forward, backward and decoding, with the argument names of flash_attn.

`__all__` is what callers may rely on. The other names are for hf_softpick, which wraps them in torch operators.
"""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "softpick_attention needs triton 3.6 or later, which is not installed here. On Linux with a GPU: "
        "pip install 'triton>=3.6'. Elsewhere use attn_implementation='tiled' of hf_softpick, which needs no kernel."
    ) from error

from .backward import attention_backward as attention_backward
from .forward import attention_forward as attention_forward
from .hub import flash_attn_forward, supports_flash_attn
from .interface import softpick_attn_func, softpick_attn_varlen_func
from .kvcache import softpick_attn_with_kvcache
from .launch import INTERPRET as INTERPRET
from .launch import check_inputs as check_inputs
from .launch import watch_launches as watch_launches
from .visibility import Visible as Visible

__all__ = [
    "softpick_attn_func",
    "softpick_attn_varlen_func",
    "softpick_attn_with_kvcache",
    "flash_attn_forward",
    "supports_flash_attn",
]
