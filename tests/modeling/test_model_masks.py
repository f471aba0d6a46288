"""Packing, padding and windows: every document must come out as if it ran alone."""

import pytest
import torch
from tiny_foreign import foreign_model
from tiny_softpick import (
    IMPLEMENTATIONS,
    NORMALIZERS,
    assert_same_gradients,
    close,
    double_parameters,
    oracle,
    oracle_loss,
    tiny_model,
    tokens,
)
from torch import Tensor

LENGTHS = [(70, 1, 9), (33, 47)]  # two rows of 80 tokens; 64 is a block of queries in the tiled form


def packed(lengths: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    """Tokens, position_ids and the documents of each row."""
    ids = tokens(len(lengths), sum(lengths[0]))
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return ids, position_ids, [list(row.split(list(n))) for row, n in zip(ids, lengths, strict=True)]


def boundaries(lengths: tuple[int, ...], dtype=torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def alone(model, rows: list[list[Tensor]]) -> Tensor:
    """Logits [B, T, vocab] of documents that ran alone, through the oracle."""
    parameters = double_parameters(model)
    return torch.stack([torch.cat([oracle(parameters, model.config, d)[0] for d in row]) for row in rows]).detach()


@pytest.mark.parametrize("mask", ["no mask", "ones"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_packed_documents_equal_documents_alone(normalizer, rows, use_cache, mask):
    """transformers itself stops isolating as soon as a cache or any 2-D mask is given."""
    model = tiny_model(normalizer)
    ids, position_ids, documents = packed(LENGTHS[:rows])
    attention_mask = torch.ones_like(ids) if mask == "ones" else None
    expected = alone(model, documents)
    labels = ids.masked_fill(position_ids == 0, -100)
    flat = [document for row in documents for document in row if len(document) > 1]
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        output = model(
            ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, labels=labels
        )
        close(output.logits, expected)
        parameters = double_parameters(model)
        assert_same_gradients(model, output.loss, parameters, oracle_loss(parameters, model.config, flat))


@pytest.mark.parametrize("with_positions", [True, False])
@pytest.mark.parametrize("normalizer", ["softpick", "softmax", "scaled_softpick"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cu_seq_lens_separate_documents(implementation, normalizer, with_positions):
    """What DataCollatorWithFlattening(return_flash_attn_kwargs=True) passes."""
    model = tiny_model(normalizer, implementation)
    ids, position_ids, documents = packed(LENGTHS[:1])
    cu = boundaries(LENGTHS[0])
    for arguments in ({"cu_seq_lens_q": cu, "cu_seq_lens_k": cu.clone()}, {"cu_seq_lens_q": cu}):
        if with_positions:
            arguments["position_ids"] = position_ids
        output = model(ids, labels=ids.masked_fill(position_ids == 0, -100), max_length_q=70, **arguments)
        close(output.logits, alone(model, documents))
        parameters = double_parameters(model)
        flat = [document for document in documents[0] if len(document) > 1]
        assert_same_gradients(model, output.loss, parameters, oracle_loss(parameters, model.config, flat))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, "rise from 0 to the row length 10"),
        ({"cu_seq_lens_q": torch.tensor([0, 7, 4, 10])}, "rise from 0"),
        ({"cu_seq_lens_q": torch.tensor([2, 10])}, "rise from 0"),
        ({"cu_seq_lens_q": torch.tensor([0, 10]), "cu_seq_lens_k": torch.tensor([0, 4, 10])}, "differ"),
        ({"cu_seq_lens_k": torch.tensor([0, 10])}, "cu_seq_lens_q missing"),
        ({"attention_mask": torch.ones(1, 9)}, "attention_mask covers 9 tokens"),
        ({"attention_mask": torch.zeros(1, 1, 10, 10)}, "torch.bool.*additive"),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_boundaries_and_masks_that_do_not_fit_are_refused(implementation, arguments, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        tiny_model(implementation=implementation)(tokens(1, 10), **arguments)


def test_cu_seq_lens_of_a_batch_are_refused():
    with pytest.raises(ValueError, match="one row"):
        tiny_model()(tokens(2, 10), cu_seq_lens_q=torch.tensor([0, 10]))


def padded(lengths: tuple[int, ...], side: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One document a row, padded with token 0 to the longest; its mask; the documents."""
    ids = tokens(len(lengths), max(lengths))
    index = torch.arange(max(lengths))
    count = torch.tensor(lengths)[:, None]
    mask = index >= max(lengths) - count if side == "left" else index < count
    return ids.masked_fill(~mask, 0), mask.long(), [row[m] for row, m in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("positions", ["counted", "generate", "none"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_padding_equals_no_padding(normalizer, side, positions):
    """Also for scaled_*, where log n must count tokens of the document and not columns of the row."""
    model = tiny_model(normalizer)
    ids, mask, documents = padded((70, 3, 41), side)
    position_ids = None
    if positions != "none":  # generate() gives padding a position of its own
        position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1 if positions == "generate" else 0)
    labels = ids.masked_fill(mask == 0, -100)
    for row, document in enumerate(documents):
        labels[row, ids.shape[1] - len(document) if side == "left" else 0] = -100
    parameters = double_parameters(model)
    expected = [oracle(parameters, model.config, document)[0] for document in documents]
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        for dtype in (torch.int64, torch.bool):
            output = model(ids, attention_mask=mask.to(dtype), position_ids=position_ids, labels=labels)
            for row, logits in enumerate(expected):
                close(output.logits[row][mask[row].bool()], logits)
        parameters = double_parameters(model)
        assert_same_gradients(model, output.loss, parameters, oracle_loss(parameters, model.config, documents))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalizer", ["softpick", "scaled_softpick"])
def test_packed_rows_with_a_padded_tail(normalizer, implementation):
    """What our data module makes: the tail is a document of its own, and here it is masked as well."""
    model = tiny_model(normalizer, implementation)
    ids, position_ids, documents = packed([(30, 20, 14), (50, 10, 4)])
    mask = torch.ones_like(ids)
    mask[0, 50:] = mask[1, 60:] = 0
    expected = alone(model, documents)
    for attention_mask in (mask, None):
        logits = model(ids, attention_mask=attention_mask, position_ids=position_ids).logits
        close(logits[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_in_the_middle_is_skipped(implementation):
    model, ids = tiny_model("scaled_softpick", implementation), tokens(1, 20)
    mask = torch.ones_like(ids)
    mask[0, 5:9] = 0
    kept = torch.cat([ids[0, :5], ids[0, 9:]])
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(ids, attention_mask=mask, position_ids=position_ids).logits[mask.bool()]
    close(logits, oracle(double_parameters(model), model.config, kept)[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_nothing_but_padding_are_finite(implementation):
    """generate() and lm-eval pad to batches; a NaN there would spread through the loss."""
    model, ids = tiny_model(implementation=implementation), tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[1] = 0
    output = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    close(output.logits[0], oracle(double_parameters(model), model.config, ids[0])[0])


@pytest.mark.parametrize("window", [2, 7, 65, 200])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_sliding_window(normalizer, implementation, window):
    """Plain, packed and padded; scaled_* still count from the start of the document, not of the window."""
    model = tiny_model(normalizer, implementation, sliding_window=window)
    ids, position_ids, documents = packed(LENGTHS)
    close(model(ids, position_ids=position_ids).logits, alone(model, documents))
    close(model(ids).logits, alone(model, [[row] for row in ids]))
    ids, mask, documents = padded((70, 20), "left")
    logits = model(ids, attention_mask=mask).logits
    for row, document in enumerate(documents):
        close(logits[row][mask[row].bool()], oracle(double_parameters(model), model.config, document)[0])


def test_windows_reach_the_gradients():
    model = tiny_model(sliding_window=5)
    ids, position_ids, documents = packed(LENGTHS[:1])
    labels = ids.masked_fill(position_ids == 0, -100)
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        parameters = double_parameters(model)
        expected = oracle_loss(parameters, model.config, [d for d in documents[0] if len(d) > 1])
        loss = model(ids, position_ids=position_ids, labels=labels).loss
        assert_same_gradients(model, loss, parameters, expected)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_boolean_4d_masks_are_honoured(implementation, heads):
    """A packed row said as an explicit mask."""
    model = tiny_model("rectified_softmax", implementation)
    ids, position_ids, documents = packed(LENGTHS)
    document = (position_ids == 0).cumsum(-1)
    mask = (document[:, :, None] == document[:, None, :]).tril()[:, None].expand(-1, heads, -1, -1)
    close(model(ids, attention_mask=mask, position_ids=position_ids).logits, alone(model, documents))


def test_softmax_through_sdpa_keeps_packed_documents_apart():
    """transformers' own implementations are allowed for softmax, and must be as right as ours."""
    model = tiny_model("softmax", "sdpa")
    ids, position_ids, documents = packed(LENGTHS)
    for arguments in ({}, {"use_cache": True}, {"attention_mask": torch.ones_like(ids)}):
        close(model(ids, position_ids=position_ids, **arguments).logits, alone(model, documents))


def test_scaled_softmax_through_sdpa_has_its_scale():
    model, ids = tiny_model("scaled_softmax", "sdpa"), tokens(1, 30)
    close(model(ids).logits[0], oracle(double_parameters(model), model.config, ids[0])[0])


def test_additive_2d_mask_is_refused_not_read_as_its_opposite():
    """Zeros mean "all visible" in an additive mask and "all padding" in transformers' 2-D masks."""
    model = tiny_model()
    ids = tokens(1, 12)
    for mask in (torch.zeros(1, 12), torch.tensor([[0.0] * 9 + [-1e9] * 3])):
        with pytest.raises(ValueError, match="attention_mask == 0"):
            model(ids, attention_mask=mask)
    torch.testing.assert_close(model(ids, attention_mask=torch.ones(1, 12)).logits, model(ids).logits)


def test_a_mask_that_numbers_documents_is_refused():
    """As packing collators make it; read as ones and zeros, its documents would see each other."""
    with pytest.raises(ValueError, match="if it numbers documents"):
        tiny_model()(tokens(1, 12), attention_mask=torch.tensor([[1] * 5 + [2] * 5 + [0] * 2]))


@pytest.mark.parametrize("window", [None, 4])
def test_4d_mask_keeps_documents_and_window(window):
    """A mask of the user's own replaces causality; it must not switch off isolation or the sliding window."""
    model = tiny_model(sliding_window=window)
    ids = tokens(1, 12)
    positions = torch.tensor([[*range(7), *range(5)]])
    causal = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    expected = model(ids, position_ids=positions).logits
    torch.testing.assert_close(model(ids, attention_mask=causal, position_ids=positions).logits, expected)


@pytest.mark.parametrize("boundaries", ["positions", "cu_seq_lens_q"])
def test_4d_mask_of_one_row_keeps_documents_apart(boundaries):
    model = tiny_model()
    ids = tokens(1, 12)
    given = {
        "positions": dict(position_ids=torch.tensor([[*range(7), *range(5)]])),
        "cu_seq_lens_q": dict(cu_seq_lens_q=torch.tensor([0, 7, 12])),
    }[boundaries]
    mask = (torch.arange(12) != 1)[None, None, None]
    expected = model(ids, attention_mask=mask.expand(1, 1, 12, 12), **given).logits
    torch.testing.assert_close(model(ids, attention_mask=mask, **given).logits, expected)


def test_3d_mask_is_refused():
    """Its first dimension would be read as heads."""
    with pytest.raises(ValueError, match=r"shape \(2, 12, 12\), expected \[B, tokens so far\] or \[B, 1 or H, T, S\]"):
        tiny_model()(tokens(2, 12), attention_mask=torch.ones(2, 12, 12, dtype=torch.bool))


INDEX = torch.tensor([[0] * 70 + [1] + [2] * 9, [0] * 33 + [1] * 47])  # of the documents in LENGTHS
NAMES = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens", "cu_seqlens_q")


@pytest.mark.parametrize("name", [*NAMES, "seq_idx"])
def test_boundaries_are_read_under_every_name(name):
    """TRL's packing passes position_ids, cu_seq_lens and seq_idx; others one of them."""
    model = tiny_model("scaled_softpick")
    ids, position_ids, documents = packed(LENGTHS[:1])
    value = INDEX[:1].int() if name == "seq_idx" else boundaries(LENGTHS[0])
    expected = alone(model, documents)
    close(model(ids, **{name: value}).logits, expected)
    everything = {"position_ids": position_ids, "cu_seq_lens_q": boundaries(LENGTHS[0]), "seq_idx": INDEX[:1]}
    close(model(ids, **{**everything, name: value}, max_length_q=70).logits, expected)
    wrong = value.clone()
    wrong[..., 1] += 1
    for others in ({"cu_seq_lens_q": boundaries(LENGTHS[0])}, {"position_ids": position_ids}):
        if name not in others and (name == "seq_idx" or "cu_seq_lens_q" in others):
            with pytest.raises(ValueError, match="differ|do not begin documents at the same tokens, first at 1"):
                model(ids, **{**others, name: wrong})


def test_seq_idx_of_a_batch_beside_padding_and_a_cache():
    model = tiny_model()
    ids, position_ids, documents = packed(LENGTHS)
    expected = alone(model, documents)
    close(model(ids, seq_idx=INDEX).logits, expected)
    mask = torch.ones_like(ids)
    mask[:, 79] = 0
    marked = INDEX.masked_fill(mask == 0, -1)  # padding is no document, whatever it is marked with
    for positions in (None, position_ids):
        close(model(ids, attention_mask=mask, seq_idx=marked, position_ids=positions).logits[:, :79], expected[:, :79])
    past = model(ids[:, :40], position_ids=position_ids[:, :40], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="seq_idx does not say how documents go on from a cache"):
        model(ids[:, 40:], seq_idx=INDEX[:, 40:], past_key_values=past)
    with pytest.raises(ValueError, match=r"seq_idx has shape \(80,\), expected \(2, 80\)"):
        model(ids, seq_idx=INDEX[0])


def test_what_flattening_collators_make():
    """TRL's padding_free and packing, and transformers' DataCollatorWithFlattening, with all that they can return."""
    from transformers import DataCollatorWithFlattening

    model, (_, _, documents) = tiny_model(), packed(LENGTHS[:1])
    rows = [{"input_ids": document} for document in documents[0]]
    for positions in (True, False):
        collate = DataCollatorWithFlattening(
            return_seq_idx=True, return_flash_attn_kwargs=positions, return_position_ids=positions
        )
        close(model(**collate(rows)).logits, alone(model, documents))


@pytest.mark.parametrize(("argument", "value"), [("is_causal", False), ("cache", object())])
def test_arguments_for_another_attention_are_refused(argument, value):
    with pytest.raises(ValueError, match="is_causal=False and a paged cache are not supported"):
        tiny_model()(tokens(1, 12), **{argument: value})


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "llama"])
def test_nan_reaches_the_rows_that_see_it_and_no_others(implementation):
    """Two tokens whose keys and values are NaN: one is padding, one stands in the first of two documents."""
    if implementation == "llama":
        model = foreign_model("llama", "softpick", initializer_range=0.2).eval()
    else:
        model = tiny_model("scaled_softpick", implementation)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, 2] = 0
    position_ids = torch.stack([torch.tensor([0, 1, 0, *range(2, 6), *range(5)]), torch.arange(12)])
    call = dict(attention_mask=mask, position_ids=position_ids, use_cache=False)
    embeds = model.get_input_embeddings()(ids).detach()
    clean = model(inputs_embeds=embeds, **call).logits
    embeds[0, 2] = embeds[0, 4] = float("nan")
    logits = model(inputs_embeds=embeds, **call).logits
    rows = torch.zeros(2, 12, dtype=torch.bool)
    rows[0, 4:7] = True
    real = mask.bool()
    assert logits[rows].isnan().all() and torch.equal(logits[real & ~rows], clean[real & ~rows])
