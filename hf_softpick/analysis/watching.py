"""Look into one forward pass of any causal LM: what each attention was called with, what each part put out.

No weights are asked for and nothing of the model changes: while the block runs, the registry of attentions holds one
that reports each call under the name in force.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_softpick.analysis.attention_rows import AttentionCall
from hf_softpick.modeling.attention_interface import REGISTERED, UNSUPPORTED, visible_of_call, what_is_computed
from hf_softpick.modeling.compat import attention_of
from hf_softpick.modeling.normalizers import NORMALIZERS
from hf_softpick.modeling.visibility import VisibleKeys, check_mask

PARTS = ("hidden", "attention", "mlp")
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|ffn|feed_forward|feedforward|moe")
# What these functions cannot repeat; softcap and sinks are arguments of theirs.
_UNSUPPORTED = {name: what for name, what in UNSUPPORTED.items() if name not in ("softcap", "s_aux", "sinks")}


class Block(NamedTuple):
    """One decoder layer: its module, its attention, and its MLP if it has one that can be told apart."""

    layer: nn.Module
    attention: nn.Module
    mlp: nn.Module | None


def decoder_blocks(model: PreTrainedModel) -> list[Block]:
    """The decoder layers of `model` in order.

    Raises:
        ValueError: no list of modules has an attention in each of its elements.
    """
    lists = ([_block(layer) for layer in part] for part in model.modules() if isinstance(part, nn.ModuleList))
    found = [blocks for blocks in lists if blocks and None not in blocks]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no list of layers with an attention in each, so its layers cannot be told "
            "apart. Expected a decoder of transformers, such as Llama, Qwen, Gemma or GPT-NeoX."
        )
    return max(found, key=len)


def _block(layer: nn.Module) -> Block | None:
    # Norms and dropouts are named after what they stand beside, and have no parts of their own.
    parts = {name: child for name, child in layer.named_children() if next(child.children(), None) is not None}
    attention = next((child for name, child in parts.items() if _ATTENTION.search(name)), None)
    mlp = next((child for name, child in parts.items() if _MLP.search(name)), None)
    return None if attention is None else Block(layer, attention, mlp)


@contextlib.contextmanager
def watch(
    model: PreTrainedModel,
    on_attention: Callable[[int, AttentionCall], None],
    on_output: Callable[[int, str, Tensor], None],
) -> Iterator[list[Block]]:
    """While the block runs, every forward pass of `model` reports from the inside.

    Args:
        on_attention: gets the layer and the call, after rotary embedding, before the weights are computed.
        on_output: gets the layer, one of PARTS and the output [B, T, hidden]: of the layer, its attention, its MLP.

    Raises:
        ValueError: an attention is called with something that statistics cannot repeat; the message names it.
    """
    blocks = decoder_blocks(model)
    layers = {module: index for index, block in enumerate(blocks) for module in block.attention.modules()}

    def leave(index: int, part: str) -> Callable:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            output = output[0] if isinstance(output, (tuple, list)) else output
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"{type(module).__name__} gives a {type(output).__name__}, where a tensor was expected."
                )
            on_output(index, part, output)

        return hook

    with contextlib.ExitStack() as stack:
        stack.callback(layers.clear)  # whoever still holds our attention then passes through it unseen
        for index, block in enumerate(blocks):
            for part, module in zip(PARTS, block, strict=True):
                if module is not None:
                    stack.callback(module.register_forward_hook(leave(index, part)).remove)
        for name in {attention_of(getattr(block.attention, "config", model.config)) for block in blocks}:
            stack.enter_context(_registered(name, on_attention, layers))
        yield blocks


@contextlib.contextmanager
def _registered(
    name: str, report: Callable[[int, AttentionCall], None], layers: dict[nn.Module, int]
) -> Iterator[None]:
    """Under `name`, an attention that reports those of `layers` and then does what it did; others notice nothing."""
    held = ALL_ATTENTION_FUNCTIONS.get(name)

    def watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *rest, **kwargs):
        if module in layers:
            if rest:
                raise ValueError(f"{type(module).__name__} passes arguments by position, which cannot be read here.")
            report(layers[module], read_call(name, module, query, key, mask, kwargs))
        # transformers keeps "eager" beside each model, and not in its registry.
        function = held or sys.modules[type(module).__module__].eager_attention_forward
        return function(module, query, key, value, mask, *rest, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = watched
    try:
        yield
    finally:
        if ALL_ATTENTION_FUNCTIONS.get(name) is watched:  # else another watch, of another thread, stands on it
            del ALL_ATTENTION_FUNCTIONS[name]
            if held is not None and ALL_ATTENTION_FUNCTIONS.get(name) is not held:  # it was an override itself
                ALL_ATTENTION_FUNCTIONS[name] = held


def read_call(
    implementation: str, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> AttentionCall:
    """A call of transformers' attention interface in our terms.

    Raises:
        ValueError: it holds something that changes the weights and is not understood here; the message names it.
    """
    name = f"{type(module).__name__} with attn_implementation={implementation!r}"
    for argument, meaning in _UNSUPPORTED.items():
        if kwargs.get(argument) is not None:
            raise ValueError(f"{name} uses {meaning}, of which no statistics can be made.")
    causal = kwargs.get("is_causal")
    if not (causal if causal is not None else getattr(module, "is_causal", True)):
        raise ValueError(f"{name} is not causal; statistics are defined for causal attention.")
    sinks = kwargs.get("s_aux") if kwargs.get("s_aux") is not None else kwargs.get("sinks")
    if implementation in NORMALIZERS or implementation in REGISTERED:
        normalizer, _ = what_is_computed(module, implementation)
        window, positions = kwargs.get("sliding_window"), kwargs.get("position_ids")
        visible = visible_of_call(mask, query, key, window, positions, kwargs)
    else:
        normalizer = getattr(getattr(module, "config", None), "normalizer", "softmax")
        visible = _read_mask(name, implementation, query, key, mask)
    scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    return AttentionCall(query, key, visible, scale, normalizer, kwargs.get("softcap"), sinks)


def _read_mask(name: str, implementation: str, query: Tensor, key: Tensor, mask: Any) -> VisibleKeys | Tensor:
    refused = None
    if mask is None and "flash" in implementation:
        refused = "keeps documents apart by arguments of its own"
    elif mask is None:
        return VisibleKeys()
    elif not isinstance(mask, Tensor) or mask.ndim != 4:
        refused = "gets another mask than [B, 1 or H, T, S]"
    if refused:
        raise ValueError(f"{name} {refused}. Load the model with attn_implementation='sdpa'.")
    if mask.dtype == torch.bool:
        return check_mask(mask, query.shape[2], key.shape[2])
    # What softmax turns into exactly 0 is hidden; any other value would be a bias on the scores.
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if bool((~hidden & (mask != 0)).any()):
        raise ValueError(f"{name} adds a bias to its scores, of which no statistics can be made.")
    return ~hidden
