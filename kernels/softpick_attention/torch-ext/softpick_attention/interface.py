"""The public functions: arguments as in flash_attn 2, layout [B, T, H, D], any strides but a dense last dimension.

No torch operator is registered here, as the Hub's kernels must not: torch.compile leaves its graph at these functions.
hf_softpick registers operators, which stay inside.
"""

import operator
from typing import Any, Optional, Tuple, Union

import torch
from torch import Tensor

from .backward import attention_backward
from .forward import attention_forward
from .launch import check_inputs as check_inputs
from .visibility import Visible, document_intervals

_LN2 = 0.6931471805599453
_ALIGNMENTS = ("bottom_right", "top_left")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, start, end, keys, mask, visible, scale, normalizer, deterministic):
        visible = visible._replace(start=start, end=end, keys=keys, mask=mask)
        out, lse = attention_forward(q, k, v, visible, scale, normalizer)
        ctx.save_for_backward(q, k, v, out, lse, start, end, keys, mask)
        ctx.rest = visible._replace(start=None, end=None, keys=None, mask=None), scale, normalizer, deterministic
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 11
        q, k, v, out, lse, start, end, keys, mask = ctx.saved_tensors
        visible, scale, normalizer, deterministic = ctx.rest
        visible = visible._replace(start=start, end=end, keys=keys, mask=mask)
        gradients = attention_backward(grad, q, k, v, out, lse, visible, scale, normalizer, deterministic)
        return (*gradients, *(None,) * 8)


@torch.compiler.disable
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    scale: Optional[float] = None,
    normalizer: str = "softpick",
    deterministic: bool = True,
) -> Tuple[Tensor, Tensor]:
    """Differentiable attention over any visibility: `attention_forward` with autograd in q, k and v.

    Returns:
        out [B, T, H, Dv]; log2 of the denominators [B, H, T], float32, not differentiable.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    fields = visible.start, visible.end, visible.keys, visible.mask
    rest = visible._replace(start=None, end=None, keys=None, mask=None)
    return _Attention.apply(q, k, v, *fields, rest, scale, normalizer, deterministic)


@torch.compiler.disable
def softpick_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    scale: Optional[float] = None,
    causal: bool = False,
    window_size: Tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = True,
    return_lse: bool = False,
    *,
    normalizer: str = "softpick",
    key_mask: Optional[Tensor] = None,
    attn_mask: Optional[Tensor] = None,
    alignment: str = "bottom_right",
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """Attention with softpick weights, relu(e^x - 1) / (sum |e^x - 1| + 1e-6) over the keys that a query sees.

    Args:
        q: [B, T, H, D], float32, float16 or bfloat16, D from 1 to 256. k: [B, S, Hkv, D]. v: [B, S, Hkv, Dv]. H is a
            multiple of Hkv (grouped-query attention). A last dimension with gaps is copied, other strides are not.
        scale: factor of the scores, default D ** -0.5.
        causal: query t sees the keys up to t + S - T, or with alignment="top_left" (an empty static cache) up to t.
        window_size: keys to the left and to the right of that one, -1 = no bound.
        deterministic: the backward gives equal bits in every run (two kernels); False adds dq with atomics.
        return_lse: also return the natural logarithm of the denominators.
        normalizer: "softpick", "softmax" or "rectified_softmax" (softmax over the keys with a score of at least 0).
        key_mask: bool [B, S], True = visible, for padded keys.
        attn_mask: bool, broadcastable to [B, H, T, S], True = visible; joins the other restrictions.

    Returns:
        [B, T, H, Dv] in the dtype of v; rows that see no key, or no positive score, are 0. With return_lse also
        [B, H, T] float32, not differentiable.

    Raises:
        ValueError: shapes, dtypes, devices, head counts, or an argument of flash_attn that is not computed here.

    Source: Zuhri, Fuadi, Aji 2025, arXiv 2504.20966.
    """
    refuse(dropout_p, softcap, alibi_slopes)
    check_inputs(q, k, v, normalizer)
    if alignment not in _ALIGNMENTS:
        raise ValueError(f"alignment is {alignment!r}, expected one of {', '.join(_ALIGNMENTS)}")
    if attn_mask is not None:
        if attn_mask.ndim > 4:
            raise ValueError(f"attn_mask has {attn_mask.ndim} dimensions, expected at most 4: [B, H, T, S]")
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    visible = Visible(
        keys=key_mask,
        mask=attn_mask,
        causal=causal,
        offset=k.shape[1] - q.shape[1] if alignment == "bottom_right" else 0,
        window=checked_window(window_size),
    )
    return with_lse(attend(q, k, v, visible, scale, normalizer, deterministic), return_lse)


@torch.compiler.disable
def softpick_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    dropout_p: float = 0.0,
    scale: Optional[float] = None,
    causal: bool = False,
    window_size: Tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = True,
    return_lse: bool = False,
    *,
    normalizer: str = "softpick",
    alignment: str = "bottom_right",
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """The same for documents of different lengths, one after the other in one row.

    Args:
        q: [total_q, H, D]. k: [total_k, Hkv, D]. v: [total_k, Hkv, Dv].
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [documents + 1], boundaries in q and in k, rising from 0 to the
            totals (not checked: they are read on the device only); documents may be empty.
        max_seqlen_q, max_seqlen_k: accepted for flash_attn's callers, and not needed.
        The others: as in `softpick_attn_func`; positions count inside each document.

    Returns:
        [total_q, H, Dv]; with return_lse also [H, total_q] float32.

    Raises:
        ValueError: as `softpick_attn_func`, or boundaries of another shape, dtype or device.
    """
    refuse(dropout_p, softcap, alibi_slopes)
    if not (q.ndim == k.ndim == v.ndim == 3):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must each be [total, heads, D]: flatten "
            "the batch into one row and give the boundaries in cu_seqlens"
        )
    q, k, v = q[None], k[None], v[None]
    check_inputs(q, k, v, normalizer)
    if alignment not in _ALIGNMENTS:
        raise ValueError(f"alignment is {alignment!r}, expected one of {', '.join(_ALIGNMENTS)}")
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if x.ndim != 1 or x.numel() < 2 or x.dtype not in (torch.int32, torch.int64) or x.device != q.device:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, dtype {x.dtype} and device {x.device}, expected [documents + 1] "
                f"of int32 or int64 on {q.device}"
            )
    if cu_seqlens_q.numel() != cu_seqlens_k.numel():
        raise ValueError(
            f"cu_seqlens_q has {cu_seqlens_q.numel()} boundaries and cu_seqlens_k {cu_seqlens_k.numel()}, expected "
            "the same number: one document of keys for each of queries"
        )
    visible = document_intervals(
        cu_seqlens_q,
        cu_seqlens_k,
        q.shape[1],
        k.shape[1],
        causal,
        checked_window(window_size),
        alignment == "top_left",
    )
    out, lse = attend(q, k, v, visible, scale, normalizer, deterministic)
    return with_lse((out[0], lse[0]), return_lse)


def checked_window(window_size: Tuple[int, int]) -> Tuple[int, int]:
    """The window as two ints, or a ValueError."""
    try:
        left, right = map(operator.index, window_size)
    except (TypeError, ValueError):
        left = right = -2
    if left < -1 or right < -1:
        raise ValueError(f"window_size is {window_size}, expected (left, right), each -1 (no bound) or at least 0")
    return left, right


def refuse(dropout_p: float, softcap: float, alibi_slopes: Any) -> None:
    """Arguments of flash_attn that these kernels accept by position, but do not compute."""
    if dropout_p:
        raise ValueError(f"dropout_p is {dropout_p}, expected 0.0: attention dropout is not implemented")
    if softcap:
        raise ValueError(f"softcap is {softcap}, expected 0.0: a cap on the scores is not implemented")
    if alibi_slopes is not None:
        raise ValueError("alibi_slopes are given, expected None: biases on the scores are not implemented")


def with_lse(pair: Tuple[Tensor, Tensor], return_lse: bool) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """The output, and on request the denominators in units of the natural logarithm."""
    out, lse = pair
    return (out, lse * _LN2) if return_lse else out
