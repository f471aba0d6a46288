"""Which keys each query sees, in memory linear in the length: an interval a query, and a mask of padded keys.

Legend: B batch, T queries of this call, S keys (cache included). Indices count tokens of the row from 0.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Names under which libraries pass the boundaries of documents, int [documents + 1].
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens", "cu_seqlens_q", "cu_seq_lens_k", "cu_seqlens_k")


class VisibleKeys(NamedTuple):
    """Query i of row b sees the keys start <= j < end with keys[b, j]; every field int64 but `keys`.

    start, end: [B or 1, T], indices into the key tensor. keys: bool [B, S] or None (no padding).
    position: [B or 1, T], real tokens from the start of the document to the query; n_i - 2 of the scaled normalizers.
    """

    start: Tensor
    end: Tensor
    keys: Tensor | None
    position: Tensor

    def dense(self, key_length: int) -> Tensor:
        """bool [B or 1, 1, T, S]: the same as an explicit mask."""
        column = torch.arange(key_length, device=self.start.device)
        mask = (column >= self.start[..., None]) & (column < self.end[..., None])
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
    cu_seq_lens: Tensor | None = None,
    sliding_window: int | None = None,
) -> VisibleKeys:
    """Causal visibility with packed documents, padding, a window and a cache.

    Args:
        query_length: T. key_length: S, the length of the key tensor (a static cache: its whole length).
        query_offset: index of the first query in the row, that is the tokens seen before this call.
        key_offset: index of the first key in the row; above 0 once a sliding-window cache has dropped keys.
        padding_mask: bool [B, tokens so far], True = a real token.
        position_ids: int [B or 1, T], position inside the document. A document starts where the position does not go
            up by one from the previous real token, and never earlier than position_ids tokens back.
        cu_seq_lens: int [documents + 1], boundaries of the documents of the only row.
        sliding_window: a query sees itself and the sliding_window - 1 keys before it.

    Raises:
        ValueError: `padding_mask` is shorter than the tokens seen, or `cu_seq_lens` does not fit the row.
    """
    index = torch.arange(query_length, device=device)[None]
    query = index + query_offset
    start = torch.zeros_like(query)
    rank = None
    if padding_mask is not None:
        _check_padding_mask(padding_mask, query_length, query_offset)
        rank = padding_mask.cumsum(-1) - 1
        real = padding_mask.gather(1, query.expand(padding_mask.shape[0], -1))
        query_rank = rank.gather(1, query.expand(rank.shape[0], -1))
    if cu_seq_lens is not None:
        _check_cu_seq_lens(cu_seq_lens, query_length, query_offset)
        boundaries = cu_seq_lens.to(device=device, dtype=torch.int64)
        start = boundaries[torch.searchsorted(boundaries, index, right=True) - 1]
    if position_ids is not None:
        position_ids = position_ids.to(device=device, dtype=torch.int64)
        if rank is None:
            previous = position_ids.roll(1, -1)
            restart = (position_ids - previous != 1) & (index > 0)
            first = torch.where(position_ids < 0, 0, query - position_ids)
        else:
            # Padding has no position of its own: compare each real token with the real token before it.
            last = torch.where(real, index, -1).cummax(-1)[0].roll(1, -1)
            position_ids = position_ids.expand(rank.shape[0], -1)
            previous = position_ids.gather(1, last.clamp_min(0))
            restart = real & (index > 0) & (last >= 0) & (position_ids - previous != 1)
            first = torch.searchsorted(rank, torch.where(position_ids < 0, 0, query_rank - position_ids).clamp_min(0))
        begun = torch.where(restart, query, 0).cummax(-1)[0]
        start = torch.maximum(torch.maximum(start, begun), first)
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
    start, end = ((edge - key_offset).clamp(0, key_length) for edge in (start, query + 1))
    start, end, position = torch.broadcast_tensors(start, end, position)
    return VisibleKeys(start, end, keys, position)


def document_starts(cu_seq_lens: Tensor, length: int) -> Tensor:
    """int64 [1, T]: position of each token inside its document, from boundaries [documents + 1]."""
    index = torch.arange(length, device=cu_seq_lens.device)[None]
    boundaries = cu_seq_lens.to(torch.int64)
    return index - boundaries[torch.searchsorted(boundaries, index, right=True) - 1]


def read_boundaries(
    arguments: dict[str, Any],
    batch: int,
    length: int,
    cached: bool = False,
    position_ids: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Take what says where documents begin out of a call's arguments, under every name that is in use.

    Args:
        arguments: of one call of `length` queries in `batch` rows; BOUNDARIES and seq_idx are removed from it.
        cached: there are tokens before this call. position_ids: int [B or 1, T]. real: bool [B, T], False = padding.

    Returns:
        boundaries [documents + 1] or None; `position_ids`, or those that seq_idx [B or 1, T] stands for, or None.

    Raises:
        ValueError: they do not describe these rows, or do not agree.
    """
    given = {name: arguments.pop(name) for name in BOUNDARIES if name in arguments}
    given = {name: value for name, value in given.items() if value is not None}
    cu_seq_lens = next(iter(given.values()), None)
    if given and (batch != 1 or all(name.endswith("_k") for name in given)):
        raise ValueError(
            f"{', '.join(given)} describes the documents of one row, got a batch of {batch}"
            f"{'' if batch != 1 else ' and nothing about its queries (cu_seq_lens_q missing)'}. Flatten the batch to "
            "one row, or pass position_ids."
        )
    compiling = torch.compiler.is_compiling()
    for name, value in given.items():
        if value is not cu_seq_lens and not compiling and not torch.equal(value, cu_seq_lens):
            raise ValueError(
                f"{next(iter(given))} and {name} differ; self-attention needs the same boundaries in both"
            )
    seq_idx = arguments.pop("seq_idx", None)
    if seq_idx is None:
        return cu_seq_lens, position_ids
    if seq_idx.shape not in ((batch, length), (1, length)):
        raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}, expected {(batch, length)}")
    changes = seq_idx.diff(dim=-1) != 0
    if position_ids is None and cu_seq_lens is None:
        if cached:
            raise ValueError("seq_idx does not say how documents go on from a cache. Pass position_ids as well.")
        index = torch.arange(length, device=seq_idx.device)
        begun = torch.where(torch.nn.functional.pad(changes, (1, 0)), index, 0).cummax(-1)[0]
        return None, index - begun
    if not compiling:
        positions = document_starts(cu_seq_lens, length) if position_ids is None else position_ids
        differ = changes.to(positions.device) != (positions.diff(dim=-1) != 1)
        if real is not None:
            differ = differ & (real[:, 1:] & real[:, :-1]).to(differ.device)
        if bool(differ.any()):
            raise ValueError(
                f"seq_idx and {'cu_seq_lens' if position_ids is None else 'position_ids'} do not begin documents at "
                f"the same tokens, first at {int(differ.any(0).nonzero()[0]) + 1}. Pass what agrees, or one of them."
            )
    return cu_seq_lens, position_ids


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


def _check_cu_seq_lens(cu_seq_lens: Tensor, query_length: int, query_offset: int | Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    if cu_seq_lens.ndim != 1 or cu_seq_lens.numel() < 2 or int(query_offset) != 0:
        raise ValueError(
            f"cu_seq_lens has shape {tuple(cu_seq_lens.shape)} with {int(query_offset)} cached tokens, expected "
            "[documents + 1] and an empty cache. Use position_ids to continue packed documents from a cache."
        )
    if int(cu_seq_lens[0]) != 0 or int(cu_seq_lens[-1]) != query_length or bool((cu_seq_lens.diff() < 0).any()):
        raise ValueError(
            f"cu_seq_lens runs from {int(cu_seq_lens[0])} to {int(cu_seq_lens[-1])}, expected to rise from 0 to the "
            f"row length {query_length}."
        )
