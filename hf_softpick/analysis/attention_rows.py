"""What attention weights look like, row by row and key by key, without ever holding a T x T map.

The scores are computed once more in blocks of 64 queries, reduced at once, and forgotten: memory linear in T, except
for one number a 64 x 64 tile. Legend: B batch, H heads, T queries and keys, N = B * H, R rows of a block, W its keys.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_softpick.modeling.attention_blocks import BLOCK_ELEMENTS, BLOCK_ROWS, Block, Layout
from hf_softpick.modeling.attention_inputs import explicit_mask
from hf_softpick.modeling.attention_tiled import LOG2E, row_shift, subtract_one
from hf_softpick.modeling.normalizers import Normalizer, describe_normalizer
from hf_softpick.modeling.visibility import VisibleKeys

TILE = BLOCK_ROWS
GPU_ELEMENTS = 1 << 25
FAR = 1e30
SMALL = 1e-5
"""Threshold of the ancestor's sparsity (flame, `sparsity_rate_per_layer.py`)."""


class AttentionCall(NamedTuple):
    """What one layer's attention was called with.

    query: [B, H, T, D], for scaled_* already multiplied. key: [B, Hkv, T, D]. visible: intervals of keys, or a bool
    mask that broadcasts to [B, H, T, T]. scale: factor of the scores. softcap: scores become c * tanh(score / c).
    sinks: [H] logits that only the denominator sees.
    """

    query: Tensor
    key: Tensor
    visible: VisibleKeys | Tensor
    scale: float
    normalizer: str
    softcap: float | None = None
    sinks: Tensor | None = None


class AttentionRows(NamedTuple):
    """Reductions of the weights w [B, H, T, T]; float32, or float64 where queries or keys are.

    mass: [B, H, T], sum_j w_ij. entropy: [B, H, T], of w_i / mass_i in nats; 0 for a row without mass.
    positive, above: [B, H, T], how many weights exceed 0 and SMALL. received: [B, H, T], sum_i w_ij of each key.
    visible: [B or 1, H or 1, T], keys that each query sees. seen: [B or 1, H or 1, T], queries that see each key.
    tiles, empty_tiles: [2, H], 64 x 64 and 128 x 128 tiles with a visible score, and those among them where no visible
    score is positive.
    """

    mass: Tensor
    entropy: Tensor
    positive: Tensor
    above: Tensor
    received: Tensor
    visible: Tensor
    seen: Tensor
    tiles: Tensor
    empty_tiles: Tensor


@torch.no_grad()
def attention_rows(call: AttentionCall, real: Tensor | None = None) -> AttentionRows:
    """Reduce the weights of one call.

    Args:
        real: bool [B, T], False for queries that are padding; their rows count as if they saw nothing.

    Raises:
        ValueError: queries and keys are not of one length (a cache), or the normalizer is unknown.
    """
    batch, heads, length, _ = call.query.shape
    if call.key.shape[2] != length:
        raise ValueError(
            f"{length} queries and {call.key.shape[2]} keys: statistics need a forward pass without a cache. Pass "
            "use_cache=False."
        )
    normalizer = describe_normalizer(call.normalizer)
    with torch.autocast(call.query.device.type, enabled=False):
        layout, visible, seen = _layout(call, real)
        query = layout.query * (call.scale * LOG2E)
        shape = query.shape[:2]
        mass, entropy, positive, above = (query.new_zeros(shape) for _ in range(4))
        received = query.new_zeros(layout.key.shape[:2])
        edges = -(-length // TILE)
        largest = query.new_full((shape[0], edges, layout.key.shape[1] // TILE), -math.inf)
        sinks = None if call.sinks is None else (call.sinks.to(query.dtype) * LOG2E).repeat(batch)[:, None, None]
        scratch: list[Tensor] = []
        for block in layout.blocks(TILE, GPU_ELEMENTS if query.is_cuda else BLOCK_ELEMENTS):
            reduced = _reduce(layout, query, block, normalizer, call.softcap, sinks, scratch)
            rows = slice(block.n0, block.n1), slice(block.row0, block.row1)
            keys = slice(block.n0, block.n1), slice(block.key0, block.key1)
            mass[rows], entropy[rows], positive[rows], above[rows] = (part[..., 0] for part in reduced[:4])
            received[keys] += reduced[4]
            largest[block.n0 : block.n1, block.row0 // TILE, block.key0 // TILE : block.key1 // TILE] = reduced[5]
        tiles, empty = _count_tiles(largest.unflatten(0, (batch, heads)))
    by_head = [x.unflatten(0, (batch, heads)) for x in (mass, entropy, positive, above, received[:, :length])]
    return AttentionRows(*by_head, visible, seen, tiles, empty)


def _layout(call: AttentionCall, real: Tensor | None) -> tuple[Layout, Tensor, Tensor]:
    """Blocks of one head a row of work, keys padded to whole tiles; what each query sees, and who sees each key."""
    batch, heads, length, _ = call.query.shape
    key = call.key.repeat_interleave(heads // call.key.shape[1], 1)
    padding = -length % TILE
    key = torch.nn.functional.pad(key, (0, 0, 0, padding))
    device = call.query.device
    keys = mask = None
    if isinstance(call.visible, VisibleKeys):
        start, end = (edge.long() for edge in call.visible.intervals(length, length, device))
        keys = call.visible.keys
        if real is not None:
            start, end = torch.where(real, start, 0), torch.where(real, end, 0)
        end = torch.maximum(start, end)
        visible, seen = _count_intervals(start, end, keys, length)
        if keys is not None:
            keys = torch.nn.functional.pad(keys, (0, padding))
    else:
        mask = explicit_mask(call.visible.to(device), call.query, call.key)
        if real is not None:
            mask = mask & real[:, None, :, None]
        # Intervals around what is visible: causal masks then cost half of the square, windows a band of it.
        any_head = mask.any(1)
        shown = any_head.any(-1)
        start = torch.where(shown, any_head.to(torch.uint8).argmax(-1), 0)
        end = torch.where(shown, length - any_head.flip(-1).to(torch.uint8).argmax(-1), 0)
        visible, seen = mask.sum(-1), mask.sum(-2)
        mask = torch.nn.functional.pad(mask, (0, padding))
    layout = Layout(call.query, key, key[..., :0], start.contiguous(), end.contiguous(), keys, mask)
    return layout, visible, seen


def _count_intervals(start: Tensor, end: Tensor, keys: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """Visible keys of each query and queries of each key, [B or 1, 1, T] each, from intervals and a padding mask."""
    change = start.new_zeros(start.shape[0], length + 1)
    change.scatter_add_(1, start, torch.ones_like(start)).scatter_add_(1, end, -torch.ones_like(end))
    seen = change.cumsum(-1)[:, :length]
    visible = end - start
    if keys is not None:
        before = torch.nn.functional.pad(keys.cumsum(-1), (1, 0))
        start, end = start.expand(keys.shape[0], -1), end.expand(keys.shape[0], -1)
        visible = before.gather(1, end) - before.gather(1, start)
        seen = seen * keys
    return visible[:, None], seen[:, None]


def _reduce(
    layout: Layout,
    query: Tensor,
    block: Block,
    normalizer: Normalizer,
    softcap: float | None,
    sinks: Tensor | None,
    scratch: list[Tensor],
) -> tuple[Tensor, ...]:
    """mass, entropy, positive, above [n, R, 1], received [n, W] and the largest score of each tile [n, W / 64]."""
    rows = layout.matrix(query, block)
    keys = layout.key[block.n0 : block.n1, block.key0 : block.key1]
    shape = (rows.shape[0], rows.shape[1], keys.shape[1])
    x, other = _scratch(scratch, shape, query)
    torch.bmm(rows, keys.transpose(1, 2), out=x)
    if softcap is not None:
        x.div_(softcap * LOG2E).tanh_().mul_(softcap * LOG2E)
    layout.hide(x, block, -math.inf)
    largest = x.view(*shape[:2], -1, TILE).amax(-1)  # amax keeps NaN
    m = largest.amax(-1, keepdim=True)
    if normalizer.minus_one:
        layout.hide(x, block, normalizer.hidden_score)
    if normalizer.rectified:
        torch.nn.functional.threshold_(x, -torch.finfo(x.dtype).tiny, -math.inf)
        m = torch.where(m < 0, 0.0, m)
    if sinks is not None:
        m = torch.maximum(m, sinks[block.n0 : block.n1])
    shift = row_shift(m, normalizer)
    if shift is not None:
        x.sub_(shift)
    if normalizer.minus_one:
        p = x.exp2_()
        signed = subtract_one(p, shift, p).sum(-1, keepdim=True)
        mass = p.relu_().sum(-1, keepdim=True)
        l = 2 * mass - signed
        # A zero times a very negative logarithm is still 0.
        p_log_p = torch.linalg.vecdot(torch.clamp_min(p, torch.finfo(p.dtype).tiny, out=other).log2_(), p)
    else:
        p = torch.exp2(x, out=other)
        l = mass = p.sum(-1, keepdim=True)
        # log2 p is the score itself; a hidden one has weight 0 and must be finite.
        p_log_p = torch.linalg.vecdot(x.clamp_min_(-FAR), p)
        other = x
    if sinks is not None:
        l = l + torch.exp2(sinks[block.n0 : block.n1] - (0.0 if shift is None else shift))
    if normalizer.constant:
        l = l + (normalizer.constant if shift is None else normalizer.constant * torch.exp2(-shift))
    l = torch.where(l == 0, 1.0, l)
    inverse = l.reciprocal()
    received = torch.bmm(inverse.transpose(1, 2), p)[:, 0]
    nan = 0 * l  # a comparison would turn NaN into a plain zero
    positive = torch.gt(p, 0.0, out=other).sum(-1, keepdim=True) + nan
    above = torch.gt(p, SMALL * l, out=other).sum(-1, keepdim=True) + nan
    # Entropy of w / mass: ln(sum p) - sum(p ln p) / sum p, which needs no division of the weights.
    entropy = torch.where(mass == 0, 0.0, (mass.log2() - p_log_p[..., None] / mass) / LOG2E)
    return mass * inverse, entropy, positive, above, received, largest.amax(1)


def _scratch(scratch: list[Tensor], shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """Two buffers for the scores of a block, grown only when a block needs more."""
    size = math.prod(shape)
    if not scratch or scratch[0].numel() < size:
        scratch[:] = [like.new_empty(size) for _ in range(2)]
    return tuple(buffer[:size].view(shape) for buffer in scratch)


def _count_tiles(largest: Tensor) -> tuple[Tensor, Tensor]:
    """[2, H] tiles with a visible score and those without a positive one, from the largest score of each 64 x 64 tile
    [B, H, T / 64, S / 64]."""
    tiles, empty = [], []
    for _ in range(2):
        visible = largest != -math.inf  # NaN is visible, and not empty
        tiles.append(visible.sum((0, 2, 3)))
        empty.append((visible & (largest <= 0)).sum((0, 2, 3)))
        largest = torch.nn.functional.max_pool2d(largest, 2, ceil_mode=True)  # keeps NaN
    return torch.stack(tiles), torch.stack(empty)
