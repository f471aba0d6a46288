"""Attention of new queries over a cache of keys, with the argument names of flash_attn 2."""

from typing import Optional, Tuple, Union

import torch
from torch import Tensor

from .forward import attention_forward
from .interface import checked_window, refuse, with_lse
from .launch import check_inputs
from .visibility import Visible, check_visible, window_bounds

# The grid of a launch has no more programs along this side.
MAX_SPLITS = 65535


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
    refuse(0.0, softcap, alibi_slopes)
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
    if not isinstance(num_splits, int) or not 0 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits is {num_splits!r}, expected 0 (chosen for the device) to {MAX_SPLITS}")
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
    visible = _cache_intervals(lengths + new, T, causal, checked_window(window_size), cache_leftpad)._replace(
        keys=key_mask
    )
    check_visible(visible, q, k_cache)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.no_grad():
        if k is not None:
            _append(k_cache, v_cache, k, v, lengths, cache_batch_idx, B)
        if cache_batch_idx is not None:
            k_cache, v_cache = k_cache[cache_batch_idx], v_cache[cache_batch_idx]
        return with_lse(attention_forward(q, k_cache, v_cache, visible, scale, normalizer, num_splits), return_lse)


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
