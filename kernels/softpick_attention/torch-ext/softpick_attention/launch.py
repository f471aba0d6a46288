"""What every kernel is told about a call: checked shapes, strides, visibility and compile-time switches."""

import math
from typing import Any, Dict, NamedTuple, Tuple

import torch
import triton
from torch import Tensor
from triton import knobs

from .tuning import Target, current_target
from .visibility import FAR_AWAY, Visible, check_visible, launch_device, window_bounds

# Fixed when the kernels were made, at import. Triton's interpreter computes bfloat16 wrongly: callers widen it then.
INTERPRET = bool(knobs.runtime.interpret)
NORMALIZERS = ("softpick", "softmax", "rectified_softmax")
MAX_HEAD_DIM = 256
# No tile has more rows.
MAX_BLOCK = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LOG2E = 1.0 / math.log(2.0)
# What heads that run side by side read again and again should fit the level-2 cache: half of the 50 MB of Hopper.
_CACHE_BYTES = 25_000_000


def check_inputs(q: Tensor, k: Tensor, v: Tensor, normalizer: str = "softpick") -> None:
    """Refuse what the kernels cannot compute.

    Raises:
        ValueError: a shape, dtype, device, head count or head dimension; the message says what was given, what is
            allowed and what to do.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"{shapes} have {q.ndim}, {k.ndim} and {v.ndim} dimensions, expected [B, T, H, D] for each")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes} do not fit: expected [B, T, H, D], [B, S, Hkv, D] and [B, S, Hkv, Dv]")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads and {k.shape[2]} key heads given, expected a multiple of the key heads; do not "
            "repeat keys for grouped-query attention, the kernel shares them"
        )
    for name, size in (("head dimension of q and k", q.shape[3]), ("head dimension of v", v.shape[3])):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(
                f"the {name} is {size}, expected 1 to {MAX_HEAD_DIM}. Larger heads run with the package's 'tiled'"
            )
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in _DTYPES:
        raise ValueError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}, expected the same one of float32, float16 and "
            "bfloat16. Cast them, or use the package's 'tiled' for float64"
        )
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k, v are on {q.device}, {k.device} and {v.device}, expected one device")
    if q.device.type == "meta":
        raise ValueError("q is on the meta device, expected a GPU: these kernels compute with real data only")
    if q.device.type == "cpu" and not INTERPRET:
        raise ValueError(
            "q is on the CPU, expected a GPU. Move the tensors, use the package's 'tiled' on CPU, or set "
            "TRITON_INTERPRET=1 before the first import to debug in Triton's slow interpreter"
        )
    if normalizer not in NORMALIZERS:
        raise ValueError(
            f"normalizer is {normalizer!r}, expected one of {', '.join(NORMALIZERS)}; for scaled_* multiply q first"
        )


def tile_dim(size: int) -> int:
    """Columns of the tile that holds a head of `size`: tensor cores want a power of two, and at least 16."""
    return max(16, triton.next_power_of_2(size))


def dense_rows(x: Tensor) -> Tensor:
    """`x` itself if the elements of its last dimension lie side by side, as the kernels require, else a copy."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def row_strides(x: Tensor) -> Tuple[int, int, int]:
    """Strides of batch, token and head; 0 where there is only one, so that a stray stride cannot force a compile."""
    return tuple(0 if size <= 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3]))


class Problem(NamedTuple):
    """One call, described once for all of its kernels. Tensors: q, k, v with dense last dimensions."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    rows: Dict[str, Any]
    numbers: Dict[str, int]
    flags: Dict[str, Any]
    target: Target
    same_mask_in_all_heads: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float, normalizer: str) -> "Problem":
        """Check the inputs and derive what the kernels need.

        Raises:
            ValueError: see `check_inputs`; or the visibility does not fit, or the scale is not finite.
        """
        check_inputs(q, k, v, normalizer)
        check_visible(visible, q, k)
        if not math.isfinite(scale):
            raise ValueError(f"scale is {scale}, expected a finite number, usually head_dim ** -0.5")
        # The kernels ask for the sign of q.k, and a score of 0 has none.
        q, k, v = dense_rows(q if scale else q * 0), dense_rows(k), dense_rows(v)
        target = current_target(q.device)
        given = visible.start is not None
        left, right = window_bounds(visible.causal, visible.window)
        banded = not given and (left >= 0 or right >= 0)
        rows = dict(
            start=None, end=None, srow_b=0, keys=None, skey_b=0, mask=None, sm_b=0, sm_h=0, sm_t=0, MASK_UNIT=1
        )
        if given:
            start, end = visible.start.contiguous(), visible.end.contiguous()
            rows.update(start=start, end=end, srow_b=start.shape[1] if start.shape[0] > 1 else 0)
        if visible.keys is not None:
            keys = dense_rows(visible.keys).view(torch.uint8)
            rows.update(keys=keys, skey_b=keys.stride(0))
        if visible.mask is not None:
            # Dense along the keys, so that many are loaded at once; a mask of one column is widened.
            mask = dense_rows(visible.mask.expand(*visible.mask.shape[:3], k.shape[1]))
            mask = mask.view(torch.uint8).expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
            unit = 16 if all(stride % 16 == 0 for stride in mask.stride()[:3]) else 1
            rows.update(mask=mask, **{name: s // unit for name, s in zip(("sm_b", "sm_h", "sm_t"), mask.stride())})
            rows.update(MASK_UNIT=unit)
        numbers = dict(
            B=q.shape[0], T=q.shape[1], S=k.shape[1], H=q.shape[2], offset=visible.offset,
            left=left if left >= 0 else FAR_AWAY, right=right if right >= 0 else FAR_AWAY,
        )  # fmt: skip
        flags = dict(
            G=q.shape[2] // k.shape[2], D=q.shape[3], DV=v.shape[3], BD=tile_dim(q.shape[3]), BDV=tile_dim(v.shape[3]),
            NORMALIZER=normalizer, ROWS="given" if given else "band" if banded else "all",
            LEFT=given or left >= 0, HAS_KEYS=visible.keys is not None, HAS_MASK=visible.mask is not None,
            NEGATE=scale < 0, PRECISION=_precision(q, target), RELU=target.relu_conversion,
        )  # fmt: skip
        same_mask = rows["mask"] is None or rows["sm_h"] == 0 or q.shape[2] == 1
        # A scale of 0 must still hide -inf scores: 0 times -inf is NaN.
        exponent = max(abs(scale) * _LOG2E, 2.0**-126)
        return cls(q, k, v, exponent, rows, numbers, flags, target, same_mask)

    @property
    def dim(self) -> int:
        """The larger tile dimension, by which configurations are chosen."""
        return max(self.flags["BD"], self.flags["BDV"])

    def strides(self, **more: Tensor) -> Dict[str, int]:
        """Strides of q, k, v and `more` in units of UNIT elements, which tells the compiler how they are aligned."""
        named = dict(q=self.q, k=self.k, v=self.v, **more)
        all_strides = {f"s{name}_{axis}": s for name, x in named.items() for axis, s in zip("bth", row_strides(x))}
        # The stride of a token is multiplied by UNIT in its own type; one that needs 64 bits must arrive whole.
        units = (16, 8, 1) if max(s for name, s in all_strides.items() if name.endswith("_t")) < 2**31 else (1,)
        unit = next(unit for unit in units if all(stride % unit == 0 for stride in all_strides.values()))
        return dict({name: stride // unit for name, stride in all_strides.items()}, UNIT=unit)

    @property
    def wide(self) -> bool:
        """Whether the rows of a tile are too far apart for 32-bit offsets."""
        return max(x.stride(1) for x in (self.q, self.k, self.v)) * MAX_BLOCK >= 2**31

    def heads_at_once(self, heads: int, rows: float) -> int:
        """How many of `heads` programs should run side by side, if each reads `rows` vectors of both dimensions."""
        bytes_of_head = rows * (self.flags["D"] + self.flags["DV"]) * self.q.element_size()
        return max(1, min(heads, int(_CACHE_BYTES / max(bytes_of_head, 1))))

    def device(self) -> Any:
        """Context in which kernels are launched on the device of the tensors, not on the current one."""
        return launch_device(self.q)


def _precision(q: Tensor, target: Target) -> str:
    """How float32 products are computed: with TensorFloat-32 where torch itself may, else as exactly as float32."""
    if q.dtype != torch.float32 or not target.family.startswith("sm"):
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # torch 2.9 and later: the old name raises once the new one was set, as transformers' Trainer does.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    # Three products on tensor cores keep float32's accuracy and are faster than the scalar units.
    return "tf32" if allowed else "tf32x3"
