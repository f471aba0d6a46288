"""The one door: the attention and mask functions that transformers' registries hold for every model.

`attn_implementation="softpick"` (or another normalizer's name) runs a model of another architecture; our own model,
whose configuration has a normalizer, runs it by the name of a way to compute it: "auto", "tiled", "triton" or
"triton_fast". "eager" is transformers' own name, and means `eager_attention_forward` here for our own model alone.
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
from .compat import mask_parts
from .documents import BOUNDARIES, document_positions, numbered_begins, read_documents
from .normalizers import NORMALIZERS
from .visibility import VisibleKeys, check_mask, keep_documents_apart, visible_keys

logger = logging.get_logger(__name__)

REGISTERED = ("auto", "tiled", *TRITON)
IMPLEMENTATIONS = ("eager", *REGISTERED)
# Arguments of models' attention that change the scores or the keys, and that these functions do not compute.
UNSUPPORTED = {
    "softcap": "softcap (tanh on the scores)",
    "s_aux": "s_aux (attention sinks)",
    "sinks": "sinks (attention sinks)",
    "position_bias": "position_bias",
    "indices": "indices (a choice of keys)",
    "block_indices": "block_indices (a choice of blocks of keys)",
    "cache": "a paged cache",
}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: "VisibleKeys | CallMask | Tensor | None",
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    *,
    name: str,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function, registered under every name of NORMALIZERS and REGISTERED.

    Args:
        query: [B, H, T, D]; for scaled_* already multiplied by s_h * log(n_i). key, value: [B, Hkv, S, D].
        attention_mask: what `attention_mask_function` returned; or bool [B, 1 or H, T, S]; or None, for causal rows
            whose documents, if any, are told by position_ids [B or 1, T] or boundaries in kwargs.
        name: the one it is registered under.

    Returns:
        output [B, T, H, Dv]; weights [B, H, T, S] if "eager" or `output_attentions` asked for them, else None.

    Raises:
        ValueError: the model needs something that this attention does not compute; the message names it.
    """
    normalizer, implementation = what_is_computed(module, name)
    for argument, meaning in UNSUPPORTED.items():
        if kwargs.get(argument) is not None:
            raise ValueError(
                f"{type(module).__name__} uses {meaning}, which attn_implementation={name!r} does not support."
            )
    if not (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
        raise ValueError(
            f"{type(module).__name__} is not causal; attn_implementation={name!r} supports causal attention only."
        )
    visible = visible_of_call(attention_mask, query, key, sliding_window, position_ids, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if implementation == "eager" or kwargs.get("output_attentions") or (name in NORMALIZERS and dropout > 0):
        return dense_attention(query, key, value, visible, scale, normalizer, dropout)
    if dropout > 0:
        raise ValueError(
            f"attn_implementation={name!r} has no attention dropout, got attention_dropout={dropout}. "
            "Set attention_dropout to 0 or use attn_implementation='eager'."
        )
    if implementation == "auto":
        implementation = resolve_auto(query.device, value.dtype, max(query.shape[-1], value.shape[-1]))
    if implementation == "tiled":
        return tiled_attention(query, key, value, visible, scale, normalizer), None
    return triton_attention(query, key, value, visible, scale, normalizer, implementation == "triton"), None


def eager_attention_forward(module, query, key, value, attention_mask, position_ids=None, **kwargs):
    """`attention_forward` as "eager" for our own model, whose mask bool [B, 1, T, S] has read position_ids."""
    return attention_forward(module, query, key, value, attention_mask, name="eager", **kwargs)


def what_is_computed(module: nn.Module, name: str) -> tuple[str, str]:
    """(normalizer, implementation) that the attention registered under `name` computes for `module`.

    Raises:
        ValueError: `name` says a way to compute and the model has no normalizer, or another one than `name`, or lacks
            the parameters of it.
    """
    own = getattr(getattr(module, "config", None), "normalizer", None)
    own = own if own in NORMALIZERS else None
    if name not in NORMALIZERS and own is None:
        raise ValueError(
            f"{type(module).__name__} cannot run with attn_implementation={name!r}, which says how to compute and not "
            "what. Use 'softpick' or another normalizer's name."
        )
    if name in NORMALIZERS and own not in (None, name):
        raise ValueError(
            f"{type(module).__name__} with normalizer {own!r} cannot run with attn_implementation={name!r}: the "
            "normalizer belongs to the model."
        )
    normalizer = own or name
    missing = [
        parameter for parameter in NORMALIZERS[normalizer].parameters if getattr(module, parameter, None) is None
    ]
    if missing:
        others = ", ".join(other for other in NORMALIZERS if not NORMALIZERS[other].parameters)
        raise ValueError(
            f"{type(module).__name__} cannot run with normalizer {normalizer!r} (attn_implementation={name!r}): it "
            f"has no {' '.join(missing)}. Use one of {others}, or SoftpickForCausalLM with normalizer={normalizer!r}."
        )
    return normalizer, "auto" if name in NORMALIZERS else name


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


_READS_MASK = (
    "This model reads it by itself, so not all of its attention goes through transformers' AttentionInterface"
)


class CallMask:
    """What transformers says about a call before its attention: padding, cache and window, not yet its documents.

    Arguments are those of `visible_keys`. All layers of a call share it, so the documents are read once.
    """

    ndim = 4  # transformers asks it of every attention_mask

    def __init__(self, *shape: int, device: torch.device, documents: Tensor | None = None, **arguments):
        self.shape, self.device, self.documents, self.arguments = shape, device, documents, arguments
        self.read: tuple[Tensor | None, VisibleKeys] | None = None

    def contiguous(self) -> "CallMask":
        """generate() asks it of the masks that it makes before the call."""
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise ValueError(f"{function.__name__} got attention's mask. {_READS_MASK}")

    def __getattr__(self, name: str):
        raise AttributeError(f"attention's mask has no {name!r}. {_READS_MASK}")

    def visible(self, position_ids: Tensor | None) -> VisibleKeys:
        """What each query sees, of documents that begin as position_ids [B or 1, T] say."""
        position_ids = self.documents if position_ids is None else position_ids
        if torch.compiler.is_compiling():
            return visible_keys(*self.shape, self.device, position_ids=position_ids, **self.arguments)[0]
        if self.read is None or self.read[0] is not position_ids:
            given = None if self._is_plain(position_ids) else position_ids
            visible, _ = visible_keys(*self.shape, self.device, position_ids=given, **self.arguments)
            self.read = position_ids, visible
        return self.read[1]

    def _is_plain(self, position_ids: Tensor | None) -> bool:
        """Models number all tokens even when nothing is packed; transformers asks the device for it as well."""
        offset = self.arguments["query_offset"]
        if position_ids is None or self.arguments.get("padding_mask") is not None or isinstance(offset, Tensor):
            return position_ids is None
        index = torch.arange(offset, offset + self.shape[0], device=position_ids.device)
        return bool((position_ids == index).all())


def visible_of_call(
    attention_mask: "VisibleKeys | CallMask | Tensor | None",
    query: Tensor,
    key: Tensor,
    sliding_window: int | None,
    position_ids: Tensor | None,
    arguments: dict,
) -> VisibleKeys | Tensor:
    """What `attention_forward` lets each query see; arguments as there, kwargs as `arguments`."""
    if isinstance(attention_mask, tuple):  # VisibleKeys, perhaps of another copy of this code: the model has read all
        visible = VisibleKeys(*attention_mask)
        return visible if visible.mask is None else visible.mask
    (batch, _, length, _), key_length = query.shape, key.shape[2]
    if position_ids is not None and position_ids.ndim != 2:
        position_ids = None  # multimodal rotary positions say nothing of documents
    arguments = {name: arguments[name] for name in (*BOUNDARIES, "seq_idx") if name in arguments}
    if length == 1 and position_ids is None:
        arguments = {}
    if isinstance(attention_mask, Tensor):
        documents = read_documents(arguments, batch, length, key_length - length, position_ids)
        return keep_documents_apart(check_mask(attention_mask, length, key_length), documents)
    if attention_mask is None:
        # One query sees the whole cache; an empty static cache is longer than the input and aligned at the top left.
        offset = key_length - 1 if length == 1 else 0
        attention_mask = CallMask(
            length, key_length, device=query.device, query_offset=offset, sliding_window=sliding_window
        )
    offset, padding = attention_mask.arguments["query_offset"], attention_mask.arguments.get("padding_mask")
    visible = attention_mask.visible(read_documents(arguments, batch, length, offset, position_ids, padding))
    # Layers may lie on several devices, and what moves arguments between them does not look into a CallMask.
    return VisibleKeys(*(x.to(query.device) if isinstance(x, Tensor) else x for x in visible))


def attention_mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | VisibleKeys | CallMask | None = None,
    device: torch.device | None = None,
    **kwargs,
) -> "VisibleKeys | CallMask | Tensor":
    """transformers' mask function: what is known of the call, as intervals; a mask bool [B, 1, T, S] only for
    visibility that is not one interval a query, such as an image that sees itself whole."""
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        return attention_mask  # made by our model, or by generate() before the call
    # Static caches hand in a tensor, which cannot be read while tracing.
    known = isinstance(q_offset, int) or not is_tracing(q_offset)
    if attention_mask is not None and known and attention_mask.shape[-1] < int(q_offset) + q_length:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[-1]} tokens, but cache and input together hold "
            f"{int(q_offset) + q_length}. Pass a mask over all tokens so far, cached ones included."
        )
    parts = mask_parts(mask_function)
    if parts is not None:
        return CallMask(
            q_length,
            kv_length,
            device=device or torch.device("cpu"),
            query_offset=q_offset.clone() if isinstance(q_offset, Tensor) else q_offset,  # the cache counts on in it
            key_offset=kv_offset,
            padding_mask=attention_mask,
            sliding_window=parts.window,
            documents=None if parts.documents is None else document_positions(numbered_begins(parts.documents)),
        )
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )


def register_attention() -> None:
    """Put the names of all normalizers and implementations into both registries of transformers; idempotent."""
    for name in (*NORMALIZERS, *REGISTERED):
        AttentionInterface.register(name, partial(attention_forward, name=name))
        AttentionMaskInterface.register(name, attention_mask_function)


register_attention()
