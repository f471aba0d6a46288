"""Gradients of attention: two deterministic kernels, or one pass that adds dq with atomics.

Derivation in the README of the kernel. With lse the log2 denominator of a row, e = 2^(x - lse) and delta = <o, do>,
dx = e * (dp - delta) where x > 0 and e * delta elsewhere; w = relu(e - inv), inv = 2^-lse, needs no division.
"""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl

from .backward_prepare import query_bounds, row_sums
from .launch import INTERPRET, Problem, dense_rows
from .tiles import (
    aligned,
    inside,
    key_range,
    load_tile,
    longest_first,
    rectify,
    score_gradient,
    split_range,
    visible_interval,
)
from .tuning import Config, configuration
from .visibility import Visible

_INTEGERS = [
    "B", "T", "S", "H", "tiles", "heads", "chunk_heads", "offset", "left", "right",
    "sq_b", "sq_t", "sq_h", "sk_b", "sk_t", "sk_h", "sv_b", "sv_t", "sv_h", "sdo_b", "sdo_t", "sdo_h",
    "srow_b", "skey_b", "sm_b", "sm_h", "sm_t", "sbound_b",
]  # fmt: skip


@triton.jit
def _dq_keys(
    b_q, b_do, b_dq, b_lse, b_delta, k, v, keys, mask, b_start, b_end, o_t, m_t, lo, hi, scale, sk_t, sv_t, sm_t,
    D: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    NORMALIZER: tl.constexpr, HAS_KEYS: tl.constexpr, HAS_MASK: tl.constexpr, NEGATE: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys lo <= j < hi to the gradient of a tile of queries."""
    o_tile = tl.arange(0, BN)
    for n0 in tl.range(lo, hi, BN):
        o_n = n0 + o_tile
        m_n = o_n < hi
        if HAS_KEYS:
            m_n = m_n & (tl.load(keys + o_n, mask=m_n, other=0) != 0)
        b_k = load_tile(k, n0, o_tile, sk_t, m_n, D, BD, MASKED or HAS_KEYS, True)
        b_v = load_tile(v, n0, o_tile, sv_t, m_n, DV, BDV, MASKED or HAS_KEYS, True)
        # [BM, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if NEGATE:
            b_s = -b_s
        if MASKED:
            b_s = tl.where(inside(o_n[None, :], b_start[:, None], b_end[:, None]), b_s, float("-inf"))
        if HAS_KEYS:
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        if HAS_MASK:
            p_mask = mask + (o_t * sm_t)[:, None] + aligned(o_n)[None, :]
            b_seen = tl.load(p_mask, mask=(m_t[:, None] & (o_n < hi)[None, :]) if MASKED else m_t[:, None], other=0)
            b_s = tl.where(b_seen != 0, b_s, float("-inf"))
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_e = tl.math.exp2(b_s * scale - b_lse[:, None])
        b_ds = score_gradient(b_s, b_e, b_dp, b_delta[:, None], NORMALIZER)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=_INTEGERS)
def dq_kernel(
    q, k, v, do, lse, delta, dq, start, end, keys, mask, scale, score_scale,
    B, T, S, H, tiles, heads, chunk_heads, offset, left, right,
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h, sv_b, sv_t, sv_h, sdo_b, sdo_t, sdo_h, srow_b, skey_b, sm_b, sm_h, sm_t,
    UNIT: tl.constexpr, MASK_UNIT: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, NORMALIZER: tl.constexpr, ROWS: tl.constexpr, LEFT: tl.constexpr,
    HAS_KEYS: tl.constexpr, HAS_MASK: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    """Gradient of BM queries of one head; `score_scale` is the caller's scale, sign included."""
    i_bh, i_m = longest_first(tiles, heads, chunk_heads)
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    i_hk = i_h // G
    q += (i_b * sq_b + i_h * sq_h) * UNIT
    k += (i_b * sk_b + i_hk * sk_h) * UNIT
    v += (i_b * sv_b + i_hk * sv_h) * UNIT
    do += (i_b * sdo_b + i_h * sdo_h) * UNIT
    sk_t = sk_t * UNIT
    sv_t = sv_t * UNIT
    if HAS_KEYS:
        keys += i_b * skey_b
    if HAS_MASK:
        mask += (i_b * sm_b + i_h * sm_h) * MASK_UNIT
        sm_t = sm_t.to(tl.int64) * MASK_UNIT
    if ROWS == "given":
        start += i_b * srow_b
        end += i_b * srow_b
    o_t = i_m * BM + tl.arange(0, BM)
    m_t = o_t < T
    b_q = load_tile(q, i_m * BM, tl.arange(0, BM), sq_t * UNIT, m_t, D, BD, True, True)
    b_do = load_tile(do, i_m * BM, tl.arange(0, BM), sdo_t * UNIT, m_t, DV, BDV, True, True)
    p_row = (i_b * H + i_h) * T + o_t
    b_lse = tl.load(lse + p_row, mask=m_t, other=0.0)
    b_delta = tl.load(delta + p_row, mask=m_t, other=0.0)

    b_start, b_end = visible_interval(start, end, o_t, T, S, offset, left, right, ROWS, LEFT)
    lo, hi, inner_lo, inner_hi = key_range(b_start, b_end, m_t)
    if HAS_MASK:
        lo = lo // BN * BN  # For `aligned`.
    full_lo, full_hi = split_range(lo, hi, inner_lo, inner_hi, BN)
    b_dq = tl.zeros([BM, BD], tl.float32)
    for i_phase in tl.static_range(3):
        if LEFT or i_phase > 0:
            b_dq = _dq_keys(
                b_q, b_do, b_dq, b_lse, b_delta, k, v, keys, mask, b_start, b_end, o_t, m_t,
                lo if i_phase == 0 else full_lo if i_phase == 1 else full_hi,
                full_lo if i_phase == 0 else full_hi if i_phase == 1 else hi,
                scale, sk_t, sv_t, sm_t, D, DV, BN, BD, BDV, NORMALIZER, HAS_KEYS, HAS_MASK, NEGATE, PRECISION,
                i_phase != 1,
            )  # fmt: skip
    o_d = tl.arange(0, BD)
    p_dq = dq + (((i_b * T + o_t) * H + i_h) * D)[:, None] + o_d[None, :]
    tl.store(p_dq, (b_dq * score_scale).to(dq.dtype.element_ty), mask=m_t[:, None] & (o_d < D)[None, :])


@triton.jit
def _dkv_queries(
    b_k, b_v, b_dk, b_dv, q, do, dq, lse, delta, inv, mask, start, end, m_n, o_n, lo, hi, T, S, H, offset, left,
    right, scale, sq_t, sdo_t, sm_t,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    NORMALIZER: tl.constexpr, ROWS: tl.constexpr, LEFT: tl.constexpr, HAS_KEYS: tl.constexpr, HAS_MASK: tl.constexpr,
    NEGATE: tl.constexpr, PRECISION: tl.constexpr, RELU: tl.constexpr, ADD_DQ: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add the queries lo <= t < hi of one head to the gradients of a tile of keys, and with ADD_DQ their own."""
    o_tile = tl.arange(0, BM)
    for t0 in tl.range(lo, hi, BM):
        o_t = t0 + o_tile
        m_t = o_t < hi
        b_q = load_tile(q, t0, o_tile, sq_t, m_t, D, BD, MASKED, True)
        b_do = load_tile(do, t0, o_tile, sdo_t, m_t, DV, BDV, MASKED, True)
        if MASKED:
            b_lse = tl.load(lse + o_t, mask=m_t, other=0.0)
            b_delta = tl.load(delta + o_t, mask=m_t, other=0.0)
        else:
            b_lse = tl.load(lse + o_t)
            b_delta = tl.load(delta + o_t)
        # [BN, BM]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        if NEGATE:
            b_s = -b_s
        if MASKED:
            b_start, b_end = visible_interval(start, end, o_t, T, S, offset, left, right, ROWS, LEFT)
            b_s = tl.where(inside(o_n[:, None], b_start[None, :], b_end[None, :]), b_s, float("-inf"))
        if HAS_MASK:
            p_mask = mask + (o_t * sm_t)[None, :] + o_n[:, None]
            b_seen = tl.load(p_mask, mask=(m_t[None, :] & (o_n < S)[:, None]) if MASKED else m_t[None, :], other=0)
            b_s = tl.where(b_seen != 0, b_s, float("-inf"))
        b_e = tl.math.exp2(b_s * scale - b_lse[None, :])
        if NORMALIZER == "softpick":
            b_p = b_e - (tl.load(inv + o_t, mask=m_t, other=1.0) if MASKED else tl.load(inv + o_t))[None, :]
        elif NORMALIZER == "rectified_softmax":
            b_p = tl.where(b_s < 0, 0.0, b_e)
        else:
            b_p = b_e
        if NORMALIZER == "softpick":
            b_w = rectify(b_p, b_do.dtype, RELU)
        else:
            b_w = b_p.to(b_do.dtype)
        b_dv = tl.dot(b_w, b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds = score_gradient(b_s, b_e, b_dp, b_delta[None, :], NORMALIZER)
        b_ds = b_ds.to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
        if ADD_DQ:
            if HAS_KEYS:
                b_ds = tl.where(m_n[:, None], b_ds, 0.0)
            o_d = tl.arange(0, BD)
            b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision=PRECISION)
            p_dq = dq + (o_t.to(tl.int64) * H * D)[:, None] + o_d[None, :]
            tl.atomic_add(p_dq, b_dq, mask=m_t[:, None] & (o_d < D)[None, :], sem="relaxed")
    return b_dk, b_dv


@triton.jit(do_not_specialize=_INTEGERS)
def dkv_kernel(
    q, k, v, do, lse, delta, inv, bounds, dq, dk, dv, start, end, keys, mask, scale, score_scale,
    B, T, S, H, tiles, heads, chunk_heads, offset, left, right,
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h, sv_b, sv_t, sv_h, sdo_b, sdo_t, sdo_h, srow_b, skey_b, sm_b, sm_h, sm_t,
    sbound_b,
    UNIT: tl.constexpr, MASK_UNIT: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, NORMALIZER: tl.constexpr, ROWS: tl.constexpr, LEFT: tl.constexpr,
    HAS_KEYS: tl.constexpr, HAS_MASK: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    RELU: tl.constexpr, ADD_DQ: tl.constexpr, EACH_HEAD: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys and values of one key head over its G query heads.

    EACH_HEAD: one program a query head, for small grids; dk and dv are then per query head, summed by the caller.
    ADD_DQ: dq is added to as well, with atomics, in an order that differs between runs.
    """
    # The first keys, which most queries see, come first.
    i_bh, i_last = longest_first(tiles, heads, chunk_heads)
    i_n = tiles - 1 - i_last
    if EACH_HEAD:
        i_b = (i_bh // H).to(tl.int64)
        first = i_bh % H
        i_hk = (first // G).to(tl.int64)
        count = 1
    else:
        i_b = (i_bh // (H // G)).to(tl.int64)
        i_hk = (i_bh % (H // G)).to(tl.int64)
        first = i_bh % (H // G) * G
        count = G
    n0 = i_n * BN
    o_n = n0 + tl.arange(0, BN)
    m_n = o_n < S
    p_k = k + (i_b * sk_b + i_hk * sk_h) * UNIT
    p_v = v + (i_b * sv_b + i_hk * sv_h) * UNIT
    # Padded keys may hold anything, and 0 * NaN would reach dq.
    if HAS_KEYS:
        m_n = m_n & (tl.load(keys + i_b * skey_b + o_n, mask=m_n, other=0) != 0)
    b_k = load_tile(p_k, n0, tl.arange(0, BN), sk_t * UNIT, m_n, D, BD, True, True)
    b_v = load_tile(p_v, n0, tl.arange(0, BN), sv_t * UNIT, m_n, DV, BDV, True, True)
    if ROWS == "given":
        start += i_b * srow_b
        end += i_b * srow_b
        bounds += (i_b * sbound_b + i_n) * 4
        lo, hi = tl.load(bounds), tl.load(bounds + 1)
        inner_lo, inner_hi = tl.load(bounds + 2), tl.load(bounds + 3)
    else:
        lo, hi, inner_lo, inner_hi = 0, T, 0, T
        if ROWS == "band":
            lo = tl.minimum(tl.maximum(n0 - offset - right, 0), T)
            inner_lo = n0 + BN - 1 - offset - right
            if LEFT:
                hi = tl.maximum(tl.minimum(n0 + BN + left - offset, T), lo)
                inner_hi = n0 + left - offset + 1
        if n0 + BN > S:
            inner_hi = 0
    full_lo, full_hi = split_range(lo, hi, inner_lo, inner_hi, BM)

    sq_t = sq_t * UNIT
    sdo_t = sdo_t * UNIT
    sm_t = sm_t.to(tl.int64) * MASK_UNIT
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BDV], tl.float32)
    for i_g in range(count):
        i_h = (first + i_g).to(tl.int64)
        p_q = q + (i_b * sq_b + i_h * sq_h) * UNIT
        p_do = do + (i_b * sdo_b + i_h * sdo_h) * UNIT
        p_row = (i_b * H + i_h) * T
        p_dq = dq
        p_mask = mask
        if ADD_DQ:
            p_dq += (i_b * T * H + i_h) * D
        if HAS_MASK:
            p_mask += (i_b * sm_b + i_h * sm_h) * MASK_UNIT
        for i_phase in tl.static_range(3):
            b_dk, b_dv = _dkv_queries(
                b_k, b_v, b_dk, b_dv, p_q, p_do, p_dq, lse + p_row, delta + p_row, inv + p_row, p_mask, start, end,
                m_n, o_n,
                lo if i_phase == 0 else full_lo if i_phase == 1 else full_hi,
                full_lo if i_phase == 0 else full_hi if i_phase == 1 else hi,
                T, S, H, offset, left, right, scale, sq_t, sdo_t, sm_t, D, DV, BM, BD, BDV, NORMALIZER, ROWS,
                LEFT, HAS_KEYS, HAS_MASK, NEGATE, PRECISION, RELU, ADD_DQ, i_phase != 1,
            )  # fmt: skip
    b_dk = b_dk * score_scale
    if HAS_KEYS:
        b_dk = tl.where(m_n[:, None], b_dk, 0.0)
        b_dv = tl.where(m_n[:, None], b_dv, 0.0)
    width = H if EACH_HEAD else H // G
    i_out = first if EACH_HEAD else i_hk
    row = (i_b * S + o_n) * width + i_out
    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    m_s = (o_n < S)[:, None]
    tl.store(dk + row[:, None] * D + o_d[None, :], b_dk.to(dk.dtype.element_ty), mask=m_s & (o_d < D)[None, :])
    tl.store(dv + row[:, None] * DV + o_dv[None, :], b_dv.to(dv.dtype.element_ty), mask=m_s & (o_dv < DV)[None, :])


def attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    visible: Visible,
    scale: float,
    normalizer: str = "softpick",
    deterministic: bool = True,
    config: Optional[Config] = None,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v for the gradient of `out` [B, T, H, Dv]; out and lse as `attention_forward` returned them.

    Args:
        deterministic: True, two kernels whose results are bit-equal between runs; False, one pass that adds dq with
            atomics.

    Returns:
        dq, dk, dv, contiguous, shapes and dtypes of q, k, v.

    Raises:
        ValueError: as `attention_forward`.
    """
    if INTERPRET and q.dtype == torch.bfloat16:
        wide = [x.float() for x in (do, q, k, v, out)]
        gradients = attention_backward(*wide, lse, visible, scale, normalizer, deterministic, config)
        return tuple(x.to(q.dtype) for x in gradients)
    problem = Problem.of(q, k, v, visible, scale, normalizer)
    do = dense_rows(do.to(v.dtype))
    B, T, H, D = q.shape
    S, heads_k, DV = k.shape[1], k.shape[2], v.shape[3]
    fast = not deterministic
    dq = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    dk = torch.empty(B, S, heads_k, D, dtype=k.dtype, device=k.device)
    dv = torch.empty(B, S, heads_k, DV, dtype=v.dtype, device=v.device)
    if 0 in (q.numel(), k.numel(), v.numel()):
        return dq.zero_(), dk.zero_(), dv.zero_()
    strides = problem.strides(g=do)
    delta = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    inv = torch.empty_like(delta) if normalizer == "softpick" else delta
    dq_sum = torch.empty(B, T, H, D, dtype=torch.float32, device=q.device) if fast else None
    shared = dict(
        problem.rows, **problem.numbers, **strides, **problem.flags, q=problem.q, k=problem.k, v=problem.v, do=do,
        lse=lse, delta=delta, scale=problem.scale, score_scale=scale,
    )  # fmt: skip
    if shared["PRECISION"] == "tf32x3" and problem.dim > 128:
        shared["PRECISION"] = "ieee"  # The parts of three products would not fit the registers.
    parts = (dk, dv)

    def launch_dkv(config: Config) -> None:
        nonlocal parts
        tiles = triton.cdiv(S, config.block_n)
        parts = (dk, dv)
        # Few key heads and short rows leave processors idle: then each query head has its own program.
        each_head = H > heads_k and tiles * B * heads_k < 2 * problem.target.processors
        if each_head:
            wide = dict(dtype=torch.float32, device=q.device)
            parts = torch.empty(B, S, H, D, **wide), torch.empty(B, S, H, DV, **wide)
        bounds = query_bounds(problem, tiles, config.block_n)
        heads = B * (H if each_head else heads_k)
        dkv_kernel[(tiles * heads,)](
            **shared, inv=inv, bounds=bounds, dq=dq_sum, dk=parts[0], dv=parts[1], tiles=tiles, heads=heads,
            # Side by side on all heads, the atomics of one pass meet less.
            chunk_heads=heads if fast else problem.heads_at_once(heads, T if each_head else T * H / heads_k),
            sbound_b=tiles if bounds is not None and bounds.shape[0] > 1 else 0, ADD_DQ=fast, EACH_HEAD=each_head,
            BM=config.block_m, BN=config.block_n, **config.launch(),
        )  # fmt: skip

    def launch_dq(config: Config) -> None:
        tiles = triton.cdiv(T, config.block_m)
        dq_kernel[(tiles * B * H,)](
            **shared, dq=dq, tiles=tiles, heads=B * H,
            chunk_heads=problem.heads_at_once(B * H, S * heads_k / H), BM=config.block_m,
            BN=config.block_n, **config.launch(),
        )  # fmt: skip

    with problem.device():
        row_sums(problem, out, do, lse, delta, inv, strides)
        chosen = config or configuration("dkv_fast" if fast else "dkv", problem, launch_dkv)
        if fast:
            dq_sum.zero_()
        launch_dkv(chosen)
        if deterministic:
            launch_dq(config or configuration("dq", problem, launch_dq))
    if fast:
        torch.mul(dq_sum, scale, out=dq)
    if parts[0] is not dk:
        for x, part in zip((dk, dv), parts):
            x.copy_(part.unflatten(2, (heads_k, H // heads_k)).sum(3))
    return dq, dk, dv
