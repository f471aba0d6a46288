"""Tiled softpick attention on the CPU against torch SDPA (softmax) and dense softpick, in one process.

    python benchmarks/cpu_attention.py [--repeats 9] [--quick]

Promises: T=2048, H=12, D=64, float32, causal, forward and backward: at most 1.6x the time of SDPA, at least 6x faster
than dense softpick; T=16384, H=4, D=64: under 1.5 GiB above start. Writes benchmarks/results/cpu_attention.json.
"""

import argparse
import subprocess
import sys

import torch
from measure import alternate, quantile, ratio, record

from hf_softpick.modeling.attention_eager import dense_attention
from hf_softpick.modeling.attention_tiled import tiled_attention
from hf_softpick.modeling.visibility import visible_keys

SHAPES = [(1, 12, 512, 64), (1, 12, 1024, 64), (1, 12, 2048, 64), (8, 4, 256, 64), (1, 8, 2048, 128)]
SDPA_LIMIT, DENSE_LIMIT, MEMORY_LIMIT = 1.6, 6.0, 1.5


def inputs(batch: int, heads: int, length: int, dim: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """query, key, value [B, H, T, D] that need gradients, and a gradient of the output [B, T, H, D]."""
    torch.manual_seed(0)
    tensors = [torch.randn(batch, heads, length, dim, requires_grad=True) for _ in range(3)]
    return tensors, torch.randn(batch, length, heads, dim)


def compare(shape: tuple[int, ...], repeats: int) -> list[dict]:
    """Forward alone and forward with backward; checks once that tiled and dense agree before timing them."""
    (query, key, value), gradient = inputs(*shape)
    visible, _ = visible_keys(shape[2], shape[2], query.device)
    scale = shape[3] ** -0.5
    forward = {
        "tiled": lambda: tiled_attention(query, key, value, visible, scale),
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(
            1, 2
        ),
        "dense": lambda: dense_attention(query, key, value, visible, scale)[0],
    }
    torch.testing.assert_close(forward["tiled"](), forward["dense"](), rtol=1e-4, atol=1e-5)

    def both(function):
        def step():
            function().backward(gradient)
            query.grad = key.grad = value.grad = None

        return step

    def without_gradient(function):
        def step():
            with torch.no_grad():
                function()

        return step

    rows = []
    for work, wrap in (("fwd", without_gradient), ("fwd+bwd", both)):
        seconds = alternate({name: wrap(function) for name, function in forward.items()}, repeats)
        rows.append(
            {
                "work": work,
                "shape": "B{} H{} T{} D{} fp32 causal".format(*shape),
                "milliseconds": {name: round(1e3 * quantile(times, 0.5), 2) for name, times in seconds.items()},
                "tiled / sdpa": ratio(seconds["tiled"], seconds["sdpa"]),
                "dense / tiled": ratio(seconds["dense"], seconds["tiled"]),
            }
        )
    return rows


def peak_resident() -> int:
    """KiB. Not getrusage: on Linux its peak is inherited from the process that started this one."""
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))


def peak_memory(length: int) -> None:
    """Print the GiB that forward and backward of B1 H4 D64 add to the peak of this process."""
    (query, key, value), gradient = inputs(1, 4, length, 64)
    start = peak_resident()
    tiled_attention(query, key, value, visible_keys(length, length, query.device)[0], 0.125).backward(gradient)
    print((peak_resident() - start) / 2**20)


def main() -> int:
    """Measure, print one line a row, write the record; 1 if a promise is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the promised shape alone")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        peak_memory(args.memory_of)
        return 0
    rows = []
    for shape in [(1, 12, 2048, 64)] if args.quick else SHAPES:
        for row in compare(shape, args.repeats):
            rows.append(row)
            for name in ("tiled / sdpa", "dense / tiled"):
                r = row[name]
                spread = f"p20 {r['p20']:.2f}, p80 {r['p80']:.2f}"
                print(f"attention {row['work']:8}{row['shape']:34}{name} = {r['p50']:.2f} ({spread})", flush=True)
    for length in (4096, 16384):
        child = subprocess.run([sys.executable, __file__, "--memory-of", str(length)], capture_output=True, text=True)
        gibibytes = float(child.stdout)
        rows.append({"work": "fwd+bwd peak memory", "shape": f"B1 H4 T{length} D64 fp32 causal", "GiB": gibibytes})
        print(f"attention fwd+bwd B1 H4 T{length} D64: {gibibytes:.2f} GiB above start", flush=True)
    promised = next(r for r in rows if r["work"] == "fwd+bwd" and "H12 T2048" in r["shape"])
    kept = {
        f"tiled / sdpa <= {SDPA_LIMIT}": promised["tiled / sdpa"]["p50"] <= SDPA_LIMIT,
        f"dense / tiled >= {DENSE_LIMIT}": promised["dense / tiled"]["p50"] >= DENSE_LIMIT,
        f"T=16384 under {MEMORY_LIMIT} GiB": rows[-1]["GiB"] < MEMORY_LIMIT,
    }
    for promise, holds in kept.items():
        print(f"{'kept  ' if holds else 'MISSED'} {promise}")
    print(record("cpu_attention", rows))
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
