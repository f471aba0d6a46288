"""Rows of tiled_attention: extreme scores, exact zeros, NaN and Inf, and what a row may not depend on."""

import math

import pytest
import torch
from attention_cases import BASES, CPU, EXTREME_ROWS, inputs, positions, run, visible_keys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_softpick.modeling.attention_reference import attention_weights, reference_attention
from hf_softpick.modeling.attention_tiled import SHIFT_LIMIT, tiled_attention

LIMIT = SHIFT_LIMIT * math.log(2)  # the score from which a row is shifted by its maximum


def score_inputs(rows, dtype=torch.float32):
    """Inputs whose scores are `rows` [T, S] and whose output is the weights: one-hot keys and values, scale 1."""
    rows = rows.to(dtype)
    eye = torch.eye(rows.shape[1], dtype=dtype)
    return [x[None, None].clone().requires_grad_() for x in (rows, eye, eye)]


def weights_of(rows, normalizer="softpick", mask=None, dtype=torch.float32):
    """[T, S] weights as tiled attention sees them."""
    mask = torch.ones(1, 1, *rows.shape, dtype=torch.bool) if mask is None else mask
    return tiled_attention(*score_inputs(rows, dtype), mask, 1.0, normalizer)[0, :, 0].detach()


EXTREMES = torch.tensor(
    [
        *EXTREME_ROWS[:-1],
        [LIMIT - 1e-3, LIMIT - 2, -LIMIT, 1.0],
        [LIMIT + 1e-3, LIMIT - 2, -LIMIT, 1.0],
        [LIMIT + 1e-3, 100.0, -100.0, LIMIT - 1e-3],
        [-LIMIT - 1e-3, -LIMIT + 1e-3, -LIMIT, -40.0],
        EXTREME_ROWS[-1],
    ]
)


@pytest.mark.parametrize("normalizer", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", [None, 0, 2], ids=["all_seen", "first_hidden", "third_hidden"])
def test_extreme_rows_are_those_of_the_reference(normalizer, dtype, hidden):
    """All in one block, so that shifted and unshifted rows meet, beside rows that see nothing."""
    mask = torch.ones(1, 1, *EXTREMES.shape, dtype=torch.bool)
    mask[..., -1, :] = False
    if hidden is not None:
        mask[..., hidden] = False
    tensors = score_inputs(EXTREMES, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    grad = torch.randn(1, len(EXTREMES), 1, 4, generator=torch.Generator().manual_seed(0))
    ours = run(lambda *x: tiled_attention(*x, mask, 1.0, normalizer), tensors, grad)
    expected = run(lambda *x: reference_attention(*x, mask, 1.0, normalizer)[0], exact, grad)
    # At scores of 1e-5, e^x - 1 in float32 is good to 0.4%. The gradient of the keys is a sum over queries of up to
    # 1e4, the rest sums numbers of order 1.
    for ours_, expected_, size in zip(ours, expected, (1, 1, 1e4, 1), strict=True):
        assert_close(ours_, expected_, rtol=4e-3 if dtype == torch.float32 else 1e-9, atol=size * 2e-6)
    assert (ours[0][0, -1] == 0).all() and (ours[1][0, 0, -1] == 0).all()
    if normalizer == "softpick":
        nothing = [2, 3, 4, 12, 13]
        assert (ours[0][0, nothing] == 0).all() and (ours[1][0, 0, nothing] == 0).all()


@pytest.mark.parametrize("normalizer", BASES)
@given(
    rows=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5), min_size=1, max_size=6),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_invariants_of_weights(normalizer, rows, data):
    """The reference, sums, zeros, hidden and permuted keys; in float64, where a score of 1e4 is good to 1e-9."""
    rows = torch.tensor(rows, dtype=torch.float64)
    seen = data.draw(st.lists(st.booleans(), min_size=5, max_size=5))
    mask = torch.tensor(seen).expand(1, 1, *rows.shape)
    weights = weights_of(rows, normalizer, mask, torch.float64)
    assert_close(weights, attention_weights(rows, normalizer, mask[0, 0]), rtol=1e-9, atol=1e-11)
    assert weights.isfinite().all() and (weights >= 0).all() and (weights.sum(-1) <= 1 + 1e-9).all()
    assert (weights[:, ~mask[0, 0, 0]] == 0).all()
    if normalizer == "softpick":
        assert (weights[rows <= 0] == 0).all()
        with_zero = weights_of(torch.cat([rows, torch.zeros(len(rows), 1)], 1), dtype=torch.float64)
        assert (with_zero[:, 5] == 0).all()
        assert_close(with_zero[:, :5], weights_of(rows, dtype=torch.float64))
    order = data.draw(st.permutations(range(5)))
    permuted = weights_of(rows[:, order], normalizer, mask[..., order], torch.float64)
    assert_close(permuted, weights[:, order], rtol=1e-9, atol=1e-11)
    changed = torch.where(mask[0, 0], rows, -rows + 17)
    assert torch.equal(weights_of(changed, normalizer, mask, torch.float64), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_and_gradients_are_exactly_zero_where_the_score_is_not_positive(dtype):
    """Rows below and above the shift limit, alone and together: SIMD and scalar exp2 may differ by a bit."""
    near = torch.logspace(-40, 4, 500, dtype=torch.float64).to(dtype)
    tops = torch.cat([torch.linspace(1e-6, 30, 40), torch.linspace(27, 130, 60), torch.tensor([1e3, 1e4])]).to(dtype)
    key = torch.cat([-near, torch.zeros(7, dtype=dtype), torch.ones(1, dtype=dtype)])
    key = torch.stack([key, torch.zeros_like(key)], -1)
    key[-1] = torch.tensor([0.0, 1.0])  # score: the top of the row; the scores before it are `near` and 0
    ones = torch.ones(len(key), 1, dtype=dtype)
    ones[-1] = 0
    for rows in [tops[i : i + n] for n in (1, 7, len(tops)) for i in range(0, len(tops), n)]:
        query = torch.stack([torch.ones_like(rows), rows], -1)
        for sign in (1.0, 0.0):  # 0: every score but the top is 0
            value = ones[None, None].clone().requires_grad_()
            mask = torch.ones(1, 1, len(rows), len(key), dtype=torch.bool)
            out = tiled_attention((query * torch.tensor([sign, 1.0]))[None, None], key[None, None], value, mask, 1.0)
            out.sum().backward()
            assert (out == 0).all()
            assert (value.grad[0, 0, :-1] == 0).all() and value.grad[0, 0, -1] > 0


@pytest.mark.parametrize("top", [1.0, 60.0, 1e4])
def test_hidden_keys_weigh_exactly_zero(top):
    """A value of 1e30 behind a weight of one bit would show."""
    rows = torch.full((3, 40), 0.25)
    rows[:, 0] = top
    query, key, value = (x.detach() for x in score_inputs(rows))
    mask = (torch.arange(40) < 20).expand(1, 1, 3, 40)
    clean = tiled_attention(query, key, value, mask, 1.0)
    value[..., 20:, :] = 1e30
    assert torch.equal(tiled_attention(query, key, value, mask, 1.0)[..., :20], clean[..., :20])
    assert (tiled_attention(query, key, value, mask, 1.0)[..., 20:] == 0).all()


@pytest.mark.parametrize("normalizer", BASES)
@pytest.mark.parametrize("tensor", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_and_inf_reach_exactly_the_rows_that_see_them(normalizer, tensor, bad, dtype):
    (query, key, value), grad = inputs(2, 4, 2, 130, 130, 8, 8, dtype)
    named = {"query": query.detach(), "key": key.detach(), "value": value.detach()}
    visible = visible_keys(130, 130, CPU, sliding_window=50, position_ids=positions(2, 130))
    clean = tiled_attention(*named.values(), visible, 0.5, normalizer)
    clean_gradients = run(lambda *x: tiled_attention(*x, visible, 0.5, normalizer), (query, key, value), grad)[1:]
    head = 3 if tensor == "query" else 1  # of 4 query heads, of 2 key heads
    named[tensor] = named[tensor].clone()
    named[tensor][1, head, 60, 5] = bad
    touched = torch.zeros(2, 130, 4, dtype=torch.bool)
    if tensor == "query":
        touched[1, 60, 3] = True
    else:
        touched[1, :, 2:] = visible.dense(130, 130)[1, 0, :, 60][:, None]
    tensors = [x.requires_grad_() for x in named.values()]
    out, *gradients = run(lambda *x: tiled_attention(*x, visible, 0.5, normalizer), tensors, grad)
    assert touched.sum() in (1, 2 * visible.dense(130, 130)[1, 0, :, 60].sum())
    assert out[touched].isnan().all() and torch.equal(out[~touched], clean[~touched].double())
    # Backward: what a touched row gives is NaN too; another row of the batch, another key head never is.
    dq, clean_dq = (x[0].transpose(1, 2) for x in (gradients, clean_gradients))
    assert dq[touched].isnan().all() and gradients[1][1, 1, 60].isnan().any()
    assert torch.equal(dq[~touched], clean_dq[~touched])
    for ours, expected in zip(gradients, clean_gradients, strict=True):
        assert torch.equal(ours[0], expected[0])
        assert torch.equal(ours[1, : ours.shape[1] // 2], expected[1, : ours.shape[1] // 2])


@pytest.mark.parametrize("normalizer", BASES)
@pytest.mark.parametrize("token", [0, 1, 63, 64, 100, 129])
@pytest.mark.parametrize("size", [1.0, 300.0], ids=["like_others", "crosses_the_shift_limit"])
def test_changing_a_token_leaves_earlier_rows_bit_equal(normalizer, token, size):
    (query, key, value), _ = inputs(2, 4, 2, 130, 130, 16, 16, torch.float32)
    visible = visible_keys(130, 130, CPU)
    before = tiled_attention(query, key, value, visible, 0.25, normalizer)
    changed = [x.detach().clone() for x in (query, key, value)]
    for i, x in enumerate(changed):
        x[:, :, token] = size * torch.randn(x[:, :, token].shape, generator=torch.Generator().manual_seed(i))
    after = tiled_attention(*changed, visible, 0.25, normalizer)
    assert torch.equal(after[:, :token], before[:, :token])
    assert not torch.equal(after[:, token], before[:, token])


@pytest.mark.parametrize("normalizer", BASES)
def test_packed_documents_equal_the_same_documents_alone(normalizer):
    lengths = [1, 70, 2, 64, 33]
    tensors, grad = inputs(1, 4, 2, sum(lengths), sum(lengths), 16, 16, torch.float32)
    boundaries = torch.tensor([0, *lengths]).cumsum(0)
    documents = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = visible_keys(sum(lengths), sum(lengths), CPU, position_ids=documents)
    together = run(lambda *x: tiled_attention(*x, packed, 0.5, normalizer), tensors, grad)
    for start, length in zip(boundaries.tolist(), lengths, strict=False):
        piece = slice(start, start + length)
        document = [x.detach()[:, :, piece].requires_grad_() for x in tensors]
        causal = visible_keys(length, length, CPU)
        alone = run(lambda *x, c=causal: tiled_attention(*x, c, 0.5, normalizer), document, grad[:, piece])
        assert_close(together[0][:, piece], alone[0], rtol=1e-6, atol=1e-6)
        assert_close([x[:, :, piece] for x in together[1:]], alone[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalizer", BASES)
@pytest.mark.parametrize("padded", [False, True])
def test_a_row_does_not_depend_on_its_batch(normalizer, padded):
    tensors, grad = inputs(3, 4, 2, 100, 100, 16, 16, torch.float32)
    mask = torch.arange(100) < torch.tensor([100, 40, 77])[:, None]
    together = run(
        lambda *x: tiled_attention(
            *x, visible_keys(100, 100, CPU, padding_mask=mask if padded else None), 0.5, normalizer
        ),
        tensors,
        grad,
    )
    for row in range(3):
        visible = visible_keys(100, 100, CPU, padding_mask=mask[row : row + 1] if padded else None)
        one = [x.detach()[row : row + 1].requires_grad_() for x in tensors]
        alone = run(lambda *x, v=visible: tiled_attention(*x, v, 0.5, normalizer), one, grad[row : row + 1])
        assert_close([x[row : row + 1] for x in together], alone, rtol=1e-6, atol=1e-6)


def test_cached_decoding_equals_the_rows_of_one_pass():
    """Token by token and in chunks, with the keys so far."""
    (query, key, value), _ = inputs(2, 4, 2, 70, 70, 16, 16, torch.float32)
    whole = tiled_attention(query, key, value, visible_keys(70, 70, CPU), 0.5)
    for edges in (range(71), (0, 1, 5, 37, 70)):
        for first, last in zip(edges, edges[1:], strict=False):
            visible = visible_keys(last - first, last, CPU, query_offset=first)
            part = tiled_attention(query[:, :, first:last], key[:, :, :last], value[:, :, :last], visible, 0.5)
            assert_close(part, whole[:, first:last], rtol=1e-6, atol=1e-6)


def test_is_linear_in_values_and_blind_to_hidden_garbage():
    (query, key, value), _ = inputs(1, 2, 2, 70, 70, 8, 8, torch.float64)
    visible = visible_keys(70, 70, CPU)
    once, other = (tiled_attention(query, key, v, visible, 0.5) for v in (value, value.cos()))
    assert_close(tiled_attention(query, key, 2 * value - value.cos(), visible, 0.5), 2 * once - other)
    padded = visible_keys(70, 70, CPU, padding_mask=torch.arange(70)[None] < 50)
    keys, values = key.detach().clone(), value.detach().clone()
    keys[:, :, 50:], values[:, :, 50:] = math.nan, math.inf
    clean, dirty = (tiled_attention(query, *kv, padded, 0.5) for kv in ((key, value), (keys, values)))
    assert torch.equal(dirty, clean)
    assert torch.equal(*(torch.autograd.grad(out.sum(), query)[0] for out in (clean, dirty)))
