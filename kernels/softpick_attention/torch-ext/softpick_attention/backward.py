"""Gradients of attention: two deterministic kernels, or one pass that adds dq with atomics.

Derivation in the README of the kernel. With lse the log2 denominator of a row, e = 2^(x - lse) and delta = <o, do>,
dx = e * (dp - delta) where x > 0 and e * delta elsewhere; w = relu(e - inv), inv = 2^-lse, needs no division.
"""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backward_prepare import row_numbers, with_bounds
from .launch import INTERPRET, Problem, dense_rows, run
from .tiles import (
    aligned,
    inside,
    key_range,
    load_tile,
    longest_first,
    place_in,
    score_gradient,
    scores,
    split_range,
    visible_interval,
    weights,
)
from .tuning import Config, configuration
from .visibility import Visible

_INTEGERS = [
    "T", "S", "H", "heads", "chunk_heads", "band_lo", "band_hi", "row_b", "mask_b", "mask_h", "mask_t",
    "q_b", "q_t", "q_h", "k_b", "k_t", "k_h", "v_b", "v_t", "v_h", "do_b", "do_t", "do_h",
]  # fmt: skip


@triton.jit
def _dq_keys(
    b_q, b_do, b_dq, b_lse, b_delta, k, v, seen, at, b_start, b_end, o_t, m_t, lo, hi, scale, k_t, v_t,
    C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys lo <= j < hi to the gradient of a tile of queries."""
    o_tile = tl.arange(0, C.BN)
    for n0 in tl.range(lo, hi, C.BN):
        o_n = n0 + o_tile
        m_n = o_n < hi
        if C.HAS_KEYS:
            m_n = m_n & (tl.load(seen.keys + at[1] + o_n, mask=m_n, other=0) != 0)
        b_k = load_tile(k, n0, o_tile, k_t, m_n, C.D, C.BD, MASKED or C.HAS_KEYS, True)
        b_v = load_tile(v, n0, o_tile, v_t, m_n, C.DV, C.BDV, MASKED or C.HAS_KEYS, True)
        # [BM, BN]
        b_s = scores(b_q, b_k, C)
        if MASKED:
            b_s = tl.where(inside(o_n[None, :], b_start[:, None], b_end[:, None]), b_s, float("-inf"))
        if C.HAS_KEYS:
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        if C.HAS_MASK:
            p_mask = seen.mask + at[2] + (o_t * at[3])[:, None] + aligned(o_n)[None, :]
            b_seen = tl.load(p_mask, mask=(m_t[:, None] & (o_n < hi)[None, :]) if MASKED else m_t[:, None], other=0)
            b_s = tl.where(b_seen != 0, b_s, float("-inf"))
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=C.PRECISION)
        b_e = tl.math.exp2(b_s * scale - b_lse[:, None])
        b_ds = score_gradient(b_s, b_e, b_dp, b_delta[:, None], C)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=C.PRECISION)
    return b_dq


@triton.jit(do_not_specialize=_INTEGERS)
def dq_kernel(
    q, k, v, do, dq, rows, seen, scale, score_scale,
    T, S, H, heads, chunk_heads, band_lo, band_hi, row_b, mask_b, mask_h, mask_t,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, C: tl.constexpr,
):  # fmt: skip
    """Gradient of BM queries of one head; `score_scale` is the caller's scale, sign included."""
    BM: tl.constexpr = C.BM
    BD: tl.constexpr = C.BD
    i_bh, i_m = longest_first(tl.cdiv(T, BM), heads, chunk_heads)
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    i_hk = i_h // C.G
    q += (i_b * q_b + i_h * q_h) * C.UNIT
    k += (i_b * k_b + i_hk * k_h) * C.UNIT
    v += (i_b * v_b + i_hk * v_h) * C.UNIT
    do += (i_b * do_b + i_h * do_h) * C.UNIT
    o_t = i_m * BM + tl.arange(0, BM)
    m_t = o_t < T
    b_q = load_tile(q, i_m * BM, tl.arange(0, BM), q_t * C.UNIT, m_t, C.D, C.BD, True, True)
    b_do = load_tile(do, i_m * BM, tl.arange(0, BM), do_t * C.UNIT, m_t, C.DV, C.BDV, True, True)
    o_row = (i_b * H + i_h) * T + o_t
    b_lse = tl.load(rows.lse + o_row, mask=m_t, other=0.0)
    b_delta = tl.load(rows.delta + o_row, mask=m_t, other=0.0)

    at = place_in(i_b, i_h, S, row_b, mask_b, mask_h, mask_t, C)
    b_start, b_end = visible_interval(seen, at, o_t, T, S, band_lo, band_hi, C)
    lo, hi, inner_lo, inner_hi = key_range(b_start, b_end, m_t)
    if C.HAS_MASK:
        lo = lo // C.BN * C.BN  # For `aligned`.
    full_lo, full_hi = split_range(lo, hi, inner_lo, inner_hi, C.BN)
    b_dq = tl.zeros([BM, BD], tl.float32)
    for i_phase in tl.static_range(3):
        if C.LEFT or i_phase > 0:
            b_dq = _dq_keys(
                b_q, b_do, b_dq, b_lse, b_delta, k, v, seen, at, b_start, b_end, o_t, m_t,
                lo if i_phase == 0 else full_lo if i_phase == 1 else full_hi,
                full_lo if i_phase == 0 else full_hi if i_phase == 1 else hi,
                scale, k_t * C.UNIT, v_t * C.UNIT, C, i_phase != 1,
            )  # fmt: skip
    o_d = tl.arange(0, C.BD)
    p_dq = dq + (((i_b * T + o_t) * H + i_h) * C.D)[:, None] + o_d[None, :]
    tl.store(p_dq, (b_dq * score_scale).to(dq.dtype.element_ty), mask=m_t[:, None] & (o_d < C.D)[None, :])


@triton.jit
def _dkv_queries(
    b_k, b_v, b_dk, b_dv, q, do, dq, rows, i_row, seen, at, m_n, o_n, lo, hi, T, S, H, band_lo, band_hi, scale,
    q_t, do_t, C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the queries lo <= t < hi of one head to the gradients of a tile of keys, and with ADD_DQ their own."""
    o_tile = tl.arange(0, C.BM)
    for t0 in tl.range(lo, hi, C.BM):
        o_t = t0 + o_tile
        m_t = o_t < hi
        b_q = load_tile(q, t0, o_tile, q_t, m_t, C.D, C.BD, MASKED, True)
        b_do = load_tile(do, t0, o_tile, do_t, m_t, C.DV, C.BDV, MASKED, True)
        b_lse = _load_row(rows.lse + i_row, o_t, m_t, 0.0, MASKED)
        b_delta = _load_row(rows.delta + i_row, o_t, m_t, 0.0, MASKED)
        # [BN, BM]
        b_s = scores(b_k, b_q, C)
        if MASKED:
            b_start, b_end = visible_interval(seen, at, o_t, T, S, band_lo, band_hi, C)
            b_s = tl.where(inside(o_n[:, None], b_start[None, :], b_end[None, :]), b_s, float("-inf"))
        if C.HAS_MASK:
            p_mask = seen.mask + at[2] + (o_t * at[3])[None, :] + o_n[:, None]
            b_seen = tl.load(p_mask, mask=(m_t[None, :] & (o_n < S)[:, None]) if MASKED else m_t[None, :], other=0)
            b_s = tl.where(b_seen != 0, b_s, float("-inf"))
        b_e = tl.math.exp2(b_s * scale - b_lse[None, :])
        b_p = b_e
        if C.NORMALIZER.MINUS_ONE:
            b_p = b_e - _load_row(rows.inv + i_row, o_t, m_t, 1.0, MASKED)[None, :]
        b_dv = tl.dot(weights(b_p, b_do.dtype, C), b_do, b_dv, input_precision=C.PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=C.PRECISION)
        b_ds = score_gradient(b_s, b_e, b_dp, b_delta[None, :], C).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=C.PRECISION)
        if C.ADD_DQ:
            if C.HAS_KEYS:
                b_ds = tl.where(m_n[:, None], b_ds, 0.0)
            o_d = tl.arange(0, C.BD)
            b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision=C.PRECISION)
            p_dq = dq + (o_t.to(tl.int64) * H * C.D)[:, None] + o_d[None, :]
            tl.atomic_add(p_dq, b_dq, mask=m_t[:, None] & (o_d < C.D)[None, :], sem="relaxed")
    return b_dk, b_dv


@triton.jit
def _load_row(row, o_t, m_t, other, MASKED: tl.constexpr):
    if MASKED:
        b_row = tl.load(row + o_t, mask=m_t, other=other)
    else:
        b_row = tl.load(row + o_t)
    return b_row


@triton.jit(do_not_specialize=_INTEGERS)
def dkv_kernel(
    q, k, v, do, dq, dk, dv, rows, seen, scale, score_scale,
    T, S, H, heads, chunk_heads, band_lo, band_hi, row_b, mask_b, mask_h, mask_t,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, C: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys and values of one key head over its G query heads.

    EACH_HEAD: one program a query head, for small grids; dk and dv are then per query head, summed by the caller.
    ADD_DQ: dq is added to as well, with atomics, in an order that differs between runs.
    """
    BN: tl.constexpr = C.BN
    BD: tl.constexpr = C.BD
    BDV: tl.constexpr = C.BDV
    tiles = tl.cdiv(S, BN)
    # The first keys, which most queries see, come first.
    i_bh, i_last = longest_first(tiles, heads, chunk_heads)
    i_n = tiles - 1 - i_last
    if C.EACH_HEAD:
        i_b = (i_bh // H).to(tl.int64)
        first = i_bh % H
        i_hk = (first // C.G).to(tl.int64)
        count = 1
    else:
        i_b = (i_bh // (H // C.G)).to(tl.int64)
        i_hk = (i_bh % (H // C.G)).to(tl.int64)
        first = i_bh % (H // C.G) * C.G
        count = C.G
    n0 = i_n * BN
    o_n = n0 + tl.arange(0, BN)
    m_n = o_n < S
    k += (i_b * k_b + i_hk * k_h) * C.UNIT
    v += (i_b * v_b + i_hk * v_h) * C.UNIT
    # Padded keys may hold anything, and 0 * NaN would reach dq.
    if C.HAS_KEYS:
        m_n = m_n & (tl.load(seen.keys + i_b * S + o_n, mask=m_n, other=0) != 0)
    b_k = load_tile(k, n0, tl.arange(0, BN), k_t * C.UNIT, m_n, C.D, C.BD, True, True)
    b_v = load_tile(v, n0, tl.arange(0, BN), v_t * C.UNIT, m_n, C.DV, C.BDV, True, True)
    lo, hi, inner_lo, inner_hi = 0, T, 0, T
    if C.ROWS == "given":
        bounds = seen.bounds + (tl.where(row_b > 0, i_b, 0) * tiles + i_n) * 4
        lo, hi = tl.load(bounds), tl.load(bounds + 1)
        inner_lo, inner_hi = tl.load(bounds + 2), tl.load(bounds + 3)
    else:
        if C.ROWS == "band":
            lo = tl.minimum(tl.maximum(n0 + 1 - band_hi, 0), T)
            inner_lo = n0 + BN - band_hi
            if C.LEFT:
                hi = tl.maximum(tl.minimum(n0 + BN - band_lo, T), lo)
                inner_hi = n0 - band_lo + 1
        if n0 + BN > S:
            inner_hi = 0
    full_lo, full_hi = split_range(lo, hi, inner_lo, inner_hi, C.BM)

    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BDV], tl.float32)
    for i_g in range(count):
        i_h = (first + i_g).to(tl.int64)
        p_q = q + (i_b * q_b + i_h * q_h) * C.UNIT
        p_do = do + (i_b * do_b + i_h * do_h) * C.UNIT
        p_dq = dq
        if C.ADD_DQ:
            p_dq += (i_b * T * H + i_h) * C.D
        at = place_in(i_b, i_h, S, row_b, mask_b, mask_h, mask_t, C)
        for i_phase in tl.static_range(3):
            b_dk, b_dv = _dkv_queries(
                b_k, b_v, b_dk, b_dv, p_q, p_do, p_dq, rows, (i_b * H + i_h) * T, seen, at, m_n, o_n,
                lo if i_phase == 0 else full_lo if i_phase == 1 else full_hi,
                full_lo if i_phase == 0 else full_hi if i_phase == 1 else hi,
                T, S, H, band_lo, band_hi, scale, q_t * C.UNIT, do_t * C.UNIT, C, i_phase != 1,
            )  # fmt: skip
    b_dk = b_dk * score_scale
    if C.HAS_KEYS:
        b_dk = tl.where(m_n[:, None], b_dk, 0.0)
        b_dv = tl.where(m_n[:, None], b_dv, 0.0)
    width = H if C.EACH_HEAD else H // C.G
    o_row = (i_b * S + o_n) * width + (first if C.EACH_HEAD else i_hk)
    o_d, o_dv = tl.arange(0, C.BD), tl.arange(0, C.BDV)
    m_s = (o_n < S)[:, None]
    tl.store(dk + o_row[:, None] * C.D + o_d[None, :], b_dk.to(dk.dtype.element_ty), mask=m_s & (o_d < C.D)[None, :])
    tl.store(
        dv + o_row[:, None] * C.DV + o_dv[None, :], b_dv.to(dv.dtype.element_ty), mask=m_s & (o_dv < C.DV)[None, :]
    )


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    visible: Visible,
    scale: float,
    normalizer: str = "softpick",
    deterministic: bool = True,
    config: Optional[Config] = None,
) -> Tuple[Tensor, Tensor, Tensor]:
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
    dq_sum = torch.empty(B, T, H, D, dtype=torch.float32, device=q.device) if fast else None
    shared, switches = problem.arguments(do=do)
    shared.update(score_scale=scale)
    if switches.PRECISION == "tf32x3" and problem.dim > 128:
        switches = switches._replace(PRECISION="ieee")  # The parts of three products would not fit the registers.
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
        heads = B * (H if each_head else heads_k)
        shared.update(seen=with_bounds(problem, config.block_n))
        run(
            dkv_kernel, (tiles * heads,), config, **shared, rows=rows, dq=dq_sum, dk=parts[0], dv=parts[1],
            heads=heads,
            # Side by side on all heads, the atomics of one pass meet less.
            chunk_heads=heads if fast else problem.heads_at_once(heads, T if each_head else T * H / heads_k),
            C=switches._replace(BM=config.block_m, BN=config.block_n, ADD_DQ=fast, EACH_HEAD=each_head),
        )  # fmt: skip

    def launch_dq(config: Config) -> None:
        shared.update(seen=problem.seen)
        run(
            dq_kernel, (triton.cdiv(T, config.block_m) * B * H,), config, **shared, rows=rows, dq=dq,
            heads=B * H, chunk_heads=problem.heads_at_once(B * H, S * heads_k / H),
            C=switches._replace(BM=config.block_m, BN=config.block_n),
        )  # fmt: skip

    with problem.device():
        rows = row_numbers(problem, out, do, lse)
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
