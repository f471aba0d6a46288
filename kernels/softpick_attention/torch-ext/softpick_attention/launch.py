"""What every kernel is told about a call: checked shapes, strides, visibility, switches; and how one is launched."""

import contextlib
import math
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
import triton
from torch import Tensor
from triton import knobs

from .normalizers import NORMALIZERS, Normalizer
from .tuning import Config, Target, current_target
from .visibility import FAR_AWAY, Visible, check_visible, launch_device, window_bounds

# Fixed when the kernels were made, at import. Triton's interpreter computes bfloat16 wrongly: callers widen it then.
INTERPRET = bool(knobs.runtime.interpret)
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


class Seen(NamedTuple):
    """Tensors that say which keys a query sees, None where the compile-time switches need none.

    start, end: int32 or int64 [B or 1, T]. keys: uint8 [B, S]. mask: uint8 [B, H, T, S], any strides but the last.
    bounds: int32 [B or 1, tiles, 4], of each tile of keys the queries that see any and all of it.
    """

    start: Optional[Tensor] = None
    end: Optional[Tensor] = None
    keys: Optional[Tensor] = None
    mask: Optional[Tensor] = None
    bounds: Optional[Tensor] = None


class Switches(NamedTuple):
    """What a kernel is compiled for.

    ROWS: "all" keys, a "band" of them that moves with the query, or "given" intervals; LEFT: whether these have a
    lower bound; HAS_KEYS, HAS_MASK: whether keys and mask are read. UNIT, MASK_UNIT: what strides are counted in. G:
    query heads a key head. D, DV, BD, BDV: head dimensions and their tiles. NEGATE: the scale is negative.
    The rest is of one kernel: see there.
    """

    NORMALIZER: Normalizer
    ROWS: str
    LEFT: bool
    HAS_KEYS: bool
    HAS_MASK: bool
    G: int
    D: int
    DV: int
    BD: int
    BDV: int
    NEGATE: bool
    PRECISION: str
    RELU: bool
    UNIT: int = 1
    MASK_UNIT: int = 1
    BM: int = 0
    BN: int = 0
    WIDE: bool = True
    PACK: bool = False
    SPLIT: bool = False
    ADD_DQ: bool = False
    EACH_HEAD: bool = False


class Launch(NamedTuple):
    """A launch that `watch_launches` saw; switches are None for the small kernels that take fewer."""

    kernel: str
    switches: Optional[Switches]


_WATCHERS: List[List[Launch]] = []


@contextlib.contextmanager
def watch_launches() -> Iterator[List[Launch]]:
    """The launches of forward and backward that happen inside, in order: which variant a call takes, for tests."""
    launches: List[Launch] = []
    _WATCHERS.append(launches)
    try:
        yield launches
    finally:
        _WATCHERS.remove(launches)


def run(kernel: Any, grid: Tuple[int, ...], config: Config, **arguments: Any) -> None:
    """Launch a kernel. Contraction to fused multiply-add is wanted, and asked for by name."""
    for launches in _WATCHERS:
        launches.append(Launch(kernel.fn.__name__, arguments.get("C")))
    kernel[grid](
        **arguments, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True
    )  # fmt: skip


class Problem(NamedTuple):
    """One call, described once for all of its kernels. Tensors: q, k, v with dense last dimensions.

    numbers: what every kernel takes as integers; from t + band_lo to before t + band_hi are the keys of a band, and
    row_b, mask_b, mask_h, mask_t strides of the tensors in `seen`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    seen: Seen
    numbers: Dict[str, int]
    switches: Switches
    target: Target

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
        left, right = window_bounds(visible.causal, visible.window)
        seen, strides, mask_unit, given = Seen(), (0, 0, 0), 1, visible.start is not None
        if given:
            seen = seen._replace(start=visible.start.contiguous(), end=visible.end.contiguous())
        if visible.keys is not None:
            seen = seen._replace(keys=visible.keys.contiguous().view(torch.uint8))
        if visible.mask is not None:
            # Dense along the keys, so that many are loaded at once; a mask of one column is widened.
            mask = dense_rows(visible.mask.expand(*visible.mask.shape[:3], k.shape[1]))
            mask = mask.view(torch.uint8).expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
            mask_unit = 16 if all(stride % 16 == 0 for stride in mask.stride()[:3]) else 1
            seen, strides = seen._replace(mask=mask), [stride // mask_unit for stride in mask.stride()[:3]]
        numbers = dict(
            T=q.shape[1], S=k.shape[1], H=q.shape[2], row_b=q.shape[1] if given and len(seen.start) > 1 else 0,
            band_lo=visible.offset - (left if left >= 0 else FAR_AWAY),
            band_hi=visible.offset + (right if right >= 0 else FAR_AWAY) + 1,
            **dict(zip(("mask_b", "mask_h", "mask_t"), strides)),
        )  # fmt: skip
        switches = Switches(
            NORMALIZER=NORMALIZERS[normalizer],
            ROWS="given" if given else "band" if left >= 0 or right >= 0 else "all", LEFT=given or left >= 0,
            HAS_KEYS=seen.keys is not None, HAS_MASK=seen.mask is not None, MASK_UNIT=mask_unit,
            G=q.shape[2] // k.shape[2], D=q.shape[3], DV=v.shape[3], BD=tile_dim(q.shape[3]), BDV=tile_dim(v.shape[3]),
            NEGATE=scale < 0, PRECISION=_precision(q, target), RELU=target.relu_conversion,
        )  # fmt: skip
        # A scale of 0 must still hide -inf scores: 0 times -inf is NaN.
        return cls(q, k, v, max(abs(scale) * _LOG2E, 2.0**-126), seen, numbers, switches, target)

    @property
    def same_mask_in_all_heads(self) -> bool:
        """Whether heads may share a tile of queries."""
        return self.numbers["mask_h"] == 0 or self.numbers["H"] == 1

    @property
    def dim(self) -> int:
        """The larger tile dimension, by which configurations are chosen."""
        return max(self.switches.BD, self.switches.BDV)

    def arguments(self, **more: Tensor) -> Tuple[Dict[str, Any], Switches]:
        """What every kernel takes, with the strides of q, k, v and `more`, and the switches for these.

        Strides are in units of UNIT elements, which tells the compiler how they are aligned.
        """
        tensors = dict(q=self.q, k=self.k, v=self.v, **more)
        strides = {f"{name}_{axis}": s for name, x in tensors.items() for axis, s in zip("bth", row_strides(x))}
        # The stride of a token is multiplied by UNIT in its own type; one that needs 64 bits must arrive whole.
        units = (16, 8, 1) if max(s for name, s in strides.items() if name.endswith("_t")) < 2**31 else (1,)
        unit = next(unit for unit in units if all(stride % unit == 0 for stride in strides.values()))
        strides = {name: stride // unit for name, stride in strides.items()}
        return dict(tensors, scale=self.scale, seen=self.seen, **self.numbers, **strides), self.switches._replace(
            UNIT=unit
        )

    @property
    def wide(self) -> bool:
        """Whether the rows of a tile are too far apart for 32-bit offsets."""
        return max(x.stride(1) for x in (self.q, self.k, self.v)) * MAX_BLOCK >= 2**31

    def heads_at_once(self, heads: int, rows: float) -> int:
        """How many of `heads` programs should run side by side, if each reads `rows` vectors of both dimensions."""
        bytes_of_head = rows * (self.switches.D + self.switches.DV) * self.q.element_size()
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
