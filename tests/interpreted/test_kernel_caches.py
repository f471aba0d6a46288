"""softpick_attn_with_kvcache: decoding equals the rows of a prefill, in one part of the cache or in many."""

import math

import pytest
import torch
from kernel_cases import NORMALIZERS, Case, inputs, within
from torch.testing import assert_close

from softpick_attention import softpick_attn_func, softpick_attn_with_kvcache
from softpick_attention.forward import attention_forward
from softpick_attention.visibility import Visible

LENGTH = 40
# Garbage behind the cached tokens and in rows of the cache that nobody uses.
ROOM = 55


@pytest.fixture(scope="module")
def prefill():
    """q, k, v of two rows of 40 tokens, and their causal outputs by normalizer."""
    q, k, v, _ = inputs(Case(length=LENGTH, heads=(4, 2), batch=2))
    return q, k, v, {name: softpick_attn_func(q, k, v, causal=True, normalizer=name) for name in NORMALIZERS}


def cache_of(*tensors, rows=2):
    """Caches [rows, ROOM, Hkv, D] that hold NaN behind the tokens."""
    caches = [torch.full((rows, ROOM, *x.shape[2:]), math.nan) for x in tensors]
    for cache, x in zip(caches, tensors, strict=True):
        cache[: len(x), : x.shape[1]] = x
    return caches


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("splits", [0, 1, 2, 5])
@pytest.mark.parametrize("length", [1, 3])
def test_decoding_is_the_last_rows_of_the_prefill(normalizer, splits, length, prefill):
    q, k, v, expected = prefill
    out = softpick_attn_with_kvcache(
        q[:, -length:], *cache_of(k, v), cache_seqlens=LENGTH, causal=True, num_splits=splits, normalizer=normalizer
    )
    assert_close(out, expected[normalizer][:, -length:], rtol=1e-6, atol=1e-6)


def test_appends_in_place_token_by_token_and_in_chunks(prefill):
    q, k, v, expected = prefill
    for edges in ((0, 1, 2, 3, 4), (0, 5, 33, LENGTH)):
        caches = cache_of(k[:, :0], v[:, :0])
        for first, last in zip(edges, edges[1:], strict=False):
            new = slice(first, last)
            out = softpick_attn_with_kvcache(
                q[:, new], *caches, k[:, new], v[:, new], cache_seqlens=first, causal=True
            )
            assert_close(out, expected["softpick"][:, new], rtol=1e-6, atol=1e-6)
        for cache, x in zip(caches, (k, v), strict=True):
            assert torch.equal(cache[:, : edges[-1]], x[:, : edges[-1]]) and cache[:, edges[-1] :].isnan().all()


@pytest.mark.parametrize("splits", [0, 2])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_of_different_length(splits, dtype, prefill):
    """Lengths as a tensor; new tokens go behind each row's own."""
    q, k, v, expected = prefill
    lengths = torch.tensor([17, 30], dtype=dtype)
    rows = torch.arange(2)
    caches = cache_of(k, v)
    for cache in caches:
        for row in rows:
            cache[row, lengths[row] :] = math.nan
    query, key, value = (x[rows, lengths.long()][:, None] for x in (q, k, v))
    out, lse = softpick_attn_with_kvcache(
        query, *caches, key, value, cache_seqlens=lengths, causal=True, num_splits=splits, return_lse=True
    )
    assert_close(out[:, 0], expected["softpick"][rows, lengths.long()], rtol=1e-6, atol=1e-6)
    assert lengths.tolist() == [17, 30]
    for row, last in enumerate(lengths.tolist()):
        alone = (x[row : row + 1, : last + 1] for x in (k, v))
        _, expected_lse = softpick_attn_func(q[row : row + 1, last : last + 1], *alone, return_lse=True)
        assert_close(lse[row], expected_lse[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("splits", [0, 3])
def test_rows_of_the_cache_in_another_order(splits, prefill):
    """cache_batch_idx chooses rows, for reading and for appending."""
    q, k, v, expected = prefill
    caches = cache_of(k[:, :-1], v[:, :-1], rows=4)
    caches = [cache[[3, 1, 2, 0]].contiguous() for cache in caches]  # row 0 is now the fourth
    index = torch.tensor([3, 1])
    last = slice(LENGTH - 1, LENGTH)
    out = softpick_attn_with_kvcache(
        q[:, last], *caches, k[:, last], v[:, last], LENGTH - 1, index, causal=True, num_splits=splits
    )
    assert_close(out, expected["softpick"][:, last], rtol=1e-6, atol=1e-6)
    assert torch.equal(caches[0][index][:, :LENGTH], k) and caches[0][[0, 2]].isnan().all()


@pytest.mark.parametrize("splits", [0, 2])
def test_padding_on_the_left_and_key_masks(splits, prefill):
    q, k, v, _ = prefill
    pads = torch.tensor([0, 13])
    caches = cache_of(k, v)
    for cache in caches:
        cache[1, :13] = math.nan
    options = dict(causal=True, num_splits=splits)
    out = softpick_attn_with_kvcache(q[:, -2:], *caches, cache_seqlens=LENGTH, cache_leftpad=pads, **options)
    expected = [softpick_attn_func(q[:1, -2:], k[:1], v[:1], causal=True)]
    expected.append(softpick_attn_func(q[1:, -2:], k[1:, 13:], v[1:, 13:], causal=True))
    assert_close(out, torch.cat(expected), rtol=1e-6, atol=1e-6)
    keys = torch.arange(ROOM) >= pads[:, None]
    masked = softpick_attn_with_kvcache(q[:, -2:], *caches, cache_seqlens=LENGTH, key_mask=keys, **options)
    assert_close(masked, out, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [(5, -1), (0, 0), (7, 0)], ids=str)
@pytest.mark.parametrize("splits", [0, 2])
def test_windows(window, splits, prefill):
    q, k, v, _ = prefill
    expected = softpick_attn_func(q, k, v, causal=True, window_size=window)[:, -3:]
    out = softpick_attn_with_kvcache(
        q[:, -3:], *cache_of(k, v), cache_seqlens=LENGTH, causal=True, window_size=window, num_splits=splits
    )
    assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_without_lengths_the_cache_is_full_and_not_causal_sees_all(prefill):
    q, k, v, _ = prefill
    expected = softpick_attn_func(q[:, -2:], k, v)
    assert torch.equal(softpick_attn_with_kvcache(q[:, -2:], k, v), expected)
    new = softpick_attn_with_kvcache(q[:, -2:], *cache_of(k, v), k, v)  # no lengths and new keys: an empty cache
    assert_close(new, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(softpick_attn_with_kvcache(q[:, -2:], k, v, scale=0.25), expected)
    assert not softpick_attn_with_kvcache(q.clone().requires_grad_(), k, v).requires_grad


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("scale", [3.0, -20.0], ids=["both_signs", "far_below_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_number_of_splits_changes_rounding_only(normalizer, scale, dtype):
    """Also more splits than keys, splits without a key that is seen, and rows that see none at all."""
    q, k, v, _ = inputs(Case(length=2, extra=68, batch=3, dtype=dtype))
    if scale < 0:
        q, k = q.abs() + 1, k.abs() + 1
    start, end = (torch.tensor(x)[:, None].expand(3, 2) for x in ([0, 60, 5], [70, 64, 5]))
    visible = Visible(start=start, end=end)
    whole, lse = attention_forward(q, k, v, visible, scale, normalizer)
    assert (whole[2] == 0).all() and (whole[:2] == 0).all() == (scale < 0 and normalizer != "softmax")
    for splits in (1, 3, 9):
        out, split_lse = attention_forward(q, k, v, visible, scale, normalizer, splits)
        within(f"out of {splits} splits", out, whole, 1e-6 if dtype == torch.float32 else 4e-3)
        within(f"lse of {splits} splits", split_lse, lse, 1e-6 * lse.abs().nan_to_num(posinf=0) + 2e-6)


def test_splits_of_one_row_do_not_depend_on_its_batch(prefill):
    q, k, v, _ = prefill
    both = softpick_attn_with_kvcache(q[:, -1:], k, v, num_splits=3)
    for row in range(2):
        part = slice(row, row + 1)
        assert torch.equal(softpick_attn_with_kvcache(q[part, -1:], k[part], v[part], num_splits=3), both[part])


def test_the_cache_stays_out_of_autograd(prefill):
    q, k, v, expected = prefill
    caches = cache_of(k[:, :-1], v[:, :-1])
    new = [x[:, -1:].clone().requires_grad_() for x in (k, v)]
    out = softpick_attn_with_kvcache(q[:, -1:], *caches, *new, cache_seqlens=LENGTH - 1, causal=True)
    assert not any(x.requires_grad for x in (out, *caches))
    assert_close(out, expected["softpick"][:, -1:], rtol=1e-6, atol=1e-6)


def test_a_refused_call_leaves_the_cache_alone(prefill):
    q, k, v, _ = prefill
    caches = cache_of(k[:, :-1], v[:, :-1])
    key_mask = torch.ones(2, ROOM)
    with pytest.raises(ValueError, match="dtype torch.float32, expected torch.bool"):
        softpick_attn_with_kvcache(
            q[:, -1:], *caches, k[:, -1:], v[:, -1:], cache_seqlens=LENGTH - 1, key_mask=key_mask
        )
    assert all(cache[:, LENGTH - 1 :].isnan().all() for cache in caches)
