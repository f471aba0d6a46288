"""Who takes part in the GPU benchmark: our kernel in its modes, and the attention of others.

A peer builds, for one case, a function of query, key and value in [B, T, H, D] (packed: [tokens, H, D]) that returns
the output in the same layout; it raises Unavailable where it cannot take part.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from attention_reference import ROOT, Attention, Unavailable
from gpu_cases import FLEX_LENGTHS, ITEM_BYTES, Case
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

KERNELS = ROOT / "kernels" / "softpick_attention" / "torch-ext"


@dataclass(frozen=True)
class Peer:
    """Somebody's attention."""

    name: str
    normalizer: str
    build: Callable[[Case, str], Attention]
    """From a case and a device, "cuda" or "cpu"; has to go to other processes, so no lambda."""
    kinds: tuple[str, ...] = ("dense", "gqa", "packed", "decode")
    ours: bool = False
    trusted: bool = True
    """If ours differs from it, ours is taken to be wrong, else the peer is left out."""
    slow_to_compile: bool = False
    backward_alone: bool = False
    """Its forward is another peer's: timed only where there is a backward."""


def our_package() -> ModuleType:
    """softpick_attention from this checkout, whatever is installed."""
    if str(KERNELS) not in sys.path:
        sys.path.insert(0, str(KERNELS))
    return importlib.import_module("softpick_attention")


def _tuning() -> ModuleType:
    return importlib.import_module(f"{our_package().__name__}.tuning")


def _bounds(case: Case, device: str) -> dict[str, Tensor | int]:
    """Where documents begin and how long they are, under flash-attn's names, which are ours as well."""
    bounds, longest = torch.tensor(case.boundaries, dtype=torch.int32, device=device), max(case.documents)
    return dict(cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest)


def _ours(normalizer: str, deterministic: bool, case: Case, device: str) -> Attention:
    """Decoding by the kernel's own function; the others by the entry of transformers' registry that a model calls."""
    package, scale = our_package(), case.dim**-0.5
    if case.kind == "decode":
        return partial(package.softpick_attn_with_kvcache, scale=scale, causal=True, normalizer=normalizer)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from hf_softpick.modeling import documents, visibility

    module, seen = nn.Module(), visibility.VisibleKeys()
    module.config = SimpleNamespace(normalizer=normalizer)
    if case.kind == "packed":
        boundaries = torch.tensor(case.boundaries, device=device)
        begins = documents.numbered_begins(documents.boundary_numbers(boundaries, case.boundaries[-1]))
        positions = documents.document_positions(begins)
        seen, _ = visibility.visible_keys(positions.shape[1], positions.shape[1], device, position_ids=positions)
    entry = ALL_ATTENTION_FUNCTIONS["triton" if deterministic else "triton_fast"]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = (x.view(-1, *x.shape[-3:]).transpose(1, 2) for x in (query, key, value))
        return entry(module, *rows, seen, scaling=scale)[0].view(query.shape)

    return attend


def autotuned() -> dict[str, dict[str, int]]:
    """What SOFTPICK_ATTENTION_AUTOTUNE=1 has put in the place of the table's configurations."""
    return {str(key): config._asdict() for key, config in _tuning()._TUNED.items()}


def our_configuration(case: Case, device: str) -> dict[str, dict[str, int]]:
    """Tiles, warps and stages that the kernel's table gives for a case."""
    tuning = _tuning()
    family = tuning.current_target(torch.device(device)).family
    # The interpreter launches nothing; a smoke run reads the table all the same.
    family, size = "sm90" if family == "interpreter" else family, ITEM_BYTES[case.dtype]
    kernels = ("decode",) if case.kind == "decode" else ("forward", "dq", "dkv", "dkv_fast")
    return {kernel: tuning.table_configuration(kernel, family, size, case.dim)._asdict() for kernel in kernels}


def _sdpa(backend_name: str, case: Case, device: str) -> Attention:
    backend = getattr(SDPBackend, backend_name)
    options = dict(is_causal=case.kind != "decode", scale=case.dim**-0.5, enable_gqa=case.heads != case.kv_heads)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **options
            ).transpose(1, 2)

    return attend


def _torch_varlen(case: Case, device: str) -> Attention:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.attention.varlen") from None
    bounds = tuple(_bounds(case, device).values())
    known = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    return lambda q, k, v: varlen_attn(q, k, v, *bounds, **causal)


def _flash_attn(case: Case, device: str) -> Attention:
    try:
        import flash_attn
    except ImportError:
        raise Unavailable("flash-attn is not installed") from None
    options = dict(softmax_scale=case.dim**-0.5, causal=True)
    if case.kind == "decode":
        return partial(flash_attn.flash_attn_with_kvcache, **options)
    if case.kind == "packed":
        return partial(flash_attn.flash_attn_varlen_func, **_bounds(case, device), **options)
    return partial(flash_attn.flash_attn_func, **options)


def _flex(case: Case, device: str) -> Attention:
    """Softpick in two calls: the positive scores give the numerator, the negative ones the rest of the denominator."""
    if device == "cpu":
        raise Unavailable("FlexAttention returns no log-denominator on the CPU")
    if case.queries not in FLEX_LENGTHS and case != case.small():
        raise Unavailable(f"compiles for every shape; timed at T = {', '.join(map(str, FLEX_LENGTHS))} alone")
    try:
        from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
    except ImportError:
        raise Unavailable(f"torch {torch.__version__} has no FlexAttention with AuxRequest") from None
    torch._dynamo.reset()
    minus_infinity, tiny, lse = float("-inf"), 1e-6, AuxRequest(lse=True)

    def positive(score, batch, head, query, key):
        kept = torch.clamp(score, min=tiny)  # log(e^x - 1), with a finite gradient in the branch not taken
        return torch.where(score > 0, kept + torch.log(-torch.expm1(-kept)), minus_infinity)

    def negative(score, batch, head, query, key):
        return torch.where(score < 0, torch.log(-torch.expm1(torch.clamp(score, max=-tiny))), minus_infinity)

    def causal(batch, head, query, key):
        return query >= key

    mask = create_block_mask(causal, None, None, case.queries, case.keys, device=device)
    options = dict(block_mask=mask, scale=case.dim**-0.5, return_aux=lse)

    def two_calls(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out, above = flex_attention(query, key, value, score_mod=positive, **options)
        # Only the sum is needed: the narrowest value spares most of the second product.
        _, below = flex_attention(query, key, value.detach()[..., :16], score_mod=negative, **options)
        epsilon = torch.full_like(above.lse, 1e-6).log()
        total = torch.logsumexp(torch.stack([above.lse, below.lse, epsilon]), 0)
        return (out * torch.exp(above.lse - total).unsqueeze(-1).to(out.dtype)).transpose(1, 2)

    return torch.compile(two_calls, dynamic=False)


@lru_cache
def _function_of(path: Path, function: str) -> Callable:
    """A function of a Python file that the user named; nothing of the file is kept."""
    spec = importlib.util.spec_from_file_location("ancestor_kernel", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise Unavailable(f"{path.name} has no function {function}; name one by --ancestor-function")
    return getattr(module, function)


def ancestor(path: Path, function: str) -> Peer:
    """The softpick kernel of the paper from a file, called as (q, k, v, scale) in [B, T, H, D]."""
    return Peer("ancestor", "softpick", partial(_ancestor, path, function), kinds=("dense",), trusted=False)


def _ancestor(path: Path, function: str, case: Case, device: str) -> Attention:
    kernel, scale = _function_of(path, function), case.dim**-0.5

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = kernel(query, key, value, scale)
        return found[0] if isinstance(found, tuple) else found

    return attend


def peers() -> list[Peer]:
    """Ours first: it is what the others are compared with."""
    trained, sdpa = ("dense", "gqa", "packed"), ("dense", "gqa", "decode")
    ours = Peer("softpick", "softpick", partial(_ours, "softpick", True), ours=True, slow_to_compile=True)
    fast = replace(
        ours, name="softpick fast", build=partial(_ours, "softpick", False), kinds=trained, backward_alone=True
    )
    rectified = partial(_ours, "rectified_softmax", True)
    return [
        ours,
        replace(ours, name="softmax", normalizer="softmax", build=partial(_ours, "softmax", True)),
        fast,
        replace(fast, name="softmax fast", normalizer="softmax", build=partial(_ours, "softmax", False)),
        replace(ours, name="rectified", normalizer="rectified_softmax", build=rectified, kinds=("dense", "decode")),
        Peer("SDPA flash", "softmax", partial(_sdpa, "FLASH_ATTENTION"), sdpa),
        Peer("SDPA cuDNN", "softmax", partial(_sdpa, "CUDNN_ATTENTION"), sdpa),
        Peer("flash-attn", "softmax", _flash_attn),
        Peer("torch varlen", "softmax", _torch_varlen, kinds=("packed",)),
        Peer("FlexAttention", "softpick", _flex, kinds=("dense",), trusted=False, slow_to_compile=True),
    ]
