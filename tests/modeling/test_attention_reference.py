"""reference_attention, the definition in code, against loops, finite differences and the written backward formula."""

import math

import pytest
import torch
from attention_cases import visible_keys, visible_keys_and_positions
from torch.testing import assert_close

from hf_softpick.modeling.attention_eager import dense_attention
from hf_softpick.modeling.attention_reference import reference_attention
from hf_softpick.modeling.normalizers import NORMALIZERS, SOFTPICK_EPS

CPU = torch.device("cpu")
BASES = ["softpick", "softmax", "rectified_softmax"]
DOCUMENTS = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1]])


def off_the_kink(shape, key_heads, seed=0, value_dim=None):
    """float64 query, key, value [B, H, T, D] with every scaled score |x| > 1e-3: relu has no derivative at 0."""
    batch, heads, length, dim = shape
    for attempt in range(100):
        generator = torch.Generator().manual_seed(seed + 1000 * attempt)
        query, key, value = (
            torch.randn(batch, h, length, d, dtype=torch.float64, generator=generator)
            for h, d in ((heads, dim), (key_heads, dim), (key_heads, value_dim or dim))
        )
        scores = query @ key.repeat_interleave(heads // key_heads, 1).transpose(-1, -2) * dim**-0.5
        if scores.abs().min() > 1e-3:
            return [x.requires_grad_() for x in (query, key, value)]
    raise AssertionError("no such inputs")


def attention_by_loop(query, key, value, mask, scale):
    """Softpick attention one number at a time; no shift, so for moderate scores only."""
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    out = torch.zeros(batch, length, heads, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                seen = [j for j in range(key.shape[2]) if mask[b, h, i, j]]
                scores = {j: scale * float(query[b, h, i].dot(key[b, h // groups, j])) for j in seen}
                total = sum(abs(math.expm1(x)) for x in scores.values()) + 1e-6
                for j, x in scores.items():
                    out[b, i, h] += max(math.expm1(x), 0.0) / total * value[b, h // groups, j]
    return out


def test_is_the_formula_with_masks_and_shared_key_heads():
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, 5, 3, dtype=torch.float64, generator=generator)
    key, value = (torch.randn(2, 2, 6, d, dtype=torch.float64, generator=generator) for d in (3, 7))
    mask = torch.rand(2, 4, 5, 6, generator=generator) > 0.4
    mask[1, 2, 3] = False
    out, weights = reference_attention(query, key, value, mask, 0.7)
    assert_close(out, attention_by_loop(query, key, value, mask, 0.7))
    assert out.shape == (2, 5, 4, 7) and weights.shape == (2, 4, 5, 6)
    assert (out[1, 3, 2] == 0).all() and (weights[~mask] == 0).all()


@pytest.mark.parametrize("normalizer", BASES)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("documents", [False, True], ids=["causal", "packed"])
def test_gradcheck(normalizer, key_heads, documents):
    inputs = off_the_kink((1, 4, 8, 3), key_heads, seed=key_heads, value_dim=2)
    mask = visible_keys(8, 8, CPU, position_ids=DOCUMENTS if documents else None).dense(8, 8)
    assert torch.autograd.gradcheck(lambda q, k, v: reference_attention(q, k, v, mask, 3**-0.5, normalizer), inputs)


@pytest.mark.parametrize("normalizer", ["scaled_softpick", "scaled_softmax"])
def test_scaled_normalizers_scale_the_query_beforehand(normalizer):
    """x <- s_h * log(n_i) * x is the same on the query as on the score; s_h gets its gradient through it."""
    query, key, value = off_the_kink((1, 2, 8, 4), 2)
    visible, position = visible_keys_and_positions(8, 8, CPU, position_ids=DOCUMENTS)
    assert position.tolist() == DOCUMENTS.tolist()
    strength = torch.tensor([0.3, 0.5], dtype=torch.float64, requires_grad=True)
    factor = strength[:, None, None] * torch.log(position[:, None, :, None] + 2.0).double()
    out, _ = reference_attention(query * factor, key, value, visible.dense(8, 8), 0.5, normalizer)
    scores = (query @ key.transpose(-1, -2) * 0.5 * factor).masked_fill(~visible.dense(8, 8), 0)
    if normalizer == "scaled_softmax":
        weights = torch.softmax(scores.masked_fill(~visible.dense(8, 8), -math.inf), -1)
    else:
        total = torch.expm1(scores).abs().sum(-1, keepdim=True) + 1e-6
        weights = torch.relu(torch.expm1(scores)) / total
    expected = (weights @ value).transpose(1, 2)
    assert_close(out, expected)
    gradients = [torch.autograd.grad(x.cos().sum(), strength, retain_graph=True) for x in (out, expected)]
    assert_close(*gradients)


@pytest.mark.parametrize("key_heads", [4, 2])
def test_backward_is_the_formula_of_the_design(key_heads):
    """dv = sum w do; dx = e^(x - L) * (dp - delta where x > 0, else delta), written out by hand."""
    query, key, value = off_the_kink((2, 4, 8, 5), key_heads, seed=7)
    mask = visible_keys(8, 8, CPU, position_ids=DOCUMENTS).dense(8, 8)
    scale, groups = 5**-0.5, 4 // key_heads
    out, weights = reference_attention(query, key, value, mask, scale)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    actual = torch.autograd.grad(out, (query, key, value), grad)

    with torch.no_grad():
        shared_key, shared_value = (x.repeat_interleave(groups, 1) for x in (key, value))
        do, o = grad.transpose(1, 2), out.transpose(1, 2)
        x = scale * query @ shared_key.transpose(-1, -2)
        level = torch.log((torch.expm1(x).abs() * mask).sum(-1, keepdim=True) + SOFTPICK_EPS)
        delta = (o * do).sum(-1, keepdim=True)
        dp = do @ shared_value.transpose(-1, -2)
        dx = torch.exp(x - level) * torch.where(x > 0, dp - delta, delta) * mask
        dv = (weights.transpose(-1, -2) @ do).unflatten(1, (key_heads, groups)).sum(2)
        dk = (scale * dx.transpose(-1, -2) @ query).unflatten(1, (key_heads, groups)).sum(2)
        expected = scale * dx @ shared_key, dk, dv
    assert_close(actual, expected)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_output_has_the_dtype_of_value_and_is_computed_in_float32(normalizer, dtype):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 4, generator=generator).to(dtype) for _ in range(3))
    mask = visible_keys(9, 9, CPU).dense(9, 9)
    out, weights = reference_attention(query, key, value, mask, 0.5, normalizer)
    assert out.dtype == dtype and out.is_contiguous()
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact, _ = reference_attention(query.double(), key.double(), value.double(), mask, 0.5, normalizer)
    assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=2e-6)


@pytest.mark.parametrize("normalizer", BASES)
def test_dense_attention_takes_intervals_masks_and_none(normalizer):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 8, 4, generator=generator) for h in (4, 2, 2))
    visible = visible_keys(8, 8, CPU, position_ids=DOCUMENTS)
    expected = reference_attention(query, key, value, visible.dense(8, 8), 0.5, normalizer)
    for given in (visible, visible.dense(8, 8), visible.dense(8, 8).expand(2, 4, 8, 8)):
        actual = dense_attention(query, key, value, given, 0.5, normalizer)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    everything, _ = reference_attention(query, key, value, None, 0.5, normalizer)
    assert torch.equal(everything, reference_attention(query, key, value, torch.tensor(True), 0.5, normalizer)[0])


def test_dropout_drops_weights_and_keeps_their_mean():
    """Half of the weights go, the rest doubles; the returned weights are those before dropout."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 400, 8), torch.randn(1, 1, 400, 8)
    value = torch.eye(400)[None, None]
    visible = visible_keys(400, 400, CPU)
    out, weights = dense_attention(query, key, value, visible, 1.0, dropout=0.5)
    plain, same = dense_attention(query, key, value, visible, 1.0)
    assert torch.equal(weights, same)
    kept = out.transpose(1, 2) != 0
    assert_close(out.transpose(1, 2)[kept], 2 * weights[kept])
    assert abs(kept.sum() / (plain != 0).sum() - 0.5) < 0.02


@pytest.mark.parametrize("normalizer", BASES)
@pytest.mark.parametrize("tensor", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_reach_exactly_the_rows_that_see_them(normalizer, tensor, bad):
    """-inf in a score or a weight of 0 would launder it; 0 * NaN in the product with the values would spread it."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(2, 2, 8, 4, generator=generator) for name in ("query", "key", "value")}
    mask = visible_keys(8, 8, CPU, position_ids=DOCUMENTS).dense(8, 8)
    clean, _ = reference_attention(*inputs.values(), mask, 0.5, normalizer)
    inputs[tensor][1, 1, 3, 2] = bad
    out, _ = reference_attention(*inputs.values(), mask, 0.5, normalizer)
    touched = torch.zeros(2, 8, 2, dtype=torch.bool)
    touched[1, [3] if tensor == "query" else [3, 4], 1] = True
    assert out[touched].isnan().all() and torch.equal(out[~touched], clean[~touched])


@pytest.mark.parametrize("normalizer", BASES)
def test_extreme_scores_are_finite_forward_and_backward(normalizer):
    """+-1e4, all negative, all zero, tiny, nothing visible: section 2 of the design, row by row."""
    rows = torch.tensor([[1e4, -1e4, 3.0], [-1e4, -1e4, -1e4], [0.0, 0.0, 0.0], [1e-5, -1e-5, 1e-5], [9.0, 9.0, 9.0]])
    query = rows[None, None].clone().requires_grad_()
    key, value = torch.eye(3)[None, None], torch.eye(3)[None, None].requires_grad_()
    mask = torch.tensor([True, True, True, True, False])[:, None]
    out, weights = reference_attention(query, key, value, mask, 1.0, normalizer)
    out.cos().sum().backward()
    assert all(x.isfinite().all() for x in (out, query.grad, value.grad))
    assert weights[0, 0, 0].tolist() == [1, 0, 0]
    nothing = {"softpick": [1, 2, 4], "softmax": [4], "rectified_softmax": [1, 4]}[normalizer]
    assert (out[0, nothing] == 0).all() and (query.grad[0, 0, nothing] == 0).all()
