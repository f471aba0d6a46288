"""Checks of the Triton kernels that a GPU runs at full size and the interpreter at small ones."""

import torch
from kernel_cases import Case, check_case, inputs, visibility, within
from kernel_memory import guarded, place

from softpick_attention import softpick_attn_func, softpick_attn_with_kvcache
from softpick_attention.backward import attention_backward
from softpick_attention.forward import attention_forward
from softpick_attention.visibility import Visible

EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-19}


def check_on(case: Case, device: torch.device, monkeypatch) -> None:
    """A case against the exact answer, among guards."""
    with guarded(monkeypatch):
        visible, mask = visibility(case, device)
        check_case(case, *(place(x, case.layout) for x in inputs(case, device)), visible, mask)


def check_decoding(device, dtype, normalizer, length=300, heads=(8, 2), dim=64) -> None:
    """Append in place, other rows of the cache, padding, a window; every number of splits gives the prefill's rows."""
    q, k, v, _ = inputs(Case(dtype, dim, length=length, heads=heads, batch=2), device)
    window, lengths = (length // 2, -1), torch.tensor([length - 1, length // 3], device=device)
    index, pads = torch.tensor([2, 0], device=device), torch.tensor([0, 5], device=device)
    t = torch.arange(length, device=device)
    keys = t >= pads[:, None]
    expected = softpick_attn_func(q, k, v, causal=True, window_size=window, key_mask=keys, normalizer=normalizer)
    rows = torch.arange(2, device=device)
    for splits in (0, 1, 2, 7):
        caches = []
        for x in (k, v):
            cache = torch.full((3, length + 50, *x.shape[2:]), torch.nan, dtype=dtype, device=device)
            cache[index, :length] = x.masked_fill((t >= lengths[:, None])[..., None, None], torch.nan)
            caches.append(cache)
        query, key, value = (x[rows, lengths][:, None] for x in (q, k, v))
        out = softpick_attn_with_kvcache(
            query, *caches, key, value, lengths, index, pads, causal=True, window_size=window, num_splits=splits,
            normalizer=normalizer,
        )  # fmt: skip
        within(f"{splits} splits", out[:, 0], expected[rows, lengths], 2 * EPS[dtype])


def check_repeats(device, repeats, deterministic=True, dtype=torch.bfloat16, **sizes) -> None:
    """Every run of forward and backward gives the bits of the first; the fast backward's dq differs by rounding."""
    sizes = dict(dict(length=777, dim=64, heads=(8, 2), batch=2, kind="doc_short"), **sizes)
    case = Case(dtype, **sizes)
    q, k, v, grad = inputs(case, device)
    visible, _ = visibility(case, device)
    first = None
    for repeat in range(repeats):
        out, lse = attention_forward(q, k, v, visible, 0.125)
        results = out, lse, *attention_backward(grad, q, k, v, out, lse, visible, 0.125, deterministic=deterministic)
        first = first or results
        for name, one, two in zip(("out", "lse", "dq", "dk", "dv"), results, first, strict=True):
            if deterministic or name != "dq":
                assert torch.equal(one, two), f"{name} of run {repeat} differs in {(one != two).sum()} places"
            else:
                within(f"dq of run {repeat}", one, two, EPS[dtype] * two.abs().max())


def check_far_strides(device, apart: int) -> None:
    """Batch rows, tokens and heads that lie `apart` elements from each other."""
    room = torch.empty(apart * 2 + 2**12, dtype=torch.bfloat16, device=device)
    for axis in range(3):
        q, k, v, grad = inputs(Case(torch.bfloat16, 64, length=2, extra=1, heads=(2, 2), batch=2), device)
        dense = [x.clone() for x in (q, k, v, grad)]
        far = []
        for number, x in enumerate(dense):
            strides = list(x.movedim(axis, 0)[0].contiguous().stride())
            strides.insert(axis, apart)
            far.append(room.as_strided(x.shape[:axis] + (2,) + x.shape[axis + 1 :], strides, 512 * number))
            far[-1].copy_(x.narrow(axis, 0, 2))
        near = [x.contiguous() for x in far]
        results = []
        for tensors in (near, far):
            visible = Visible(causal=True, offset=tensors[1].shape[1] - tensors[0].shape[1])
            out, lse = attention_forward(*tensors[:3], visible, 0.125)
            results.append((out, lse, *attention_backward(tensors[3], *tensors[:3], out, lse, visible, 0.125)))
        assert all(map(torch.equal, *results)), f"axis {axis}"


def check_many_rows(device, tokens, heads, dim, deterministic) -> None:
    """Outputs and gradients of tokens * heads * dim elements. All queries are one, so all rows must be alike; then
    the same with queries and keys exchanged."""
    generator = torch.Generator().manual_seed(0)
    row, keys, values = torch.randn(3, 1, 16, 1, dim, generator=generator).to(device, torch.bfloat16)
    row = row[:, :1]

    def check(name, x, row):
        error = (x - row).abs().max()
        assert error <= 2**-7 * row.abs().max() and error == error, f"{name}: a row is off by {error}"

    many, grad = row.expand(1, tokens, heads, dim), row.flip(-1).expand(1, tokens, heads, dim)
    out, lse = attention_forward(many, keys, values, Visible(), 0.125)
    check("out", out, softpick_attn_func(row, keys, values, scale=0.125))
    check("lse", lse, lse[:, :1, :1])
    dq = attention_backward(grad, many, keys, values, out, lse, Visible(), 0.125, deterministic=deterministic)[0]
    check("dq", dq, dq[:, :1, :1].clone())
    del out, dq
    few, few_grad = (x.expand(1, 16, heads, dim) for x in (keys, values))
    out, lse = attention_forward(few, many, grad, Visible(), 0.125)
    gradients = attention_backward(few_grad, few, many, grad, out, lse, Visible(), 0.125, deterministic=deterministic)
    for name, x in zip(("dk", "dv"), gradients[1:], strict=True):
        check(name, x, x[:, :1, :1].clone())


def check_many_programs(device, batch) -> None:
    """More heads in the batch than a grid may be long on its second and third side (65535)."""
    tensors = [torch.randn(batch, 2, 1, 16, device=device, dtype=torch.bfloat16) for _ in range(3)]
    q, k, v = (x.requires_grad_() for x in tensors)
    out = softpick_attn_func(q, k, v, causal=True)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    last = [x.detach()[-3:].requires_grad_() for x in (q, k, v)]
    expected = softpick_attn_func(*last, causal=True)
    assert torch.equal(out[-3:], expected)
    for one, two in zip(gradients, torch.autograd.grad(expected.sum(), last), strict=True):
        assert torch.equal(one[-3:], two)


def check_nan(device, dtype) -> None:
    """A NaN reaches the rows that see it and no other, and is not lost on the way back."""
    q, k, v, grad = inputs(Case(dtype, 64, length=100, heads=(2, 2)), device)
    visible = Visible(causal=True)
    clean, _ = attention_forward(q, k, v, visible, 0.125)
    for name, x in (("q", q), ("k", k), ("v", v)):
        kept = x[0, 70, 1, 3].clone()
        x[0, 70, 1, 3] = torch.nan
        out, lse = attention_forward(q, k, v, visible, 0.125)
        sees = torch.zeros(1, 100, 2, dtype=torch.bool, device=device)
        sees[0, 70 : 71 if name == "q" else 100, 1] = True
        assert out[sees].isnan().all(), name
        within(name, out[~sees], clean[~sees], 2 * EPS[dtype])
        dq, dk, dv = attention_backward(grad, q, k, v, out, lse, visible, 0.125)
        assert dq[sees].isnan().all() and dk[0, :, 1].isnan().any(), name
        assert dq[:, :, 0].isfinite().all() and dk[:, :, 0].isfinite().all() and dv[:, :, 0].isfinite().all(), name
        x[0, 70, 1, 3] = kept
