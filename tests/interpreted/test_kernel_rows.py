"""Rows of the kernels: extreme scores, exact zeros, NaN and Inf, and what a row may not depend on."""

import math

import pytest
import torch
from attention_cases import EXTREME_ROWS
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import NORMALIZERS, Case, inputs, within
from torch.testing import assert_close

from hf_softpick.modeling.attention_reference import attention_weights, reference_attention
from softpick_attention import softpick_attn_func, softpick_attn_varlen_func
from softpick_attention.forward import attention_forward
from softpick_attention.interface import attend
from softpick_attention.normalizers import NORMALIZERS as NORMALIZER_TABLE
from softpick_attention.visibility import Visible, document_intervals

EXTREMES = torch.tensor([*EXTREME_ROWS[:-1], [127.5, 128.5, -126.5, 1.0], EXTREME_ROWS[-1]])
NOTHING_POSITIVE = [2, 3, 4]
NAMES, RTOL = ("out", "dq", "dk", "dv"), (4e-3, 4e-3, 4e-3, 2e-2)


def score_inputs(rows, dtype=torch.float32):
    """q, k, v whose scores are `rows` [T, S] and whose output is the weights: one-hot keys and values, scale 1."""
    eye = torch.eye(rows.shape[1], dtype=dtype)
    return [x[None, :, None].clone().requires_grad_() for x in (rows.to(dtype), eye, eye)]


def weights_of(rows, normalizer="softpick", mask=None, dtype=torch.float32):
    """[T, S] weights as the kernels see them."""
    tensors = (x.detach() for x in score_inputs(rows, dtype))
    return softpick_attn_func(*tensors, scale=1.0, normalizer=normalizer, attn_mask=mask)[0, :, 0]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("hidden", [None, 0, 2], ids=["all_seen", "first_hidden", "third_hidden"])
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
def test_extreme_rows_are_those_of_the_reference(normalizer, dtype, hidden, deterministic):
    """All in one tile, beside a row that sees nothing."""
    mask = torch.ones(EXTREMES.shape, dtype=torch.bool)
    mask[-1] = False
    if hidden is not None:
        mask[:, hidden] = False
    tensors = score_inputs(EXTREMES, dtype)
    grad = torch.randn(1, len(EXTREMES), 1, 4, generator=torch.Generator().manual_seed(0)).to(dtype) / 32
    out = softpick_attn_func(*tensors, scale=1.0, normalizer=normalizer, attn_mask=mask, deterministic=deterministic)
    ours = [out, *torch.autograd.grad(out, tensors, grad)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = reference_attention(*(x.transpose(1, 2) for x in exact), mask, 1.0, normalizer)[0]
    expected = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    # At scores of 1e-5, e^x - 1 in float32 is good to 0.4% in the forward; e^(x - L) - e^-L in the backward to 2%. At
    # 1e4 a score is good to 1e-3. The gradient of the keys is a sum over queries of up to 1e4.
    for name, o, e, size, rtol in zip(NAMES, ours, expected, (1, 1, 1e4, 100), RTOL, strict=True):
        atol = size * (2e-6 if dtype == torch.float32 else 2e-3)
        within(name, o.detach(), e.detach(), rtol * e.abs().detach() + atol)
    zero = [len(EXTREMES) - 1] + (NOTHING_POSITIVE if normalizer == "softpick" else [])
    assert (ours[0][0, zero] == 0).all() and (ours[1][0, zero] == 0).all()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@given(
    rows=st.lists(st.lists(st.floats(-1e4, 1e4, width=16), min_size=5, max_size=5), min_size=1, max_size=6),
    seen=st.lists(st.booleans(), min_size=5, max_size=5),
    order=st.permutations(range(5)),
)
@settings(max_examples=12, deadline=None)
def test_invariants_of_weights(normalizer, rows, seen, order):
    """The reference, sums, zeros, keys of score 0, hidden and permuted keys."""
    rows, mask = torch.tensor(rows), torch.tensor(seen)[None].expand(len(rows), 5)
    weights = weights_of(rows, normalizer, mask)
    exact = attention_weights(rows.double(), normalizer, mask)
    # A score has an error of 2^-23 of itself; e^x - 1 one of 2^-23, which matters where all scores are tiny.
    size = torch.where(mask, rows.abs(), 0).amax(-1, keepdim=True).double()
    within("weights", weights, exact, 4e-6 + 5e-7 * size + 5e-7 / size.clamp_min(1e-7) * exact)
    assert weights.isfinite().all() and (weights >= 0).all() and (weights.sum(-1) <= 1 + 5e-7).all()
    assert (weights[~mask] == 0).all()
    assert torch.equal(weights_of(torch.where(mask, rows, -rows + 17), normalizer, mask), weights)
    assert_close(weights_of(rows[:, order], normalizer, mask[:, order]), weights[:, order], rtol=1e-5, atol=1e-6)
    if normalizer == "softpick":
        assert (weights[rows <= 0] == 0).all()
        with_zero = weights_of(torch.cat([rows, torch.zeros(len(rows), 1)], 1))
        assert (with_zero[:, 5] == 0).all()
        assert torch.equal(with_zero[:, :5], weights_of(rows))


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_and_gradients_are_exactly_zero_where_the_score_is_not_positive(dtype, deterministic):
    """Whatever the largest score of the row is, down to the smallest scores below 0."""
    near = torch.logspace(-40, 4, 120, dtype=torch.float64).to(dtype)
    tops = torch.cat([torch.linspace(1e-6, 30, 30), torch.linspace(27, 130, 30), torch.tensor([1e3, 1e4])]).to(dtype)
    key = torch.cat([-near, torch.zeros(7, dtype=dtype), torch.ones(1, dtype=dtype)])
    key = torch.stack([key, torch.zeros_like(key)], -1)
    key[-1] = torch.tensor([0.0, 1.0])  # score: the top of the row; the scores before it are `near` and 0
    value = torch.ones(len(key), 1, dtype=dtype)
    value[-1] = 0
    for sign in (1.0, 0.0):  # 0: every score but the top is 0
        query = torch.stack([torch.full_like(tops, sign), tops], -1)
        tensors = [x[None, :, None].clone().requires_grad_() for x in (query, key, value)]
        out = softpick_attn_func(*tensors, scale=1.0, deterministic=deterministic)
        dv = torch.autograd.grad(out, tensors, torch.ones_like(out))[2]
        assert (out == 0).all()
        assert (dv[0, :-1] == 0).all() and dv[0, -1] > 0


def windows(length: int) -> tuple[Visible, torch.Tensor]:
    """Documents of 20 tokens and a window of 15, and the same as a mask [T, S]."""
    cu = torch.tensor([*range(0, length, 20), length])
    t = torch.arange(length)
    mask = (t[:, None] // 20 == t // 20) & (t <= t[:, None]) & (t >= t[:, None] - 15)
    return document_intervals(cu, cu, length, length, True, (15, -1)), mask


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_reach_exactly_the_rows_that_see_them(normalizer, name, bad):
    """Token 36 of 50, hidden from its tile of 18 queries by causality or by the end of its document.

    A score of -inf, from an infinity in q or k, is the limit: a weight of 0.
    """
    case = Case(length=50, heads=(4, 2), batch=2)
    named = dict(zip("qkv", inputs(case), strict=False))
    visible, mask = windows(50)
    clean, _ = attention_forward(*named.values(), visible, 0.5, normalizer)
    place = (1, 36, 3 if name == "q" else 1, 5)  # of 4 query heads, of 2 key heads
    spoiled = torch.zeros(2, 50, 4, dtype=torch.bool)
    if name == "q":
        spoiled[place[:3]] = True
    else:
        spoiled[1, :, 2:] = mask[:, 36, None]
    x = named[name] = named[name].clone()
    if bad == bad and name != "v":
        x[place] = math.copysign(1e30, bad)
        limit, _ = attention_forward(*named.values(), visible, 0.5, normalizer)
        x[place] = bad
        scores = torch.einsum("bthd,bshd->bths", named["q"], named["k"].repeat_interleave(2, 2))
        scores = scores.masked_fill(~mask[:, None], 0)
        sees, spoiled = spoiled, (scores.isnan() | (scores == math.inf)).any(-1)
        assert (sees[spoiled]).all() and spoiled.any()
        clean = torch.where((sees & ~spoiled)[..., None], limit, clean)
    x[place] = bad
    out, _ = attention_forward(*named.values(), visible, 0.5, normalizer)
    assert (~out[spoiled].isfinite()).any(-1).all()
    if name == "v":
        # A tile that meets a bad value is computed once more, and sums in an order of its own.
        within("a row that does not see it", out[~spoiled], clean[~spoiled], 1e-6)
        spoiled[1, 32:] = True
    assert torch.equal(out[~spoiled], clean[~spoiled])


@pytest.mark.parametrize("splits", [0, 3])
@pytest.mark.parametrize("name", ["k", "v"])
def test_nan_in_decoding_reaches_only_the_rows_that_see_it(name, splits):
    """Query heads that share a tile, and parts of the keys that are computed on their own."""
    case = Case(length=2, extra=68, heads=(4, 2), batch=2)
    q, k, v, _ = inputs(case)
    visible = Visible(start=torch.tensor([[0, 0], [0, 30]]), end=torch.tensor([[70, 70], [20, 60]]))
    clean, _ = attention_forward(q, k, v, visible, 0.5, "softpick", splits)
    (k if name == "k" else v)[1, 25, 0, 3] = math.nan
    within("nobody sees it", attention_forward(q, k, v, visible, 0.5, "softpick", splits)[0], clean, 1e-6)
    (k if name == "k" else v)[1, 45, 0, 3] = math.nan
    out, _ = attention_forward(q, k, v, visible, 0.5, "softpick", splits)
    sees = torch.zeros(2, 2, 4, dtype=torch.bool)
    sees[1, 1, :2] = True
    assert out[sees].isnan().any(-1).all()
    within("the others", out[~sees], clean[~sees], 1e-6)


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradients_of_padding_are_zero_whatever_it_holds(normalizer, deterministic):
    """Padded keys may be uninitialised memory; the gradient of real tokens must not see it."""
    case = Case(length=50, heads=(2, 1), batch=2)
    q, k, v, grad = inputs(case)
    keys = torch.arange(50) >= torch.tensor([[0], [17]])

    def gradients(k, v):
        tensors = [x.clone().requires_grad_() for x in (q, k, v)]
        out = softpick_attn_func(
            *tensors, causal=True, key_mask=keys, normalizer=normalizer, deterministic=deterministic
        )
        return out, *torch.autograd.grad(out, tensors, grad)

    clean = gradients(k, v)
    dirty = gradients(k.masked_fill(~keys[..., None, None], math.nan), v.masked_fill(~keys[..., None, None], math.inf))
    for one, two in zip(clean, dirty, strict=True):
        assert torch.equal(one, two)
    assert (dirty[2][1, :17] == 0).all() and (dirty[3][1, :17] == 0).all()


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
@pytest.mark.parametrize("normalizer", ["softpick", "rectified_softmax"])
def test_a_bad_value_spoils_no_gradient_of_a_row_that_cannot_see_it(normalizer, deterministic):
    """The value of a later token, in the tile of the row: dq of the rows before it. (Not so with softmax.)"""
    case = Case(length=40, heads=(1, 1))
    q, k, v, grad = inputs(case)
    tensors = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.no_grad():
        tensors[2][0, 20, 0, 3] = math.nan
    out = softpick_attn_func(*tensors, causal=True, normalizer=normalizer, deterministic=deterministic)
    dq = torch.autograd.grad(out, tensors, grad)[0]
    assert dq[0, :20].isfinite().all() and dq[0, 20:].isnan().any(-1).all()


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_bad_query_shows_in_every_gradient_that_it_reaches(normalizer, deterministic):
    """The maximum with 0 would drop the NaN of its weights, and dv would look sound."""
    q, k, v, grad = inputs(Case(length=40, heads=(1, 1)))
    q = q.index_fill(1, torch.tensor(20), math.nan)
    tensors = [x.clone().requires_grad_() for x in (q, k, v)]
    out = softpick_attn_func(*tensors, causal=True, normalizer=normalizer, deterministic=deterministic)
    dq, dk, dv = torch.autograd.grad(out, tensors, grad)
    assert dq[0, 20].isnan().all() and dk[0, :21].isnan().all() and dv[0, :21].isnan().all()


@pytest.mark.parametrize("token", [0, 1, 31, 32, 50, 69])
def test_changing_a_token_leaves_earlier_rows_bit_equal(token):
    tensors = inputs(Case(length=70))[:3]
    before = softpick_attn_func(*tensors, causal=True)
    changed = [x.clone() for x in tensors]
    for i, x in enumerate(changed):
        x[:, token] = 30 * torch.randn(x[:, token].shape, generator=torch.Generator().manual_seed(i))
    after = softpick_attn_func(*changed, causal=True)
    assert torch.equal(after[:, :token], before[:, :token])
    assert not torch.equal(after[:, token], before[:, token])


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_packed_documents_equal_the_same_documents_alone(normalizer):
    """Output and gradients; empty documents between them change nothing."""
    lengths = [1, 0, 40, 2, 0, 0, 33]
    total = sum(lengths)
    tensors = [x.requires_grad_() for x in inputs(Case(length=total))[:3]]
    grad = inputs(Case(length=total))[3]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    flat = [x[0] for x in tensors]
    together = softpick_attn_varlen_func(*flat, cu, cu, causal=True, normalizer=normalizer)
    together = [together[None], *torch.autograd.grad(together, tensors, grad[0])]
    for start, length in zip(cu.tolist(), lengths, strict=False):
        piece = slice(start, start + length)
        document = [x.detach()[:, piece].requires_grad_() for x in tensors]
        alone = softpick_attn_func(*document, causal=True, normalizer=normalizer)
        alone = [alone, *torch.autograd.grad(alone, document, grad[:, piece])]
        assert_close([x[:, piece] for x in together], alone, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("length", [1, 40])
def test_a_row_does_not_depend_on_its_batch(length):
    tensors = inputs(Case(length=length, extra=3, batch=3))
    together = softpick_attn_func(*tensors[:3], causal=True)
    for row in range(3):
        alone = softpick_attn_func(*(x[row : row + 1] for x in tensors[:3]), causal=True)
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("length", [1, 33], ids=["decode", "prefill"])
def test_shared_heads_are_repeated_heads(length):
    q, k, v, _ = inputs(Case(length=length, extra=3, heads=(6, 2)))
    repeated = [x.repeat_interleave(3, 2) for x in (k, v)]
    assert_close(softpick_attn_func(q, k, v), softpick_attn_func(q, *repeated), rtol=1e-6, atol=1e-6)


def test_is_linear_in_values():
    q, k, v, _ = inputs(Case(length=70))
    once, other = (softpick_attn_func(q, k, x) for x in (v, v.cos()))
    assert_close(softpick_attn_func(q, k, 2 * v - v.cos()), 2 * once - other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_more_hidden_keys_and_keys_of_score_zero_change_nothing(dtype):
    """Behind the others, so that tiles coincide: bit-equal. Garbage among them, or keys of 0, move the tiles."""
    q, k, v, _ = inputs(Case(length=40, dtype=dtype))
    plain = softpick_attn_func(q, k, v)
    huge = torch.full_like(k[:, :30], 6e4)
    keys = torch.arange(70)[None] < 40
    assert torch.equal(softpick_attn_func(q, *(torch.cat([x, huge], 1) for x in (k, v)), key_mask=keys), plain)
    zero = torch.zeros_like(huge)
    appended = softpick_attn_func(q, torch.cat([k, zero], 1), torch.cat([v, huge], 1))
    tolerance = dict(rtol=1e-6, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-3, atol=1e-3)
    assert_close(appended, plain, **tolerance)
    before = softpick_attn_func(q, torch.cat([zero[:, :5], k], 1), torch.cat([huge[:, :5], v], 1))
    assert_close(before, plain, **tolerance)


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
def test_two_runs_are_bit_equal_and_the_two_backwards_agree(deterministic):
    q, k, v, grad = inputs(Case(length=70, heads=(4, 2), dtype=torch.float16))
    tensors = [x.requires_grad_() for x in (q, k, v)]

    def gradients(deterministic):
        out = softpick_attn_func(*tensors, causal=True, deterministic=deterministic)
        return torch.autograd.grad(out, tensors, grad)

    first = gradients(deterministic)
    assert all(map(torch.equal, first, gradients(deterministic)))
    assert_close(first, gradients(not deterministic), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
def test_a_normalizer_is_a_row_of_the_table(deterministic, monkeypatch):
    """softmax1, e^x / (1 + sum e^x), has no text of its own in the kernels."""
    softmax1 = NORMALIZER_TABLE["rectified_softmax"]._replace(HIDE_NEGATIVE=False, ADDED=1.0)
    monkeypatch.setitem(NORMALIZER_TABLE, "softmax1", softmax1)
    q, k, v, grad = inputs(Case(length=40, heads=(2, 1)))
    tensors = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attend(*tensors, Visible(causal=True), 0.25, "softmax1", deterministic)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    scores = torch.einsum("bthd,bsgd->bhts", exact[0], exact[1]) * 0.25
    weights = scores.masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), -math.inf).exp()
    total = 1 + weights.sum(-1, keepdim=True)
    expected = torch.einsum("bhts,bsgd->bthd", weights / total, exact[2])
    within("lse", lse, total[..., 0].log2(), 1e-5)
    gradients = zip(torch.autograd.grad(out, tensors, grad), torch.autograd.grad(expected, exact, grad), strict=True)
    for name, (ours, theirs) in zip(NAMES, [(out, expected), *gradients], strict=True):
        within(name, ours.detach(), theirs.detach(), 2e-5)
