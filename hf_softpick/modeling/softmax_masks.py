"""What transformers' own softmax attention is told by our model: the same visible keys, in the form that each reads.

Flash attention is told of documents by boundaries, flex attention by a block mask, sdpa by a dense mask. Engines with
a cache of their own (vLLM, transformers' continuous batching) know what each query sees and are told nothing.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers.cache_utils import Cache
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.utils.generic import is_flash_attention_requested

from .compat import assert_async, attention_of, has_mask_function
from .configuration_softpick import SoftpickConfig
from .documents import document_begins
from .visibility import VisibleKeys


def runs_in_engine(implementation: str, arguments: dict[str, Any]) -> bool:
    """Whether the attention of that name brings its own cache: it has no mask function, or is called with `cache`."""
    return arguments.get("cache") is not None or not has_mask_function(implementation)


def softmax_mask(
    config: SoftpickConfig,
    visible: VisibleKeys,
    position: Tensor,
    rows: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    keys: int,
    position_ids: Tensor,
    query: Tensor,
) -> tuple[Any, dict[str, Any]]:
    """The attention_mask of Llama's forward for transformers' own attentions but sdpa, and further arguments for them.

    Args:
        position: int64 [B or 1, T], places in documents. rows: [B, T, 0], in the model's dtype.
        attention_mask: bool [B, tokens so far] or None. keys: S, the keys of this call, cached ones included.
        query: int64 [T], the columns of the queries in attention_mask.

    Raises:
        ValueError: the attention cannot keep these packed documents apart.
    """
    implementation, (batch, length) = attention_of(config), rows.shape[:2]
    if implementation == "flex_attention":
        return _block_mask(visible, batch, length, keys, rows.device), {}
    mask = attention_mask  # from which Llama's forward makes its own
    if config.sliding_window is not None:
        mask = create_sliding_window_causal_mask(
            config=config,
            inputs_embeds=rows,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
    flash = is_flash_attention_requested(requested_attention_implementation=implementation)
    # Flash attention takes boundaries among the tokens of a call; a mask function is told of documents in whole rows.
    padded = attention_mask is not None and (torch.compiler.is_compiling() or not bool(attention_mask.all()))
    apart = not padded and keys == length if flash else attention_mask is None and past_key_values is None
    if apart and not flash:
        return mask, {}
    packed = _packed(position, attention_mask, query)
    message = (
        f"attn_implementation={implementation!r} does not keep packed documents apart when an attention_mask or a "
        "cache is given. Pass neither (use_cache=False), or use 'auto', 'tiled' or 'sdpa'."
    )
    if torch.compiler.is_compiling():
        if not apart or batch > 1:
            assert_async(~packed, message)  # and a single row is read by flash attention itself
    elif bool(packed):
        if not apart:
            raise ValueError(message)
        return mask, _flat_boundaries(position, batch)
    return mask, {}


def _block_mask(visible: VisibleKeys, batch: int, length: int, keys: int, device: torch.device) -> Any:
    start, end = (edge.expand(batch, -1) for edge in visible.intervals(length, keys, device))

    def sees(row, head, query, key):
        seen = (key >= start[row, query]) & (key < end[row, query])
        return seen if visible.keys is None else seen & visible.keys[row, key]

    # Compiled, so that no mask of T x S is ever held; inside a graph it is by itself.
    create = create_block_mask if torch.compiler.is_compiling() else torch.compile(create_block_mask)
    return create(sees, B=batch, H=None, Q_LEN=length, KV_LEN=keys, device=device)


def _packed(position: Tensor, attention_mask: Tensor | None, query: Tensor) -> Tensor:
    """bool []: a row holds several documents, so that a token's position is not its rank among the row's tokens."""
    if attention_mask is None:
        return (position != query).any()
    rank = attention_mask.cumsum(-1)[:, query] - 1
    return ((position != rank) & attention_mask[:, query]).any()


def _flat_boundaries(position: Tensor, batch: int) -> dict[str, Any]:
    """Flash attention's boundaries of all rows laid end to end; it does not read those of a batch by itself."""
    begins = document_begins(position).expand(batch, -1).flatten()
    edges = torch.cat([begins.nonzero()[:, 0], begins.new_full((1,), begins.numel(), dtype=torch.int64)]).int()
    longest = int(edges.diff().max())
    return dict(cu_seq_lens_q=edges, cu_seq_lens_k=edges, max_length_q=longest, max_length_k=longest)


__all__ = ["runs_in_engine", "softmax_mask"]
