"""What tiled_attention takes and refuses: strides, dtypes, empty inputs, wrong shapes; its memory, its operators."""

import subprocess
import sys

import pytest
import torch
from attention_cases import BASES, CPU, inputs, run, seen, visible_keys
from torch.testing import assert_close

from hf_softpick.modeling import attention_tiled
from hf_softpick.modeling.attention_tiled import tiled_attention
from hf_softpick.modeling.visibility import VisibleKeys

LAYOUTS = {
    "heads_last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every_second": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "dims_first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "one_batch": lambda x: x[:1].expand(2, -1, -1, -1),
    "one_head": lambda x: x[:, :1].expand(-1, 2, -1, -1),
}


@pytest.mark.parametrize(
    "layout, batch", [(name, b) for name in LAYOUTS for b in (1, 2) if name != "one_batch" or b > 1]
)
def test_strides_do_not_matter(layout, batch):
    """Batch 1 is a case of its own: merging batch and heads needs no copy there and keeps odd strides."""
    tensors, grad = inputs(batch, 2, 2, 70, 70, 8, 8, torch.float32)
    visible = visible_keys(70, 70, CPU)
    actual = run(lambda *x: tiled_attention(*map(LAYOUTS[layout], x), visible, 0.5), tensors, grad)
    expected = run(
        lambda *x: tiled_attention(*(LAYOUTS[layout](y).contiguous() for y in x), visible, 0.5), tensors, grad
    )
    assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert tiled_attention(*map(LAYOUTS[layout], tensors), visible, 0.5).is_contiguous()


def test_mixed_dtypes_and_partial_gradients():
    """Rotary embeddings may leave float32 queries beside bfloat16 values; each gradient comes in its own dtype."""
    (query, key, value), grad = inputs(1, 2, 2, 9, 9, 8, 8, torch.float32)
    value = value.detach().bfloat16().requires_grad_()
    visible = visible_keys(9, 9, CPU)
    out = tiled_attention(query, key, value, visible, 0.5)
    gradients = torch.autograd.grad(out, (query, key, value), grad.bfloat16())
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32, torch.bfloat16]
    for wanted, expected in zip((query, key, value), gradients, strict=True):
        parts = [x if x is wanted else x.detach() for x in (query, key, value)]
        (alone,) = torch.autograd.grad(tiled_attention(*parts, visible, 0.5), wanted, grad.bfloat16())
        assert torch.equal(alone, expected)


@pytest.mark.parametrize("batch, length, total", [(1, 0, 5), (1, 5, 0), (0, 5, 5), (1, 0, 0), (0, 0, 0), (2, 3, 0)])
@pytest.mark.parametrize("as_mask", [False, True])
@pytest.mark.parametrize("normalizer", BASES)
def test_empty_inputs_give_empty_or_zero(batch, length, total, as_mask, normalizer):
    tensors, grad = inputs(batch, 4, 2, length, total, 8, 6, torch.float32)
    visible = visible_keys(length, total, CPU, query_offset=max(total - length, 0))
    visible = visible.dense(length, total) if as_mask else visible
    out, *gradients = run(lambda q, k, v: tiled_attention(q, k, v, visible, 1.0, normalizer), tensors, grad)
    assert out.shape == (batch, length, 4, 6) and (total > 0 or (out == 0).all())
    assert all((g == 0).all() for g in gradients) or total * batch * length > 0


def test_second_derivatives_are_refused_not_wrong():
    tensors, grad = inputs(1, 2, 2, 5, 5, 4, 4, torch.float64)
    out = tiled_attention(*tensors, visible_keys(5, 5, CPU), 0.5)
    gradients = torch.autograd.grad(out, tensors, grad.double().requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors)


def _operands(kind, batch, dtype):
    tensors, grad = inputs(batch, 4, 2, 6, 6, 8, 4, dtype)
    visible = seen(kind, batch, 4, 6, 0)
    if isinstance(visible, VisibleKeys):
        return tensors, grad, [*visible.intervals(6, 6), visible.keys, None, 0.5, "softpick"]
    start = torch.zeros(1, 6, dtype=torch.int64)
    return tensors, grad, [start, start + 6, None, visible, 0.5, "softpick"]


@pytest.mark.parametrize(
    "kind, batch, dtype", [("causal", 1, torch.float64), ("holes", 2, torch.float32), ("bool_b1", 2, torch.bfloat16)]
)
def test_operators_keep_the_contract_of_torch_compile(kind, batch, dtype):
    """Schema, fake tensors (shapes, dtypes, strides, no aliasing) and autograd registration."""
    tensors, grad, visible = _operands(kind, batch, dtype)
    torch.library.opcheck(attention_tiled._forward, (*tensors, *visible))
    tensors = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    out, lse = attention_tiled._forward(*tensors, *visible)
    torch.library.opcheck(
        attention_tiled._backward,
        (grad, *tensors, out, lse, *visible),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)),  # 4 heads over 3
        ((2, 4, 5, 8), (1, 4, 5, 8), (1, 4, 5, 8)),
        ((2, 4, 5, 8), (2, 4, 5, 7), (2, 4, 5, 7)),
        ((2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 6, 8)),
        ((2, 4, 5, 8), (2, 0, 5, 8), (2, 0, 5, 8)),
        ((4, 5, 8), (4, 5, 8), (4, 5, 8)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match=r"do not fit: expected \[B, H, T, D\]"):
        tiled_attention(*(torch.randn(s) for s in shapes), visible_keys(5, 5, CPU), 1.0)


@pytest.mark.parametrize(
    "shape", [(3, 1, 5, 6), (2, 3, 5, 6), (2, 2, 5, 6), (2, 1, 4, 6), (2, 1, 5, 5), (1, 2, 1, 5, 6)]
)
def test_masks_that_do_not_fit_are_refused(shape):
    """A mask of another batch must not be read for the wrong row."""
    (query, key, value), _ = inputs(2, 4, 2, 5, 6, 8, 8, torch.float32)
    with pytest.raises(ValueError, match=r"broadcasts to \(2, 4, 5, 6\)"):
        tiled_attention(query, key, value, torch.ones(shape, dtype=torch.bool), 1.0)


def test_intervals_that_do_not_fit_are_refused():
    """Too few of them would leave the last rows 0."""
    (query, key, value), _ = inputs(2, 4, 2, 5, 6, 8, 8, torch.float32)
    padded = visible_keys(5, 6, CPU, query_offset=1, padding_mask=torch.ones(3, 6, dtype=torch.bool))
    for visible in (*(visible_keys(n, 6, CPU, position_ids=torch.arange(n)[None]) for n in (4, 6)), padded):
        with pytest.raises(ValueError, match="do not fit 2 rows of 5 queries and 6 keys"):
            tiled_attention(query, key, value, visible, 1.0)


def test_wrong_dtypes_and_names_are_refused():
    (query, key, value), _ = inputs(1, 2, 2, 5, 5, 8, 8, torch.float32)
    visible = visible_keys(5, 5, CPU)
    with pytest.raises(ValueError, match="dtype torch.float32, expected torch.bool with True = visible"):
        tiled_attention(query, key, value, torch.zeros(1, 1, 5, 5), 1.0)
    with pytest.raises(ValueError, match="torch.int64, expected floats"):
        tiled_attention(query, key, value.long(), visible, 1.0)
    with pytest.raises(ValueError, match="normalizer is 'relu', expected one of softpick"):
        tiled_attention(query, key, value, visible, 1.0, "relu")


MEMORY = """
import torch
from hf_softpick.modeling.attention_tiled import tiled_attention
from hf_softpick.modeling.visibility import visible_keys

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def step(length):
    tensors = [torch.randn(1, 4, length, 16, requires_grad=True) for _ in range(3)]
    visible, _ = visible_keys(length, length, torch.device("cpu"), padding_mask=torch.arange(length)[None] > 3)
    tiled_attention(*tensors, visible, 0.25).sum().backward()

step(512)
before = peak()
step(6000)
print((peak() - before) / 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_linear():
    """One dense [4, 6000, 6000] map would be 549 MiB; tiled needs its inputs, gradients and a few MiB of scratch."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert 1 < float(done.stdout) < 80
