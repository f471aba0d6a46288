"""Every private name of torch, transformers and DeepSpeed that this package reads, replaces or calls.

`tests/modeling/test_compat.py` has a test for each, and runs on the oldest and newest transformers that are supported:
all were read in torch 2.13, transformers 5.17 and 5.23, and DeepSpeed 0.19. Two methods of the Trainer are in
training/compat.py; what a class of ours declares for transformers to read (`_no_split_modules` and its like) stays
in the class.
"""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionMaskInterface, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.utils import is_tracing

# Where every config.json passes, and every choice of an attention but that of a kernel on the Hub passes the second.
WRITES_CONFIG = (PreTrainedConfig, "to_json_file")
READS_CONFIG = (PreTrainedConfig, "_dict_from_json_file")
CHOOSES_ATTENTION = (
    (PreTrainedModel, "_check_and_adjust_attn_implementation"),
    (PreTrainedModel, "get_correct_attn_implementation"),
)


def attention_of(config: PreTrainedConfig) -> str | None:
    """The attn_implementation in force; None before a model has chosen one."""
    return config._attn_implementation


def has_mask_function(name: str | None) -> bool:
    """Whether transformers makes masks for the attention of that name; it looks into the same dictionary itself."""
    return name in AttentionMaskInterface._global_mapping


def float32_modules(model: PreTrainedModel) -> set[str]:
    """Names of modules and parameters that stay float32 in a model of another dtype, as its class or itself says."""
    return set(model._keep_in_fp32_modules_strict or ())


def expect_missing(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Let the Trainer find the parameters `names` missing in a checkpoint without a warning."""
    model._keys_to_ignore_on_save = set(names)


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, also where ZeRO-3 has sharded it and left an empty tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds the parameter."""
    return hasattr(parameter, "ds_id")


def checkpoint_names() -> tuple[type, type, Callable]:
    """What is private of that which the metadata of a torch distributed checkpoint name in their pickle.

    The first says where a piece of a tensor lies, the others are parts of a tensor's description.
    """
    from torch.distributed.checkpoint import filesystem, metadata

    return filesystem._StorageInfo, metadata._MEM_FORMAT_ENCODING, torch.serialization._get_layout


def decomposition(operator: Any) -> Callable:
    """Decorator of what a custom operator is made of, for exporters that know none of ours: ONNX reads this table."""
    return register_decomposition(operator._opoverload)


def assert_async(condition: Tensor, message: str) -> None:
    """Raise RuntimeError where the bool [] `condition` is false; in a compiled graph too, and without waiting."""
    torch._assert_async(condition, message)


def sequence_is_sharded() -> bool:
    """Whether DeepSpeed's Ulysses gives this process a part of each row."""
    state = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    return getattr(state, "_SEQUENCE_PARALLEL_GROUP", None) is not None and (
        state.get_sequence_parallel_world_size() > 1
    )


def hook(owner: type, name: str, around: Callable) -> None:
    """Replace the method `name` of `owner` by one that calls `around(original, self, *args, **kwargs)`.

    Once: not again for another copy of this file, which may be Hub code.
    """
    held = owner.__dict__[name]
    original = held.__func__ if isinstance(held, classmethod) else held
    if getattr(original, "softpick_guard", False):
        return

    @functools.wraps(original)
    def hooked(self, *args, **kwargs):
        return around(original, self, *args, **kwargs)

    hooked.softpick_guard = True
    setattr(owner, name, classmethod(hooked) if isinstance(held, classmethod) else hooked)


class MaskParts(NamedTuple):
    """Causal attention, and what else hides keys.

    window: a query sees itself and the window - 1 keys before it; None sees all of them.
    documents: int64 [B, T], rising along a row; a query sees keys of the same number. None: every row is one.
    """

    window: int | None = None
    documents: Tensor | None = None


def mask_parts(mask_function: Callable) -> MaskParts | None:
    """What a mask function is made of that transformers' create_causal_mask or create_sliding_window_causal_mask hands
    to a registered one. None for every other, and while tracing for all but plain causal ones: call it instead.

    Recognised by the code of masking_utils itself, never by names or by trial. Reads the documents' numbers, which
    waits for the device, as transformers has just done to find them.
    """
    if mask_function is masking_utils.causal_mask_function:
        return MaskParts()
    if is_tracing() or not _masks_are_as_read():  # Dynamo has no closures of the functions that it makes
        return None
    if (window := _window(mask_function)) is not None:
        return MaskParts(window)
    both = _conjunction(mask_function)
    if both is None:
        return None
    for packed, seen in (both, both[::-1]):  # 5.17 names what is packed last
        if (documents := _held(packed, "packed_sequence_mask_function", "packed_sequence_mask")) is None:
            continue
        (documents,) = documents
        # 5.23 tells causality and window of positions inside the document, which say the same.
        remapped = _held(seen, "remap_positions_for_packed_sequence", "mask_function", "position_ids")
        seen, positions = remapped or (seen, None)
        window = _window(seen)
        if (window is not None or seen is masking_utils.causal_mask_function) and _agree(documents, positions):
            return MaskParts(window, documents)
    return None


def _held(function: Any, maker: str, *names: str) -> tuple[Any, ...] | None:
    """The closure `names` of `function`, if masking_utils' `maker` made it."""
    made_by = getattr(getattr(masking_utils, maker, None), "__code__", None)
    code = getattr(function, "__code__", None)
    if code is None or made_by is None or not any(code is constant for constant in made_by.co_consts):
        return None
    held = {name: cell.cell_contents for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)}
    return tuple(held[name] for name in names) if held.keys() == set(names) else None


def _conjunction(function: Any) -> tuple[Any, Any] | None:
    """The two functions that and_masks joined in `function`."""
    (joined,) = _held(function, "and_masks", "mask_functions") or ((),)
    return joined if len(joined) == 2 else None


def _window(function: Any) -> int | None:
    """The window of a causal mask with one."""
    overlay, causal = _conjunction(function) or (None, None)
    (window,) = _held(overlay, "sliding_window_overlay", "sliding_window") or (None,)
    is_size = isinstance(window, int) and not isinstance(window, bool) and window > 0
    return window if is_size and causal is masking_utils.causal_mask_function else None


def _agree(documents: Any, positions: Any) -> bool:
    """Whether `documents` rise, and `positions` go up by one inside each: they order its tokens as columns do."""
    if not isinstance(documents, Tensor) or documents.ndim != 2 or is_tracing(documents):
        return False
    steps = documents.diff(dim=-1)
    sound = (steps >= 0).all()
    if positions is not None:
        if not isinstance(positions, Tensor) or positions.shape != documents.shape:
            return False
        sound = sound & ((positions.diff(dim=-1) == 1) | (steps != 0)).all()
    return bool(sound)


@functools.cache
def _masks_are_as_read() -> bool:
    """Whether this version's functions still compute what `mask_parts` takes them for: tried once, on one row."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]], device="cpu")
    column = torch.arange(documents.shape[1], device="cpu")
    query, causal = column[:, None], column <= column[:, None]
    near, apart = causal & (column > query - 2), documents[0, :, None] == documents[0]
    joined = masking_utils.and_masks
    packed = masking_utils.packed_sequence_mask_function(documents)
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", lambda function, positions: function)
    window = masking_utils.sliding_window_causal_mask_function(2)
    expected = (
        (masking_utils.causal_mask_function, causal),
        (window, near),
        (joined(packed, remap(masking_utils.causal_mask_function, column[None] % 3)), causal & apart),
        (joined(packed, remap(window, column[None] % 3)), near & apart),
    )
    return all(torch.equal(function(0, 0, query, column), mask) for function, mask in expected)


__all__ = [
    "CHOOSES_ATTENTION",
    "MaskParts",
    "READS_CONFIG",
    "TorchDispatchMode",
    "WRITES_CONFIG",
    "assert_async",
    "attention_of",
    "checkpoint_names",
    "decomposition",
    "expect_missing",
    "float32_modules",
    "has_mask_function",
    "hook",
    "is_sharded",
    "mask_parts",
    "sequence_is_sharded",
    "whole_shape",
]
