"""What the backward works out first: two numbers of each query, and which queries see a tile of keys."""

from typing import Dict, Optional

import torch
import triton
import triton.language as tl

from .launch import Problem
from .tiles import FAR, load_tile


@triton.jit(do_not_specialize=["T", "H", "sdo_b", "sdo_t", "sdo_h"])
def delta_kernel(
    out, do, lse, delta, inv, T, H, sdo_b, sdo_t, sdo_h, UNIT: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr,
    BDV: tl.constexpr, NORMALIZER: tl.constexpr,
):  # fmt: skip
    """delta = <o, do> and inv = 2^-lse of BM queries of a head; both [B, H, T] float32."""
    # A grid may be longer than 65535 along its first side only.
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    t0 = tl.program_id(1) * BM
    o_t = t0 + tl.arange(0, BM)
    m_t = o_t < T
    p_o = out + (i_b * T * H + i_h) * DV
    p_do = do + (i_b * sdo_b + i_h * sdo_h) * UNIT
    b_o = load_tile(p_o, t0, tl.arange(0, BM), H * DV, m_t, DV, BDV, True, True)
    b_do = load_tile(p_do, t0, tl.arange(0, BM), sdo_t * UNIT, m_t, DV, BDV, True, True)
    tl.store(delta + i_bh * T + o_t, tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1), mask=m_t)
    if NORMALIZER == "softpick":
        b_lse = tl.load(lse + i_bh * T + o_t, mask=m_t, other=0.0)
        tl.store(inv + i_bh * T + o_t, tl.math.exp2(-b_lse), mask=m_t)


@triton.jit(do_not_specialize=["T", "S", "srow_b", "tiles"])
def bounds_kernel(start, end, bounds, T, S, srow_b, tiles, BN: tl.constexpr, BT: tl.constexpr):
    """Which queries see a tile of keys, and which see all of it: first, last of each, int32 [B or 1, tiles, 4]."""
    i_n = tl.program_id(0) % tiles
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    n0 = i_n * BN
    start += i_b * srow_b
    end += i_b * srow_b
    lo, hi, inner_lo, inner_hi = FAR, 0, FAR, T
    for t0 in range(0, T, BT):
        o_t = t0 + tl.arange(0, BT)
        m_t = o_t < T
        b_start = tl.load(start + o_t, mask=m_t, other=0).to(tl.int32)
        b_end = tl.minimum(tl.load(end + o_t, mask=m_t, other=0).to(tl.int32), S)
        b_sees = m_t & (b_start < tl.minimum(b_end, n0 + BN)) & (b_end > n0)
        lo = tl.minimum(lo, tl.min(tl.where(b_sees, o_t, FAR), 0))
        hi = tl.maximum(hi, tl.max(tl.where(b_sees, o_t + 1, 0), 0))
        b_all = m_t & (b_start <= n0) & (b_end >= n0 + BN)
        inner_lo = tl.minimum(inner_lo, tl.min(tl.where(b_all, o_t, FAR), 0))
        b_stop = m_t & (b_all == 0) & (o_t > inner_lo)
        inner_hi = tl.minimum(inner_hi, tl.min(tl.where(b_stop, o_t, FAR), 0))
    bounds += (i_b * tiles + i_n) * 4
    tl.store(bounds, tl.minimum(lo, hi))
    tl.store(bounds + 1, hi)
    tl.store(bounds + 2, inner_lo)
    tl.store(bounds + 3, inner_hi)


def row_sums(
    problem: Problem,
    out: torch.Tensor,
    do: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    inv: torch.Tensor,
    strides: Dict[str, int],
) -> None:
    """Fill delta and, for softpick, inv; strides as `Problem.strides(g=do)` gives them."""
    T, H = problem.numbers["T"], problem.numbers["H"]
    block = 64
    delta_kernel[(problem.numbers["B"] * H, triton.cdiv(T, block))](
        out, do, lse, delta, inv, T, H, strides["sdo_b"], strides["sdo_t"], strides["sdo_h"],
        UNIT=strides["UNIT"], DV=problem.flags["DV"], BM=block, BDV=problem.flags["BDV"],
        NORMALIZER=problem.flags["NORMALIZER"], num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def query_bounds(problem: Problem, tiles: int, block_n: int) -> Optional[torch.Tensor]:
    """Queries that see each tile of keys, int32 [B or 1, tiles, 4]; None unless the intervals are given as tensors."""
    start, end = problem.rows["start"], problem.rows["end"]
    if start is None:
        return None
    bounds = torch.empty(start.shape[0], tiles, 4, dtype=torch.int32, device=start.device)
    T, S = problem.numbers["T"], problem.numbers["S"]
    bounds_kernel[(tiles * start.shape[0],)](
        start, end, bounds, T, S, problem.rows["srow_b"], tiles, BN=block_n, BT=1024, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return bounds
