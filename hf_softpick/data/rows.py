"""Packed rows on disk: an Arrow file that is memory-mapped as a `datasets.Dataset`, written in bounded memory."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from hf_softpick.data.packing import RowPlan, fill_rows

_BATCH_TOKENS = 2**20


class PackedRows(Dataset):
    """A `datasets.Dataset` whose rows come as views of the memory-mapped file when a DataLoader asks for a batch.

    The general path of `datasets` costs about 100 microseconds a batch and copies twice; everything else is inherited.
    """

    _views: tuple[list[int], list[dict[str, np.ndarray]]] | None = None

    @classmethod
    def open(cls, path: Path) -> "PackedRows":
        """Memory-map the file that `write_rows` made; rows are NumPy arrays."""
        return cls.from_file(str(path)).with_format("numpy")

    def __getitems__(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        """The rows `keys`, in this order, as read-only views without a copy."""
        if self._indices is not None or self._format_type != "numpy" or self._format_columns is not None:
            return super().__getitems__(keys)
        if self._views is None:
            self._views = _views(self._data)
        firsts, batches = self._views
        at = np.searchsorted(firsts, keys, side="right") - 1
        if len(keys) and not 0 <= min(keys) <= max(keys) < len(self):
            raise IndexError(f"row index out of range: this data has {len(self)} rows")
        rows = []
        for key, batch in zip(keys, at.tolist(), strict=True):
            offset = key - firsts[batch]
            rows.append({name: column[offset] for name, column in batches[batch].items()})
        return rows

    def digest(self) -> str:
        """SHA-256 of all values, whatever version of Arrow wrote them in batches of whatever size."""
        digests = {name: hashlib.sha256() for name in self.column_names}
        for batch in _views(self._data)[1]:
            for name, column in batch.items():
                digests[name].update(np.ascontiguousarray(column))
        return " ".join(f"{name} {digest.hexdigest()}" for name, digest in sorted(digests.items()))

    def __getstate__(self) -> dict[str, Any]:
        """Without the views: a copy or another process maps the file anew instead of receiving its content."""
        state = self.__dict__.copy()
        state.pop("_views", None)
        return state


def write_rows(
    path: Path, plan: RowPlan, tokens: np.ndarray, pad_token_id: int, isolate_documents: bool, bar: Any
) -> None:
    """Write all rows of a plan to an Arrow file: int32 input_ids and position_ids of seq_len each, and num_tokens."""
    ids = List(Value("int32"), length=plan.seq_len)
    features = Features({"input_ids": ids, "position_ids": ids, "num_tokens": Value("int32")})
    rows_at_once = max(1, _BATCH_TOKENS // plan.seq_len)
    writer = ArrowWriter(path=str(path), features=features, writer_batch_size=rows_at_once)
    try:
        for begin in range(0, plan.num_rows, rows_at_once):
            end = min(begin + rows_at_once, plan.num_rows)
            *lists, num_tokens = fill_rows(plan, tokens, begin, end, pad_token_id, isolate_documents)
            columns = [pyarrow.FixedSizeListArray.from_arrays(values.reshape(-1), plan.seq_len) for values in lists]
            columns.append(pyarrow.array(num_tokens))
            writer.write_table(pyarrow.table(columns, schema=features.arrow_schema))
            bar.update(int(num_tokens.sum()))
        writer.finalize()
    finally:
        writer.close()


def _views(table: Any) -> tuple[list[int], list[dict[str, np.ndarray]]]:
    """First row and zero-copy column arrays of every record batch of a table."""
    firsts, batches, first = [], [], 0
    for batch in table.to_batches():
        columns = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            is_list = pyarrow.types.is_fixed_size_list(column.type)
            values = (column.flatten() if is_list else column).to_numpy(zero_copy_only=True)
            columns[name] = values.reshape(batch.num_rows, -1) if is_list else values
        firsts.append(first)
        batches.append(columns)
        first += batch.num_rows
    return firsts, batches
