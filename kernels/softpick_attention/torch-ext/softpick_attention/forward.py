"""Forward attention: one kernel for prefill and for decoding split over keys, and the kernel that joins the splits."""

from collections import namedtuple
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRET, Problem, run
from .normalizers import LOWEST
from .tiles import (
    aligned,
    inside,
    key_range,
    load_tile,
    longest_first,
    place_in,
    scores,
    split_range,
    visible_interval,
    weights,
)
from .tuning import Config, configuration, decode_splits
from .visibility import Visible

_INTEGERS = [
    "T", "S", "H", "heads", "chunk_heads", "band_lo", "band_hi", "row_b", "mask_b", "mask_h", "mask_t",
    "q_b", "q_t", "q_h", "k_b", "k_t", "k_h", "v_b", "v_t", "v_h",
]  # fmt: skip


# Sums of each row over one of several parts of the keys, float32: [B, parts, T, H, Dv] and twice [B, parts, H, T].
Part = namedtuple("Part", "acc m l")


@triton.jit
def _attend(
    b_q, b_acc, b_l, b_m, k, v, seen, at, b_start, b_end, o_t, m_t, lo, hi, scale, k_t, v_t,
    C: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add the keys lo <= j < hi to the sums of a tile of queries.

    MASKED: some query of the tile may not see some of these keys. EXACT: a NaN in a value reaches only the queries
    that see it; without it, every query of the tile, because 0 * NaN is NaN in the product with the values.
    """
    HIDDEN: tl.constexpr = 0.0 if C.NORMALIZER.MINUS_ONE else float("-inf")
    o_tile = tl.arange(0, BN)
    for n0 in tl.range(lo, hi, BN):
        o_n = n0 + o_tile
        m_n = o_n < hi
        b_k = load_tile(k, n0, o_tile, k_t, m_n, C.D, C.BD, MASKED, C.WIDE)
        # [BM, BN]
        b_s = scores(b_q, b_k, C)
        b_v = load_tile(v, n0, o_tile, v_t, m_n, C.DV, C.BDV, MASKED, C.WIDE)
        if EXACT:
            b_bad = (b_v != b_v) | (tl.abs(b_v) == float("inf"))
            b_v = tl.where(b_bad, 0.0, b_v)
            b_s = tl.where((tl.max(b_bad.to(tl.int32), 1) > 0)[None, :], float("nan"), b_s)
        if MASKED:
            b_s = tl.where(inside(o_n[None, :], b_start[:, None], b_end[:, None]), b_s, HIDDEN)
        if C.HAS_KEYS:
            p_keys = seen.keys + at[1] + o_n
            b_seen = tl.load(p_keys, mask=m_n, other=0) if MASKED else tl.load(p_keys)
            b_s = tl.where((b_seen != 0)[None, :], b_s, HIDDEN)
        if C.HAS_MASK:
            p_mask = seen.mask + at[2] + (o_t * at[3])[:, None] + aligned(o_n)[None, :]
            b_seen = tl.load(p_mask, mask=(m_t[:, None] & m_n[None, :]) if MASKED else m_t[:, None], other=0)
            b_s = tl.where(b_seen != 0, b_s, HIDDEN)
        # A whole number: scaling by 2^-m is then exact, and so is a weight of 0 for a score of 0.
        b_m_new = tl.maximum(b_m, tl.ceil(tl.max(b_s, 1) * scale))
        b_alpha = tl.math.exp2(b_m - b_m_new)
        b_p = tl.math.exp2(b_s * scale - b_m_new[:, None])
        if C.NORMALIZER.MINUS_ONE:
            b_p = b_p - tl.math.exp2(-b_m_new)[:, None]
            b_l = b_l * b_alpha + tl.sum(tl.abs(b_p), 1)
        else:
            b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_w = weights(b_p, b_v.dtype, C)
        b_acc = tl.dot(b_w, b_v, b_acc * b_alpha[:, None], input_precision=C.PRECISION)
        b_m = b_m_new
    return b_acc, b_l, b_m


@triton.jit(do_not_specialize=_INTEGERS)
def forward_kernel(
    q, k, v, out, lse, part, seen, scale,
    T, S, H, heads, chunk_heads, band_lo, band_hi, row_b, mask_b, mask_h, mask_t,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, C: tl.constexpr,
):  # fmt: skip
    """Output and log2 denominator of BM queries of one head; PACK: of BM / G queries of the G heads of a key head.

    SPLIT: the sums over one part of the keys go to `part` instead, to be joined by `combine_kernel`.
    """
    BM: tl.constexpr = C.BM
    BN: tl.constexpr = C.BN
    BDV: tl.constexpr = C.BDV
    i_bh, i_m = longest_first(tl.cdiv(T * C.G if C.PACK else T, BM), heads, chunk_heads)
    i_split, splits = tl.program_id(1), tl.num_programs(1)

    o_r = i_m * BM + tl.arange(0, BM)
    if C.PACK:
        i_b = (i_bh // (H // C.G)).to(tl.int64)
        i_hk = (i_bh % (H // C.G)).to(tl.int64)
        i_h = i_hk * C.G
        o_t = o_r // C.G
        o_h = i_h + o_r % C.G
    else:
        i_b = (i_bh // H).to(tl.int64)
        i_h = (i_bh % H).to(tl.int64)
        i_hk = i_h // C.G
        o_t = o_r
        o_h = i_h + tl.zeros([BM], tl.int64)
    m_t = o_t < T
    k += (i_b * k_b + i_hk * k_h) * C.UNIT
    v += (i_b * v_b + i_hk * v_h) * C.UNIT
    if C.PACK:
        o_d = tl.arange(0, C.BD)
        p_q = q + i_b * q_b * C.UNIT + (o_t.to(tl.int64) * q_t + o_h * q_h)[:, None] * C.UNIT + o_d[None, :]
        b_q = tl.load(p_q, mask=m_t[:, None] & (o_d < C.D)[None, :], other=0.0)
    else:
        p_q = q + (i_b * q_b + i_h * q_h) * C.UNIT
        b_q = load_tile(p_q, i_m * BM, tl.arange(0, BM), q_t * C.UNIT, m_t, C.D, C.BD, True, C.WIDE)

    # PACK only where one mask is for all heads.
    at = place_in(i_b, i_h, S, row_b, mask_b, mask_h, mask_t, C)
    b_start, b_end = visible_interval(seen, at, o_t, T, S, band_lo, band_hi, C)
    lo, hi, inner_lo, inner_hi = key_range(b_start, b_end, m_t)
    if C.HAS_MASK:
        lo = lo // BN * BN  # For `aligned`.
    if C.SPLIT:
        keys = tl.cdiv(tl.cdiv(hi - lo, splits), BN) * BN
        lo = tl.minimum(lo + i_split * keys, hi)
        hi = tl.minimum(lo + keys, hi)
        b_end = tl.minimum(b_end, hi)
    full_lo, full_hi = split_range(lo, hi, inner_lo, inner_hi, BN)

    b_m = tl.full([BM], C.NORMALIZER.LEAST_M, tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BDV], tl.float32)
    # Where a mask is needed tiles are half as wide, for the sake of registers.
    for i_phase in tl.static_range(3):
        if C.LEFT or i_phase > 0:
            b_acc, b_l, b_m = _attend(
                b_q, b_acc, b_l, b_m, k, v, seen, at, b_start, b_end, o_t, m_t,
                lo if i_phase == 0 else full_lo if i_phase == 1 else full_hi,
                full_lo if i_phase == 0 else full_hi if i_phase == 1 else hi,
                scale, k_t * C.UNIT, v_t * C.UNIT, C, BN if i_phase == 1 else max(BN // 2, 16), i_phase != 1, False,
            )  # fmt: skip
    # NaN in a finite row came from a value; once more, in narrow tiles that need
    # few registers, so that it reaches no query that does not see it.
    if tl.max(tl.max(((b_acc != b_acc) & (b_l == b_l)[:, None]).to(tl.int32), 1), 0) > 0:
        b_acc, b_l, b_m = _attend(
            b_q, tl.zeros([BM, BDV], tl.float32), tl.zeros([BM], tl.float32),
            tl.full([BM], C.NORMALIZER.LEAST_M, tl.float32), k, v, seen, at, b_start, b_end, o_t, m_t, lo, hi,
            scale, k_t * C.UNIT, v_t * C.UNIT, C, 16, True, True,
        )  # fmt: skip

    o_d = tl.arange(0, C.BDV)
    i_part = i_b * splits + i_split
    o_out = (((i_part * T + o_t) * H + o_h) * C.DV)[:, None] + o_d[None, :]
    o_row = (i_part * H + o_h) * T + o_t
    m_out = m_t[:, None] & (o_d < C.DV)[None, :]
    if C.SPLIT:
        tl.store(part.acc + o_out, b_acc, mask=m_out)
        tl.store(part.m + o_row, b_m, mask=m_t)
        tl.store(part.l + o_row, b_l, mask=m_t)
    else:
        b_norm, b_lse = _denominator(b_l, b_m, C.NORMALIZER)
        tl.store(out + o_out, (b_acc / b_norm[:, None]).to(out.dtype.element_ty), mask=m_out)
        tl.store(lse + o_row, b_lse, mask=m_t)


@triton.jit
def _denominator(b_l, b_m, NORMALIZER: tl.constexpr):
    """The denominator of rows shifted by b_m, and log2 of the unshifted one. A row without keys divides by 1 where
    nothing is added, and has +inf, as in flash_attn, so that its weights are 0 in the backward."""
    if NORMALIZER.ADDED > 0:
        b_norm = b_l + NORMALIZER.ADDED * tl.math.exp2(-b_m)
        b_lse = b_m + tl.math.log2(b_norm)
    else:
        b_norm = tl.where(b_l == 0, 1.0, b_l)
        b_lse = tl.where(b_l == 0, float("inf"), b_m + tl.math.log2(b_norm))
    return b_norm, b_lse


@triton.jit(do_not_specialize=["T", "H", "splits"])
def combine_kernel(
    part, out, lse, T, H, splits, NORMALIZER: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BS: tl.constexpr
):
    """Join the sums over the parts of the keys of one query: linear, once all are shifted by one m."""
    i_r = tl.program_id(0).to(tl.int64)
    i_t, i_bh = i_r % T, i_r // T
    i_b, i_h = i_bh // H, i_bh % H
    o_d = tl.arange(0, BDV)
    b_m = NORMALIZER.LEAST_M
    for s0 in range(0, splits, BS):
        o_s = s0 + tl.arange(0, BS)
        p_m = part.m + ((i_b * splits + o_s) * H + i_h) * T + i_t
        b_m = tl.maximum(b_m, tl.max(tl.load(p_m, mask=o_s < splits, other=LOWEST), 0))
    b_l = 0.0
    b_acc = tl.zeros([BDV], tl.float32)
    for s0 in range(0, splits, BS):
        o_s = s0 + tl.arange(0, BS)
        m_s = o_s < splits
        o_row = ((i_b * splits + o_s) * H + i_h) * T + i_t
        b_alpha = tl.where(m_s, tl.math.exp2(tl.load(part.m + o_row, mask=m_s, other=LOWEST) - b_m), 0.0)
        b_l += tl.sum(tl.load(part.l + o_row, mask=m_s, other=0.0) * b_alpha, 0)
        p_acc = part.acc + (((i_b * splits + o_s) * T + i_t) * H + i_h)[:, None] * DV + o_d[None, :]
        b_acc += tl.sum(tl.load(p_acc, mask=m_s[:, None] & (o_d < DV)[None, :], other=0.0) * b_alpha[:, None], 0)
    b_norm, b_lse = _denominator(b_l, b_m, NORMALIZER)
    i_row = (i_b * T + i_t) * H + i_h
    tl.store(out + i_row * DV + o_d, (b_acc / b_norm).to(out.dtype.element_ty), mask=o_d < DV)
    tl.store(lse + i_r, b_lse)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    scale: float,
    normalizer: str = "softpick",
    num_splits: int = 0,
    config: Optional[Config] = None,
) -> Tuple[Tensor, Tensor]:
    """Attention without autograd.

    Args:
        q: [B, T, H, D]. k: [B, S, Hkv, D]. v: [B, S, Hkv, Dv]. One dtype; H a multiple of Hkv; any strides.
        visible: which keys each query sees. scale: factor of the scores.
        num_splits: parts of the keys that are computed side by side, 0 = chosen for the device when T is small.

    Returns:
        out [B, T, H, Dv] in the dtype of v; log2 of the denominators [B, H, T], float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; see `check_inputs`.
    """
    if INTERPRET and q.dtype == torch.bfloat16:
        out, lse = attention_forward(q.float(), k.float(), v.float(), visible, scale, normalizer, num_splits, config)
        return out.to(v.dtype), lse
    problem = Problem.of(q, k, v, visible, scale, normalizer)
    B, T, H = q.shape[:3]
    S, DV, G = k.shape[1], v.shape[3], problem.switches.G
    out = torch.empty(B, T, H, DV, dtype=v.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    if out.numel() == 0 or lse.numel() == 0:
        return out, lse
    pack = G > 1 and T * G <= 64 and problem.same_mask_in_all_heads
    rows = T * G if pack else T
    heads = B * H // G if pack else B * H
    splits, part = 0, None
    shared, switches = problem.arguments()

    def launch(config: Config) -> None:
        nonlocal splits, part
        tiles = triton.cdiv(rows, config.block_m)
        splits = num_splits or decode_splits(problem.target, T, S, tiles * heads, config.block_n)
        part = None
        if splits > 0:
            wide = dict(dtype=torch.float32, device=q.device)
            shapes = (B, splits, T, H, DV), (B, splits, H, T), (B, splits, H, T)
            part = Part(*(torch.empty(*shape, **wide) for shape in shapes))
        run(
            forward_kernel, (tiles * heads, max(splits, 1)), config, **shared, out=out, lse=lse, part=part,
            heads=heads, chunk_heads=problem.heads_at_once(heads, S if pack else S / G),
            C=switches._replace(
                WIDE=problem.wide, PACK=pack, SPLIT=splits > 0, BM=config.block_m, BN=config.block_n
            ),
        )  # fmt: skip

    with problem.device():
        launch(config or configuration("decode" if rows <= 16 else "forward", problem, launch))
        if splits > 0:
            run(
                combine_kernel, (B * H * T,), Config(), part=part, out=out, lse=lse, T=T, H=H, splits=splits,
                NORMALIZER=switches.NORMALIZER, DV=DV, BDV=switches.BDV, BS=16,
            )  # fmt: skip
    return out, lse
