"""The "triton" implementations: the fused kernels of `softpick_attention` as operators of torch.

Operators, so that autograd, torch.compile, checkpointing and sharding see one opaque step; the kernels are elsewhere.
"""

import warnings
from functools import cache
from typing import Optional

import torch
from torch import Tensor

from .attention_inputs import OPERATORS, check_inputs, explicit_mask
from .normalizers import base_normalizer
from .visibility import VisibleKeys

try:
    from softpick_attention import INTERPRET, Visible, attention_backward, attention_forward

    _missing = None
except Exception as error:  # ImportError without Triton; a Triton that does not fit the machine raises anything
    _missing = f"softpick_attention cannot be imported ({type(error).__name__}: {error})"

TRITON = ("triton", "triton_fast")
MAX_HEAD_DIM = 256
_DEVICES = ("cuda", "xpu")  # AMD's are called cuda as well
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: VisibleKeys | Tensor,
    scale: float,
    normalizer: str = "softpick",
    deterministic: bool = True,
) -> Tensor:
    """Attention by Triton kernels, in memory linear in T and S.

    Args:
        query: [B, H, T, D]; for scaled_* already multiplied by s_h * log(n_i).
        key: [B, Hkv, S, D]. value: [B, Hkv, S, Dv], float32, float16 or bfloat16; H a multiple of Hkv. Query and key
            are cast to the dtype of `value`; sums are kept in float32.
        visible: intervals of keys, or a bool mask broadcastable to [B, H, T, S] (True = visible).
        scale: factor of the scores, usually D ** -0.5.
        deterministic: bit-equal gradients on every run. False adds the parts of dq in any order, in one pass.

    Returns:
        [B, T, H, Dv] in the dtype of `value`. Differentiable once, in query, key and value.

    Raises:
        ValueError: shapes do not fit, or the kernels cannot run on these tensors; the message says why.
    """
    kind = base_normalizer(normalizer)
    check_inputs(query, key, value, visible)
    head_dim = max(query.shape[3], value.shape[3])
    refuse("triton" if deterministic else "triton_fast", head_dim, query.device, value.dtype)
    heads_inside = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
    if isinstance(visible, VisibleKeys):
        seen = visible.start, visible.end, visible.keys, None, visible.offset, visible.window or 0
    else:
        seen = None, None, None, explicit_mask(visible, query, key), 0, 0
    return _forward(*heads_inside, *seen, scale, kind, deterministic)[0]


def _visible(start, end, keys, mask, offset: int, window: int) -> "Visible":
    """The kernels' description: without intervals and mask, rows by a band, for which no tensor is read."""
    if start is not None or mask is not None:
        return Visible(start=start, end=end, keys=keys, mask=mask)
    return Visible(keys=keys, causal=True, offset=offset, window=(window - 1, -1))


def refuse(
    implementation: str, head_dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> None:
    """Raise if the kernels cannot run; arguments as in `refusal`.

    Raises:
        ValueError: what was asked for, why it cannot be, and what to use instead.
    """
    reason = refusal(head_dim, device, dtype)
    if reason is not None:
        raise ValueError(f"attn_implementation={implementation!r} cannot run: {reason}. Use 'auto' or 'tiled'.")


def refusal(head_dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why the kernels cannot run, None if they can. Reads no tensor, so that torch.compile can trace it.

    Args:
        head_dim: the larger of D and Dv.
        device: None where it is not known yet, for instance while a model is loaded.
        dtype: of the values; None where it is not known yet.
    """
    if _missing is not None:
        return f'{_missing}; pip install "hf_softpick[gpu]" brings what it needs'
    if head_dim > MAX_HEAD_DIM:
        return f"heads have {head_dim} dimensions, and the kernels take {MAX_HEAD_DIM} at most"
    if dtype is not None and dtype not in _DTYPES:
        return f"values are {dtype}, and the kernels take float32, float16 and bfloat16"
    if device is None or (INTERPRET and device.type == "cpu"):
        return None
    if device.type == "cpu":
        return "the tensors are on cpu, where Triton runs only under TRITON_INTERPRET=1, for tests"
    if device.type not in _DEVICES:
        return f"the tensors are on {device.type}, and Triton is for GPUs of NVIDIA, AMD and Intel"
    if device.type == "cuda" and _too_old(device):
        return "Triton needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer"
    return None


@torch.compiler.assume_constant_result
def _too_old(device: torch.device) -> bool:
    return torch.version.hip is None and _capability(device) < (8, 0)


_capability = cache(torch.cuda.get_device_capability)


@torch.library.custom_op(f"{OPERATORS}::triton_forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Optional[Tensor],  # noqa: UP045 -- the schema parser of torch 2.11 wants Optional
    end: Optional[Tensor],  # noqa: UP045
    keys: Optional[Tensor],  # noqa: UP045
    mask: Optional[Tensor],  # noqa: UP045
    offset: int,
    window: int,
    scale: float,
    kind: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, Dv] and log2 of the denominator [B, H, T], float32; inputs [B, T or S, heads, dims]."""
    visible = _visible(start, end, keys, mask, offset, window)
    return attention_forward(query, key, value, visible, scale, kind)


@_forward.register_fake
def _(query, key, value, start, end, keys, mask, offset, window, scale, kind, deterministic):
    batch, length, heads, _ = query.shape
    out = value.new_empty(batch, length, heads, value.shape[3])
    return out, query.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op(f"{OPERATORS}::triton_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Optional[Tensor],  # noqa: UP045
    end: Optional[Tensor],  # noqa: UP045
    keys: Optional[Tensor],  # noqa: UP045
    mask: Optional[Tensor],  # noqa: UP045
    offset: int,
    window: int,
    scale: float,
    kind: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each in the layout of `_forward`."""
    if not deterministic:
        _alert_not_deterministic()
    visible = _visible(start, end, keys, mask, offset, window)
    return attention_backward(grad, query, key, value, out, lse, visible, scale, kind, deterministic)


@_backward.register_fake
def _(grad, query, key, value, out, lse, start, end, keys, mask, offset, window, scale, kind, deterministic):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _alert_not_deterministic() -> None:
    """What torch's own operators do under `torch.use_deterministic_algorithms(True)`."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        "the backward pass of attn_implementation='triton_fast' is not deterministic, but "
        "torch.use_deterministic_algorithms(True) is set. Use 'triton', whose gradients are."
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.numbers = inputs[7:]
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad: Tensor | None, grad_lse: Tensor | None):
    gradients = (None,) * 3 if grad is None else _backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return (*gradients, *(None,) * 9)


_forward.register_autograd(_autograd, setup_context=_setup_context)
