"""The public functions against their definition in float64: from a build or from the sources, see conftest.py."""

import pytest
import torch

pytestmark = pytest.mark.kernels_ci
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
PUBLIC = ("softpick_attn_func", "softpick_attn_varlen_func", "softpick_attn_with_kvcache", "flash_attn_forward")


def dense(q, k, v, causal):
    """relu(e^x - 1) / (sum |e^x - 1| + 1e-6), the last query aligned with the last key."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(k.shape[2] - q.shape[2])
    p = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).expm1() * seen
    return (p.relu() / (p.abs().sum(-1, keepdim=True) + 1e-6) @ v).transpose(1, 2)


def inputs(device, dtype=torch.float32, batch=2, length=21, keys=None, heads=4, key_heads=2, dim=32, value_dim=None):
    """Random q, k, v with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = (length, heads, dim), (keys or length, key_heads, dim), (keys or length, key_heads, value_dim or dim)
    made = [torch.randn(batch, *shape, generator=generator) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in made]


def close(found, expected, dtype):
    """Largest error in units of the largest expected value."""
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward_and_backward(kernel, device, dtype, causal):
    tensors = inputs(device, dtype, value_dim=16)
    out = kernel.softpick_attn_func(*tensors, causal=causal)
    expected = dense(*tensors, causal)
    grad = torch.randn_like(out)
    close(out, expected, dtype)
    ours, theirs = torch.autograd.grad(out, tensors, grad), torch.autograd.grad(expected, tensors, grad.double())
    for i in range(3):
        close(ours[i], theirs[i].double(), dtype)


def test_packed_documents_are_apart(kernel, device):
    q, k, v = (x.detach()[0] for x in inputs(device, batch=1))
    boundaries = torch.tensor([0, 5, 5, 21], dtype=torch.int32, device=device)
    out = kernel.softpick_attn_varlen_func(q, k, v, boundaries, boundaries, causal=True)
    for first, last in ((0, 5), (5, 21)):
        alone = dense(*(x[None, first:last] for x in (q, k, v)), True)[0]
        close(out[first:last], alone, torch.float32)


def test_decoding_with_a_cache(kernel, device):
    q, k, v = (x.detach() for x in inputs(device, length=2, keys=40))
    lengths = torch.tensor([40, 17], dtype=torch.int32, device=device)
    out = kernel.softpick_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)
    for row, length in enumerate((40, 17)):
        alone = dense(q[row, None], k[row, None, :length], v[row, None, :length], True)
        close(out[row, None], alone, torch.float32)


def test_rows_without_a_positive_score_are_zero(kernel, device):
    q, k, v = inputs(device)
    out = kernel.softpick_attn_func(q.abs(), -k.abs(), v)
    assert torch.equal(out, torch.zeros_like(out))


def test_wrong_calls_say_what_is_wrong(kernel, device):
    q, k, v = (x.detach() for x in inputs(device))
    with pytest.raises(ValueError, match="dropout"):
        kernel.softpick_attn_func(q, k, v, 0.1)
    with pytest.raises(ValueError, match="dtypes"):
        kernel.softpick_attn_func(q.half(), k, v)
    with pytest.raises(ValueError, match="query heads"):
        kernel.softpick_attn_func(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="normalizer"):
        kernel.softpick_attn_func(q, k, v, normalizer="sigmoid")


def test_public_names(kernel):
    assert set(PUBLIC) <= set(kernel.__all__)
    assert not hasattr(kernel, "flash_attn_varlen_func"), "transformers would wrap it in its own flash attention"
