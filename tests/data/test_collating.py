"""The batch that a model sees: no target crosses a document boundary, none is padding."""

import numpy as np
import pytest
import torch

from hf_softpick.data.collating import PackedCollator


def row(ids, positions, num_tokens):
    return {
        "input_ids": np.array(ids, np.int32),
        "position_ids": np.array(positions, np.int32),
        "num_tokens": np.int32(num_tokens),
    }


def test_labels_leave_out_first_tokens_and_padding():
    batch = PackedCollator()(
        [
            row([5, 6, 7, 5, 8, 9], [0, 1, 2, 0, 1, 2], 6),
            row([5, 6, 2, 2, 2, 2], [0, 1, 0, 1, 2, 3], 2),
        ]
    )
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 8, 9], [-100, 6, -100, -100, -100, -100]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 5, 8, 9], [5, 6, 2, 2, 2, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]]
    assert {values.dtype for values in batch.values()} == {torch.int64}


def test_padding_is_told_by_count_not_by_id():
    """Where PAD is EOS, a comparison of ids would also drop the EOS that ends a document."""
    batch = PackedCollator()([row([5, 6, 2, 2], [0, 1, 2, 0], 3)])
    assert batch["labels"].tolist() == [[-100, 6, 2, -100]]


def test_padding_of_one_document_rows_has_no_label_without_isolation():
    batch = PackedCollator()([row([5, 6, 2, 2], [0, 1, 2, 3], 2)])
    assert batch["labels"].tolist() == [[-100, 6, -100, -100]]


def test_lists_work_as_arrays_do():
    rows = [row([5, 6, 7], [0, 1, 0], 3)]
    lists = [{name: np.asarray(value).tolist() for name, value in one.items()} for one in rows]
    for name, values in PackedCollator()(rows).items():
        assert torch.equal(PackedCollator()(lists)[name], values)


def test_missing_count_is_refused():
    with pytest.raises(ValueError, match="remove_unused_columns"):
        PackedCollator()([{"input_ids": [1], "position_ids": [0]}])
