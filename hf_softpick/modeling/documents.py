"""Where the documents of packed rows begin: the one rule, which everything that packs, masks or counts asks.

A token begins a document where its position is not one more than that of the real token before it in its row, nor as
many more as columns lie between them: models that are told no positions count columns, padding too. Legend: B rows,
T tokens of a row.
"""

from typing import Any

import torch
from torch import Tensor

# Names under which libraries pass the boundaries of documents, int [documents + 1].
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens", "cu_seqlens_q", "cu_seq_lens_k", "cu_seqlens_k")


def document_begins(position_ids: Tensor, real: Tensor | None = None) -> Tensor:
    """bool [B, T]: the tokens that begin a document, the first of each row among them; padding begins none.

    Args:
        position_ids: int [B or 1, T]. real: bool [B, T], False = padding, which has no position of its own.
    """
    # Inside a document, position and tokens before it in the row go up together, or position and column.
    begins = numbered_begins(position_ids - _tokens_before(position_ids, real), real)
    if real is None:
        return begins
    return begins & numbered_begins(position_ids - _tokens_before(position_ids, None), real)


def numbered_begins(numbers: Tensor, real: Tensor | None = None) -> Tensor:
    """bool [B, T] as `document_begins`, from numbers int [B or 1, T] that are the same in all tokens of a document."""
    index = torch.arange(numbers.shape[-1], device=numbers.device)
    if real is None:
        return (numbers != numbers.roll(1, -1)) | (index == 0)
    last = running_max(torch.where(real, index, -1)).roll(1, -1)  # column of the real token before
    last = torch.where(index == 0, -1, last)
    numbers = numbers.expand(real.shape[0], -1)
    return real & ((last < 0) | (numbers != numbers.gather(1, last.clamp_min(0))))


def document_positions(begins: Tensor, real: Tensor | None = None) -> Tensor:
    """int64 [B, T]: real tokens from the beginning of its document to each token; the reverse of `document_begins`."""
    count = _tokens_before(begins, real).expand_as(begins)
    return count - running_max(torch.where(begins, count, 0))


def running_max(x: Tensor) -> Tensor:
    """int [..., T]: the largest of x [..., T], none below -1, up to each column; ONNX has no operator for it."""
    if not torch.compiler.is_exporting():
        return x.cummax(-1)[0]
    index = torch.arange(x.shape[-1], device=x.device)
    return torch.where(index <= index[:, None], x[..., None, :], -1).amax(-1)


def _tokens_before(row: Tensor, real: Tensor | None) -> Tensor:
    if real is None:
        return torch.arange(row.shape[-1], device=row.device)
    return real.cumsum(-1) - real.long()


def boundary_numbers(cu_seq_lens: Tensor, length: int) -> Tensor:
    """int64 [1, T]: number of each token's document, from the boundaries int [documents + 1] of one row.

    Raises:
        ValueError: they do not rise from 0 to the length of the row.
    """
    if not torch.compiler.is_compiling():
        edges = cu_seq_lens.tolist() if cu_seq_lens.ndim == 1 else []
        if len(edges) < 2:
            raise ValueError(f"cu_seq_lens has shape {tuple(cu_seq_lens.shape)}, expected [documents + 1]")
        if edges[0] != 0 or edges[-1] != length or edges != sorted(edges):
            raise ValueError(
                f"cu_seq_lens runs from {edges[0]} to {edges[-1]}, expected to rise from 0 to the row length {length}."
            )
    index = torch.arange(length, device=cu_seq_lens.device)[None]
    return torch.searchsorted(cu_seq_lens.to(torch.int64), index, right=True)  # of empty documents, the last


def read_documents(
    arguments: dict[str, Any],
    batch: int,
    length: int,
    offset: int | Tensor = 0,
    position_ids: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor | None:
    """Take what says where documents begin out of a call's arguments, under every name that is in use.

    Args:
        arguments: of one call of `length` queries in `batch` rows; BOUNDARIES and seq_idx are removed from it.
        offset: tokens before this call. position_ids: int [B or 1, T].
        padding_mask: bool [B, tokens so far], False = padding, whatever document it is said to belong to.

    Returns:
        int [B or 1, T], positions inside documents: `position_ids`, or those that the boundaries stand for; None if
        nothing is said.

    Raises:
        ValueError: they do not describe these rows, or do not agree.
    """
    given = {name: arguments.pop(name) for name in (*BOUNDARIES, "seq_idx") if name in arguments}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return position_ids
    device, seq_idx = next(iter(given.values())).device, given.pop("seq_idx", None)
    begins = real = None
    if padding_mask is not None:
        device, columns = padding_mask.device, torch.arange(length, device=padding_mask.device) + offset
        real = padding_mask[:, columns.clamp_max(padding_mask.shape[1] - 1)].expand(batch, -1)
    if position_ids is not None:
        device = position_ids.device if real is None else device
        begins = document_begins(position_ids.to(device), real)
    if given:
        cut = numbered_begins(_read_boundaries(given, batch, length, offset).to(device), real)
        begins = cut if begins is None else begins | cut
    if seq_idx is not None:
        if seq_idx.shape not in ((batch, length), (1, length)):
            raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}, expected {(batch, length)}")
        changes = numbered_begins(seq_idx.to(device), real)
        if begins is None:
            if _follows(offset):
                raise ValueError("seq_idx does not say how documents go on from a cache. Pass position_ids as well.")
            begins = changes
        elif not torch.compiler.is_compiling() and bool((differ := changes != begins).any()):
            raise ValueError(
                f"seq_idx and {'cu_seq_lens' if position_ids is None else 'position_ids'} do not begin documents at "
                f"the same tokens, first at {int(differ.any(0).nonzero()[0])}. Pass what agrees, or one of them."
            )
    # Over a cache, position_ids also say how far back the first document of the call began.
    return position_ids if position_ids is not None and not given else document_positions(begins, real)


def _follows(offset: int | Tensor) -> bool:
    """Whether the call goes on from a cache; static ones keep their length on the device."""
    return not (isinstance(offset, Tensor) and torch.compiler.is_compiling()) and bool(offset > 0)


def _read_boundaries(given: dict[str, Tensor], batch: int, length: int, offset: int | Tensor) -> Tensor:
    names = list(given)
    if batch != 1 or all(name.endswith("_k") for name in names):
        raise ValueError(
            f"{', '.join(names)} describes the documents of one row, got a batch of {batch}"
            f"{'' if batch != 1 else ' and nothing about its queries (cu_seq_lens_q missing)'}. Flatten the batch to "
            "one row, or pass position_ids."
        )
    if _follows(offset):
        raise ValueError(
            f"{names[0]} was given together with cached tokens, expected an empty cache. Use position_ids to continue "
            "packed documents from a cache."
        )
    cu_seq_lens = given[names[0]]
    for name in names[1:]:
        same = given[name] is cu_seq_lens or torch.compiler.is_compiling() or torch.equal(given[name], cu_seq_lens)
        if not same:
            raise ValueError(f"{names[0]} and {name} differ; self-attention needs the same boundaries in both")
    return boundary_numbers(cu_seq_lens, length)


__all__ = [
    "BOUNDARIES",
    "boundary_numbers",
    "document_begins",
    "document_positions",
    "numbered_begins",
    "read_documents",
    "running_max",
]
