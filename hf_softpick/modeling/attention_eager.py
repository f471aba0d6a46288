"""The "eager" implementation: dense attention that holds the [B, H, T, S] weights and returns them; any mask."""

import torch
from torch import Tensor

from .attention_reference import reference_attention
from .visibility import VisibleKeys


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: VisibleKeys | Tensor,
    scale: float,
    normalizer: str = "softpick",
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention with its weights, O(T * S) memory.

    Args:
        query: [B, H, T, D]; for scaled_* already multiplied by s_h * log(n_i).
        key: [B, Hkv, S, D]. value: [B, Hkv, S, Dv].
        visible: intervals of keys, or a bool mask broadcastable to [B, H, T, S] (True = visible).
        scale: factor of the scores. dropout: share of the weights set to zero, the rest scaled up.

    Returns:
        output [B, T, H, Dv] and weights [B, H, T, S] (before dropout), both in the dtype of `value`.
    """
    mask = visible
    if isinstance(visible, VisibleKeys):
        mask = visible.dense(query.shape[2], key.shape[2], query.device)
    output, weights = reference_attention(query, key, value, mask, scale, normalizer)
    if dropout > 0:
        groups = query.shape[1] // key.shape[1]
        kept = torch.nn.functional.dropout(weights, dropout).to(value.dtype)
        output = torch.matmul(kept, value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous()
    return output, weights.to(value.dtype)
