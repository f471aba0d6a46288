"""What the backward works out first: two numbers of each query, and which queries see a tile of keys."""

from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Problem, Seen, run
from .tiles import FAR, load_tile
from .tuning import Config


class Rows(NamedTuple):
    """Numbers of each query, float32 [B, H, T]: log2 denominator, <o, do>, and 2^-lse, which only MINUS_ONE needs."""

    lse: Tensor
    delta: Tensor
    inv: Optional[Tensor]


@triton.jit(do_not_specialize=["T", "H", "do_b", "do_t", "do_h"])
def delta_kernel(
    out, do, rows, T, H, do_b, do_t, do_h,
    UNIT: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, MINUS_ONE: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """delta = <o, do> and inv = 2^-lse of BM queries of a head."""
    # A grid may be longer than 65535 along its first side only.
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    t0 = tl.program_id(1) * BM
    o_t = t0 + tl.arange(0, BM)
    m_t = o_t < T
    p_o = out + (i_b * T * H + i_h) * DV
    p_do = do + (i_b * do_b + i_h * do_h) * UNIT
    b_o = load_tile(p_o, t0, tl.arange(0, BM), H * DV, m_t, DV, BDV, True, True)
    b_do = load_tile(p_do, t0, tl.arange(0, BM), do_t * UNIT, m_t, DV, BDV, True, True)
    tl.store(rows.delta + i_bh * T + o_t, tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1), mask=m_t)
    if MINUS_ONE:
        b_lse = tl.load(rows.lse + i_bh * T + o_t, mask=m_t, other=0.0)
        tl.store(rows.inv + i_bh * T + o_t, tl.math.exp2(-b_lse), mask=m_t)


@triton.jit(do_not_specialize=["T", "S", "row_b", "tiles"])
def bounds_kernel(seen, T, S, row_b, tiles, BN: tl.constexpr, BT: tl.constexpr):
    """Which queries see a tile of keys, and which see all of it: first, last of each, int32 [B or 1, tiles, 4]."""
    i_n = tl.program_id(0) % tiles
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    n0 = i_n * BN
    lo, hi, inner_lo, inner_hi = FAR, 0, FAR, T
    for t0 in range(0, T, BT):
        o_t = t0 + tl.arange(0, BT)
        m_t = o_t < T
        b_start = tl.load(seen.start + i_b * row_b + o_t, mask=m_t, other=0).to(tl.int32)
        b_end = tl.minimum(tl.load(seen.end + i_b * row_b + o_t, mask=m_t, other=0).to(tl.int32), S)
        b_sees = m_t & (b_start < tl.minimum(b_end, n0 + BN)) & (b_end > n0)
        lo = tl.minimum(lo, tl.min(tl.where(b_sees, o_t, FAR), 0))
        hi = tl.maximum(hi, tl.max(tl.where(b_sees, o_t + 1, 0), 0))
        b_all = m_t & (b_start <= n0) & (b_end >= n0 + BN)
        inner_lo = tl.minimum(inner_lo, tl.min(tl.where(b_all, o_t, FAR), 0))
        b_stop = m_t & (b_all == 0) & (o_t > inner_lo)
        inner_hi = tl.minimum(inner_hi, tl.min(tl.where(b_stop, o_t, FAR), 0))
    bounds = seen.bounds + (i_b * tiles + i_n) * 4
    tl.store(bounds, tl.minimum(lo, hi))
    tl.store(bounds + 1, hi)
    tl.store(bounds + 2, inner_lo)
    tl.store(bounds + 3, inner_hi)


def row_numbers(problem: Problem, out: Tensor, do: Tensor, lse: Tensor) -> Rows:
    """The numbers of every query that the backward needs."""
    minus_one, T, H = problem.switches.NORMALIZER.MINUS_ONE, problem.numbers["T"], problem.numbers["H"]
    rows = Rows(lse, torch.empty_like(lse), torch.empty_like(lse) if minus_one else None)
    shared, switches = problem.arguments(do=do)
    names, block = ("do", "T", "H", "do_b", "do_t", "do_h"), 64
    run(
        delta_kernel, (lse.shape[0] * H, triton.cdiv(T, block)), Config(), out=out, rows=rows,
        **{name: shared[name] for name in names}, UNIT=switches.UNIT, DV=switches.DV, BDV=switches.BDV,
        MINUS_ONE=minus_one, BM=block,
    )  # fmt: skip
    return rows


def with_bounds(problem: Problem, block_n: int) -> Seen:
    """`problem.seen` with the queries that see each tile of keys; itself unless intervals are given as tensors."""
    seen, numbers = problem.seen, problem.numbers
    if seen.start is None:
        return seen
    rows, tiles = seen.start.shape[0], triton.cdiv(numbers["S"], block_n)
    bounds = torch.empty(rows, tiles, 4, dtype=torch.int32, device=seen.start.device)
    run(
        bounds_kernel, (tiles * rows,), Config(), seen=Seen(seen.start, seen.end, bounds=bounds), tiles=tiles,
        **{name: numbers[name] for name in ("T", "S", "row_b")}, BN=block_n, BT=1024,
    )  # fmt: skip
    return seen._replace(bounds=bounds)
