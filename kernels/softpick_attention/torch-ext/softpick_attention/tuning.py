"""Tile sizes, warps and stages: one fixed table, so that two runs, and all ranks of one, launch the same kernels.

Every entry is compiled ahead of time in the tests: no spilled register, shared memory within the limit. Entries are
heuristic until a GPU has measured them; SOFTPICK_ATTENTION_AUTOTUNE=1 times alternatives on the first call, which
breaks bit-equal resumption and is meant for finding better entries.
"""

from functools import lru_cache
from typing import Any, Dict, NamedTuple

import torch


class Config(NamedTuple):
    """Queries and keys of a tile, and how a program is laid out on the device."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2

    def launch(self) -> Dict[str, Any]:
        """Options of the launch. Contraction to fused multiply-add is wanted, and asked for by name."""
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True)


class Target(NamedTuple):
    """What is known of a device. family: "sm80", "sm86", "sm90", "sm100", "gfx9" or "other"."""

    family: str
    processors: int = 1
    relu_conversion: bool = False


@lru_cache(maxsize=None)
def current_target(device: torch.device) -> Target:
    """The target of a device; the CPU is the interpreter's."""
    if device.type == "cpu":
        return Target("interpreter")
    if device.type != "cuda":
        properties = torch.get_device_module(device).get_device_properties(device)
        return Target("other", getattr(properties, "multi_processor_count", None) or 64)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("gfx9", properties.multi_processor_count)
    return Target(
        nvidia_family(properties.major, properties.minor), properties.multi_processor_count, properties.major >= 8
    )


def nvidia_family(major: int, minor: int) -> str:
    """Generations with one entry: data-centre parts by name, parts with 100 KiB of shared memory together."""
    if (major, minor) == (8, 0):
        return "sm80"
    if major == 9:
        return "sm90"
    if major in (10, 11):
        return "sm100"
    return "sm86"


# Kernel -> ((largest dimension, config), ...), by family and by bytes of an element.
_TABLE: Dict[Any, Any] = {
    ("sm80", 2): {
        "forward": (
            (32, Config(128, 64, 4, 3)),
            (64, Config(128, 64, 4, 3)),
            (128, Config(128, 64, 8, 2)),
            (256, Config(64, 32, 4, 2)),
        ),
        "decode": ((128, Config(16, 64, 4, 3)), (256, Config(16, 32, 4, 2))),
        "dq": ((64, Config(128, 64, 8, 2)), (128, Config(64, 64, 8, 2)), (256, Config(32, 32, 4, 1))),
        "dkv": ((64, Config(64, 128, 8, 2)), (128, Config(64, 64, 8, 2)), (256, Config(32, 32, 4, 1))),
    },
}
_INTERPRETER = Config(32, 32)


def configuration(kernel: str, target: Target, dtype: torch.dtype, dim: int) -> Config:
    """The configuration of "forward", "decode", "dq", "dkv" or "dkv_fast" for heads of tile dimension `dim`."""
    if target.family == "interpreter":
        return _INTERPRETER
    table = _TABLE[target.family, dtype.itemsize]
    return next(config for limit, config in table[kernel] if dim <= limit)


def decode_splits(target: Target, T: int, S: int, programs: int, block_n: int) -> int:
    """Parts into which decoding splits the keys, 0 = prefill. Whether it splits does not depend on the cache length."""
    if T > 16 or programs >= target.processors:
        return 0
    return max(1, min(2 * target.processors // programs, -(-S // (4 * block_n)), 128))
