"""What an attention that holds no weights checks before it computes, and the namespace of its operators."""

import hashlib

import torch
from torch import Tensor

from .visibility import VisibleKeys

# Differs for every copy of this file, so that the operators of Hub code never replace the package's. Hashed, because
# the module of Hub code is named after its folder, with any character in it.
OPERATORS = "softpick_" + hashlib.sha256(__name__.encode()).hexdigest()[:16]


def check_inputs(query: Tensor, key: Tensor, value: Tensor, visible: VisibleKeys | Tensor) -> None:
    """Refuse tensors that do not belong together.

    Raises:
        ValueError: shapes do not fit query [B, H, T, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv] and what they see,
            values are not floating, or the mask is not boolean.
    """
    _check_shapes(query, key, value)
    _check_visible(visible, query, key)


def explicit_mask(visible: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A bool mask that broadcasts to [B, H, T, S] as a view [B or 1, H or 1, T, S]."""
    return visible[(None,) * (4 - visible.ndim)].expand(-1, -1, query.shape[2], key.shape[2])


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    fits = (
        query.ndim == key.ndim == value.ndim == 4
        and key.shape[:3] == value.shape[:3]
        and query.shape[0] == key.shape[0]
        and query.shape[3] == key.shape[3]
        and key.shape[1] > 0
        and query.shape[1] % key.shape[1] == 0
    )
    if not fits:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit: expected "
            "[B, H, T, D], [B, Hkv, S, D] and [B, Hkv, S, Dv] with H a multiple of Hkv"
        )
    if not all(x.is_floating_point() for x in (query, key, value)):
        raise ValueError(
            f"query, key and value have dtypes {query.dtype}, {key.dtype}, {value.dtype}, expected floats"
        )


def _check_visible(visible: VisibleKeys | Tensor, query: Tensor, key: Tensor) -> None:
    batch, heads, length, _ = query.shape
    if isinstance(visible, VisibleKeys):
        keys, fits = visible.keys, True
        if visible.start is not None:
            intervals = tuple(visible.start.shape)
            fits = intervals == tuple(visible.end.shape) and intervals in ((1, length), (batch, length))
        if not fits or (keys is not None and tuple(keys.shape) != (batch, key.shape[2])):
            given = {name: tuple(x.shape) for name, x in visible._asdict().items() if isinstance(x, Tensor)}
            raise ValueError(
                f"the visible keys {given} do not fit {batch} rows of {length} queries and {key.shape[2]} keys: "
                "expected start and end [B or 1, T], keys [B, S]"
            )
        return
    if visible.dtype != torch.bool:
        raise ValueError(f"the mask has dtype {visible.dtype}, expected torch.bool with True = visible")
    wanted = (batch, heads, length, key.shape[2])
    shape = (1,) * (4 - visible.ndim) + tuple(visible.shape)
    if len(shape) != 4 or any(size not in (1, full) for size, full in zip(shape, wanted, strict=True)):
        raise ValueError(f"the mask has shape {tuple(visible.shape)}, expected one that broadcasts to {wanted}")
