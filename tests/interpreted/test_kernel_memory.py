"""Where the kernels read and write: strides of every kind, offsets beyond 2^31, ends of documents and of tiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import Case, check_results, document_mask, inputs
from kernel_memory import every_second, guarded, place

import softpick_attention
from softpick_attention import backward, forward
from softpick_attention.backward import attention_backward
from softpick_attention.forward import attention_forward
from softpick_attention.tuning import Config
from softpick_attention.visibility import Visible, document_intervals

STRIDES = {
    "heads_first": lambda x: place(x, "heads_first"),
    "gaps": lambda x: place(x, "gaps"),
    "offset_1": lambda x: place(x, "offset"),
    "every_second": lambda x: every_second(x, torch.tensor(torch.nan)),
    "one_batch_row": lambda x: place(x[:1]).expand_as(x),
    "one_token": lambda x: place(x[:, :1]).expand_as(x),
    "one_head": lambda x: place(x[:, :, :1]).expand_as(x),
    "one_number": lambda x: x[:1, :1, :1, :1].expand_as(x),
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "grad"])
def test_strides_change_no_bit(strides, which):
    """One strided tensor among dense ones; also the copy of a last dimension with gaps."""
    tensors = inputs(Case(length=33, heads=(2, 2), batch=2))
    tensors[which] = STRIDES[strides](tensors[which])
    assert not tensors[which].is_contiguous() or strides == "offset_1"

    def results(q, k, v, grad):
        visible = Visible(causal=True)
        out, lse = attention_forward(q, k, v, visible, 0.25)
        return out, lse, *attention_backward(grad, q, k, v, out, lse, visible, 0.25)

    dense = results(*(x.clone(memory_format=torch.contiguous_format) for x in tensors))
    assert all(map(torch.equal, results(*tensors), dense))


FAR = """
import torch
from softpick_attention.backward import attention_backward
from softpick_attention.forward import attention_forward
from softpick_attention.visibility import Visible

room = torch.empty(131 * (2**24 + 17), dtype=torch.float16)  # 4.4 GB of addresses; memory only where it is touched
far = torch.empty(0)

def spread(x, axis, stride, number):
    # Tensor `number` of four, with so many elements between its places along one axis.
    near = x.movedim(axis, 0)[0]
    strides = list(near.contiguous().stride())
    strides.insert(axis, stride)
    offset = number * 2**17
    assert near.numel() <= 2**17 < stride and offset + (x.shape[axis] - 1) * stride > 2**31 - 2**20
    return room.as_strided(x.shape, strides, offset).copy_(x)

def results(q, k, v, grad, visible, splits):
    out, lse = attention_forward(q, k, v, visible, 0.25, num_splits=splits)
    if splits:
        return out, lse
    fast = attention_backward(grad, q, k, v, out, lse, visible, 0.25, deterministic=False)
    return out, lse, *attention_backward(grad, q, k, v, out, lse, visible, 0.25), *fast

def check(name, B, T, S, H, G, axis, stride, which, splits=0, visible=Visible()):
    print(name, flush=True)
    torch.manual_seed(0)
    tensors = [torch.randn(B, n, h, 16).half() for n, h in ((T, H), (S, G), (S, G), (T, H))]
    near = results(*tensors, visible, splits)
    for moved in which:
        given = [spread(x, axis, stride, i) if i in moved else x for i, x in enumerate(tensors)]
        for i, (one, two) in enumerate(zip(results(*given, visible, splits), near, strict=True)):
            assert torch.equal(one, two), f"{name} {moved}: number {i} of out, lse, dq, dk, dv and fast dq, dk, dv"

Q, K, V, GRAD = range(4)
QUERIES, KEYS, ALL = ((Q,), (GRAD,)), ((K,), (V,)), ((Q, K, V, GRAD),)
check("queries, odd stride", 1, 130, 16, 1, 1, 1, 2**24 + 17, QUERIES)
check("queries, aligned stride", 1, 130, 16, 1, 1, 1, 2**24 + 16, QUERIES)
check("keys, odd stride", 1, 16, 130, 1, 1, 1, 2**24 + 17, KEYS)
check("keys, aligned stride", 1, 16, 130, 1, 1, 1, 2**24 + 16, KEYS)
check("many queries", 1, 520, 16, 1, 1, 1, 2**22 + 16, QUERIES)
check("many keys", 1, 16, 520, 1, 1, 1, 2**22 + 16, KEYS)
check("two tokens", 1, 2, 2, 1, 1, 1, 2**31 + 16, ALL)
check("heads", 1, 16, 16, 2, 2, 2, 2**31 + 16, ALL)
check("batch", 2, 16, 16, 1, 1, 0, 2**31 + 16, ALL)
check("three tokens", 1, 3, 3, 1, 1, 1, 2**30 + 1, ALL)
check("three heads", 1, 16, 16, 3, 3, 2, 2**30 + 1, ALL)
check("three batch rows", 3, 16, 16, 1, 1, 0, 2**30 + 1, ALL)
check("decoding, keys", 1, 1, 130, 2, 1, 1, 2**24 + 16, KEYS, 2)
check("decoding, shared heads", 1, 2, 16, 2, 1, 2, 2**31 + 16, ((Q,),), 2)
check("decoding, batch", 2, 1, 16, 2, 1, 0, 2**31 + 16, ALL, 2)
bits = room.view(torch.bool)
for axis, shape, stride in ((2, (1, 1, 130, 16), 2**25), (3, (1, 1, 16, 130), 2**25), (1, (1, 2, 16, 16), 2**32)):
    mask = torch.rand(shape) > 0.5
    print("mask, axis", axis, flush=True)
    B, H, T, S = shape
    tensors = [torch.randn(B, n, H, 16).half() for n in (T, S, S, T)]
    near = results(*tensors, Visible(mask=mask), 0)
    strides = [S * T, S * T, S, 1]
    strides[axis] = stride
    far = bits.as_strided(shape, strides, 0)
    far.copy_(mask)
    assert all(map(torch.equal, results(*tensors, Visible(mask=far), 0), near)), f"mask, axis {axis}"
print("done")
"""


def test_offsets_beyond_32_bits():
    """In a process of its own, because a wrapped offset is a segmentation fault."""
    package = str(Path(softpick_attention.__file__).parents[1])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", FAR],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (
        f"exit code {done.returncode} after {done.stdout.split(chr(10))}: {done.stderr[-2000:]}"
    )
    assert done.stdout.endswith("done\n")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("window", [(-1, -1), (7, -1), (3, 5)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("top_left", [True, False], ids=["top_left", "bottom_right"])
def test_intervals_of_documents(dtype, window, causal, top_left, monkeypatch):
    """More queries than a program of the kernel takes, empty documents everywhere, and queries before the first and
    behind the last."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 40, (2, 31), generator=generator) * (torch.rand(2, 31, generator=generator) > 0.3)
    lengths[:, 0] = 4
    cu_q, cu_k = (row.cumsum(0).tolist() for row in lengths)
    beyond = 5
    with guarded(monkeypatch):
        boundaries = (place_row(torch.tensor(cu, dtype=dtype)) for cu in (cu_q, cu_k))
        visible = document_intervals(*boundaries, cu_q[-1] + beyond, cu_k[-1], causal, window, top_left)
    assert cu_q[-1] > 256
    j = torch.arange(cu_k[-1])
    seen = (j >= visible.start[0, :, None]) & (j < visible.end[0, :, None])
    assert not seen[cu_q[-1] :].any()
    assert torch.equal(seen[: cu_q[-1]], document_mask(cu_q, cu_k, causal, window, top_left))


def place_row(x):
    return place(x[:, None, None, None])[:, 0, 0, 0]


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
@pytest.mark.parametrize("kind", ["plateaus", "holes", "batch"])
def test_queries_that_see_a_tile_of_keys(kind, deterministic, monkeypatch):
    """The backward of a tile of keys is told its queries in blocks of 1024: stretches that end in another block, or at
    its edge, and stretches with queries between them that see no key or only some."""
    T, S, B = 2100, 20, 2 if kind == "batch" else 1
    start, end = torch.zeros(B, T, dtype=torch.int32), torch.full((B, T), S, dtype=torch.int32)
    if kind == "plateaus":
        end[:, :100], start[:, 1024:1500], end[:, 2048:] = 3, 17, 0
    elif kind == "holes":
        end[:, 1023:1025], end[:, 5], start[:, 2099] = 0, 11, 19
    else:
        end[0, 1200:], start[1, :1024] = 16, 4
    mask = (torch.arange(S) >= start[..., None]) & (torch.arange(S) < end[..., None])
    q, k, v, grad = inputs(Case(length=T, extra=S - T, heads=(1, 1), batch=B))
    visible, config = Visible(start=start, end=end), Config(128, 16)
    with guarded(monkeypatch):
        out, lse = attention_forward(q, k, v, visible, 0.25, config=config)
        gradients = attention_backward(
            grad, q, k, v, out, lse, visible, 0.25, deterministic=deterministic, config=config
        )
    check_results((q, k, v), grad, mask[:, None], 0.25, "softpick", out, lse, gradients)


def test_what_the_guards_of_this_suite_see(monkeypatch):
    """A store one element beyond an allocation, and an element that was never stored."""
    with pytest.raises(AssertionError, match="stored behind a tensor of 6 elements"), guarded(monkeypatch) as memory:
        x = memory.empty(2, 3, dtype=torch.float32, device="cpu")
        assert x.isnan().all()
        x.as_strided((7,), (1,), x.storage_offset())[6] = 1.0
    placed = place(torch.zeros(1, 2, 2, 4), "gaps")
    assert placed.as_strided((1,), (1,), placed.storage_offset() - 1).isnan()
    assert placed.as_strided((1,), (1,), placed.storage_offset() + 4).isnan()


def test_what_no_kernel_writes_is_poison_in_every_test(monkeypatch):
    """tests/conftest.py fills what torch.empty returns, so that a launch that writes nothing is seen."""
    q, k, v, grad = inputs(Case(length=20))
    visible = Visible(causal=True)
    out, lse = attention_forward(q, k, v, visible, 0.25)
    monkeypatch.setattr(forward, "run", lambda *args, **named: None)
    monkeypatch.setattr(backward, "run", lambda *args, **named: None)
    assert all(x.isnan().all() for x in attention_forward(q, k, v, visible, 0.25))
    assert all(x.isnan().all() for x in attention_backward(grad, q, k, v, out, lse, visible, 0.25))
    assert (document_intervals(*2 * [torch.tensor([0, 20])], 20, 20, True).end > 0).all()
