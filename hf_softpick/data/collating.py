"""Packed rows to a batch of tensors: the step that runs in every DataLoader worker."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100


class PackedCollator:
    """Stack packed rows and make labels that never cross a document boundary.

    Labels are not shifted, the model does that: the label of position t is its own token. It is -100 on padding and on
    the first token of every document, which would otherwise be predicted from the document before it.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate rows of `prepare_data`.

        Args:
            rows: mappings with input_ids [T], position_ids [T] and num_tokens.

        Returns:
            input_ids, position_ids and labels, int64 [B, T].

        Raises:
            ValueError: `num_tokens` is missing, without which padding cannot be told from text.
        """
        if "num_tokens" not in rows[0]:
            raise ValueError(
                f"packed rows have columns {sorted(rows[0])}, 'num_tokens' is missing: set remove_unused_columns=False"
            )
        input_ids, position_ids = (np.stack([row[name] for row in rows]) for name in ("input_ids", "position_ids"))
        num_tokens = np.array([row["num_tokens"] for row in rows])
        is_target = (position_ids != 0) & (np.arange(input_ids.shape[1]) < num_tokens[:, None])
        batch = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "labels": np.where(is_target, input_ids, np.int32(IGNORE_INDEX)),
        }
        return {name: torch.from_numpy(values).long() for name, values in batch.items()}
