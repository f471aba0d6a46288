"""Cases of the Triton kernels, the exact answer to each, and how far from it a kernel may be.

The interpreter's tests and the GPU's run the same cases. Queries and keys are multiples of 1/8 and the scales have few
bits, so that scores are exact in float32: which side of 0 they lie on, where the gradient jumps, is never a question
of rounding. Values and gradients are not rounded beyond their dtype.
"""

import functools
import itertools
import math
import random
from typing import NamedTuple

import torch
from attention_cases import plain, run
from torch import Tensor

from hf_softpick.modeling.attention_reference import reference_attention
from hf_softpick.modeling.normalizers import SOFTPICK_EPS
from softpick_attention.backward import attention_backward
from softpick_attention.forward import attention_forward
from softpick_attention.tuning import Config
from softpick_attention.visibility import Visible, document_intervals

NORMALIZERS = ("softpick", "softmax", "rectified_softmax")
DOCUMENTS = {"doc_one": (0,), "doc_short": (0, 1, 2), "doc_empty": (0, 0, 5, 5), "doc_window": (0, 9, 9, 40)}
KINDS = tuple(
    "all causal top_left window band doc_one doc_short doc_empty doc_window doc_full doc_top_left padded holes "
    "mask_bh mask_b1 mask_row mask_column given joined".split()
)


class Case(NamedTuple):
    """One call of the forward and one of the backward. `extra`: keys more than queries; `splits`: of the forward."""

    dtype: torch.dtype = torch.float32
    dim: int = 16
    value_dim: int = 0  # 0: as dim
    length: int = 65
    extra: int = 0
    heads: tuple[int, int] = (2, 1)
    kind: str = "causal"
    scale: str = "usual"
    normalizer: str = "softpick"
    deterministic: bool = True
    config: tuple[int, int] | None = (32, 32)  # None: the launchers choose
    layout: str = "dense"
    batch: int = 1
    splits: int = 0
    processors: int = 1  # of the device that the launchers believe in; many choose the kernels for small grids

    @property
    def id(self) -> str:
        return "-".join(str(x).removeprefix("torch.").replace(" ", "") for x in self)

    @property
    def total(self) -> int:
        """Number of keys."""
        return max(self.length + self.extra, 0)

    @property
    def scale_value(self) -> float:
        return {"usual": round(256 * self.dim**-0.5) / 256, "zero": 0.0, "five": 5.0, "negative": -0.3125}[self.scale]

    @property
    def cost(self) -> int:
        """What the interpreter's time grows with, in tiles; to join the splits of two rows costs as much as one."""
        rows, columns = self.config or (64, 64)
        tiles = -(-self.length // rows) * -(-self.total // columns)
        joined = self.length // 2 + 4 * self.splits if self.splits else 0
        return self.batch * self.heads[0] * (tiles + joined)


VALUES = Case(
    dtype=(torch.float32, torch.float16),
    dim=(16, 32, 40, 59, 64, 80, 96, 111, 128, 256),
    value_dim=(0, 0, 24, 77),
    length=(1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200),
    extra=(0, 1, 70, -5),
    heads=((1, 1), (4, 4), (8, 2), (9, 3), (8, 1)),
    kind=KINDS,
    scale=("usual", "zero", "five", "negative"),
    normalizer=NORMALIZERS,
    deterministic=(True, False),
    config=((16, 16), (32, 32), (16, 64), (64, 16)),
    layout=("dense", "heads_first", "gaps", "offset"),
    batch=(1, 2),
    splits=(0, 1, 2, 5),
    processors=(1, 132),
)


def pairs_of(case: Case) -> set[tuple]:
    """Every two choices of a case."""
    return set(itertools.combinations(zip(Case._fields, case, strict=True), 2))


@functools.cache
def covering(count: int | None, largest_cost: int, values: Case = VALUES, seed: int = 0) -> tuple[Case, ...]:
    """`count` cases that hold as many pairs of choices as a greedy search finds; None: until it finds no new pair.

    A case with a larger cost than `largest_cost` is not taken.
    """
    deal = random.Random(seed)
    covered: set[tuple] = set()
    cases: list[Case] = []
    barren = 0
    while len(cases) < (count or 10_000) and barren < 30:
        best, best_new = None, -1
        for _ in range(24):
            chosen: dict = {}
            for field in deal.sample(Case._fields, len(Case._fields)):
                options = deal.sample(getattr(values, field), len(getattr(values, field)))
                chosen[field] = max(options, key=lambda value: _new_pairs(field, value, chosen, covered))
            case = Case(**chosen)
            new = len(pairs_of(case) - covered)
            if case.cost <= largest_cost and new > best_new:
                best, best_new = case, new
        barren = barren + 1 if best_new <= 0 else 0
        if best_new > 0:
            cases.append(best)
            covered |= pairs_of(best)
    return tuple(cases)


_ORDER = {field: i for i, field in enumerate(Case._fields)}


def _new_pairs(field, value, chosen, covered) -> int:
    pairs = (
        ((field, value), other) if _ORDER[field] < _ORDER[other[0]] else (other, (field, value))
        for other in chosen.items()
    )
    return sum(pair not in covered for pair in pairs)


def visibility(case: Case, device: torch.device | str = "cpu") -> tuple[Visible, Tensor]:
    """The visibility of a kind as the kernels take it, and as a bool mask [B, H, T, S] made independently."""
    B, H, T, S = case.batch, case.heads[0], case.length, case.total
    generator = torch.Generator().manual_seed(T)
    t, j = torch.arange(T)[:, None], torch.arange(S)
    own = t + S - T
    causal = j <= own
    visible = Visible(causal=True, offset=S - T)
    if case.kind == "all":
        visible, mask = Visible(), torch.ones(T, S, dtype=torch.bool)
    elif case.kind == "causal":
        mask = causal
    elif case.kind == "top_left":
        visible, mask = Visible(causal=True), j <= t
    elif case.kind == "window":
        visible, mask = visible._replace(window=(19, -1)), causal & (j >= own - 19)
    elif case.kind == "band":
        visible = Visible(offset=S - T, window=(9, 6))
        mask = (j >= own - 9) & (j <= own + 6)
    elif case.kind.startswith("doc"):
        starts = DOCUMENTS.get(case.kind, DOCUMENTS["doc_empty"])
        cu_q, cu_k = ([min(x, n) for x in starts] + [n] for n in (T, S))
        window = (11, -1) if case.kind == "doc_window" else (-1, -1)
        options = case.kind != "doc_full", window, case.kind == "doc_top_left"
        dtype = torch.int32 if T % 2 else torch.int64
        boundaries = (torch.tensor(cu, dtype=dtype, device=device) for cu in (cu_q, cu_k))
        visible, mask = document_intervals(*boundaries, T, S, *options), document_mask(cu_q, cu_k, *options)
    elif case.kind in ("padded", "holes"):
        index = torch.arange(S) - torch.arange(B)[:, None]
        keys = index >= S // 3 if case.kind == "padded" else index % 3 != 0
        visible, mask = visible._replace(keys=keys), causal & keys[:, None, None]
    elif case.kind.startswith("mask"):
        shapes = {
            "mask_bh": (B, H, T, S),
            "mask_b1": (B, 1, T, S),
            "mask_row": (1, 1, 1, S),
            "mask_column": (B, 1, T, 1),
        }
        mask = torch.rand(shapes[case.kind], generator=generator) > 0.4
        mask[..., mask.shape[2] // 2, :] &= case.kind == "mask_row"
        visible = Visible(mask=mask)
    else:
        rows = 1 if case.kind == "given" else B
        start, end = (torch.randint(-3, S + 4, (rows, T), generator=generator) for _ in range(2))
        mask = ((j >= start[..., None]) & (j < end[..., None]))[:, None]
        visible = Visible(start=start, end=end)
        if case.kind == "joined":
            keys, heads = (
                torch.rand(B, S, generator=generator) > 0.3,
                torch.rand(1, H, T, S, generator=generator) > 0.2,
            )
            visible, mask = visible._replace(keys=keys, mask=heads), mask & keys[:, None, None] & heads
    visible = Visible(*(x.to(device) if isinstance(x, Tensor) else x for x in visible))
    return visible, mask.expand(B, H, T, S).to(device)


def document_mask(cu_q: list[int], cu_k: list[int], causal: bool, window=(-1, -1), top_left: bool = False) -> Tensor:
    """bool [T, S], document by document."""
    mask = torch.zeros(cu_q[-1], cu_k[-1], dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        own, j = torch.arange(q1 - q0)[:, None], torch.arange(k1 - k0)
        own = own if top_left else own + (k1 - k0) - (q1 - q0)
        seen = j <= own if causal else torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        if window[0] >= 0:
            seen = seen & (j >= own - window[0])
        if window[1] >= 0:
            seen = seen & (j <= own + window[1])
        mask[q0:q1, k0:k1] = seen
    return mask


def inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> list[Tensor]:
    """q [B, T, H, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv] and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    B, T, S, (H, G), D, DV = case.batch, case.length, case.total, case.heads, case.dim, case.value_dim or case.dim
    shapes = (B, T, H, D), (B, S, G, D), (B, S, G, DV), (B, T, H, DV)
    q, k, v, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(case.dtype).to(device) for x in ((q * 8).round() / 8, (k * 8).round() / 8, v, grad)]


def check_case(case: Case, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, visible: Visible, mask: Tensor) -> None:
    """Run forward and backward of a case on these tensors, whatever their strides, and compare all results."""
    scale, config = case.scale_value, Config(*case.config) if case.config else None
    out, lse = attention_forward(q, k, v, visible, scale, case.normalizer, case.splits, config)
    gradients = attention_backward(
        grad, q, k, v, out, lse, visible, scale, case.normalizer, case.deterministic, config
    )
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    if case.total == 0:
        assert all((x == 0).all() for x in (out, *gradients))
        return
    check_results((q, k, v), grad, mask, scale, case.normalizer, out, lse, gradients)


def check_results(tensors, grad, mask, scale, normalizer, out, lse, gradients) -> None:
    """FlashAttention's rule: at most 2 (forward) or 3 (backward) times the error of plain PyTorch in that dtype; and a
    bound on the relative RMS error, so that a bad plain version cannot hide a bad kernel.

    Plain autograd is exact where a row sees one key, and better where scores are large; `doubtful` allows for that.
    """
    dtype = out.dtype
    heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors]
    exact_inputs = [x.detach().double().requires_grad_() for x in heads_first]
    exact = run(lambda q, k, v: reference_attention(q, k, v, mask, scale, normalizer)[0], exact_inputs, grad)
    plainly = run(lambda q, k, v: plain(q, k, v, mask, scale, normalizer), heads_first, grad)
    exact_lse, rounding, *doubts = doubtful(*(x.detach() for x in exact_inputs), grad, mask, scale, normalizer, dtype)
    within("lse", lse, exact_lse[..., 0], rounding[..., 0])
    groups = doubts[0].shape[1] // exact_inputs[1].shape[1]
    doubts = [doubts[0].transpose(1, 2), doubts[1], *(x.unflatten(1, (-1, groups)).sum(2) for x in doubts[2:])]
    ours = [out, *(x.transpose(1, 2) for x in gradients)]
    rms = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}[dtype]
    for i, (name, doubt) in enumerate(zip(("out", "dq", "dk", "dv"), doubts, strict=True)):
        o, e = ours[i].double(), exact[i]
        assert o.shape == e.shape, f"{name} has shape {tuple(o.shape)} instead of {tuple(e.shape)}"
        coarse = e.to(dtype)
        atol = 2 * ((coarse + 0.3 - 0.3) - coarse).abs().max() + 1e-5 * e.abs().max() + 5e-6
        within(name, o, e, (3 if i else 2) * (plainly[i] - e).abs().max() + atol + doubt)
        error, limit = (o - e).norm(), rms * e.norm() + doubt.norm() + 1e-6 * e.numel() ** 0.5
        assert error <= limit, f"{name}: root mean square error {error:.3g} of norm {e.norm():.3g}, limit {limit:.3g}"


@torch.no_grad()
def doubtful(q, k, v, grad, mask, scale, normalizer, dtype) -> list[Tensor]:
    """log2 of the denominators, and how far lse, out, dq, dk and dv may be off where every number is rounded once:
    scores and denominators in float32; weights, gradients of scores and the output in `dtype`.
    """
    groups, do = q.shape[1] // k.shape[1], grad.transpose(1, 2).double()
    keys, values = (x.repeat_interleave(groups, 1) for x in (k, v))
    x = scale * q @ keys.transpose(-1, -2)
    kept = mask & (x >= 0) if normalizer == "rectified_softmax" else mask
    x = x.masked_fill(~kept, -torch.inf)
    top = x.amax(-1, keepdim=True)
    top = top.clamp_min(0) if normalizer == "softpick" else top.masked_fill(top == -torch.inf, 0)
    e, floor = torch.exp(x - top), torch.exp(-top)
    p = (e - floor) * kept if normalizer == "softpick" else e
    total = p.abs().sum(-1, keepdim=True) + (SOFTPICK_EPS * floor if normalizer == "softpick" else 0)
    # A row of softmax without keys has +inf, as in flash_attn.
    lse = torch.where(total == 0, torch.inf, torch.log2(total) + top / math.log(2))
    total = total.masked_fill(total == 0, torch.inf)
    single, own = 2**-23, torch.finfo(dtype).eps
    x = x.masked_fill(~kept, 0).abs()
    unsure = (e * (3 + x) + kept * floor * (normalizer == "softpick")).sum(-1, keepdim=True) / total
    rounding = 2 * single * (unsure + lse.abs().nan_to_num(posinf=0) + 1)
    e, p = e / total, p.clamp_min(0) / total
    o, dp = p @ values, do @ values.transpose(-1, -2)
    delta = (o * do).sum(-1, keepdim=True)
    dx = e * torch.where(p > 0, dp - delta, delta)
    relative = own + single * (x + unsure)
    p, dx = p * relative + e * single, dx * relative
    shared = own * (o * do).norm(dim=-1, keepdim=True) + 2 * single * root(do, values.transpose(-1, -2))
    dx = abs(scale) * (dx.abs() + e * shared)
    doubts = root(p, values), root(dx, keys), root(dx.transpose(-1, -2), q), root(p.transpose(-1, -2), do)
    return [lse, rounding, *(2 * doubt for doubt in doubts)]


def root(one: Tensor, two: Tensor) -> Tensor:
    """Root of the sum of the squares that a product sums: the size of a sum of independent errors."""
    return (one.square() @ two.square()).sqrt()


def within(name: str, ours: Tensor, exact: Tensor, limit: Tensor | float) -> None:
    """|ours - exact| <= limit, or the worst place with both values."""
    excess = (ours.double() - exact.double()).abs() - limit
    excess = torch.where(ours == exact, 0.0, excess)  # also infinities
    excess = torch.where(excess.isnan(), torch.inf, excess)
    if excess.numel() and excess.max() > 0:
        place = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        bad = int((excess > 0).sum())
        raise AssertionError(
            f"{name}{list(place)} is {ours[place].item():.9g} instead of {exact[place].item():.9g}; "
            f"{bad} of {excess.numel()} too far, limit {torch.as_tensor(limit).expand_as(excess)[place].item():.3g}"
        )
