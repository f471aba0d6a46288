"""What transformers' loader of Hub kernels takes as it is: `attn_implementation="<this repository>"` for any model.

The loader wants `flash_attn_forward` beside `supports_flash_attn`, and then hands over boolean masks. Under the name
`flash_attn_varlen_func` it would wrap the function in its own flash attention; so nothing here has that name.
"""

from typing import Any, Optional

import torch
from torch import Tensor, nn

from .interface import attend
from .visibility import Visible, document_intervals

supports_flash_attn = True

# Arguments of models that change the scores or the keys, and that are not computed here.
_UNSUPPORTED = {
    "softcap": "softcap (tanh on the scores)",
    "s_aux": "s_aux (attention sinks)",
    "sinks": "sinks (attention sinks)",
    "position_bias": "position_bias",
    "indices": "indices (a choice of keys)",
    "block_indices": "block_indices (a choice of blocks of keys)",
    "cache": "a paged cache",
}
# What others call the boundaries of documents: ignored, they would let the documents run into each other.
_FOREIGN_BOUNDARIES = ("cu_seq_lens", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "seq_idx")


# Without an operator, tracing would go on into the launch of the kernels: one clean break instead.
@torch.compiler.disable
def flash_attn_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Optional[Tensor],
    scaling: Optional[float] = None,
    dropout: float = 0.0,
    is_causal: Optional[bool] = None,
    sliding_window: Optional[int] = None,
    position_ids: Optional[Tensor] = None,
    cu_seq_lens_q: Optional[Tensor] = None,
    cu_seq_lens_k: Optional[Tensor] = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softpick attention in the form that transformers' models call.

    Args:
        query: [B, H, T, D]. key: [B, Hkv, S, D]. value: [B, Hkv, S, Dv]. Heads are not repeated.
        attention_mask: bool, broadcastable to [B, H, T, S], True = visible; or None for causal attention, in which a
            single query sees all keys, and several are aligned with the first keys (S > T: an empty static cache).
        scaling: factor of the scores, default D ** -0.5.
        sliding_window: a query sees itself and the sliding_window - 1 keys before it; a mask has that in it already.
        position_ids: [B or 1, T]. A document begins where they do not go up by one from the token before, nor by the
            columns of padding between; with a mask of T = S that is not causal but for padding, at each visible
            position 0. Other shapes are ignored.
        cu_seq_lens_q: int [documents + 1], boundaries of the documents of the only row, read instead of position_ids.
            cu_seq_lens_k must hold the same.
        kwargs: the model's other arguments.

    Returns:
        output [B, T, H, Dv] in the dtype of value, and None for the weights, which are never stored.

    Raises:
        ValueError: the model needs something that this attention does not compute; the message names it.
    """
    _check_call(type(module).__name__, module, attention_mask, dropout, is_causal, kwargs)
    T, S = query.shape[2], key.shape[2]
    left = -1 if sliding_window is None else sliding_window - 1
    if attention_mask is None:
        visible = Visible(causal=True, offset=S - 1 if T == 1 else 0, window=(left, -1))
    else:
        visible = Visible(mask=attention_mask)
    # One query is not a row of documents, and of the keys in a cache only a mask says where its documents lie.
    if T > 1 and (attention_mask is None or T == S):
        if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
            _check_boundaries(query, cu_seq_lens_q, cu_seq_lens_k)
            boundaries = cu_seq_lens_q.to(query.device)
            documents = document_intervals(boundaries, boundaries, T, S, attention_mask is None, (left, -1))
            visible = Visible(start=documents.start, end=documents.end, mask=attention_mask)
        elif position_ids is not None and position_ids.ndim == 2:
            visible = _documents(position_ids.to(query.device), attention_mask, left)
    out, _ = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), visible, scaling)
    return out, None


def _documents(position_ids: Tensor, mask: Optional[Tensor], left: int) -> Visible:
    """What the queries of packed rows see: their own document, of it the past if no mask says better."""
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    if mask is None:
        begins = position_ids - position_ids.roll(1, -1) != 1
    else:
        mask = mask.expand(*mask.shape[:2], *(len(index) if size == 1 else size for size in mask.shape[2:]))
        real = mask.diagonal(dim1=-2, dim2=-1).any(1)
        distance = index[:, None] - index
        causal = (distance >= 0) & (distance <= (left if left >= 0 else len(index)))
        # Causal but for padding is what models make. In a mask of the user's own, positions but 0 may repeat: trees.
        is_made = (mask == causal & real[:, None, None, :]).all(-1).all(-1).all(-1, keepdim=True)
        last = torch.where(real, index, 0).cummax(-1)[0].roll(1, -1)  # column of the real token before
        position_ids, last = torch.broadcast_tensors(position_ids, last)
        # Models that are told no positions count columns, padding too.
        step = position_ids - position_ids.gather(1, last)
        begins = real & torch.where(is_made, (step != 1) & (step != index - last), position_ids == 0)
    document = begins.cumsum(-1)
    start = torch.searchsorted(document, document)
    if mask is not None:
        return Visible(start=start, end=torch.searchsorted(document, document, right=True), mask=mask)
    if left >= 0:
        start = torch.maximum(start, index - left)
    return Visible(start=start, end=(index + 1).expand_as(start))


def _check_call(name: str, module: nn.Module, mask: Any, dropout: float, is_causal: Optional[bool], others: dict):
    for argument, meaning in _UNSUPPORTED.items():
        if others.get(argument) is not None:
            raise ValueError(
                f"{name} uses {meaning}, which softpick attention does not compute. Use another attn_implementation, "
                "or a model without it."
            )
    for argument in _FOREIGN_BOUNDARIES:
        if others.get(argument) is not None:
            raise ValueError(
                f"{argument} is not read here, and documents would not be kept apart. Pass position_ids that restart, "
                "or cu_seq_lens_q."
            )
    if others.get("output_attentions"):
        raise ValueError(
            "output_attentions=True was given, expected False: the kernel never stores the weights. hf_softpick's "
            "attn_implementation='eager' returns them."
        )
    if dropout > 0:
        raise ValueError(f"attention dropout is {dropout}, expected 0: softpick attention has none. Set it to 0.")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{name} is not causal; softpick attention from the Hub computes causal attention only.")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4 or mask.dtype != torch.bool):
        given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {given}, expected torch.bool [B, 1 or H, T, S] with True = visible. An additive mask "
            "cannot exclude a key from softpick's denominator; pass `attention_mask == 0` instead."
        )


def _check_boundaries(query: Tensor, cu_seq_lens_q: Optional[Tensor], cu_seq_lens_k: Optional[Tensor]) -> None:
    if cu_seq_lens_q is None or query.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens describes the documents of one row, got a batch of {query.shape[0]} and cu_seq_lens_q "
            f"{'missing' if cu_seq_lens_q is None else 'given'}. Flatten the batch to one row, or pass position_ids."
        )
    if cu_seq_lens_q.ndim != 1 or cu_seq_lens_q.numel() < 2 or cu_seq_lens_q.is_floating_point():
        raise ValueError(
            f"cu_seq_lens_q is {cu_seq_lens_q.dtype} {tuple(cu_seq_lens_q.shape)}, expected int [documents + 1]"
        )
    if cu_seq_lens_k is not None and cu_seq_lens_k.shape != cu_seq_lens_q.shape:
        raise ValueError(
            f"cu_seq_lens_k has shape {tuple(cu_seq_lens_k.shape)} and cu_seq_lens_q {tuple(cu_seq_lens_q.shape)}, "
            "expected the same boundaries in both: this is self-attention."
        )
