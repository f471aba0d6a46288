"""One rule for documents: everything that masks, labels or counts begins them at the same tokens as a double loop."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_softpick import tiny_model
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask

from hf_softpick.analysis.attention_statistics import documents_of
from hf_softpick.analysis.quantization import token_loss
from hf_softpick.analysis.samples import Samples, _unpacked, one_document_a_row
from hf_softpick.data.collating import PackedCollator
from hf_softpick.modeling import attention_interface
from hf_softpick.modeling.documents import document_positions, numbered_begins
from hf_softpick.modeling.softmax_masks import _flat_boundaries
from hf_softpick.modeling.visibility import visible_keys

SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
quick = settings(max_examples=60, deadline=None)


class Row(NamedTuple):
    """Token by token: the number of its document, its position there (noise on padding), whether it is no padding."""

    document: list[int]
    position: list[int]
    real: list[bool]


@st.composite
def batches(draw, padding=("none", "left", "right", "anywhere"), rows=2):
    """Rows of one length whose documents begin at any position, as those that go on from an earlier row do."""
    where, length, columns = draw(st.sampled_from(padding)), draw(st.integers(2, 10)), draw(st.booleans())
    batch = []
    for _ in range(draw(st.integers(1, rows))):
        holes = draw(st.integers(0, length - 1)) if where in ("left", "right") else 0
        real = [index >= holes if where == "left" else index < length - holes for index in range(length)]
        if where == "anywhere":
            real = draw(st.lists(st.booleans(), min_size=length, max_size=length).filter(any))
        document, position, number, before = [], [], 0, None
        for index, token in enumerate(real):
            value = draw(st.integers(0, 5))
            if token:
                if before is None:
                    value = draw(st.sampled_from([0, 0, 3]))
                elif draw(st.integers(0, 2)) == 0:
                    number, value = number + 1, draw(st.sampled_from([0, 0, 1, 2, 5]))
                    if value - before[0] in (1, index - before[1]):
                        value = 0  # what goes on is no boundary
                else:
                    value = before[0] + (index - before[1] if columns else 1)
                before = value, index
            document.append(number)
            position.append(value)
        batch.append(Row(document, position, real))
    return batch


BY_EYE = [Row([0, 0, 0, 1, 1, 1], [3, 4, 5, 2, 3, 4], [True] * 6)]
PADDED = [Row([0, 0, 0, 0, 1, 1, 1, 1], [3, 4, 0, 5, 2, 3, 4, 5], [True, True, False, True, True, True, True, False])]


def tensors(batch: list[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, position_ids, and the padding mask, which is None where nothing is padded; numbers of documents."""
    document, position, real = (torch.tensor(values) for values in zip(*batch, strict=True))
    ids = torch.randint(3, 64, position.shape, generator=torch.Generator().manual_seed(0))
    return ids, position, None if bool(real.all()) else real, document


def first_tokens(row: Row) -> list[int]:
    """Where documents begin, by a loop: the first real token, and those whose document is not that before them."""
    real = [index for index, token in enumerate(row.real) if token]
    return [i for at, i in enumerate(real) if at == 0 or row.document[i] != row.document[real[at - 1]]]


def visible(batch: list[Row]) -> Tensor:
    """bool [B, T, T] by the double loop; a query that is padding sees nothing."""

    def sees(row, query, key):
        return row.real[query] and row.real[key] and key <= query and row.document[query] == row.document[key]

    columns = range(len(batch[0].real))
    return torch.tensor([[[sees(row, query, key) for key in columns] for query in columns] for row in batch])


def assert_sees(found: list, batch: list[Row], begin: int = 0, end: int | None = None) -> None:
    """What the only layer let the queries `begin` to `end` see, in the one call that was recorded."""
    end = end or len(batch[0].real)
    (seen,) = found
    dense = seen if isinstance(seen, Tensor) else seen.dense(end - begin, end)
    real = torch.tensor([row.real for row in batch])[:, begin:end, None]
    assert torch.equal(dense.expand(len(batch), 1, -1, -1)[:, 0] & real, visible(batch)[:, begin:end, :end])
    found.clear()


@pytest.fixture(scope="module")
def models():
    """Ours and another with softpick, and what their layers were called with, read by what every call passes."""
    found, read = [], attention_interface.visible_of_call
    torch.manual_seed(0)
    llama = LlamaForCausalLM._from_config(LlamaConfig(**SIZES, num_key_value_heads=1), attn_implementation="softpick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_interface, "visible_of_call", lambda *args: found.append(read(*args)) or found[-1])
        yield tiny_model(num_hidden_layers=1), llama.eval(), found


@given(batch=batches(), cut=st.integers(1, 9), ones=st.booleans())
@example(BY_EYE, 3, False)
@example(BY_EYE, 5, True)
@example(PADDED, 4, False)
@settings(quick, max_examples=80)
@torch.no_grad()
def test_models_keep_documents_apart(models, batch, cut, ones):
    """Told by positions: without a mask or with one, in one call, and over a cache in two."""
    ids, position, real, document = tensors(batch)
    mask = torch.ones_like(ids) if ones and real is None else real
    cut = min(cut, ids.shape[1] - 1)
    for model in models[:2]:
        found = models[2]
        model(ids, position_ids=position, attention_mask=mask, use_cache=False)
        assert_sees(found, batch)
        counted = visible(batch).sum(-1) - 1
        if bool((position != counted)[torch.tensor([row.real for row in batch])].any()):
            continue  # over a cache, a position says how far back its document reaches
        cache = DynamicCache(config=model.config)
        for start, end in ((0, cut), (cut, ids.shape[1])):
            part = None if mask is None else mask[:, :end]
            given = dict(position_ids=position[:, start:end], attention_mask=part)
            model(ids[:, start:end], past_key_values=cache, use_cache=True, **given)
            assert_sees(found, batch, start, end)


@given(batch=batches(rows=1), name=st.sampled_from(["cu_seq_lens_q", "cu_seqlens", "seq_idx"]))
@example(PADDED, "cu_seq_lens_q")
@example(PADDED, "seq_idx")
@quick
@torch.no_grad()
def test_boundaries_are_documents_beside_any_padding(models, batch, name):
    """Also padding inside a document, which seq_idx may give a number of its own."""
    ids, _, real, document = tensors(batch)
    numbers = document if real is None else document.masked_fill(~real, -1)
    edges = torch.cat([torch.tensor([0]), document[0].diff().nonzero()[:, 0] + 1, torch.tensor([ids.shape[1]])])
    told = {name: numbers if name == "seq_idx" else edges.int()}
    ours, llama, found = models
    ours(ids, attention_mask=real, use_cache=False, **told)
    assert_sees(found, batch)
    position = document_positions(numbered_begins(document, real), real)
    llama(ids, attention_mask=real, position_ids=position, use_cache=False, **told)
    assert_sees(found, batch)


@given(batch=batches(padding=("none",)))
@example(BY_EYE)
@quick
def test_flash_attention_is_told_the_same_boundaries(batch):
    """Of rows laid end to end; softmax alone can run there."""
    position, length = tensors(batch)[1], len(batch[0].real)
    _, place = visible_keys(length, length, torch.device("cpu"), position_ids=position)
    begins = [row * length + first for row in range(len(batch)) for first in first_tokens(batch[row])]
    assert _flat_boundaries(place, len(batch))["cu_seq_lens_q"].tolist() == [*begins, len(batch) * length]


@given(batch=batches())
@example(BY_EYE)
@example(PADDED)
@quick
def test_statistics_count_the_same_documents(batch):
    _, position, real, _ = tensors(batch)
    found = documents_of(*position.shape, position, real, "cpu")
    length = position.shape[1]
    assert found.first.tolist() == [b * length + t for b, row in enumerate(batch) for t in first_tokens(row)]
    begin = -1
    for b, row in enumerate(batch):
        for t, token in enumerate(row.real):
            begin += t in first_tokens(row)
            assert found.index[b, t] == (begin if token else found.count)
            if token:
                assert found.position[b, t] == visible([row])[0, t].sum() - 1
    assert found.length.tolist() == torch.bincount(found.index.flatten(), minlength=found.count + 1)[:-1].tolist()


@given(batch=batches(padding=("none", "right")))
@example(BY_EYE)
@quick
def test_labels_samples_and_quantization_have_the_same_targets(models, batch):
    """The first token of a row is no target, whatever its position: what it goes on from is not there."""
    ids, position, _, _ = tensors(batch)
    counts = [sum(row.real) for row in batch]
    packed = [
        {"input_ids": i.numpy(), "position_ids": p.numpy().astype(np.int32), "num_tokens": n}
        for i, p, n in zip(ids, position, counts, strict=True)
    ]
    targets = [[t for t, token in enumerate(row.real) if token and t not in first_tokens(row)] for row in batch]
    labels = PackedCollator()(packed)["labels"]
    for i, found, expected in zip(ids, labels, targets, strict=True):
        assert found.tolist() == [int(i[t]) if t in expected else -100 for t in range(len(i))]
    documents = [
        i[begin:end].tolist()
        for i, row, count in zip(ids, batch, counts, strict=True)
        for begin, end in zip(first_tokens(row), [*first_tokens(row)[1:], count], strict=True)
    ]
    assert [document.ids.tolist() for document in _unpacked(packed, None)] == documents
    unpadded = [{"input_ids": i[:n], "position_ids": p[:n]} for i, p, n in zip(ids, position, counts, strict=True)]
    assert [row["input_ids"].tolist() for row in one_document_a_row(Samples("", unpadded)).rows] == documents
    rows = [{name: values[None] for name, values in row.items()} for row in unpadded if len(row["input_ids"]) > 1]
    if any(targets):
        read = []

        class Model(nn.Module):
            device = ids.device

            def forward(self, input_ids, position_ids, use_cache):
                weight = torch.arange(input_ids.shape[1])[None, :, None] + 1.0
                read.append((input_ids, logits := weight * torch.linspace(-1, 1, 64)))
                return SimpleNamespace(logits=logits)

        loss, count = token_loss(Model(), rows)
        assert count == sum(map(len, targets))
        losses = [
            -logits[0, t - 1].log_softmax(-1)[input_ids[0, t]].item()
            for (input_ids, logits), expected in zip(
                read, [t for t, n in zip(targets, counts, strict=True) if n > 1], strict=True
            )
            for t in expected
        ]
        assert loss == pytest.approx(sum(losses) / count, rel=1e-5)


@given(batch=batches(), window=st.none() | st.integers(1, 4))
@example(BY_EYE, None)
@example(PADDED, None)
@quick
def test_the_hub_kernel_sees_the_same(batch, window):
    """A mask as transformers makes it of padding; the kernel that would run is not looked at here."""
    pytest.importorskip("triton")
    from softpick_attention import hub

    _, position, real, _ = tensors(batch)
    rows, length = position.shape
    distance = torch.arange(length)[:, None] - torch.arange(length)
    near = distance < (window or length)
    mask = None
    if real is not None:
        mask = sdpa_mask(rows, length, length, attention_mask=real, allow_is_causal_skip=False) & near
    query, seen = torch.zeros(rows, 2, length, 4), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "attend", lambda q, k, v, visible, scale: (seen.append(visible), (q, None))[1])
        hub.flash_attn_forward(nn.Module(), query, query, query, mask, position_ids=position, sliding_window=window)
    (found,) = seen
    column = torch.arange(length)
    dense = (column >= found.start[..., None]) & (column < found.end[..., None])
    dense = dense if found.mask is None else dense & found.mask[:, 0]
    queries = torch.tensor([row.real for row in batch])[..., None]
    assert torch.equal(dense.expand(rows, -1, -1) & queries, visible(batch) & near)
