"""tiled_attention against the float64 reference, forward and backward, over shapes, dtypes, masks and layouts."""

import itertools
import random

import pytest
import torch
from attention_cases import BASES, CPU, KINDS, inputs, plain, run, seen, visible_keys, written_gradients
from torch.testing import assert_close

from hf_softpick.modeling import attention_blocks
from hf_softpick.modeling.attention_reference import reference_attention
from hf_softpick.modeling.attention_tiled import tiled_attention
from hf_softpick.modeling.visibility import VisibleKeys

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def cases():
    """Every kind with every normalizer; lengths, sizes, heads and dtypes are dealt out so that each comes often."""
    deal = random.Random(0)

    def endless(values):
        while True:
            yield from deal.sample(values, len(values))

    lengths, dims = endless([1, 2, 15, 63, 64, 65, 130, 200]), endless([8, 33, 59, 64, 96, 128])
    value_dims = endless([None, None, 8, 40, 77])
    heads, batches, cached = endless([(1, 1), (4, 4), (4, 2), (3, 1), (6, 3)]), endless([1, 2, 3]), endless([0, 1, 70])
    dtypes = endless(DTYPES)
    for kind, normalizer, _ in itertools.product(KINDS, BASES, range(2)):
        dim, (heads_, key_heads) = next(dims), next(heads)
        shape = next(batches), heads_, key_heads, next(lengths), 0 if kind == "cu_seq_lens" else next(cached)
        dtype = next(dtypes)
        values = (kind, normalizer, dtype, *shape, dim, next(value_dims) or dim)
        yield pytest.param(*values, id="-".join(str(v).removeprefix("torch.") for v in values))


def assert_agrees(visible, tensors, grad, normalizer, scale):
    """FlashAttention's rule: at most 2 (forward) or 3 (backward) times the error of plain PyTorch in that dtype.

    Plain are autograd of the formula and the written backward formula, whose <o, do> rounds where a row sees one key.
    """
    dtype, length, total = tensors[0].dtype, tensors[0].shape[2], tensors[1].shape[2]
    mask = visible.dense(length, total) if isinstance(visible, VisibleKeys) else visible
    exact_inputs = [x.detach().double().requires_grad_() for x in tensors]
    exact = run(lambda q, k, v: reference_attention(q, k, v, mask, scale, normalizer)[0], exact_inputs, grad)
    ours = run(lambda q, k, v: tiled_attention(q, k, v, visible, scale, normalizer), tensors, grad)
    if dtype == torch.float64:
        assert_close(ours, exact, rtol=1e-9, atol=1e-11)
        return
    autograd = run(lambda q, k, v: plain(q, k, v, mask, scale, normalizer), tensors, grad)
    written = [autograd[0], *written_gradients(tensors, grad, mask, scale, normalizer)]
    rms = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}[dtype]
    for i, (o, e, name) in enumerate(zip(ours, exact, ("out", "dq", "dk", "dv"), strict=True)):
        coarse = e.to(dtype)
        atol = 2 * ((coarse + 0.3 - 0.3) - coarse).abs().max().double() + 1e-5 * e.abs().max() + 5e-6
        errors = [(plainly[i] - e) for plainly in (autograd, written)]
        assert (o - e).abs().max() <= (3 if i else 2) * max(x.abs().max() for x in errors) + atol, name
        assert (o - e).norm() <= rms * e.norm() + 2 * errors[1].norm() + 1e-6 * e.numel() ** 0.5, name


@pytest.mark.parametrize(
    "kind, normalizer, dtype, batch, heads, key_heads, length, cached, dim, value_dim", list(cases())
)
def test_is_the_reference(kind, normalizer, dtype, batch, heads, key_heads, length, cached, dim, value_dim):
    tensors, grad = inputs(batch, heads, key_heads, length, length + cached, dim, value_dim, dtype)
    visible = seen(kind, batch, heads, length, cached)
    assert_agrees(visible, tensors, grad, normalizer, 2 * dim**-0.5)


@pytest.mark.parametrize("kind", ["causal", "packed", "holes", "bool_b1", "bool_bh"])
def test_is_the_reference_when_heads_are_cut_into_blocks(kind, monkeypatch):
    """Long rows take few heads at a time; small blocks make that happen at a length that a test can afford."""
    monkeypatch.setattr(attention_blocks.Layout.blocks, "__defaults__", (1, 1 << 12))
    tensors, grad = inputs(2, 6, 3, 70, 80, 16, 16, torch.float32)
    start = torch.zeros(1, 70, dtype=torch.int64)
    layout = attention_blocks.Layout(*tensors, start, start + 80, None, None)
    assert any(block.n1 - block.n0 < 6 for block in layout.blocks()), "no head is cut, so this tests nothing"
    assert_agrees(seen(kind, 2, 6, 70, 10), tensors, grad, "softpick", 0.5)


@pytest.mark.parametrize("scale", [1e-1, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("kind", ["causal", "packed", "left", "bool_b1"])
def test_scores_near_0_keep_their_digits(kind, scale):
    """e^x - 1 in float32 has two digits left of a score of 1e-5; untrained and tiny models have many."""
    tensors, grad = inputs(2, 4, 2, 70, 80, 16, 16, torch.float32)
    visible = seen(kind, 2, 4, 70, 10)
    mask = visible.dense(70, 80) if isinstance(visible, VisibleKeys) else visible
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    exact = run(lambda q, k, v: reference_attention(q, k, v, mask, scale / 4)[0], doubles, grad)
    for attention in (
        lambda q, k, v: tiled_attention(q, k, v, visible, scale / 4),
        lambda q, k, v: reference_attention(q, k, v, mask, scale / 4)[0],
    ):
        for ours, expected in zip(run(attention, tensors, grad), exact, strict=True):
            assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_many_small_scores_keep_their_sign_in_the_gradient():
    """Their sum is not near 0, so e^x - 1 is rounded; a sign read from that was an error of 1% in dq and dk."""
    length = 2048
    tensors = [torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3)]
    grad, visible = torch.randn(1, length, 1, 16), visible_keys(length, length, torch.device("cpu"))
    exact = [x.detach().double().requires_grad_() for x in tensors]
    mask = visible.dense(length, length)
    expected = run(lambda q, k, v: reference_attention(q, k, v, mask, 1e-4, "softpick")[0], exact, grad)
    ours = run(lambda q, k, v: tiled_attention(q, k, v, visible, 1e-4), tensors, grad)
    for o, e, rounded in zip(ours, expected, (1e-6, 1e-6, 1e-6, 1e-3), strict=True):
        assert (o - e).norm() <= rounded * e.norm()


@pytest.mark.parametrize("normalizer", BASES)
def test_gradcheck(normalizer):
    tensors, _ = inputs(2, 4, 2, 5, 7, 3, 2, torch.float64, seed=5)
    visible = visible_keys(5, 7, CPU, query_offset=2, position_ids=torch.tensor([[2, 3, 4, 0, 1], [0, 1, 2, 3, 0]]))
    scores = tensors[0] @ tensors[1].repeat_interleave(2, 1).transpose(-1, -2)
    assert scores.abs().min() > 1e-3, "too close to the kink at 0"
    assert torch.autograd.gradcheck(lambda q, k, v: tiled_attention(q, k, v, visible, 1.0, normalizer), tensors)


@pytest.mark.parametrize("normalizer", ["softpick", "softmax"])
def test_scaled_normalizers_are_their_base_on_scaled_queries(normalizer):
    tensors, _ = inputs(1, 2, 2, 70, 70, 8, 8, torch.float32)
    visible = visible_keys(70, 70, CPU)
    base, scaled = (tiled_attention(*tensors, visible, 0.5, name) for name in (normalizer, f"scaled_{normalizer}"))
    assert torch.equal(base, scaled)


@pytest.mark.parametrize("normalizer", BASES)
def test_shared_heads_are_repeated_heads(normalizer):
    (query, key, value), _ = inputs(2, 6, 2, 70, 70, 8, 8, torch.float64)
    visible = visible_keys(70, 70, CPU)
    repeated = tiled_attention(query, *(x.repeat_interleave(3, 1) for x in (key, value)), visible, 0.5, normalizer)
    assert_close(tiled_attention(query, key, value, visible, 0.5, normalizer), repeated)
