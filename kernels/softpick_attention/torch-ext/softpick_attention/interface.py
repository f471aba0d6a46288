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
from .visibility import Visible, check_visible, document_intervals, window_bounds

_LN2 = 0.6931471805599453
_ALIGNMENTS = ("bottom_right", "top_left")
# The grid of a launch has no more programs along this side.
_MAX_SPLITS = 65535


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
    _refuse(dropout_p, softcap, alibi_slopes)
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
        window=_window(window_size),
    )
    return _result(attend(q, k, v, visible, scale, normalizer, deterministic), return_lse)


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
    _refuse(dropout_p, softcap, alibi_slopes)
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
        cu_seqlens_q, cu_seqlens_k, q.shape[1], k.shape[1], causal, _window(window_size), alignment == "top_left"
    )
    out, lse = attend(q, k, v, visible, scale, normalizer, deterministic)
    return _result((out[0], lse[0]), return_lse)


@torch.compiler.disable
def softpick_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Optional[Tensor] = None,
    v: Optional[Tensor] = None,
    cache_seqlens: Optional[Union[int, Tensor]] = None,
    cache_batch_idx: Optional[Tensor] = None,
    cache_leftpad: Optional[Tensor] = None,
    scale: Optional[float] = None,
    causal: bool = False,
    window_size: Tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    num_splits: int = 0,
    return_lse: bool = False,
    *,
    normalizer: str = "softpick",
    key_mask: Optional[Tensor] = None,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """Attention of a few new queries over a cache of keys; no gradients.

    Args:
        q: [B, T, H, D]. k_cache: [B or more, S, Hkv, D]. v_cache: [B or more, S, Hkv, Dv].
        k, v: [B, T_new, Hkv, D and Dv], written into the cache, in place, behind its first cache_seqlens tokens.
        cache_seqlens: int or int [B], tokens in the cache before this call (default: all of it, and none with k, v).
        cache_batch_idx: int [B], the row of the cache that belongs to each query row; these rows are copied.
        cache_leftpad: int [B], padded tokens at the start of each row, never seen.
        causal: query t sees the keys up to (cache_seqlens + T_new) - T + t; else all tokens in the cache.
        num_splits: parts of the cache that are worked on side by side; 0 = chosen by device and shape. Another number
            may round differently.
        key_mask: bool [B, S], True = visible.
        The others: as in `softpick_attn_func`.

    Returns:
        [B, T, H, Dv]; with return_lse also [B, H, T] float32.

    Raises:
        ValueError: as `softpick_attn_func`, or the new tokens do not fit.
    """
    _refuse(0.0, softcap, alibi_slopes)
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together, or neither")
    # Where rows of the cache are chosen there may be any number of them.
    rows = slice(None) if cache_batch_idx is None else slice(0)
    check_inputs(q[rows], k_cache[rows], v_cache[rows], normalizer)
    B, T, S, device = q.shape[0], q.shape[1], k_cache.shape[1], q.device
    for name, x in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        # Bytes would index the cache as a mask.
        if x is not None and (tuple(x.shape) != (B,) or x.dtype not in (torch.int32, torch.int64)):
            raise ValueError(f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}, expected int32 or int64 [{B}]")
    if not isinstance(num_splits, int) or not 0 <= num_splits <= _MAX_SPLITS:
        raise ValueError(f"num_splits is {num_splits!r}, expected 0 (chosen for the device) to {_MAX_SPLITS}")
    new = 0 if k is None else k.shape[1]
    if cache_seqlens is None:
        cache_seqlens = S if k is None else 0
    if not isinstance(cache_seqlens, Tensor):
        if not hasattr(cache_seqlens, "__index__") or not 0 <= cache_seqlens <= S - new:
            raise ValueError(
                f"cache_seqlens is {cache_seqlens!r}, expected an int from 0 to {S - new} or a tensor of them: the "
                f"cache has room for {S} tokens and {new} are new"
            )
        lengths = torch.full((1,), cache_seqlens, dtype=torch.int32, device=device)
    else:
        if tuple(cache_seqlens.shape) != (B,) or cache_seqlens.is_floating_point():
            raise ValueError(
                f"cache_seqlens has shape {tuple(cache_seqlens.shape)} and dtype {cache_seqlens.dtype}, expected an "
                f"int or int [{B}]"
            )
        lengths = cache_seqlens.to(device, torch.int32)
    visible = _cache_intervals(lengths + new, T, causal, _window(window_size), cache_leftpad)._replace(keys=key_mask)
    check_visible(visible, q, k_cache)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.no_grad():
        if k is not None:
            _append(k_cache, v_cache, k, v, lengths, cache_batch_idx, B)
        if cache_batch_idx is not None:
            k_cache, v_cache = k_cache[cache_batch_idx], v_cache[cache_batch_idx]
        return _result(attention_forward(q, k_cache, v_cache, visible, scale, normalizer, num_splits), return_lse)


def _append(k_cache, v_cache, k, v, lengths, cache_batch_idx, batch) -> None:
    """Write new keys and values behind the first `lengths` tokens of each row of the cache."""
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new.ndim != 4 or new.shape[0] != batch or new.shape[2:] != cache.shape[2:] or new.dtype != cache.dtype:
            raise ValueError(
                f"{name} is {tuple(new.shape)} of {new.dtype}, expected [{batch}, T_new, {cache.shape[2]}, "
                f"{cache.shape[3]}] of {cache.dtype} as the cache"
            )
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"k holds {k.shape[1]} new tokens and v {v.shape[1]}, expected the same number")
    rows = torch.arange(batch, device=k.device) if cache_batch_idx is None else cache_batch_idx
    columns = lengths[:, None].long() + torch.arange(k.shape[1], device=k.device)
    k_cache[rows[:, None], columns] = k
    v_cache[rows[:, None], columns] = v


def _cache_intervals(lengths: Tensor, T: int, causal: bool, window: Tuple[int, int], leftpad: Optional[Tensor]):
    """What T queries at the end of rows of `lengths` tokens see."""
    left, right = window_bounds(causal, window)
    last = lengths[:, None]
    own = last - T + torch.arange(T, device=lengths.device, dtype=torch.int32)
    end = last.expand_as(own) if right < 0 else torch.minimum(own + right + 1, last)
    start = torch.zeros_like(own) if left < 0 else own - left
    if leftpad is not None:
        start = torch.maximum(start, leftpad.to(start)[:, None])
        end = end.expand_as(start)
    return Visible(start=start, end=end)


def _window(window_size: Tuple[int, int]) -> Tuple[int, int]:
    try:
        left, right = map(operator.index, window_size)
    except (TypeError, ValueError):
        left = right = -2
    if left < -1 or right < -1:
        raise ValueError(f"window_size is {window_size}, expected (left, right), each -1 (no bound) or at least 0")
    return left, right


def _refuse(dropout_p: float, softcap: float, alibi_slopes: Any) -> None:
    """Arguments of flash_attn that these kernels accept by position, but do not compute."""
    if dropout_p:
        raise ValueError(f"dropout_p is {dropout_p}, expected 0.0: attention dropout is not implemented")
    if softcap:
        raise ValueError(f"softcap is {softcap}, expected 0.0: a cap on the scores is not implemented")
    if alibi_slopes is not None:
        raise ValueError("alibi_slopes are given, expected None: biases on the scores are not implemented")


def _result(pair: Tuple[Tensor, Tensor], return_lse: bool) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    out, lse = pair
    return (out, lse * _LN2) if return_lse else out
