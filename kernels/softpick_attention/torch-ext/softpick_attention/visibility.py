"""Which keys each query sees: an interval of keys a query, a mask of padded keys, or a dense mask.

Packed documents are intervals over the flattened row, so no kernel has a grid over documents and nothing here waits
for the device.
"""

import contextlib
from typing import Any, NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# A bound that no key is beyond, yet small enough to be added to positions as int32.
FAR_AWAY = 1 << 29


class Visible(NamedTuple):
    """Query t of row b sees the keys start <= j < end with keys[b, j] and mask[b, h, t, j].

    start, end: int32 or int64 [B or 1, T], or both None: then all keys, or with `causal` and `window` the keys from
    t + offset - window[0] to t + offset + window[1] (-1 = no bound; causal makes the upper one 0). keys: bool [B, S].
    mask: bool, 4-D, broadcastable to [B, H, T, S].
    """

    start: Optional[Tensor] = None
    end: Optional[Tensor] = None
    keys: Optional[Tensor] = None
    mask: Optional[Tensor] = None
    causal: bool = False
    offset: int = 0
    window: Tuple[int, int] = (-1, -1)


def window_bounds(causal: bool, window: Tuple[int, int]) -> Tuple[int, int]:
    """Keys to the left and to the right that a query sees, -1 = no bound; callers may write "none" as 2**31 - 1."""
    return min(window[0], FAR_AWAY), 0 if causal else min(window[1], FAR_AWAY)


def launch_device(x: Tensor) -> Any:
    """Context in which Triton launches on the device of `x`, not on the current one."""
    if x.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(x.device).device(x.device)


@triton.jit(do_not_specialize=["documents", "T", "S", "left", "right"])
def _intervals_kernel(
    cu_q, cu_k, start, end, documents, T, S, left, right,
    BT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TOP_LEFT: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    # Number of boundaries at or before the query, so that an empty document gives way to the one that follows.
    b_low = tl.zeros([BT], tl.int32)
    b_high = tl.zeros([BT], tl.int32) + (documents + 1)
    for _ in range(32):
        m_open = b_low < b_high
        b_mid = (b_low + b_high) // 2
        m_past = m_open & (tl.load(cu_q + b_mid, mask=m_open, other=0).to(tl.int32) <= o_t)
        b_high = tl.where(m_open & (m_past == 0), b_mid, b_high)
        b_low = tl.where(m_past, b_mid + 1, b_low)
    m_in = (o_t < T) & (b_low > 0) & (b_low <= documents)
    b_q0 = tl.load(cu_q + b_low - 1, mask=m_in, other=0).to(tl.int32)
    b_k0 = tl.load(cu_k + b_low - 1, mask=m_in, other=0).to(tl.int32)
    b_k1 = tl.load(cu_k + b_low, mask=m_in, other=0).to(tl.int32)
    b_key = b_k0 + o_t - b_q0
    if not TOP_LEFT:
        b_key += b_k1 - b_k0 - tl.load(cu_q + b_low, mask=m_in, other=0).to(tl.int32) + b_q0
    b_start = b_k0
    b_end = b_k1
    if LEFT:
        b_start = tl.maximum(b_start, b_key - left)
    if RIGHT:
        b_end = tl.minimum(b_end, b_key + right + 1)
    b_end = tl.maximum(tl.minimum(b_end, S), b_start)
    tl.store(start + o_t, tl.where(m_in, b_start, 0), mask=o_t < T)
    tl.store(end + o_t, tl.where(m_in, b_end, 0), mask=o_t < T)


def document_intervals(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    total_q: int,
    total_k: int,
    causal: bool,
    window: Tuple[int, int] = (-1, -1),
    top_left: bool = False,
) -> Visible:
    """What the queries of packed documents see, computed on the device of the boundaries.

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [documents + 1], boundaries in the flattened rows; a document may be
            empty. Queries behind the last boundary see nothing.
        window: keys to the left and to the right of the query, -1 = no bound; `causal` makes the right one 0.
        top_left: align query 0 with key 0 of its document, else the last query with the last key.
    """
    left, right = window_bounds(causal, window)
    start = torch.empty(1, total_q, dtype=torch.int32, device=cu_seqlens_q.device)
    end = torch.empty_like(start)
    if total_q > 0:
        block = 256
        with launch_device(start):
            _intervals_kernel[(triton.cdiv(total_q, block),)](
                cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), start, end, cu_seqlens_q.numel() - 1, total_q,
                total_k, left, right, BT=block, LEFT=left >= 0, RIGHT=right >= 0, TOP_LEFT=top_left, num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip
    return Visible(start=start, end=end)


def check_visible(visible: Visible, q: Tensor, k: Tensor) -> None:
    """Refuse a visibility that does not fit q [B, T, H, D] and k [B, S, Hkv, D].

    Raises:
        ValueError: a shape or a dtype; the message says what was given and what is expected.
    """
    B, T, H, S = q.shape[0], q.shape[1], q.shape[2], k.shape[1]
    if (visible.start is None) != (visible.end is None):
        raise ValueError("start and end of the visible keys must be given together")
    for name, x in (("start", visible.start), ("end", visible.end)):
        if x is None:
            continue
        if tuple(x.shape) not in ((1, T), (B, T)) or x.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} of the visible keys has shape {tuple(x.shape)} and dtype {x.dtype}, expected {(B, T)} or "
                f"{(1, T)} of int32 or int64"
            )
        if x.shape != visible.start.shape:
            raise ValueError(
                f"start {tuple(visible.start.shape)} and end {tuple(x.shape)} of the visible keys must have one shape"
            )
    for name, x, shape in (("key mask", visible.keys, (B, S)), ("attention mask", visible.mask, (B, H, T, S))):
        if x is None:
            continue
        if x.dtype != torch.bool:
            raise ValueError(
                f"the {name} has dtype {x.dtype}, expected torch.bool with True = visible. An additive mask cannot "
                "exclude a key from softpick's denominator; pass `mask == 0` instead"
            )
        sizes = tuple(x.shape)
        fits = len(sizes) == len(shape) and all(
            size == full or (size == 1 and name == "attention mask") for size, full in zip(sizes, shape)
        )
        if not fits:
            raise ValueError(f"the {name} has shape {sizes}, expected {shape}" + " or 1 in places" * (len(shape) == 4))
    for name, x in visible._asdict().items():
        if isinstance(x, Tensor) and x.device != q.device:
            raise ValueError(f"{name} of the visible keys is on {x.device}, expected {q.device} as q")
