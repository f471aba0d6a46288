"""Inputs, masks and plain implementations that the tests of attention share."""

import torch

from hf_softpick.modeling.attention_reference import reference_attention
from hf_softpick.modeling.documents import boundary_numbers, document_positions, numbered_begins
from hf_softpick.modeling.normalizers import SOFTPICK_EPS
from hf_softpick.modeling.visibility import visible_keys as visible_keys_and_positions

CPU = torch.device("cpu")
BASES = ["softpick", "softmax", "rectified_softmax"]
# Scores of four keys at which formulas for softpick break: overflow, no positive score, only zeros, cancellation.
EXTREME_ROWS = (
    [1e4, -1e4, 3.0, 0.0],
    [1e4, 1e4, -1e4, 9990.0],
    [-1e4, -1e4, -1e4, -1e4],
    [-1e4, -5.0, -30.0, -80.0],
    [0.0, 0.0, 0.0, 0.0],
    [1e-5, -1e-5, 1e-5, 1e-5],
    [1e-5, -1e-5, 60.0, 1e-5],
    [88.0, 89.0, 90.0, -89.0],
    [-0.5, -0.25, 1e-3, -1e4],
    [5.0, 6.0, 7.0, 8.0],
)


def visible_keys(*sizes, **options):
    """What each query sees, without its place in its document."""
    return visible_keys_and_positions(*sizes, **options)[0]


def positions(batch, length, seed=0):
    """int [B, T]: every row cut into documents at places of its own."""
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.06
    index = torch.arange(length).expand(batch, length)
    return index - torch.where(starts, index, 0).cummax(-1).values


def padding(batch, length, kind):
    """bool [B, S], every row with another number of real tokens; at least one is real."""
    index = torch.arange(length)
    count = torch.tensor([1 + (length - 1) * (b + 1) // (batch + 1) for b in range(batch)])[:, None]
    if kind == "left":
        return index >= length - count
    if kind == "right":
        return index < count
    return (index + torch.arange(batch)[:, None]) % 3 != 0


def seen(kind, batch, heads, length, cached):
    """The named kind of visibility for `length` queries after `cached` keys."""
    total = length + cached
    offset = {"query_offset": cached}
    generator = torch.Generator().manual_seed(length)
    if kind.startswith("bool"):
        shape = {"bool_b1": (batch, 1), "bool_11": (1, 1), "bool_bh": (batch, heads), "bool_2d": ()}[kind]
        mask = torch.rand(*shape, length, total, generator=generator) > 0.4
        mask[..., length // 2, :] = False
        return mask
    if kind == "cu_seq_lens":
        boundaries = torch.tensor([0, 0, length // 3, length // 3, length // 3 + 1, length])
        begins = numbered_begins(boundary_numbers(boundaries.clamp_max(length).sort().values, length))
        return visible_keys(length, length, CPU, position_ids=document_positions(begins))
    options = {
        "causal": {},
        "packed": {"position_ids": positions(batch, total)[:, cached:]},
        "packed_alike": {"position_ids": positions(1, total)[:, cached:]},
        "window_1": {"sliding_window": 1},
        "window_7": {"sliding_window": 7},
        "window_100": {"sliding_window": 100},
        "packed_window": {"position_ids": positions(batch, total)[:, cached:], "sliding_window": 9},
        "packed_padded": {
            "position_ids": positions(batch, total)[:, cached:],
            "padding_mask": padding(batch, total, "right"),
        },
        "left": {"padding_mask": padding(batch, total, "left")},
        "right": {"padding_mask": padding(batch, total, "right")},
        "holes": {"padding_mask": padding(batch, total, "holes"), "sliding_window": 20},
    }
    return visible_keys(length, total, CPU, **offset, **options[kind])


KINDS = (
    "causal packed packed_alike cu_seq_lens window_1 window_7 window_100 packed_window packed_padded left right holes"
)
KINDS = KINDS.split() + ["bool_b1", "bool_11", "bool_bh", "bool_2d"]


def inputs(batch, heads, key_heads, length, total, dim, value_dim, dtype, seed=0):
    """query, key, value and the gradient of the output, rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, length, dim), (key_heads, total, dim), (key_heads, total, value_dim)
    tensors = [torch.randn(batch, *shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return tensors, torch.randn(batch, length, heads, value_dim, generator=generator).to(dtype)


def plain(query, key, value, mask, scale, normalizer):
    """The same formula in plain PyTorch, every step in the dtype of the inputs: what a user would write."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    x = query @ key.transpose(-1, -2) * scale
    if normalizer == "softpick":
        x = x.masked_fill(~mask, 0)  # adds 0 to both sums
        shift = x.detach().amax(-1, keepdim=True).clamp_min(0)
        p = torch.exp(x - shift) - torch.exp(-shift)
        weights = torch.relu(p) / (p.abs().sum(-1, keepdim=True) + SOFTPICK_EPS * torch.exp(-shift))
    else:
        kept = mask & (x >= 0) if normalizer == "rectified_softmax" else mask
        weights = torch.softmax(x.masked_fill(~kept, torch.finfo(x.dtype).min), -1) * kept
    return (weights @ value).transpose(1, 2)


def run(function, tensors, grad):
    """Output and the three gradients, in float64."""
    out = function(*tensors)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, tensors, grad.to(out.dtype)))]


@torch.no_grad()
def written_gradients(tensors, grad, mask, scale, normalizer):
    """The dense backward formula, delta = <o, do> with o rounded as it is saved: what any flash attention computes."""
    query, key, value = (x.float() for x in tensors)
    groups, do = query.shape[1] // key.shape[1], grad.transpose(1, 2).float()
    shared_key, shared_value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out, weights = reference_attention(*tensors, mask, scale, normalizer)
    x = scale * query @ shared_key.transpose(-1, -2)
    delta = (out.transpose(1, 2).float() * do).sum(-1, keepdim=True)
    dx = do @ shared_value.transpose(-1, -2) - delta
    if normalizer == "softpick":
        level = torch.log((torch.expm1(x).abs() * mask).sum(-1, keepdim=True) + SOFTPICK_EPS)
        dx = torch.where(x > 0, dx, delta) * torch.exp(x - level) * mask
    else:
        dx = dx * weights
    dq, dk, dv = dx @ shared_key * scale, dx.transpose(-1, -2) @ query * scale, weights.transpose(-1, -2) @ do
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return [x.to(given.dtype).double() for x, given in zip((dq, dk, dv), tensors, strict=True)]
