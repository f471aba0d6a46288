"""Forward attention: one kernel for prefill and for decoding split over keys, and the kernel that joins the splits."""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl

from .launch import INTERPRET, Problem
from .tiles import (
    LOWEST,
    SOFTPICK_EPS,
    aligned,
    hidden_score,
    inside,
    key_range,
    load_tile,
    longest_first,
    rectify,
    split_range,
    visible_interval,
)
from .tuning import Config, configuration, decode_splits
from .visibility import Visible

_INTEGERS = [
    "B", "T", "S", "H", "tiles", "heads", "chunk_heads", "offset", "left", "right", "splits",
    "sq_b", "sq_t", "sq_h", "sk_b", "sk_t", "sk_h", "sv_b", "sv_t", "sv_h",
    "srow_b", "skey_b", "sm_b", "sm_h", "sm_t",
]  # fmt: skip


@triton.jit
def _attend(
    b_q, b_acc, b_l, b_m, k, v, keys, mask, b_start, b_end, o_t, m_t, lo, hi, scale, sk_t, sv_t, sm_t,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    NORMALIZER: tl.constexpr, HAS_KEYS: tl.constexpr, HAS_MASK: tl.constexpr, NEGATE: tl.constexpr,
    PRECISION: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add the keys lo <= j < hi to the sums of a tile of queries.

    MASKED: some query of the tile may not see some of these keys. EXACT: a NaN in a value reaches only the queries
    that see it; without it, every query of the tile, because 0 * NaN is NaN in the product with the values.
    """
    o_tile = tl.arange(0, BN)
    for n0 in tl.range(lo, hi, BN):
        o_n = n0 + o_tile
        m_n = o_n < hi
        b_k = load_tile(k, n0, o_tile, sk_t, m_n, D, BD, MASKED, WIDE)
        # [BM, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if NEGATE:
            b_s = -b_s
        if NORMALIZER == "rectified_softmax":
            b_s = tl.where(b_s < 0, float("-inf"), b_s)
        b_v = load_tile(v, n0, o_tile, sv_t, m_n, DV, BDV, MASKED, WIDE)
        if EXACT:
            b_bad = (b_v != b_v) | (tl.abs(b_v) == float("inf"))
            b_v = tl.where(b_bad, 0.0, b_v)
            b_s = tl.where((tl.max(b_bad.to(tl.int32), 1) > 0)[None, :], float("nan"), b_s)
        if MASKED:
            b_s = tl.where(inside(o_n[None, :], b_start[:, None], b_end[:, None]), b_s, hidden_score(NORMALIZER))
        if HAS_KEYS:
            b_seen = tl.load(keys + o_n, mask=m_n, other=0) if MASKED else tl.load(keys + o_n)
            b_s = tl.where((b_seen != 0)[None, :], b_s, hidden_score(NORMALIZER))
        if HAS_MASK:
            p_mask = mask + (o_t * sm_t)[:, None] + aligned(o_n)[None, :]
            b_seen = tl.load(p_mask, mask=(m_t[:, None] & m_n[None, :]) if MASKED else m_t[:, None], other=0)
            b_s = tl.where(b_seen != 0, b_s, hidden_score(NORMALIZER))
        # A whole number: scaling by 2^-m is then exact, and so is a weight of 0 for a score of 0.
        b_m_new = tl.maximum(b_m, tl.ceil(tl.max(b_s, 1) * scale))
        b_alpha = tl.math.exp2(b_m - b_m_new)
        b_p = tl.math.exp2(b_s * scale - b_m_new[:, None])
        if NORMALIZER == "softpick":
            b_p = b_p - tl.math.exp2(-b_m_new)[:, None]
            b_l = b_l * b_alpha + tl.sum(tl.abs(b_p), 1)
            b_w = rectify(b_p, b_v.dtype, RELU)
        else:
            b_l = b_l * b_alpha + tl.sum(b_p, 1)
            b_w = b_p.to(b_v.dtype)
        b_acc = tl.dot(b_w, b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
        b_m = b_m_new
    return b_acc, b_l, b_m


@triton.jit(do_not_specialize=_INTEGERS)
def forward_kernel(
    q, k, v, out, m, part_l, start, end, keys, mask, scale,
    B, T, S, H, tiles, heads, chunk_heads, offset, left, right, splits,
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h, sv_b, sv_t, sv_h, srow_b, skey_b, sm_b, sm_h, sm_t,
    UNIT: tl.constexpr, MASK_UNIT: tl.constexpr, G: tl.constexpr, PACK: tl.constexpr, SPLIT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    NORMALIZER: tl.constexpr, ROWS: tl.constexpr, LEFT: tl.constexpr, HAS_KEYS: tl.constexpr, HAS_MASK: tl.constexpr,
    NEGATE: tl.constexpr, PRECISION: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Output and log2 denominator of BM queries of one head; PACK: of BM / G queries of the G heads of a key head.

    SPLIT: out, m and l are acc, m and l of one part of the keys, to be joined by `combine_kernel`.
    """
    i_bh, i_m = longest_first(tiles, heads, chunk_heads)
    i_split = tl.program_id(1)

    o_r = i_m * BM + tl.arange(0, BM)
    if PACK:
        rows = H // G
        i_b = (i_bh // rows).to(tl.int64)
        i_hk = (i_bh % rows).to(tl.int64)
        o_t = o_r // G
        o_h = i_hk * G + o_r % G
    else:
        i_b = (i_bh // H).to(tl.int64)
        i_hk = (i_bh % H // G).to(tl.int64)
        o_t = o_r
        o_h = (i_bh % H).to(tl.int64) + tl.zeros([BM], tl.int64)
    m_t = o_t < T
    q += i_b * sq_b * UNIT
    k += (i_b * sk_b + i_hk * sk_h) * UNIT
    v += (i_b * sv_b + i_hk * sv_h) * UNIT
    if PACK:
        o_d = tl.arange(0, BD)
        p_q = q + (o_t.to(tl.int64) * sq_t + o_h * sq_h)[:, None] * UNIT + o_d[None, :]
        b_q = tl.load(p_q, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)
    else:
        p_q = q + (i_bh % H).to(tl.int64) * sq_h * UNIT
        b_q = load_tile(p_q, i_m * BM, tl.arange(0, BM), sq_t * UNIT, m_t, D, BD, True, WIDE)
    if HAS_KEYS:
        keys += i_b * skey_b
    if HAS_MASK:
        mask += i_b * sm_b * MASK_UNIT
        if not PACK:
            mask += (i_bh % H).to(tl.int64) * sm_h * MASK_UNIT
        sm_t = sm_t.to(tl.int64) * MASK_UNIT
    if ROWS == "given":
        start += i_b * srow_b
        end += i_b * srow_b

    b_start, b_end = visible_interval(start, end, o_t, T, S, offset, left, right, ROWS, LEFT)
    lo, hi, inner_lo, inner_hi = key_range(b_start, b_end, m_t)
    if HAS_MASK:
        lo = lo // BN * BN  # For `aligned`.
    if SPLIT:
        part = tl.cdiv(tl.cdiv(hi - lo, splits), BN) * BN
        lo = tl.minimum(lo + i_split * part, hi)
        hi = tl.minimum(lo + part, hi)
        b_end = tl.minimum(b_end, hi)
    full_lo, full_hi = split_range(lo, hi, inner_lo, inner_hi, BN)

    b_m = tl.zeros([BM], tl.float32)
    if NORMALIZER == "softmax":
        b_m += LOWEST
    b_l = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BDV], tl.float32)
    sk_t = sk_t * UNIT
    sv_t = sv_t * UNIT
    # Where a mask is needed tiles are half as wide, for the sake of registers.
    for i_phase in tl.static_range(3):
        if LEFT or i_phase > 0:
            b_acc, b_l, b_m = _attend(
                b_q, b_acc, b_l, b_m, k, v, keys, mask, b_start, b_end, o_t, m_t,
                lo if i_phase == 0 else full_lo if i_phase == 1 else full_hi,
                full_lo if i_phase == 0 else full_hi if i_phase == 1 else hi,
                scale, sk_t, sv_t, sm_t, D, DV, BM, BN if i_phase == 1 else max(BN // 2, 16), BD, BDV,
                NORMALIZER, HAS_KEYS, HAS_MASK, NEGATE, PRECISION, RELU, WIDE, i_phase != 1, False,
            )  # fmt: skip
    # NaN in a finite row came from a value; once more, in narrow tiles that need
    # few registers, so that it reaches no query that does not see it.
    if tl.max(tl.max(((b_acc != b_acc) & (b_l == b_l)[:, None]).to(tl.int32), 1), 0) > 0:
        b_m = tl.zeros([BM], tl.float32)
        if NORMALIZER == "softmax":
            b_m += LOWEST
        b_acc, b_l, b_m = _attend(
            b_q, tl.zeros([BM, BDV], tl.float32), tl.zeros([BM], tl.float32), b_m,
            k, v, keys, mask, b_start, b_end, o_t, m_t, lo, hi, scale, sk_t, sv_t, sm_t,
            D, DV, BM, 16, BD, BDV, NORMALIZER, HAS_KEYS, HAS_MASK, NEGATE, PRECISION, RELU, WIDE,
            True, True,
        )  # fmt: skip

    o_d = tl.arange(0, BDV)
    i_sb = i_split * B + i_b
    p_out = out + (((i_sb * T + o_t) * H + o_h) * DV)[:, None] + o_d[None, :]
    p_m = (i_sb * H + o_h) * T + o_t
    m_out = m_t[:, None] & (o_d < DV)[None, :]
    if SPLIT:
        tl.store(p_out, b_acc, mask=m_out)
        tl.store(m + p_m, b_m, mask=m_t)
        tl.store(part_l + p_m, b_l, mask=m_t)
    else:
        b_norm, b_lse = _denominator(b_l, b_m, NORMALIZER)
        tl.store(p_out, (b_acc / b_norm[:, None]).to(out.dtype.element_ty), mask=m_out)
        tl.store(m + p_m, b_lse, mask=m_t)


@triton.jit
def _denominator(b_l, b_m, NORMALIZER: tl.constexpr):
    """The denominator of rows shifted by b_m, and log2 of the unshifted one. A row without keys divides
    by 1; softmax gives it +inf, as flash_attn does, so that its weights are 0 in the backward."""
    if NORMALIZER == "softpick":
        b_norm = b_l + SOFTPICK_EPS * tl.math.exp2(-b_m)
        b_lse = b_m + tl.math.log2(b_norm)
    else:
        b_norm = tl.where(b_l == 0, 1.0, b_l)
        b_lse = tl.where(b_l == 0, float("inf"), b_m + tl.math.log2(b_norm))
    return b_norm, b_lse


@triton.jit(do_not_specialize=["B", "T", "H", "splits"])
def combine_kernel(
    acc, m, part_l, out, lse, B, T, H, splits,
    DV: tl.constexpr, BDV: tl.constexpr, BS: tl.constexpr, NORMALIZER: tl.constexpr,
):  # fmt: skip
    """Join the sums over the parts of the keys of one query: linear, once all are shifted by one m."""
    i_r = tl.program_id(0).to(tl.int64)
    i_t, i_bh = i_r % T, i_r // T
    i_b, i_h = i_bh // H, i_bh % H
    o_d = tl.arange(0, BDV)
    rows = B.to(tl.int64) * H * T
    b_m = tl.load(m + i_r)
    for s0 in range(0, splits, BS):
        o_s = s0 + tl.arange(0, BS)
        b_m = tl.maximum(b_m, tl.max(tl.load(m + o_s * rows + i_r, mask=o_s < splits, other=LOWEST), 0))
    b_l = 0.0
    b_acc = tl.zeros([BDV], tl.float32)
    for s0 in range(0, splits, BS):
        o_s = s0 + tl.arange(0, BS)
        m_s = o_s < splits
        b_alpha = tl.math.exp2(tl.load(m + o_s * rows + i_r, mask=m_s, other=LOWEST) - b_m)
        b_alpha = tl.where(m_s, b_alpha, 0.0)
        b_l += tl.sum(tl.load(part_l + o_s * rows + i_r, mask=m_s, other=0.0) * b_alpha, 0)
        p_acc = acc + (((o_s * B + i_b) * T + i_t) * H + i_h)[:, None] * DV + o_d[None, :]
        b_acc_s = tl.load(p_acc, mask=m_s[:, None] & (o_d < DV)[None, :], other=0.0)
        b_acc += tl.sum(b_acc_s * b_alpha[:, None], 0)
    b_norm, b_lse = _denominator(b_l, b_m, NORMALIZER)
    i_row = (i_b * T + i_t) * H + i_h
    tl.store(out + i_row * DV + o_d, (b_acc / b_norm).to(out.dtype.element_ty), mask=o_d < DV)
    tl.store(lse + i_r, b_lse)


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: Visible,
    scale: float,
    normalizer: str = "softpick",
    num_splits: int = 0,
    config: Optional[Config] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
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
    S, DV, G = k.shape[1], v.shape[3], problem.flags["G"]
    out = torch.empty(B, T, H, DV, dtype=v.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    if out.numel() == 0 or lse.numel() == 0:
        return out, lse
    pack = G > 1 and T * G <= 64 and problem.same_mask_in_all_heads
    rows = T * G if pack else T
    heads = B * H // G if pack else B * H
    splits, parts = 0, (out, lse, None)
    kind = "decode" if rows <= 16 else "forward"

    def launch(config: Config) -> None:
        nonlocal splits, parts
        tiles = triton.cdiv(rows, config.block_m)
        parts = (out, lse, None)
        splits = num_splits or decode_splits(problem.target, T, S, tiles * heads, config.block_n)
        if splits > 0:
            empty = dict(dtype=torch.float32, device=q.device)
            parts = (
                torch.empty(splits, B, T, H, DV, **empty),
                torch.empty(splits, B, H, T, **empty),
                torch.empty(splits, B, H, T, **empty),
            )
        forward_kernel[(tiles * heads, max(splits, 1))](
            problem.q, problem.k, problem.v, *parts, **problem.rows, **problem.numbers, **problem.strides(),
            scale=problem.scale, tiles=tiles, heads=heads,
            chunk_heads=problem.heads_at_once(heads, S if pack else S / G), splits=max(splits, 1), **problem.flags,
            WIDE=problem.wide, PACK=pack, SPLIT=splits > 0, BM=config.block_m, BN=config.block_n, **config.launch(),
        )  # fmt: skip

    with problem.device():
        launch(config or configuration(kind, problem, launch))
        if splits > 0:
            combine_kernel[(B * H * T,)](
                *parts, out, lse, B, T, H, splits, DV=DV, BDV=problem.flags["BDV"], BS=16, NORMALIZER=normalizer,
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out, lse
