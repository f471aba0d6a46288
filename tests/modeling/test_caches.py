"""Caches: token by token, in chunks, static or dropping keys behind a window, every logit equals the uncached one."""

import pytest
import torch
from tiny_softpick import (
    IMPLEMENTATIONS,
    NORMALIZERS,
    close,
    double_parameters,
    oracle,
    tiny_model,
    tokens,
)
from torch import Tensor
from transformers import DynamicCache, StaticCache


def cache(kind: str, model, length: int):
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=length)


def chunked(
    model, ids: Tensor, sizes: list[int], past, mask: Tensor | None = None, position_ids: Tensor | None = None
):
    """Logits of `ids` fed in pieces through the cache `past`."""
    logits, seen = [], 0
    for size in sizes:
        end = seen + size
        logits.append(
            model(
                ids[:, seen:end],
                attention_mask=None if mask is None else mask[:, :end],
                position_ids=None if position_ids is None else position_ids[:, seen:end],
                past_key_values=past,
                use_cache=True,
            ).logits
        )
        seen = end
    assert seen == ids.shape[1]
    return torch.cat(logits, 1).detach()


def exact(model, document: Tensor) -> Tensor:
    return oracle(double_parameters(model), model.config, document)[0]


SIZES = {"token by token": [1] * 24, "prefill, then tokens": [17, *[1] * 7], "chunks": [9, 1, 10, 4]}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_cached_logits_equal_recomputed_ones(normalizer, kind, sizes):
    model, ids = tiny_model(normalizer), tokens(2, 24)
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        logits = chunked(model, ids, SIZES[sizes], cache(kind, model, 32))
        for row, document in enumerate(ids):
            close(logits[row], exact(model, document))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("window", [2, 6, 15, 40])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("normalizer", ["softpick", "scaled_softpick"])
def test_windows_over_caches_that_drop_keys(normalizer, kind, window, sizes):
    model, ids = tiny_model(normalizer, sliding_window=window), tokens(2, 24)
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        past = cache(kind, model, 32)
        logits = chunked(model, ids, SIZES[sizes], past)
        if kind == "dynamic" and window < 24:
            assert past.layers[0].keys.shape[2] < 24, "the cache did not drop anything, so this tests nothing"
        for row, document in enumerate(ids):
            close(logits[row], exact(model, document))


# A window counts columns, as in transformers, so behind a gap it is no longer that of the document alone.
@pytest.mark.parametrize(("side", "window"), [("left", None), ("left", 6), ("right", None)])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("normalizer", ["softpick", "scaled_softmax"])
def test_padded_batches_over_caches(normalizer, kind, side, window):
    """Prompts of 12, 5 and 9 tokens padded to 12, then 6 tokens each; positions as generate() makes them, or none."""
    model = tiny_model(normalizer, sliding_window=window)
    ids, lengths = tokens(3, 18), (12, 5, 9)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(0, 12 - length) if side == "left" else slice(length, 12)] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        # Without position_ids a token's position is its column, which is wrong behind a gap, in Llama as well.
        for position_ids in (positions, None) if side == "left" else (positions,):
            logits = chunked(model, ids, [12, *[1] * 6], cache(kind, model, 18), mask, position_ids)
            for row in range(3):
                real = mask[row].bool()
                close(logits[row][real], exact(model, ids[row][real]))


@pytest.mark.parametrize("sizes", [[24], [9, 1, 10, 4], [1] * 24, [12, 12]])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("normalizer", ["softpick", "scaled_softpick"])
def test_packed_rows_in_chunks(normalizer, kind, window, sizes):
    """Documents begin inside a chunk, at its edge, or went on from the chunk before."""
    model = tiny_model(normalizer, sliding_window=window)
    lengths = [(7, 1, 16), (12, 8, 4)]
    ids = tokens(2, 24)
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    expected = [torch.cat([exact(model, d) for d in row.split(n)]) for row, n in zip(ids, lengths, strict=True)]
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        for mask in (None, torch.ones_like(ids)):
            logits = chunked(model, ids, sizes, cache(kind, model, 24), mask, position_ids)
            for row in range(2):
                close(logits[row], expected[row])


def greedy(model, document: Tensor, count: int) -> Tensor:
    """The `count` tokens that follow `document`, recomputing everything through the oracle."""
    with torch.no_grad():
        for _ in range(count):
            document = torch.cat([document, exact(model, document)[-1].argmax()[None]])
    return document[-count:]


@pytest.mark.parametrize("kind", ["dynamic", "static", None])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalizer", ["softpick", "softmax", "scaled_softpick"])
def test_generate_equals_recomputation(normalizer, implementation, window, kind):
    """A left-padded batch through generate(), with every cache that runs on any machine, and with none."""
    model = tiny_model(normalizer, implementation, sliding_window=window)
    ids, lengths = tokens(3, 12), (12, 3, 8)
    mask = torch.stack([torch.arange(12) >= 12 - n for n in lengths]).long()
    options = {"use_cache": False} if kind is None else {"cache_implementation": kind}
    out = model.generate(
        ids.masked_fill(mask == 0, 0),
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=-1,
        **options,
    )
    for row, length in enumerate(lengths):
        assert out[row, 12:].tolist() == greedy(model, ids[row, 12 - length :], 8).tolist()


def test_generation_depends_on_the_whole_prompt():
    """Guards the test above: a model that ignores its context would pass it."""
    model, ids = tiny_model(), tokens(1, 12)
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 64
    assert greedy(model, ids[0], 8).tolist() != greedy(model, changed[0], 8).tolist()


def test_beam_search_reorders_the_cache():
    model, ids = tiny_model(), tokens(2, 9)
    options = dict(num_beams=3, max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_cached_softmax_through_sdpa():
    """transformers' own attention with our masks: static caches and windows included."""
    for window in (None, 6):
        model, ids = tiny_model("softmax", "sdpa", sliding_window=window), tokens(2, 24)
        for kind in ("dynamic", "static"):
            logits = chunked(model, ids, [9, 1, 10, 4], cache(kind, model, 24))
            for row, document in enumerate(ids):
                close(logits[row], exact(model, document))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_boundaries_at_the_first_call_of_a_cache(kind):
    """A static cache keeps its length, 0 here, on the device."""
    model, ids = tiny_model("scaled_softpick"), tokens(1, 12)
    past = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=16)
    arguments = {"cu_seq_lens_q": torch.tensor([0, 7, 12])}
    logits = model(ids, past_key_values=past, use_cache=True, **arguments).logits
    close(logits, model(ids, **arguments).logits)
    with pytest.raises(ValueError, match="cached tokens"):
        model(ids, past_key_values=past, use_cache=True, **arguments)
