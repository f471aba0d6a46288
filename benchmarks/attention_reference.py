"""Is it attention at all? A float64 reference, and comparisons with it at a small size and at the timed one."""

import importlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from gpu_cases import Case
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
# ||x - reference|| / ||reference|| that rounding can explain; a wrong kernel is off by far more.
LIMITS = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 2e-3}
TAIL = 64
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unavailable(Exception):
    """A peer cannot take part; the message says why."""


def inputs(case: Case, device: str, backward: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random query, key, value and gradient of the output; the first three ask for gradients where `backward`."""
    draw = torch.Generator(device=device).manual_seed(seed)
    query, key = case.shapes
    options = dict(generator=draw, device=device, dtype=getattr(torch, case.dtype))
    q, k, v = (torch.randn(shape, **options).requires_grad_(backward) for shape in (query, key, key))
    return q, k, v, torch.randn(query, **options)


def results(attend: Attention, given: tuple[Tensor, ...], backward: bool) -> list[Tensor]:
    """The output, and where `backward` the gradients of query, key and value."""
    *qkv, gradient = given
    with torch.set_grad_enabled(backward):
        out = attend(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, gradient)] if backward else [out]


@cache
def _normalizer(name: str) -> Callable[..., Tensor]:
    """The package's own definition, without the package: the machine may lack what that needs."""
    sys.path.append(str(ROOT / "hf_softpick"))
    return getattr(importlib.import_module("modeling.attention_reference"), name)


def attend_exactly(query: Tensor, key: Tensor, value: Tensor, normalizer: str) -> Tensor:
    """Dense causal attention of [B, T, H, D] in the dtype given; the last query sees every key."""
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
    scores = query.shape[-1] ** -0.5 * torch.einsum("bthd,bshd->bhts", query, key)
    length, keys = scores.shape[-2:]
    mask = torch.ones(length, keys, dtype=torch.bool, device=scores.device).tril(keys - length)
    return torch.einsum("bhts,bshd->bthd", _normalizer(normalizer)(scores, mask=mask), value)


def reference(case: Case, normalizer: str) -> Attention:
    """`attend_exactly` in the layout of the case, document by document."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not case.documents:
            return attend_exactly(query, key, value, normalizer)
        pieces = zip(*(x.split(case.documents) for x in (query, key, value)), strict=True)
        return torch.cat([attend_exactly(*(x[None] for x in piece), normalizer)[0] for piece in pieces])

    return attend


def difference(found: list[Tensor], expected: list[Tensor], limit: float) -> str:
    """ "" if all tensors agree, else the first that does not and by how much; NaN never agrees."""
    for name, a, b in zip(("output", "dq", "dk", "dv")[: len(found)], found, expected, strict=True):
        if a.shape != b.shape:
            return f"{name} has shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        a, b = a.detach().float(), b.detach().float()
        error = float((a - b).norm() / b.norm())
        if not error <= limit:
            return f"{name} is off by {error:.2g} of its norm, rounding explains {limit:g}"
    return ""


def check(attend: Attention, case: Case, normalizer: str, device: str, backward: bool) -> str:
    """ "" if output and gradients agree with the float64 reference at this (small) size, else what is wrong."""
    given = inputs(case, device, backward)
    found = [x.cpu() for x in results(attend, given, backward)]
    exact = [x.detach().cpu().double().requires_grad_(backward) for x in given[:3]]
    expected = results(reference(case, normalizer), (*exact, given[3].cpu().double()), backward)
    return difference(found, expected, LIMITS[case.dtype])


def tail_difference(out: Tensor, given: tuple[Tensor, ...], case: Case, normalizer: str) -> str:
    """ "" if the last queries of the last sequence and head agree with float64, at any size: the far end of memory."""
    last = slice(-case.documents[-1], None) if case.documents else -1
    query, key, value, found = (x.detach()[last][:, -1:].double()[None] for x in (*given[:3], out))
    expected = attend_exactly(query[:, -TAIL:], key, value, normalizer)
    reason = difference([found[:, -TAIL:]], [expected], LIMITS[case.dtype])
    return f"at the timed size {reason}" if reason else ""
