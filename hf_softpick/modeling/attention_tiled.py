"""Attention over blocks of queries in plain PyTorch: linear memory, forward and backward, any device and normalizer.

Legend: B batch, N = B * Hkv rows of work, G query heads a key head, T queries, S keys, R rows of a block, W its keys.
Scores are kept in log2 units (exp2 is the fast exponential). Both passes are opaque operators, so that torch.compile
neither unrolls the loops nor materialises a mask.
"""

import math
from typing import Optional

import torch
from torch import Tensor

from .attention_blocks import Block, Layout
from .attention_eager import dense_attention
from .attention_inputs import OPERATORS, check_inputs, explicit_mask
from .compat import decomposition
from .normalizers import NORMALIZERS, Normalizer, base_normalizer
from .visibility import VisibleKeys

LOG2E = 1.0 / math.log(2.0)
# Rows are shifted by their maximum only beyond 2^40: below it nothing can overflow in float32, and a pass is saved.
SHIFT_LIMIT = 40.0
# Rows that stay below it in log2 units take expm1, three times as slow: 2^x - 1 keeps few digits of a score near 0.
NEAR_ZERO = 2.0**-4


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: VisibleKeys | Tensor,
    scale: float,
    normalizer: str = "softpick",
) -> Tensor:
    """Attention in memory linear in T and S.

    Args:
        query: [B, H, T, D]; for scaled_* already multiplied by s_h * log(n_i).
        key: [B, Hkv, S, D]. value: [B, Hkv, S, Dv]. Any floating dtype, computed in float32 (float64 stays float64);
            H a multiple of Hkv.
        visible: intervals of keys, or a bool mask broadcastable to [B, H, T, S] (True = visible).
        scale: factor of the scores, usually D ** -0.5.

    Returns:
        [B, T, H, Dv] in the dtype of `value`. Differentiable once, in query, key and value.

    Raises:
        ValueError: shapes do not fit, the mask is not boolean, or the normalizer is unknown.
    """
    kind = base_normalizer(normalizer)
    check_inputs(query, key, value, visible)
    if isinstance(visible, VisibleKeys):
        start, end = visible.intervals(query.shape[2], key.shape[2], query.device)
        return _forward(query, key, value, start, end, visible.keys, None, scale, kind)[0]
    mask = explicit_mask(visible, query, key)
    start = torch.zeros(1, query.shape[2], dtype=torch.int64, device=query.device)
    return _forward(query, key, value, start, start + key.shape[2], None, mask, scale, kind)[0]


def _scores(layout: Layout, query: Tensor, block: Block, normalizer: Normalizer, out: Tensor) -> Tensor:
    """[n, R * G, W] scores in log2 units; hidden ones hold the score that adds nothing."""
    rows = layout.matrix(query, block)
    keys = layout.key[block.n0 : block.n1, block.key0 : block.key1]
    x = _view(out, rows.shape[0], rows.shape[1], keys.shape[1])
    torch.bmm(rows, keys.transpose(1, 2), out=x)
    if normalizer.rectified:
        torch.nn.functional.threshold_(x, -torch.finfo(x.dtype).tiny, float("-inf"))
    layout.hide(x, block, normalizer.hidden_score)
    return x


def _view(buffer: Tensor, *shape: int) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


def row_shift(m: Tensor, normalizer: Normalizer) -> Tensor | None:
    """What rows [..., R, 1] whose largest score in log2 units is `m` are shifted by, None where none needs it.

    Row by row, so no row depends on another. A constant in the denominator keeps rows of low scores off 0, and would
    overflow if they were shifted upward.
    """
    far = m > SHIFT_LIMIT if normalizer.constant else (m.abs() > SHIFT_LIMIT) & m.isfinite()
    # A whole number, whose exp2 is exact in a SIMD and in a scalar loop alike, so that a score of 0 weighs exactly 0.
    return torch.where(far, m.ceil(), 0.0) if bool(far.any()) else None


def subtract_one(x: Tensor, shift: Tensor | None, out: Tensor) -> Tensor:
    """With `minus_one`: 2^(score - shift) - 2^-shift from x = 2^(score - shift), into `out`, before the relu."""
    return torch.sub(x, 1.0 if shift is None else torch.exp2(-shift), out=out)


def _exact_numerators(x: Tensor, near: Tensor, normalizer: Normalizer) -> Tensor | None:
    """e^score - 1 of the rows of [n, R, W] scores in log2 units that are `near` 0, [rows, W]; None if there is none.

    Row by row, as `row_shift`.
    """
    return torch.expm1(x[near] * math.log(2)) if normalizer.minus_one and bool(near.any()) else None


@torch.library.custom_op(f"{OPERATORS}::tiled_forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    keys: Optional[Tensor],  # noqa: UP045 -- the schema parser of torch 2.11 wants Optional
    mask: Optional[Tensor],  # noqa: UP045
    scale: float,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, Dv] and log2 of the denominator [B, H, T]."""
    normalizer = NORMALIZERS[kind]
    layout = Layout(query, key, value, start, end, keys, mask)
    scaled = layout.query * (scale * LOG2E)
    out = scaled.new_zeros(*scaled.shape[:3], layout.value_dim)
    lse = scaled.new_zeros(scaled.shape[:3])
    if normalizer.constant:
        lse.fill_(math.log2(normalizer.constant))
    buffer = None
    for block in layout.blocks():
        buffer = _buffer(buffer, block, layout, 1)
        x = _scores(layout, scaled, block, normalizer, buffer[0])
        m = x.amax(-1, keepdim=True)
        shift = row_shift(m, normalizer)
        near = ((m > 0) & (m < NEAR_ZERO))[..., 0]
        exact = _exact_numerators(x, near, normalizer)
        if shift is not None:
            x.sub_(shift)
        x.exp2_()
        if normalizer.minus_one:
            p = subtract_one(x, shift, x)
            if exact is not None:
                p[near] = exact
            signed = p.sum(-1, keepdim=True)
            torch.relu_(p)
            # sum |p| without another pass: the positive part counted twice, less the whole
            l = 2 * p.sum(-1, keepdim=True) - signed
        else:
            p, l = x, x.sum(-1, keepdim=True)
        if normalizer.constant:
            l += normalizer.constant if shift is None else normalizer.constant * torch.exp2(-shift)
        else:
            l = torch.where(l == 0, 1.0, l)
        rows = slice(block.n0, block.n1), slice(block.row0, block.row1)
        acc = torch.bmm(p, layout.value[block.n0 : block.n1, block.key0 : block.key1])
        out[rows] = acc.div_(l).unflatten(1, (-1, layout.groups))
        log_l = l.log2_() if shift is None else l.log2_() + shift
        lse[rows] = log_l.view(log_l.shape[0], -1, layout.groups)
    out = layout.heads_first(out).transpose(1, 2).to(value.dtype).contiguous()
    return out, layout.heads_first(lse[..., None])[..., 0].contiguous()


@_forward.register_fake
def _(query, key, value, start, end, keys, mask, scale, kind):
    batch, heads, length, _ = query.shape
    dtype = torch.float64 if torch.float64 in (query.dtype, key.dtype, value.dtype) else torch.float32
    out = value.new_empty(batch, length, heads, value.shape[3])
    return out, query.new_empty(batch, heads, length, dtype=dtype)


@torch.library.custom_op(f"{OPERATORS}::tiled_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor,
    end: Tensor,
    keys: Optional[Tensor],  # noqa: UP045
    mask: Optional[Tensor],  # noqa: UP045
    scale: float,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `Normalizer` has the formula."""
    normalizer = NORMALIZERS[kind]
    layout = Layout(query, key, value, start, end, keys, mask)
    scaled = layout.query * (scale * LOG2E)
    lse = layout.rows_first(lse[..., None])
    grad = layout.rows_first(grad.transpose(1, 2))
    delta = (grad * layout.rows_first(out.transpose(1, 2))).sum(-1, keepdim=True)
    shift_all = row_shift(lse, normalizer)
    near_all = lse < math.log2(NEAR_ZERO)
    # Dividing the rows of grad by the denominator spares dividing the T x S weights.
    factor = torch.exp2(-lse if shift_all is None else shift_all - lse)
    grad, delta = grad * factor, delta * factor
    dq, dk, dv = (x.new_zeros(x.shape) for x in (scaled, layout.key, layout.value))
    buffer = None
    for block in layout.blocks():
        buffer = _buffer(buffer, block, layout, 3)
        x = _scores(layout, scaled, block, normalizer, buffer[0])
        shift = None if shift_all is None else layout.matrix(shift_all, block)
        near = layout.matrix(near_all, block)[..., 0]
        exact = _exact_numerators(x, near, normalizer)
        block_grad, block_delta = layout.matrix(grad, block), layout.matrix(delta, block)
        block_dk, block_dv = (d[block.n0 : block.n1, block.key0 : block.key1] for d in (dk, dv))
        values = layout.value[block.n0 : block.n1, block.key0 : block.key1]
        dx = torch.bmm(block_grad, values.transpose(1, 2), out=_view(buffer[1], *x.shape))
        if normalizer.minus_one:
            # dp - delta where the score is positive, delta elsewhere: mask dp - 2 delta, then add delta everywhere.
            # The score says its sign; 2^x - 1 is 0 for small ones.
            torch.ops.aten.threshold_backward.grad_input(dx.sub_(2 * block_delta), x, 0.0, grad_input=dx)
        if shift is not None:
            x.sub_(shift)
        x.exp2_()
        if normalizer.minus_one:
            p = subtract_one(x, shift, _view(buffer[2], *x.shape))
            if exact is not None:
                p[near] = exact
            block_dv.baddbmm_(torch.relu_(p).transpose(1, 2), block_grad)
            layout.hide(x, block, 0.0)
            dx.add_(block_delta).mul_(x)
        else:
            block_dv.baddbmm_(x.transpose(1, 2), block_grad)
            dx.sub_(block_delta).mul_(x)
        keys_ = layout.finite_key[block.n0 : block.n1, block.key0 : block.key1]
        dq[block.n0 : block.n1, block.row0 : block.row1] = torch.bmm(dx, keys_).unflatten(1, (-1, layout.groups))
        block_dk.baddbmm_(dx.transpose(1, 2), layout.matrix(scaled, block))
    return (
        layout.heads_first(dq.mul_(scale)).to(query.dtype).contiguous(),
        dk.div_(LOG2E).view(key.shape).to(key.dtype),
        dv.view(value.shape).to(value.dtype),
    )


def _buffer(buffer: Tensor | None, block: Block, layout: Layout, count: int) -> Tensor:
    """`count` rows of scratch for the scores of a block, grown only when a block needs more."""
    size = (block.n1 - block.n0) * (block.row1 - block.row0) * layout.groups * (block.key1 - block.key0)
    if buffer is None or buffer.shape[1] < size:
        buffer = torch.empty(count, size, dtype=layout.dtype, device=layout.query.device)
    return buffer


@_backward.register_fake
def _(grad, query, key, value, out, lse, start, end, keys, mask, scale, kind):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.kind = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad: Tensor | None, grad_lse: Tensor | None):
    if grad is None:
        return (None,) * 9
    query, key, value, out, lse, *visible = ctx.saved_tensors
    gradients = _backward(grad, query, key, value, out, lse, *visible, ctx.scale, ctx.kind)
    return (*gradients, None, None, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


@decomposition(_forward)
def _dense_forward(query, key, value, start, end, keys, mask, scale, kind):
    """The forward pass for formats that know none of our operators: torch's ONNX exporter takes it from this table.

    The denominator, which only a backward pass reads, is not computed.
    """
    visible = VisibleKeys(start, end, keys) if mask is None else mask
    out, _ = dense_attention(query, key, value, visible, scale, kind)
    return out, query.new_full(query.shape[:3], float("nan"))
