"""Tile sizes, warps and stages: one fixed table, so that two runs, and all ranks of one, launch the same kernels.

Every entry is compiled ahead of time: shared memory within the limit, no register spilled in a main loop. Entries are
heuristic until a GPU has measured them; SOFTPICK_ATTENTION_AUTOTUNE=1 times alternatives on the first call, which
breaks bit-equal resumption and is meant for finding better entries.
"""

import logging
import os
from functools import cache
from typing import Any, Callable, Dict, NamedTuple

import torch
import triton

_LOG = logging.getLogger("softpick_attention")
_TUNED: Dict[Any, Any] = {}


class Config(NamedTuple):
    """Queries and keys of a tile, and how a program is laid out on the device."""

    block_m: int = 0
    block_n: int = 0
    num_warps: int = 4
    num_stages: int = 2


class Target(NamedTuple):
    """What is known of a device. family: "sm80", "sm86", "sm90", "sm100", "gfx9", or "other" (small tiles)."""

    family: str
    processors: int = 1
    relu_conversion: bool = False


@cache
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
    return "sm86" if major >= 8 else "other"


_INTERPRETER = Config(32, 32)


# By family and bytes of an element: (block_m, block_n, num_warps, num_stages) for dimensions up to 64, 128 and 256.
# fmt: off
_HALF_80 = {
    "forward": ((128, 128, 8, 3), (128, 64, 8, 3), (32, 32, 4, 1)),
    "decode": ((16, 128, 4, 3), (16, 64, 4, 3), (16, 32, 4, 2)),
    "dq": ((128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 4, 1)),
    "dkv": ((64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 1)),
    "dkv_fast": ((64, 128, 8, 2), (32, 128, 8, 2), (16, 32, 4, 1)),
}
_HALF_86 = dict(
    _HALF_80,
    dq=((128, 64, 8, 2), (64, 64, 4, 2), (32, 32, 4, 1)),
    dkv=((64, 128, 8, 2), (32, 64, 4, 2), (16, 32, 4, 1)),
    dkv_fast=((64, 128, 8, 2), (32, 32, 4, 1), (16, 32, 4, 1)),
)
_HALF_90 = {
    "forward": ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 1)),
    "decode": ((16, 128, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2)),
    "dq": ((128, 128, 8, 2), (128, 64, 8, 2), (128, 32, 8, 1)),
    "dkv": ((64, 128, 8, 2), (32, 128, 8, 2), (16, 32, 4, 1)),
    "dkv_fast": ((64, 128, 8, 2), (32, 128, 8, 2), (16, 32, 4, 1)),
}
_HALF_100 = dict(
    _HALF_90,
    forward=((128, 128, 8, 3), (128, 128, 8, 2), (64, 32, 4, 1)),
    dkv=((64, 128, 8, 2), (32, 128, 8, 2), (32, 32, 4, 1)),
)
_HALF_GFX9 = {
    "forward": ((128, 64, 4, 3), (128, 64, 4, 2), (64, 32, 4, 1)),
    "decode": ((16, 64, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1)),
    "dq": ((64, 64, 4, 2), (64, 64, 4, 2), (32, 32, 4, 1)),
    "dkv": ((64, 64, 4, 1), (32, 64, 4, 1), (16, 32, 4, 1)),
    "dkv_fast": ((64, 64, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
}
_SMALL_HALF = {
    "forward": ((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)),
    "decode": ((16, 64, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1)),
    "dq": ((64, 32, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1)),
    "dkv": ((32, 64, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
    "dkv_fast": ((32, 64, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
}
_FLOAT = {
    "forward": ((32, 32, 4, 2), (16, 32, 4, 1), (16, 16, 8, 1)),
    "decode": ((16, 64, 4, 2), (16, 32, 4, 2), (16, 16, 8, 1)),
    "dq": ((32, 32, 4, 1), (16, 32, 8, 1), (16, 16, 16, 1)),
    "dkv": ((16, 32, 4, 1), (16, 16, 8, 1), (16, 16, 16, 1)),
    "dkv_fast": ((16, 32, 4, 1), (16, 16, 8, 1), (16, 16, 16, 1)),
}
_FLOAT_GFX9 = {
    "forward": ((32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)),
    "decode": ((16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    "dq": ((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
    "dkv": ((32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    "dkv_fast": ((32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}
_TABLE = {
    ("sm80", 2): _HALF_80, ("sm80", 4): _FLOAT,
    ("sm86", 2): _HALF_86, ("sm86", 4): _FLOAT,
    ("sm90", 2): _HALF_90, ("sm90", 4): _FLOAT,
    ("sm100", 2): _HALF_100, ("sm100", 4): _FLOAT,
    ("gfx9", 2): _HALF_GFX9, ("gfx9", 4): _FLOAT_GFX9,
    ("other", 2): _SMALL_HALF, ("other", 4): _FLOAT_GFX9,
}
# fmt: on


def configuration(kernel: str, problem: Any, launch: Callable[[Config], None]) -> Config:
    """What to launch "forward", "decode", "dq", "dkv" or "dkv_fast" of a `Problem` with.

    launch: runs the kernel with a configuration; called only when SOFTPICK_ATTENTION_AUTOTUNE=1 asks for timing.
    """
    if problem.target.family == "interpreter":
        return _INTERPRETER
    masks = problem.switches.HAS_KEYS or problem.switches.HAS_MASK
    config = table_configuration(kernel, problem.target.family, problem.q.element_size(), problem.dim, masks)
    if os.environ.get("SOFTPICK_ATTENTION_AUTOTUNE") != "1":
        return config
    length = 1 << max(problem.numbers["T"] - 1, 0).bit_length()
    key = kernel, problem.q.device, problem.q.dtype, problem.dim, problem.switches.NORMALIZER, masks, length
    if key not in _TUNED:
        _TUNED[key] = _fastest(config, launch)
        _LOG.info("autotuned %s: %s (table: %s)", key, _TUNED[key], config)
    return _TUNED[key]


def table_configuration(kernel: str, family: str, element_size: int, dim: int, masks: bool = False) -> Config:
    """The entry for heads of tile dimension `dim`; masks take registers, so the tile is then cut along the loop."""
    entries = _TABLE[family, element_size][kernel]
    config = Config(*next(entry for limit, entry in zip((64, 128, 256), entries) if dim <= limit))
    if not masks:
        return config
    side = "block_m" if kernel.startswith("dkv") else "block_n"
    return config._replace(**{side: max(getattr(config, side) // (2 if dim <= 64 else 4), 16)})


def _fastest(config: Config, launch: Callable[[Config], None]) -> Config:
    """The best of `config` and its neighbours, one thing changed at a time; those that do not fit are left out."""
    fields = {name: getattr(config, name) for name in ("block_m", "block_n", "num_warps")}
    trials = [config] + [
        config._replace(**{name: size}) for name, old in fields.items() for size in (old // 2, old * 2) if size >= 4
    ]
    trials += [config._replace(num_stages=stages) for stages in (1, 2, 3, 4) if stages != config.num_stages]
    times = {}
    for trial in trials:
        try:
            times[trial] = triton.testing.do_bench(lambda trial=trial: launch(trial), warmup=10, rep=50)
        except Exception as error:  # Out of shared memory, or a tile below what the tensor cores take.
            _LOG.debug("%s does not run: %s", trial, error)
    return min(times, key=times.get, default=config)


def decode_splits(target: Target, T: int, S: int, programs: int, block_n: int) -> int:
    """Parts into which decoding splits the keys, 0 = prefill. Whether it splits does not depend on the cache."""
    if T > 16 or programs >= target.processors:
        return 0
    return max(1, min(2 * target.processors // programs, -(-S // (4 * block_n)), 128))
