"""Which tokens land where: nothing lost, nothing split without need, little padding, the same every time."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_softpick.data.packing import best_fit, fill_rows, hold_out, plan_rows


def lay_out(lengths):
    """Starts of documents that lie back to back, and tokens that are all different."""
    lengths = np.asarray(lengths, np.int64)
    return np.cumsum(lengths) - lengths, lengths, np.arange(1, lengths.sum() + 1, dtype=np.uint32)


def best_fit_one_by_one(lengths, capacity):
    """The definition: each item, longest first, into the fullest row with room."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, room in enumerate(rooms) if room >= length]
        if fitting:
            row = min(fitting, key=lambda row: rooms[row])
        else:
            row = len(rooms)
            rooms.append(capacity)
        rooms[row] -= length
    return sorted(rooms)


@given(
    capacity=st.integers(1, 40),
    data=st.data(),
)
def test_best_fit_equals_its_definition(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60))
    rows, num_rows = best_fit(np.array(lengths), capacity)
    rooms = capacity - np.bincount(rows, weights=lengths, minlength=num_rows).astype(int)
    assert sorted(rooms.tolist()) == best_fit_one_by_one(lengths, capacity)


def test_one_document_a_row():
    starts, lengths, tokens = lay_out([3, 12, 8, 1, 19])
    plan = plan_rows(starts, lengths, 8, 0, one_document=True)
    ids, positions, num_tokens = fill_rows(plan, tokens, 0, plan.num_rows, 0, isolate_documents=True)
    rows = sorted(ids[row, :count].tolist() for row, count in enumerate(num_tokens))
    whole = tokens.tolist()
    assert rows == [
        whole[:3],
        whole[3:11],
        whole[11:15],
        whole[15:23],
        whole[23:24],
        whole[24:32],
        whole[32:40],
        whole[40:],
    ]
    assert all((row[:count] == np.arange(count)).all() for row, count in zip(positions, num_tokens, strict=True))


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=50), seq_len=st.integers(8, 33), seed=st.integers(0, 9)
)
def test_every_token_is_in_one_row_in_order_and_short_documents_whole(lengths, seq_len, seed):
    starts, lengths, tokens = lay_out(lengths)
    plan = plan_rows(starts, lengths, seq_len, seed)
    ids, positions, num_tokens = fill_rows(plan, tokens, 0, plan.num_rows, 0, isolate_documents=True)
    assert ids.shape == positions.shape == (plan.num_rows, seq_len)
    assert ids.dtype == positions.dtype == num_tokens.dtype == np.int32
    is_text = np.arange(seq_len) < num_tokens[:, None]
    assert sorted(ids[is_text].tolist()) == tokens.tolist()
    assert (ids[~is_text] == 0).all()
    # Runs of positions 0, 1, 2 ... are the pieces; read back, each must be one stretch of one document.
    pieces = []
    for row, row_positions, count in zip(ids, positions, num_tokens, strict=True):
        bounds = [*np.flatnonzero(row_positions[:count] == 0), count]
        assert row_positions.tolist() == [
            position
            for begin, end in zip(bounds, [*bounds[1:], seq_len], strict=True)
            for position in range(end - begin)
        ]
        pieces += [row[begin:end].tolist() for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
    expected = []
    for start, length in zip(starts, lengths, strict=True):
        document = tokens[start : start + length].tolist()
        expected += [document[at : at + seq_len] for at in range(0, length, seq_len)]
    assert sorted(pieces) == sorted(expected)
    assert plan.num_cut == sum(lengths > seq_len)
    assert plan.padding == pytest.approx(1 - lengths.sum() / ids.size)


@pytest.mark.parametrize(
    ("mean", "sigma", "seq_len"), [(6.3, 1.1, 2048), (6.3, 1.1, 512), (7.5, 1.5, 4096), (3.0, 1.0, 128)]
)
def test_padding_of_realistic_lengths_is_at_most_two_in_a_thousand(mean, sigma, seq_len):
    """Log-normal lengths, as of web text and code; median 540 tokens for the first."""
    lengths = np.random.default_rng(0).lognormal(mean, sigma, 30_000).astype(np.int64) + 1
    plan = plan_rows(np.cumsum(lengths) - lengths, lengths, seq_len, 0)
    assert plan.num_tokens == lengths.sum()
    assert plan.padding <= 0.002


def test_time_does_not_grow_with_the_square_of_the_documents():
    """A row by row search would take minutes here. The benchmark measures speed; this only catches a wrong order."""
    lengths = np.random.default_rng(0).integers(1, 2000, 200_000)
    begin = time.perf_counter()
    plan = plan_rows(np.cumsum(lengths) - lengths, lengths, 2048, 0)
    assert time.perf_counter() - begin < 20
    assert plan.padding < 0.002


def test_order_is_mixed_and_depends_on_the_seed_alone():
    starts, lengths, _ = lay_out([30] * 200)
    plans = [plan_rows(starts, lengths, 64, seed) for seed in (1, 1, 2)]
    assert (plans[0].starts == plans[1].starts).all()
    assert (plans[0].starts != plans[2].starts).any()
    assert (np.diff(plans[0].starts) < 0).mean() > 0.3
    together = np.abs(np.diff(plans[0].starts.reshape(-1, 2), axis=1))
    assert (together > 60).mean() > 0.8, "documents of equal length that are neighbours in the source share a row"


def test_positions_count_through_the_row_without_isolation():
    starts, lengths, tokens = lay_out([3, 4, 2])
    plan = plan_rows(starts, lengths, 10, 0)
    _, positions, num_tokens = fill_rows(plan, tokens, 0, 1, 0, isolate_documents=False)
    assert positions.tolist() == [list(range(10))]
    assert num_tokens.tolist() == [9]


def test_part_of_the_rows_is_that_part():
    starts, lengths, tokens = lay_out(np.random.default_rng(3).integers(1, 50, 100))
    plan = plan_rows(starts, lengths, 32, 0)
    whole = fill_rows(plan, tokens, 0, plan.num_rows, 0, True)
    part = fill_rows(plan, tokens, 5, 9, 0, True)
    for all_rows, some in zip(whole, part, strict=True):
        assert (all_rows[5:9] == some).all()


@given(
    texts=st.lists(st.integers(0, 20), min_size=1, max_size=60),
    share=st.floats(0.001, 0.9),
)
def test_no_text_is_on_both_sides(texts, share):
    """Hashes of 21 different texts, so that duplicates are common."""
    hashes = np.array([text * 0x9E3779B97F4A7C15 % 2**64 for text in texts], np.uint64)
    held = hold_out(hashes, np.full(len(texts), 7), share)
    assert not set(hashes[held]) & set(hashes[~held])
    assert held.any()
    assert not held.all() or len(set(texts)) == 1


def test_held_out_share_is_in_tokens():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**63, 5000, np.int64).astype(np.uint64)
    lengths = generator.integers(1, 2000, 5000)
    held = hold_out(hashes, lengths, 0.02)
    assert lengths[held].sum() / lengths.sum() == pytest.approx(0.02, abs=0.001)
    assert not hold_out(hashes, lengths, 0.0).any()


@pytest.mark.parametrize("lengths", [[100_000, 50, 60, 70, 80], [90_000] * 2 + [10] * 50, [40, 60]])
def test_large_text_is_not_held_out(lengths):
    """Whatever its hash: an epoch would be trained on four notes, or on nothing but notes."""
    lengths = np.array(lengths)
    for seed in range(30):
        hashes = np.random.default_rng(seed).integers(0, 2**63, len(lengths), np.int64).astype(np.uint64)
        held = hold_out(hashes, lengths, 0.02)
        assert 0 < lengths[held].sum() <= max(0.03 * lengths.sum(), lengths.min())


def test_text_that_is_most_of_the_corpus_by_repetition_is_not_held_out():
    hashes = np.array([1] * 900 + list(range(2, 102)), np.uint64)
    held = hold_out(hashes, np.full(1000, 10), 0.02)
    assert held.sum() == 20 and not held[:900].any()
