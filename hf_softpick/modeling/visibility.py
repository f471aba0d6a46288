"""Which keys each query sees, in memory linear in the length: an interval a query, and a mask of padded keys.

Legend: B batch, T queries of this call, S keys (cache included). Indices count tokens of the row from 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .documents import document_begins, running_max


class VisibleKeys(NamedTuple):
    """Query t of row b sees the keys start <= j < end with keys[b, j].

    start, end: int32 [B or 1, T], indices into the key tensor; or None for plain causal rows, whose intervals follow
        from two numbers: query t sees t + offset and the keys before it, `window` in all (None = all of them).
    keys: bool [B, S] or None (no padding).
    mask: bool [B, 1 or H, T, S], which says everything by itself; or None.
    """

    start: Tensor | None = None
    end: Tensor | None = None
    keys: Tensor | None = None
    offset: int = 0
    window: int | None = None
    mask: Tensor | None = None

    # What transformers asks of an attention_mask before it calls the mask function: not 2-D, not ready either.
    ndim = 3
    shape = (0, 0, 0)

    def intervals(self, length: int, key_length: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """start and end, int32 [B or 1, T]."""
        if self.start is not None:
            return self.start, self.end
        last = torch.arange(self.offset, self.offset + length, dtype=torch.int32, device=device)[None]
        first = torch.zeros_like(last) if self.window is None else last - (self.window - 1)
        return first.clamp(0, key_length), (last + 1).clamp(0, key_length)

    def dense(self, length: int, key_length: int, device: torch.device | None = None) -> Tensor:
        """bool [B or 1, 1, T, S]: the same as an explicit mask."""
        start, end = self.intervals(length, key_length, device)
        column = torch.arange(key_length, device=start.device)
        mask = (column >= start[..., None]) & (column < end[..., None])
        if self.keys is not None:
            mask = mask & self.keys[:, None, :]
        return mask[:, None]


def visible_keys(
    query_length: int,
    key_length: int,
    device: torch.device,
    *,
    query_offset: int | Tensor = 0,
    key_offset: int = 0,
    padding_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
) -> tuple[VisibleKeys, Tensor]:
    """Causal visibility with packed documents, padding, a window and a cache.

    Args:
        query_length: T. key_length: S, the length of the key tensor (a static cache: its whole length).
        query_offset: index of the first query in the row, that is the tokens seen before this call.
        key_offset: index of the first key in the row; above 0 once a sliding-window cache has dropped keys.
        padding_mask: bool [B, tokens so far], True = a real token.
        position_ids: int [B or 1, T], position inside the document, as `documents` reads them. The first real token
            of the call belongs to a document that began that many real tokens before.
        sliding_window: a query sees itself and the sliding_window - 1 keys before it.

    Returns:
        What each query sees; and int64 [B or 1, T], real tokens from the start of the document to the query, which is
        n_i - 2 of the scaled normalizers.

    Raises:
        ValueError: `padding_mask` is shorter than the tokens seen.
    """
    query = torch.arange(query_length, device=device)[None] + query_offset
    if padding_mask is None and position_ids is None and not isinstance(query_offset, Tensor):
        return VisibleKeys(offset=query_offset - key_offset, window=sliding_window), query
    start = torch.zeros_like(query)
    rank = real = None
    if padding_mask is not None:
        _check_padding_mask(padding_mask, query_length, query_offset)
        rank = padding_mask.cumsum(-1) - 1
        real, query_rank = (x.gather(1, query.expand(rank.shape[0], -1)) for x in (padding_mask, rank))
    if position_ids is not None:
        position_ids = position_ids.to(device=device, dtype=torch.int64)
        begins = document_begins(position_ids, real)
        # The first document of the call may have begun before it: so far as its first real token says.
        if rank is None:
            back, reach = position_ids[:, :1], query[:, :1]
            first = torch.where(back < 0, 0, reach - back).clamp_min(0)
            begins = begins & (query > query_offset)
        else:
            at = real.int().argmax(-1, keepdim=True)
            back, reach = (x.expand(rank.shape[0], -1).gather(1, at) for x in (position_ids, query_rank))
            first = (rank < torch.where(back < 0, 0, reach - back)).sum(-1, keepdim=True)
            begins = begins & (real.cumsum(-1) > 1)
        start = torch.maximum(running_max(torch.where(begins, query, 0)), first)
    if rank is None:
        position = query - start
    else:
        before = rank.gather(1, start.clamp_max(rank.shape[1] - 1).expand(rank.shape[0], -1)).clamp_min(0)
        position = (query_rank - before).clamp_min(0)
    if sliding_window is not None:
        start = torch.maximum(start, query - (sliding_window - 1))
    keys = None
    if padding_mask is not None:
        # Static caches are longer than the mask; what lies behind it is hidden by `end` anyway.
        short = max(key_offset + key_length - padding_mask.shape[1], 0)
        keys = torch.nn.functional.pad(padding_mask, (0, short))[:, key_offset : key_offset + key_length]
    start, end = ((edge - key_offset).clamp(0, key_length).int() for edge in torch.broadcast_tensors(start, query + 1))
    return VisibleKeys(start, end, keys), position


def _check_padding_mask(padding_mask: Tensor, query_length: int, query_offset: int | Tensor) -> None:
    if isinstance(query_offset, Tensor):
        if torch.compiler.is_compiling():
            return  # reading the offset would break the graph
        query_offset = int(query_offset)
    needed = query_offset + query_length  # int() of a symbolic length would fix it in an exported program
    if padding_mask.shape[1] < needed:
        raise ValueError(
            f"attention_mask covers {padding_mask.shape[1]} tokens, but cache and input together hold {needed}. "
            "Pass a mask over all tokens so far, cached ones included."
        )


def check_padding(mask: Tensor) -> None:
    """Refuse a 2-D mask that holds anything but 0 and 1, for instance an additive one or the numbers of documents.

    Raises:
        ValueError: it would be read as the opposite of what it means, or its documents would see each other.
    """
    if torch.compiler.is_compiling():
        return
    wrong = ((mask != 0) & (mask != 1)).any()
    if bool(wrong | (mask == 0).all() if mask.is_floating_point() else wrong):
        raise ValueError(
            f"the 2-D attention_mask has dtype {mask.dtype} and is not made of ones and zeros, expected 1 for a token "
            "and 0 for padding. Pass `attention_mask == 0` if yours is additive, and position_ids or seq_idx if it "
            "numbers documents."
        )


def check_mask(mask: Tensor, length: int, key_length: int) -> Tensor:
    """A mask [B, H, T or 1, S or 1] handed in by the user, if it is boolean, as a view [B, H, T, S].

    Raises:
        ValueError: it is additive, has another dtype or is not 4-D.
    """
    if mask.ndim != 4:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, expected [B, tokens so far] or [B, 1 or H, T, S]"
        )
    if mask.dtype != torch.bool:
        raise ValueError(
            f"the 4-D attention_mask has dtype {mask.dtype}, expected torch.bool with True = visible. An additive "
            "mask cannot exclude a key from softpick's denominator; pass `attention_mask == 0` instead."
        )
    sizes = (full if size == 1 else size for size, full in zip(mask.shape[2:], (length, key_length), strict=True))
    return mask.expand(*mask.shape[:2], *sizes)


def keep_documents_apart(mask: Tensor, position_ids: Tensor | None) -> Tensor:
    """An explicit `mask`, bool [B, 1 or H, T, S], without what lies in another document of the row.

    Only position 0 begins a document here: under a mask of the user's own, other positions may repeat (draft trees).
    """
    if position_ids is None:
        return mask
    position = position_ids.to(mask.device)
    length, key_length = mask.shape[2:]
    if length != key_length:
        return _hide_earlier_documents(mask, position)
    begins = (position == 0) & mask.diagonal(dim1=-2, dim2=-1).any(1)
    document = begins.cumsum(-1)
    return mask & (document[:, None, :, None] == document[:, None, None, :])


def _hide_earlier_documents(mask: Tensor, position: Tensor) -> Tensor:
    """Over a cache: a query at position p of its document sees the newest p + 1 of its visible keys, none older.

    Keys behind the query stay, an image prefix may see them. Its column is not known here, but the last query's is the
    last column that anything sees.
    """
    length, key_length = mask.shape[2:]
    column = torch.arange(key_length, device=mask.device)
    last = torch.where(mask, column, -1).amax()
    own = last - (length - 1) + torch.arange(length, device=mask.device)
    age = (mask & (column <= own[:, None])).flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
    return mask & (age <= position[:, None, :, None] + 1)


__all__ = ["VisibleKeys", "check_mask", "check_padding", "keep_documents_apart", "visible_keys"]
