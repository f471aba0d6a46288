"""What forward and backward do alike with a tile of scores: which keys a query sees, loading, scoring, weighting.

Legend, in all Triton files: B batch, T queries, S keys, H query heads, G query heads a key head, D and DV head
dimensions, BM, BN, BD, BDV sizes of tiles. i_ index, o_ offsets, p_ pointers, m_ mask, b_ value of a tile. `C` are the
compile-time `Switches` of a call, `seen` its tensors of visibility, `at` where a program's row begins in them; x_b,
x_t, x_h are strides in units of C.UNIT elements.
Scores are raw products q.k until they meet `scale` = |scale| * log2(e), so that exp2 is the only exponential.
"""

import triton
import triton.language as tl

# Larger than any index, small enough to be added to one.
FAR = tl.constexpr(1 << 30)


@triton.jit
def place_in(i_b, i_h, S, row_b, mask_b, mask_h, mask_t, C: tl.constexpr):
    """`at`: where one head of one row of the batch begins in start and end, keys, and mask; and a step of the mask."""
    mask = (i_b * mask_b + i_h * mask_h) * C.MASK_UNIT
    return i_b * row_b, i_b * S, mask, mask_t.to(tl.int64) * C.MASK_UNIT


@triton.jit
def visible_interval(seen, at, o_t, T, S, band_lo, band_hi, C: tl.constexpr):
    """Keys [first, last) that each query of a tile sees, two int32 [BM].

    C.ROWS: "all" keys; "band", from t + band_lo to before t + band_hi; "given", read from start and end. C.LEFT:
    whether there is a lower bound at all.
    """
    if C.ROWS == "given":
        b_end = tl.minimum(tl.load(seen.end + at[0] + o_t, mask=o_t < T, other=0).to(tl.int32), S)
    elif C.ROWS == "band":
        b_end = tl.minimum(o_t + band_hi, S)
    else:
        b_end = o_t * 0 + S
    if not C.LEFT:
        b_start = o_t * 0
    elif C.ROWS == "given":
        b_start = tl.maximum(tl.load(seen.start + at[0] + o_t, mask=o_t < T, other=0).to(tl.int32), 0)
    else:
        b_start = tl.maximum(o_t + band_lo, 0)
    return b_start, b_end


@triton.jit
def key_range(b_start, b_end, m_t):
    """Of a tile of queries: the keys that any of them sees, and those that all of them see."""
    b_seen = m_t & (b_start < b_end)
    hi = tl.max(tl.where(b_seen, b_end, 0), 0)
    lo = tl.minimum(tl.min(tl.where(b_seen, b_start, FAR), 0), hi)
    inner_lo = tl.max(tl.where(m_t, b_start, 0), 0)
    inner_hi = tl.min(tl.where(m_t, b_end, FAR), 0)
    return lo, hi, inner_lo, inner_hi


@triton.jit
def split_range(lo, hi, inner_lo, inner_hi, BLOCK: tl.constexpr):
    """Where, in steps of BLOCK from lo, the blocks that need no mask begin and end."""
    full_lo = tl.minimum(lo + tl.cdiv(tl.maximum(inner_lo - lo, 0), BLOCK) * BLOCK, hi)
    full_hi = full_lo + tl.maximum(tl.minimum(inner_hi, hi) - full_lo, 0) // BLOCK * BLOCK
    return full_lo, full_hi


@triton.jit
def inside(b_index, b_start, b_end):
    """start <= index < end in one comparison, as unsigned numbers; the three broadcast."""
    return (b_index - b_start).to(tl.uint32) < tl.maximum(b_end - b_start, 0).to(tl.uint32)


@triton.jit
def load_tile(
    base, row, o_row, stride, m_row, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr
):
    """[rows, BD] of a matrix from `row` on, with `stride` elements between rows; what lies outside is 0.

    WIDE: 64-bit offsets in the tile, not only for its start. Fewer instructions without; the backward spills then.
    """
    o_d = tl.arange(0, BD)
    if WIDE:
        p_tile = base + ((row + o_row).to(tl.int64) * stride)[:, None] + o_d[None, :]
    else:
        p_tile = base + tl.cast(row, tl.int64) * stride + ((o_row * tl.cast(stride, tl.int32))[:, None] + o_d[None, :])
    if MASKED:
        if D == BD:
            b_tile = tl.load(p_tile, mask=m_row[:, None], other=0.0)
        else:
            b_tile = tl.load(p_tile, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    elif D == BD:
        b_tile = tl.load(p_tile)
    else:
        b_tile = tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)
    return b_tile


@triton.jit
def aligned(o_n):
    """Columns of a dense mask, which are loaded many at once: tiles begin at multiples of 16 where there is one."""
    return tl.max_contiguous(tl.multiple_of(o_n, 16), 16)


@triton.jit
def scores(b_rows, b_columns, C: tl.constexpr):
    """Products of two tiles, with the sign of the scale, and -inf where a score hides its key."""
    b_s = tl.dot(b_rows, tl.trans(b_columns), input_precision=C.PRECISION)
    if C.NEGATE:
        b_s = -b_s
    if C.NORMALIZER.HIDE_NEGATIVE:
        b_s = tl.where(b_s < 0, float("-inf"), b_s)
    return b_s


@triton.jit
def weights(b_p, dtype: tl.constexpr, C: tl.constexpr):
    """Numerators in `dtype`: max(p, 0) if one was subtracted, NaN where p is, else p.

    C.RELU lets the conversion do it (sm_80 and later), an instruction less.
    """
    if not C.NORMALIZER.MINUS_ONE:
        b_w = b_p.to(dtype)
    elif C.RELU and dtype == tl.bfloat16:
        b_w = tl.inline_asm_elementwise(
            "cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,r,r", [b_p], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif C.RELU and dtype == tl.float16:
        b_w = tl.inline_asm_elementwise(
            "cvt.rn.relu.f16x2.f32 $0, $2, $1;", "=r,r,r", [b_p], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        b_w = tl.maximum(b_p, 0.0, propagate_nan=tl.PropagateNan.ALL).to(dtype)
    return b_w


@triton.jit
def score_gradient(b_s, b_e, b_dp, b_delta, C: tl.constexpr):
    """Gradient of the scores; b_e = exp(score - log denominator), b_delta = <o, do>, broadcastable to the tile."""
    if C.NORMALIZER.MINUS_ONE:
        b_ds = b_e * tl.where(b_s > 0, b_dp - b_delta, b_delta)
    elif C.NORMALIZER.HIDE_NEGATIVE:
        b_ds = tl.where(b_s < 0, 0.0, b_e * (b_dp - b_delta))
    else:
        b_ds = b_e * (b_dp - b_delta)
    return b_ds


@triton.jit
def longest_first(tiles, heads, chunk_heads):
    """Head and tile of a program.

    The last tiles, which see most keys, come first in all heads, so that no processor is left with a long one;
    `chunk_heads` heads at a time share the level-2 cache.
    """
    pid = tl.program_id(0)
    first = pid // (chunk_heads * tiles) * chunk_heads
    width = tl.minimum(heads - first, chunk_heads)
    rest = pid - first * tiles
    return first + rest % width, tiles - 1 - rest // width
