"""Packed rows to a batch of tensors: the step that runs in every DataLoader worker."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_softpick.modeling.documents import document_begins

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
        input_ids, position_ids = (
            torch.from_numpy(np.stack([row[name] for row in rows], dtype=np.int64))
            for name in ("input_ids", "position_ids")
        )
        num_tokens = torch.tensor([[int(row["num_tokens"])] for row in rows])
        no_target = document_begins(position_ids) | (torch.arange(input_ids.shape[1]) >= num_tokens)
        labels = input_ids.masked_fill(no_target, IGNORE_INDEX)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
