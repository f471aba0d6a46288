"""Packed rows behave as any `datasets.Dataset`; the fast path gives what the general one gives."""

import copy
import pickle

import numpy as np
import pytest
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm import tqdm

from hf_softpick.data import rows
from hf_softpick.data.collating import PackedCollator
from hf_softpick.data.packing import plan_rows
from hf_softpick.data.rows import PackedRows, write_rows


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """40 rows in record batches of 4, so that keys lie in several."""
    monkeypatch.setattr(rows, "_BATCH_TOKENS", 64)
    lengths = np.random.default_rng(0).integers(1, 40, 32)
    tokens = np.arange(lengths.sum(), dtype=np.uint16)
    plan = plan_rows(np.cumsum(lengths) - lengths, lengths, 16, 0)
    write_rows(tmp_path / "rows.arrow", plan, tokens, 7, True, tqdm(disable=True))
    return PackedRows.open(tmp_path / "rows.arrow")


def assert_rows_equal(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_views_equal_the_general_path(packed):
    keys = np.random.default_rng(1).permutation(len(packed)).tolist()
    assert len(packed) > 20
    assert_rows_equal(packed.__getitems__(keys), Dataset.__getitems__(packed, keys))
    assert packed.__getitems__([]) == []


@pytest.mark.parametrize("key", [-1, 10**6])
def test_key_out_of_range(packed, key):
    with pytest.raises(IndexError):
        packed.__getitems__([0, key])


def test_views_do_not_outlive_a_change_of_the_data(packed):
    packed.__getitems__([0])
    assert set(packed.remove_columns("num_tokens").__getitems__([3])[0]) == {"input_ids", "position_ids"}
    chosen = packed.select([5, 2])
    assert_rows_equal(chosen.__getitems__([1, 0]), packed.__getitems__([2, 5]))
    assert isinstance(packed.with_format(None).__getitems__([0])[0]["input_ids"], list)


def test_copies_map_the_file_anew(packed):
    packed.__getitems__([0])
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):  # noqa: S301
        assert "_views" not in vars(other)
        assert_rows_equal(other.__getitems__([0, 9]), packed.__getitems__([0, 9]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_loader(packed, num_workers):
    loader = DataLoader(packed, batch_size=4, collate_fn=PackedCollator(), num_workers=num_workers)
    batches = list(loader)
    assert sum(len(batch["labels"]) for batch in batches) == len(packed)
    assert np.array_equal(np.concatenate([batch["input_ids"].numpy() for batch in batches]), packed["input_ids"])
