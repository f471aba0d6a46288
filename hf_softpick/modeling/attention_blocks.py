"""How tiled attention cuts its work: blocks of queries, the keys that each can see, and what to hide inside them.

Legend: B batch, N = B * Hkv rows of work, G query heads a key head, T queries, S keys, R rows of a block, W its keys.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_reference import spread_nonfinite

BLOCK_ROWS = 64
BLOCK_ELEMENTS = 1 << 19  # scores worked on at once; about the cache share of two cores


class Hidden(NamedTuple):
    """Columns [first, last) of a block that hold scores to leave out: `mask` broadcasts to [N, R, G, last - first]."""

    first: int
    last: int
    mask: Tensor


class Block(NamedTuple):
    """Query rows [row0, row1) of the work rows [n0, n1) against keys [key0, key1)."""

    n0: int
    n1: int
    row0: int
    row1: int
    key0: int
    key1: int
    hidden: list[Hidden]


class Layout:
    """Tensors of one call in the shape the loops want; one reading of `visible` for both passes."""

    def __init__(self, query, key, value, start, end, keys, mask):
        self.batch, self.heads, self.length, self.dim = query.shape
        self.key_heads, self.value_dim = key.shape[1], value.shape[3]
        self.groups = self.heads // self.key_heads
        self.dtype = torch.float64 if torch.float64 in (query.dtype, key.dtype, value.dtype) else torch.float32
        alike = bool((start == start[:1]).all()) and bool((end == end[:1]).all())
        self.start, self.end = (start[:1], end[:1]) if alike else (start, end)
        self.mask = mask
        self.keys = None if keys is None or bool(keys.all()) else keys
        total = sum(float(x.detach().sum(dtype=self.dtype)) for x in (query, key, value))
        if not math.isfinite(total):  # an overflowing sum of finite numbers only costs time
            query, key, value = spread_nonfinite(query, key, value)
        self.query = self.rows_first(query)
        self.key, self.value = (x.to(self.dtype).flatten(0, 1) for x in (key, value))
        # For the gradient of the queries: a hidden NaN key weighs 0 there, and 0 * NaN would reach who cannot see it.
        self.finite_key = self.key if math.isfinite(total) else self.key.nan_to_num(0.0)

    def rows_first(self, x: Tensor) -> Tensor:
        """[B, H, T, E] -> [N, T, G, E] contiguous, so that a block of rows of all its heads is one matrix."""
        x = x.unflatten(1, (self.key_heads, self.groups)).transpose(2, 3).flatten(0, 1)
        return x.to(self.dtype).contiguous()

    def heads_first(self, x: Tensor) -> Tensor:
        """[N, T, G, E] -> [B, H, T, E]."""
        return x.unflatten(0, (self.batch, self.key_heads)).transpose(2, 3).flatten(1, 2)

    def blocks(self, align: int = 1, elements: int = BLOCK_ELEMENTS) -> Iterator[Block]:
        """Every block with at least one visible interval.

        Args:
            align: the first and last key of a block are rounded to multiples of it; S must be one.
            elements: scores of one block at most.
        """
        shared = self.start.shape[0] == 1 and self.keys is None and self.mask is None
        for row in [None] if shared else range(self.batch):
            first, count = (0, self.batch * self.key_heads) if row is None else (row * self.key_heads, self.key_heads)
            select = 0 if row is None or self.start.shape[0] == 1 else row
            start, end = self.start[select], self.end[select]
            keys = None if self.keys is None else self.keys[row]
            for row0, row1, low, high, full_low, full_high in _extents(start, end):
                if low >= high:
                    continue
                low, high = low // align * align, -(-high // align) * align
                hidden = self._hidden(
                    start[row0:row1], end[row0:row1], keys, row, low, high, full_low, full_high, row0
                )
                size = max(1, elements // ((row1 - row0) * self.groups * (high - low)))
                for n0 in range(first, first + count, size):
                    n1 = min(n0 + size, first + count)
                    part = hidden if self.mask is None else [_slice_heads(h, n0 - first, n1 - first) for h in hidden]
                    yield Block(n0, n1, row0, row1, low, high, part)

    def _hidden(self, start, end, keys, row, low, high, full_low, full_high, row0) -> list[Hidden]:
        column = torch.arange(low, high, device=start.device)
        hidden = []
        if full_low > low:
            stop = min(full_low, high)
            hidden.append(Hidden(0, stop - low, (column[: stop - low] < start[:, None])[None, :, None]))
        if full_high < high:
            first = max(full_high, low)
            hidden.append(Hidden(first - low, high - low, (column[first - low :] >= end[:, None])[None, :, None]))
        if keys is not None and not bool(keys[low:high].all()):
            hidden.append(Hidden(0, high - low, ~keys[low:high][None, None, None]))
        if self.mask is not None:
            mask = self.mask[
                min(row, self.mask.shape[0] - 1), :, row0 : row0 + start.shape[0], low:high
            ]  # [H or 1, R, W]
            mask = mask.unflatten(0, (self.key_heads, self.groups)) if mask.shape[0] > 1 else mask[None]
            hidden.append(Hidden(0, high - low, ~mask.transpose(1, 2)))
        return hidden

    def matrix(self, x: Tensor, block: Block) -> Tensor:
        """The rows of a block of [N, T, G, E] as matrices [n, R * G, E]."""
        return x[block.n0 : block.n1, block.row0 : block.row1].flatten(1, 2)

    def hide(self, x: Tensor, block: Block, fill: float) -> None:
        """Overwrite the hidden entries of the [n, R * G, W] block `x`."""
        x = x.view(x.shape[0], block.row1 - block.row0, self.groups, x.shape[2])
        for first, last, mask in block.hidden:
            x[..., first:last].masked_fill_(mask, fill)


def _slice_heads(hidden: Hidden, n0: int, n1: int) -> Hidden:
    return hidden if hidden.mask.shape[0] == 1 else hidden._replace(mask=hidden.mask[n0:n1])


def _extents(start: Tensor, end: Tensor) -> list[tuple[int, ...]]:
    """(row0, row1, lowest start, highest end, highest start, lowest end) of each block of queries, on the host."""
    if start.shape[0] == 0:
        return []
    edges = range(0, start.shape[0], BLOCK_ROWS)
    rows = [
        torch.stack([s.amin(), e.amax(), s.amax(), e.amin()])
        for s, e in zip(start.split(BLOCK_ROWS), end.split(BLOCK_ROWS), strict=True)
    ]
    extents = torch.stack(rows).tolist()
    return [(r, min(r + BLOCK_ROWS, start.shape[0]), *extent) for r, extent in zip(edges, extents, strict=True)]
