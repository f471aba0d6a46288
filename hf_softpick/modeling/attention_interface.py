"""The meeting point with transformers: the attention and mask functions of its registries, for any model.

`attn_implementation="softpick"` (or another normalizer's name) runs a foreign model through `attention_forward`. Our
own model calls `run_attention` with its own masks.
"""

from functools import cache, partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils import is_tracing, logging

from .attention_eager import dense_attention
from .attention_tiled import tiled_attention
from .attention_triton import TRITON, refusal, triton_attention
from .normalizers import NORMALIZERS
from .visibility import BOUNDARIES, VisibleKeys, document_starts, read_boundaries, visible_keys

logger = logging.get_logger(__name__)

IMPLEMENTATIONS = ("auto", "eager", "tiled", *TRITON)
# Arguments of other models' attention that change the scores or the keys, and that these functions do not compute.
UNSUPPORTED = {
    "softcap": "softcap (tanh on the scores)",
    "s_aux": "s_aux (attention sinks)",
    "sinks": "sinks (attention sinks)",
    "position_bias": "position_bias",
    "indices": "indices (a choice of keys)",
    "block_indices": "block_indices (a choice of blocks of keys)",
    "cache": "a paged cache",
}


def run_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: VisibleKeys | Tensor,
    scale: float,
    normalizer: str,
    implementation: str = "auto",
    dropout: float = 0.0,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention by implementation name; shapes as in `tiled_attention`.

    Returns:
        output [B, T, H, Dv] and, for "eager" or on request, weights [B, H, T, S].

    Raises:
        ValueError: the implementation is unknown, or cannot do what is asked of it.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention with normalizer {normalizer!r} cannot run with attn_implementation={implementation!r}. "
            f"Use one of {', '.join(IMPLEMENTATIONS)}."
        )
    if implementation == "eager" or output_attentions:
        return dense_attention(query, key, value, visible, scale, normalizer, dropout)
    if dropout > 0:
        raise ValueError(
            f"attn_implementation={implementation!r} has no attention dropout, got attention_dropout={dropout}. "
            "Set attention_dropout to 0 or use attn_implementation='eager'."
        )
    if implementation == "auto":
        head_dim = max(query.shape[-1], value.shape[-1])
        implementation = resolve_auto(query.device, value.dtype, head_dim)
    if implementation == "tiled":
        return tiled_attention(query, key, value, visible, scale, normalizer), None
    deterministic = implementation == "triton"
    return triton_attention(query, key, value, visible, scale, normalizer, deterministic), None


def resolve_auto(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What "auto" means for values of `dtype` on `device`: "triton" on GPUs where it can run, else "tiled".

    Chosen once and for all by these facts, so that torch.compile can trace it; another choice than the kernels is
    logged once a process.
    """
    if device.type in ("cpu", "meta"):  # also where Triton's interpreter would run them: it is for tests
        return "tiled"
    reason = refusal(head_dim, device, dtype)
    if reason is None:
        return "triton"
    if not torch.compiler.is_compiling():
        _log_choice(reason)
    return "tiled"


@cache
def _log_choice(reason: str) -> None:
    logger.warning("attn_implementation='auto' runs 'tiled', which is right, but slow beside the kernels: %s", reason)


def check_mask(mask: Tensor, length: int, key_length: int) -> Tensor:
    """A mask [B, H, T or 1, S or 1] handed in by the user, if it is boolean, as a view [B, H, T, S].

    Raises:
        ValueError: it is additive, has another dtype or is not 4-D.
    """
    if mask.ndim != 4:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, expected [B, tokens so far] or [B, 1 or H, T, S]"
        )
    if mask.dtype != torch.bool:
        raise ValueError(
            f"the 4-D attention_mask has dtype {mask.dtype}, expected torch.bool with True = visible. An additive "
            "mask cannot exclude a key from softpick's denominator; pass `attention_mask == 0` instead."
        )
    sizes = (full if size == 1 else size for size, full in zip(mask.shape[2:], (length, key_length), strict=True))
    return mask.expand(*mask.shape[:2], *sizes)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    *,
    normalizer: str,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function for models that are not ours; registered under each normalizer's name.

    Args:
        query: [B, H, T, D]. key, value: [B, Hkv, S, D], not repeated. attention_mask: what `attention_mask_function`
            returned, None or bool [B, 1, T, S].

    Returns:
        output [B, T, H, Dv]; weights [B, H, T, S] if `output_attentions` was asked for, else None.

    Raises:
        ValueError: the model needs something that this attention does not compute; the message names it.
    """
    name = type(module).__name__
    if normalizer.startswith("scaled_"):
        raise ValueError(
            f"{name} cannot run with attn_implementation={normalizer!r}: it has no learnable scale per head. Use "
            f"{normalizer.removeprefix('scaled_')!r}, or SoftpickForCausalLM with normalizer={normalizer!r}."
        )
    for argument, meaning in UNSUPPORTED.items():
        if kwargs.get(argument) is not None:
            raise ValueError(f"{name} uses {meaning}, which attn_implementation={normalizer!r} does not support.")
    if not (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
        raise ValueError(f"{name} is not causal; attn_implementation={normalizer!r} supports causal attention only.")
    boundaries = {name: kwargs[name] for name in (*BOUNDARIES, "seq_idx") if kwargs.get(name) is not None}
    if boundaries.keys() - ({"cu_seq_lens_k"} if cu_seq_lens_q is not None else set()):
        (batch, _, length, _), cached = query.shape, key.shape[2] > query.shape[2]
        boundaries |= {"cu_seq_lens_q": cu_seq_lens_q}
        # Models number the tokens of a row through: documents by seq_idx alone disagree with that, and are refused.
        cu_seq_lens_q, position_ids = read_boundaries(boundaries, batch, length, cached, position_ids)
    visible = visible_of_call(attention_mask, query, key, sliding_window, position_ids, cu_seq_lens_q)
    return run_attention(
        query,
        key,
        value,
        visible,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        normalizer,
        "auto" if dropout == 0 else "eager",
        dropout,
        bool(kwargs.get("output_attentions")),
    )


def visible_of_call(
    attention_mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    sliding_window: int | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
) -> VisibleKeys | Tensor:
    """What `attention_forward` lets each query see; arguments as there."""
    length, key_length = query.shape[2], key.shape[2]
    if position_ids is not None and position_ids.ndim != 2:
        position_ids = None  # multimodal rotary positions say nothing of documents
    if attention_mask is None:
        # One query sees the whole cache; an empty static cache is longer than the input and aligned at the top left.
        return visible_keys(
            length,
            key_length,
            query.device,
            query_offset=key_length - 1 if length == 1 else 0,
            position_ids=position_ids,
            cu_seq_lens=cu_seq_lens if length > 1 else None,
            sliding_window=sliding_window,
        )
    # transformers ignores packing as soon as a cache or a 2-D mask is given; documents stay apart here all the same.
    return keep_documents_apart(check_mask(attention_mask, length, key_length), position_ids, cu_seq_lens)


def keep_documents_apart(mask: Tensor, position_ids: Tensor | None, cu_seq_lens: Tensor | None) -> Tensor:
    """`mask`, bool [B, 1 or H, T, S], without what lies in another document of the row.

    Only position 0 begins a document here: under a mask of the user's own, other positions may repeat (draft trees).
    """
    if position_ids is None and cu_seq_lens is None:
        return mask
    length, key_length = mask.shape[2:]
    position = position_ids if cu_seq_lens is None else document_starts(cu_seq_lens, length)
    position = position.to(mask.device)
    if length != key_length:
        return _hide_earlier_documents(mask, position)
    begins = (position == 0) & mask.diagonal(dim1=-2, dim2=-1).any(1)
    document = begins.cumsum(-1)
    return mask & (document[:, None, :, None] == document[:, None, None, :])


def _hide_earlier_documents(mask: Tensor, position: Tensor) -> Tensor:
    """Over a cache: a query at position p of its document sees the newest p + 1 of its visible keys, none older.

    Keys behind the query stay, an image prefix may see them. Its column is not known here, but the last query's is the
    last column that anything sees.
    """
    length, key_length = mask.shape[2:]
    column = torch.arange(key_length, device=mask.device)
    last = torch.where(mask, column, -1).amax()
    own = last - (length - 1) + torch.arange(length, device=mask.device)
    age = (mask & (column <= own[:, None])).flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
    return mask & (age <= position[:, None, :, None] + 1)


def attention_mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> Tensor | None:
    """transformers' mask function: None for plain causal attention, else bool [B, 1, T, S]; also for plain
    attention while tracing, when transformers always asks for packed attention."""
    # Static caches hand in a tensor, which cannot be read while tracing.
    known = isinstance(q_offset, int) or not is_tracing(q_offset)
    if attention_mask is not None and known and attention_mask.shape[-1] < int(q_offset) + q_length:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[-1]} tokens, but cache and input together hold "
            f"{int(q_offset) + q_length}. Pass a mask over all tokens so far, cached ones included."
        )
    plain = mask_function is causal_mask_function and attention_mask is None and kv_offset == 0
    if plain and isinstance(q_offset, int) and (q_offset == 0 or q_length == 1) and kv_length >= q_offset + q_length:
        if q_length > 1 or kv_length == q_offset + 1:
            return None
    kwargs["allow_is_causal_skip"] = False
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    return mask


def register_attention() -> None:
    """Put every normalizer's name into both registries of transformers; idempotent."""
    for normalizer in NORMALIZERS:
        AttentionInterface.register(normalizer, partial(attention_forward, normalizer=normalizer))
        AttentionMaskInterface.register(normalizer, attention_mask_function)


register_attention()
