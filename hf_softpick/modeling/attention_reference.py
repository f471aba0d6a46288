"""The reference for every implementation: the normalizers, and attention with them, in plain PyTorch.

Shapes: B batch, H query heads, Hkv key heads, T queries, S keys.
"""

import torch
from torch import Tensor

from .normalizers import SOFTPICK_EPS, base_normalizer


def _visible_scores(scores: Tensor, mask: Tensor | None, fill: float) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(
            f"mask has dtype {mask.dtype}, expected torch.bool (True = visible). An additive mask cannot exclude a "
            "key from softpick's denominator; pass `additive_mask == 0` instead."
        )
    if not scores.is_floating_point():
        raise ValueError(f"scores have dtype {scores.dtype}, expected a floating dtype: the weights are fractions")
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores if mask is None else torch.where(mask, scores, fill)


def softpick(x: Tensor, dim: int = -1, mask: Tensor | None = None, eps: float = SOFTPICK_EPS) -> Tensor:
    """Softpick weights, relu(e^x - 1) / (sum |e^x - 1| + eps), over the visible entries along `dim`.

    Args:
        x: scores of any shape and floating dtype; computed in float32 (float64 stays float64).
        dim: the dimension of the keys.
        mask: bool, broadcastable to `x`; False entries count neither above nor below the fraction line.
        eps: added to the denominator before any shift, so the value does not depend on the shift used inside.

    Returns:
        Weights of the shape and dtype of `x`: non-negative, sum in [0, 1] along `dim`, exactly 0 where x <= 0. A slice
        without a positive visible score is 0; one with a visible NaN or +inf is NaN.

    Raises:
        ValueError: `mask` is not boolean, or `x` not floating.

    Source: Zuhri, Fuadi, Aji 2025, arXiv 2504.20966. Slices that reach 1 are shifted by m = max x, so that nothing
    overflows; the others take expm1, which keeps every digit of a score near 0.
    """
    scores = _visible_scores(x, mask, 0.0)  # a score of 0 adds nothing to either sum
    if scores.shape[dim] == 0:
        return x.clone()
    m = scores.detach().amax(dim, keepdim=True)
    near = m < 1
    m = torch.where(near, 0.0, m)
    one = torch.exp(-m)
    # expm1 of 0 where it is not taken: an infinite branch would make the gradient NaN.
    p = torch.where(near, torch.expm1(torch.where(near, scores, 0.0)), torch.exp(scores - m) - one)
    positive = scores > 0
    l = torch.where(positive, p, -p).sum(dim, keepdim=True) + eps * one
    return (torch.where(positive, p, 0.0) / l).to(x.dtype)


def softmax(x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """Softmax over the visible entries; a slice with nothing visible is 0. Arguments and errors as in `softpick`."""
    scores = _visible_scores(x, mask, float("-inf"))
    if scores.shape[dim] == 0:
        return x.clone()
    m = scores.detach().amax(dim, keepdim=True)
    p = torch.exp(scores - torch.where(m == float("-inf"), 0.0, m))
    l = p.sum(dim, keepdim=True)
    return (p / torch.where(l == 0, 1.0, l)).to(x.dtype)


def rectified_softmax(x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """Softmax over the visible entries with x >= 0; a slice without one is 0. Shapes and errors as `softpick`."""
    kept = ~(x < 0)  # keeps NaN, so that it is seen and not dropped
    if mask is not None:
        _visible_scores(x, mask, 0.0)
        kept = kept & mask
    return softmax(x, dim, kept)


_FUNCTIONS = {"softpick": softpick, "softmax": softmax, "rectified_softmax": rectified_softmax}


def attention_weights(scores: Tensor, normalizer: str, mask: Tensor | None = None) -> Tensor:
    """[..., S] weights of [..., S] scores by normalizer name; for scaled_* the scores come already scaled."""
    return _FUNCTIONS[base_normalizer(normalizer)](scores, -1, mask)


def spread_nonfinite(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn every query, key or value vector that holds NaN or Inf into one that makes the rows that see it NaN.

    Without it a score of -inf or a weight of 0 would launder the bad number, and 0 * NaN in the product with the
    values would spread it to rows that cannot see it. Finite tensors come back unchanged in value.
    """
    bad_query = ~query.isfinite().all(-1, keepdim=True)
    bad_value = ~value.isfinite().all(-1, keepdim=True)
    bad_key = ~key.isfinite().all(-1, keepdim=True) | bad_value
    nan = float("nan")
    return query.masked_fill(bad_query, nan), key.masked_fill(bad_key, nan), value.masked_fill(bad_value, 0.0)


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, normalizer: str = "softpick"
) -> tuple[Tensor, Tensor]:
    """Dense attention with any normalizer, differentiable, the definition in code.

    Args:
        query: [B, H, T, D]; for scaled_* already multiplied by s_h * log(n_i).
        key: [B, Hkv, S, D]. value: [B, Hkv, S, Dv].
        mask: bool, broadcastable to [B, H, T, S], True = visible; None = all visible.
        scale: factor of the scores, usually D ** -0.5.

    Returns:
        output [B, T, H, Dv] in the dtype of `value`, weights [B, H, T, S] in float32 (float64 stays float64).
    """
    dtype = torch.float64 if torch.float64 in (query.dtype, value.dtype) else torch.float32
    out_dtype = value.dtype
    query, key, value = spread_nonfinite(query.to(dtype), key.to(dtype), value.to(dtype))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = attention_weights(torch.matmul(query * scale, key.transpose(-1, -2)), normalizer, mask)
    return torch.matmul(weights, value).transpose(1, 2).contiguous().to(out_dtype), weights
