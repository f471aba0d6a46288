"""visible_keys against double loops over tokens: documents, padding, windows, caches; and what it refuses."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_softpick.modeling.attention_interface import attention_forward
from hf_softpick.modeling.attention_reference import reference_attention
from hf_softpick.modeling.documents import boundary_numbers, document_positions, numbered_begins, read_documents
from hf_softpick.modeling.visibility import visible_keys

CPU = torch.device("cpu")
quick = settings(max_examples=250, deadline=None, derandomize=True)


class Row(NamedTuple):
    """One row of a batch, token by token: its document, whether it is real, and its position (noise on padding)."""

    document: list[int]
    real: list[bool]
    position: list[int]


@st.composite
def row(draw, length, padded):
    """Documents that restart at position 0, with padding anywhere in them; padding counts for no position."""
    starts = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    real = draw(st.lists(st.booleans(), min_size=length, max_size=length)) if padded else [True] * length
    document, position, count = [], [], {}
    for index in range(length):
        document.append(document[-1] + starts[index] if document else 0)
        seen = count.get(document[-1], 0)
        position.append(seen if real[index] else draw(st.integers(0, 5)))
        count[document[-1]] = seen + real[index]
    return Row(document, real, position)


@st.composite
def calls(draw):
    """A batch of rows, of which the last tokens are the queries of this call."""
    padded, packed = draw(st.booleans()), draw(st.booleans())
    offset, queries = draw(st.integers(0, 7)), draw(st.integers(1, 9))
    rows = draw(st.lists(row(offset + queries, padded), min_size=1, max_size=3))
    if not packed:
        rows = [Row([0] * (offset + queries), r.real, r.position) for r in rows]
    dropped = draw(st.integers(0, offset))
    room = draw(st.sampled_from([0, 0, 1, 4]))
    window = draw(st.none() | st.integers(1, 6))
    longer_mask = draw(st.sampled_from([0, 0, 3]))
    return rows, padded, packed, offset, queries, dropped, room, window, longer_mask


def sees(r: Row, query: int, key: int, window: int | None) -> bool:
    """Whether the token at `query` sees the one at `key`, both counted in the whole row."""
    same = r.document[query] == r.document[key]
    return r.real[key] and same and key <= query and (window is None or key > query - window)


@given(call=calls())
@quick
def test_is_the_double_loop(call):
    """Packed or not, padded anywhere, any window, keys cached, dropped (sliding cache) or not yet written (static)."""
    rows, padded, packed, offset, queries, dropped, room, window, longer_mask = call
    total = offset + queries
    key_length = total - dropped + room
    # Tokens that are not there yet may be marked real; they are in the future of every query.
    mask = torch.tensor([r.real + [True] * longer_mask for r in rows]) if padded else None
    visible, position = visible_keys(
        queries,
        key_length,
        CPU,
        query_offset=offset,
        key_offset=dropped,
        padding_mask=mask,
        position_ids=torch.tensor([r.position[offset:] for r in rows]) if packed else None,
        sliding_window=window,
    )
    dense = visible.dense(queries, key_length)
    assert dense.dtype == torch.bool and dense.shape[1:] == (1, queries, key_length)
    start, end = visible.intervals(queries, key_length)
    assert start.shape == end.shape and start.dtype == end.dtype == torch.int32
    assert (visible.start is None) == (not padded and not packed)
    dense, position = dense.expand(len(rows), -1, -1, -1), position.expand(len(rows), -1)
    for b, r in enumerate(rows):
        for i in range(queries):
            query = offset + i
            columns = range(dropped, dropped + key_length)
            actual = dense[b, 0, i].tolist()
            if r.real[query]:
                assert actual == [key < total and sees(r, query, key, window) for key in columns]
                assert position[b, i] == sum(sees(r, query, key, None) for key in range(query))
            else:  # what padding sees is nobody's business, as long as it is real and not in the future
                assert not any(
                    seen and (key > query or not r.real[key]) for seen, key in zip(actual, columns, strict=True)
                )


@given(
    positions=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    offset=st.integers(0, 6),
    data=st.data(),
)
@quick
def test_any_position_ids_mean_what_is_documented(positions, offset, data):
    """Also positions that jump, or that reach behind the row: a break starts a document, position p reaches p back."""
    total = offset + len(positions)
    real = data.draw(st.lists(st.booleans(), min_size=total, max_size=total) | st.none())
    visible, place = visible_keys(
        len(positions),
        total,
        CPU,
        query_offset=offset,
        padding_mask=None if real is None else torch.tensor([real]),
        position_ids=torch.tensor([positions]),
    )
    dense = visible.dense(len(positions), total)[0, 0].tolist()
    real = real or [True] * total
    start, previous = 0, None
    for i, position in enumerate(positions):
        query = offset + i
        if not real[query]:
            continue
        if previous is not None and position - previous[0] not in (1, i - previous[1]):
            start = query
        previous = position, i
        before = [key for key in range(query) if real[key]]
        reach = before[max(len(before) - position, 0) :] + [query]
        expected = [key for key in reach if key >= start]
        assert [key for key, seen in enumerate(dense[i]) if seen] == expected
        assert place[0, i] == len(expected) - 1


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), window=st.none() | st.integers(1, 4))
@quick
def test_cu_seq_lens_are_documents(lengths, window):
    """Empty documents included; the same as position_ids that restart."""
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    length = sum(lengths)
    document = [d for d, count in enumerate(lengths) for _ in range(count)]
    documents = document_positions(numbered_begins(boundary_numbers(boundaries, length)))
    visible, position = visible_keys(length, length, CPU, position_ids=documents, sliding_window=window)
    r = Row(document, [True] * length, [])
    expected = [[sees(r, query, key, window) for key in range(length)] for query in range(length)]
    assert visible.dense(length, length)[0, 0].tolist() == expected
    assert documents.tolist() == position.tolist() == [[i for count in lengths for i in range(count)]]


def test_plain_causal_by_eye():
    visible, position = visible_keys(3, 5, CPU, query_offset=2)
    assert visible.dense(3, 5).int().tolist() == [[[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]]
    assert position.tolist() == [[2, 3, 4]] and visible == (None, None, None, 2, None, None)


def test_left_padding_and_packed_documents_by_eye():
    """Row 0: two padded tokens, then documents of 1 and 2 tokens. Row 1: one document."""
    visible, position = visible_keys(
        5,
        5,
        CPU,
        padding_mask=torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool(),
        position_ids=torch.tensor([[1, 1, 0, 0, 1], [0, 1, 2, 3, 4]]),
    )
    dense = visible.dense(5, 5).int()
    assert dense[0, 0, 2:].tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert dense[1, 0].tolist() == torch.ones(5, 5).tril().int().tolist()
    assert position[0, 2:].tolist() == [0, 0, 1] and position[1].tolist() == [0, 1, 2, 3, 4]


@given(call=calls())
@settings(quick, max_examples=60)
def test_one_call_equals_any_two_chunks(call):
    """Documents that go on from the cache: the second chunk knows them by position_ids alone."""
    rows, padded, packed, offset, queries, _, _, window, _ = call
    total = offset + queries
    mask = torch.tensor([r.real for r in rows]) if padded else None
    positions = torch.tensor([r.position for r in rows]) if packed else None

    def dense(first, last):
        visible, _ = visible_keys(
            last - first,
            last,
            CPU,
            query_offset=first,
            padding_mask=None if mask is None else mask[:, :last],
            position_ids=None if positions is None else positions[:, first:last],
            sliding_window=window,
        )
        return visible.dense(last - first, last).expand(len(rows), -1, -1, -1)

    real = torch.tensor([r.real for r in rows])[:, offset:, None]
    assert torch.equal(dense(0, total)[:, 0, offset:] & real, dense(offset, total)[:, 0] & real)


def test_offset_may_be_a_tensor():
    """Static caches keep their length on the device."""
    for options in ({}, {"sliding_window": 3}, {"padding_mask": torch.tensor([[False, False] + [True] * 6])}):
        a = visible_keys(3, 10, CPU, query_offset=5, **options)
        b = visible_keys(3, 10, CPU, query_offset=torch.tensor(5), **options)
        assert torch.equal(a[0].dense(3, 10), b[0].dense(3, 10)) and torch.equal(a[1], b[1])


def test_one_row_of_positions_serves_a_padded_batch():
    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    shared, _ = visible_keys(6, 6, CPU, padding_mask=mask, position_ids=positions)
    each, _ = visible_keys(6, 6, CPU, padding_mask=mask, position_ids=positions.expand(2, -1))
    assert torch.equal(shared.dense(6, 6), each.dense(6, 6))


def test_everything_is_linear_in_the_length():
    """A [T, S] mask of these lengths would take 40 GB."""
    length = 200_000
    positions = torch.arange(length)[None] % 5000
    visible, position = visible_keys(
        length, length, CPU, position_ids=positions, padding_mask=torch.ones(1, length).bool()
    )
    assert all(x.numel() == length for x in visible[:3])
    assert torch.equal(position, positions)


def test_masks_shorter_than_the_tokens_are_refused():
    with pytest.raises(ValueError, match="attention_mask covers 3 tokens, but cache and input together hold 7"):
        visible_keys(3, 7, CPU, query_offset=4, padding_mask=torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    "boundaries, message",
    [
        ([0, 3, 5], "runs from 0 to 5"),
        ([1, 3, 6], "runs from 1 to 6"),
        ([0, 4, 3, 6], "expected to rise from 0"),
        ([6], r"expected \[documents \+ 1\]"),
        ([[0, 3, 6]], r"expected \[documents \+ 1\]"),
    ],
)
def test_boundaries_that_do_not_fit_are_refused(boundaries, message):
    with pytest.raises(ValueError, match=message):
        boundary_numbers(torch.tensor(boundaries), 6)


def test_boundaries_after_cached_tokens_are_refused():
    with pytest.raises(ValueError, match="cached tokens.*Use position_ids"):
        read_documents({"cu_seq_lens_q": torch.tensor([0, 3, 6])}, 1, 6, offset=4)


@pytest.mark.parametrize("window", [None, 4])
def test_a_call_without_a_mask_keeps_its_window(window):
    """As a model calls whose mask function was told of no window."""
    query, key, value = torch.randn(3, 1, 2, 12, 8, generator=torch.Generator().manual_seed(0)).unbind()
    distance = torch.arange(12)[:, None] - torch.arange(12)
    mask = (distance >= 0) & (distance < (window or 12))
    out, _ = attention_forward(torch.nn.Module(), query, key, value, None, 0.5, sliding_window=window, name="softpick")
    expected, _ = reference_attention(query, key, value, mask, 0.5)
    torch.testing.assert_close(out, expected)
