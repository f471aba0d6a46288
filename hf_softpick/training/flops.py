"""Floating point operations of a training step, and the share of the hardware's peak that they reach (MFU)."""

from typing import Any

from torch import nn

from hf_softpick.modeling.compat import whole_shape
from hf_softpick.modeling.proving import attention_layers

# Dense bf16 peaks in FLOP/s from the vendors' data sheets, without sparsity. First match wins, so longer names first.
PEAK_FLOPS = (
    ("B200", 2.25e15),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("RTX 4090", 165e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of one device in FLOP/s, None where we do not know it."""
    return next((peak for name, peak in PEAK_FLOPS if name in device_name), None)


def flops_per_token(model: nn.Module, config: Any, seq_len: int) -> float | None:
    """Forward and backward FLOPs of one token in a row of `seq_len`: 6 N + 12 L H D T; None for another kind of model.

    N counts every weight that multiplies something: the embedding lookup does not, the output head does, tied or not.
    The attention term is the usual convention (PaLM, appendix B), which does not halve for causality.
    """
    config = config.get_text_config(decoder=True)
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not (layers and heads):
        return None
    size = sum(whole_shape(p).numel() for p in model.parameters())
    embeddings = model.get_input_embeddings().weight
    if not getattr(config, "tie_word_embeddings", False):
        size -= whole_shape(embeddings).numel()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 6.0 * size + 12.0 * attention_layers(config) * heads * head_dim * seq_len
