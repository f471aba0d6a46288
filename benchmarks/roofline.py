"""Ceilings of attention on a chip, and their plot beside what was measured.

    python benchmarks/roofline.py benchmarks/results/gpu_attention.json roofline.png

A kernel that visits whole tiles of 128 queries and keys computes T (T + 128) / 2 scores a head, while T^2 / 2 count as
useful. A visited score costs 4 D FLOP on the tensor cores in the forward and 10 D in the backward, and one exp2 on the
multi-function unit (MUFU) each time; softpick needs no more of either than softmax.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

TILE = 128
# FLOP a head dimension, and exp2, of one visited score.
COSTS = {"forward": (4, 1), "backward": (10, 1), "both": (14, 2)}
EXP2_PER_CLOCK = 16  # a multiprocessor, compute capability 8.0 to 10.0 (CUDA programming guide, arithmetic throughput)


class Chip(NamedTuple):
    """Datasheet values; the clock is the one at which the datasheet's tensor-core rate is reached."""

    multiprocessors: int
    gigahertz: float
    tensor_flop_per_clock: int
    """Dense bf16 or fp16, one multiprocessor."""
    bandwidth: float
    """Bytes/s of device memory."""

    @property
    def tensor(self) -> float:
        """FLOP/s."""
        return self.multiprocessors * self.gigahertz * 1e9 * self.tensor_flop_per_clock

    @property
    def exp2(self) -> float:
        """exp2/s."""
        return self.multiprocessors * self.gigahertz * 1e9 * EXP2_PER_CLOCK


# Searched in this order as whole words of the device's name.
CHIPS = {
    "H200": Chip(132, 1.83, 4096, 4.8e12),
    "H100 PCIe": Chip(114, 1.62, 4096, 2.0e12),
    "H100 NVL": Chip(132, 1.545, 4096, 3.9e12),
    "H100": Chip(132, 1.83, 4096, 3.35e12),
    "B200": Chip(148, 1.85, 8192, 8.0e12),
    "A100-SXM4-80GB": Chip(108, 1.41, 2048, 2.039e12),
    "A100-SXM4-40GB": Chip(108, 1.41, 2048, 1.555e12),
    "A100 80GB PCIe": Chip(108, 1.41, 2048, 1.935e12),
}


def chip_of(device_name: str) -> Chip | None:
    """The row of CHIPS that a name such as "NVIDIA H100 80GB HBM3" belongs to; None if it is not there."""
    for name, chip in CHIPS.items():
        if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", device_name):
            return chip
    return None


def ceilings(chip: Chip, dim: int, length: int, work: str = "forward") -> dict[str, float]:
    """Useful TFLOP/s that causal attention cannot pass.

    Returns:
        "tensor cores" and "exp2": that unit alone, the others free; "no overlap": one after the other.
    """
    flop, exps = COSTS[work]
    useful = flop * dim * length / (length + TILE) / 1e12
    tensor, exp2 = flop * dim / chip.tensor, exps / chip.exp2
    return {"tensor cores": useful / tensor, "exp2": useful / exp2, "no overlap": useful / (tensor + exp2)}


def plot(result: dict[str, Any], path: Path) -> None:
    """TFLOP/s over T for every peer, forward and backward, one column a head dimension; ceilings where known."""
    # Optional: the benchmark itself runs without it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["kind"] == "dense" and row["work"] in ("forward", "backward")]
    if not rows:
        raise ValueError("no dense row was measured: nothing to plot")
    gpu = result["environment"]["gpu"]["name"]
    chip = None if any(row["dtype"] == "float32" for row in rows) else chip_of(gpu)
    dims, works = (sorted({row[key] for row in rows}, reverse=key == "work") for key in ("dim", "work"))
    names = list(dict.fromkeys(name for row in rows for name in row["tflops"]))
    figure = Figure(figsize=(6 * len(dims), 4 * len(works)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(works), len(dims), squeeze=False, sharex=True)
    for axes, (work, dim) in zip(grid.flat, [(work, dim) for work in works for dim in dims], strict=True):
        chosen = sorted((r for r in rows if (r["work"], r["dim"]) == (work, dim)), key=lambda row: row["length"])
        for number, name in enumerate(names):
            points = [(row["length"], row["tflops"][name]) for row in chosen if name in row["tflops"]]
            if points:
                x, spread = [length for length, _ in points], [t for _, t in points]
                width, color = 2.2 if name.startswith("softpick") else 1.0, f"C{number % 10}"
                axes.plot(x, [t["p50"] for t in spread], "o-", label=name, color=color, linewidth=width, markersize=3)
                axes.fill_between(x, [t["p20"] for t in spread], [t["p80"] for t in spread], color=color, alpha=0.15)
        lengths = [row["length"] for row in chosen]
        axes.set(title=f"{work}, D={dim}, causal", xlabel="T (tokens)", ylabel="TFLOP/s", ylim=(0, None))
        if chip and lengths:
            limits = [ceilings(chip, dim, length, work) for length in lengths]
            for name, style in (("tensor cores", "--"), ("exp2", ":"), ("no overlap", "-.")):
                axes.plot(lengths, [limit[name] for limit in limits], style, color="black", linewidth=0.9, label=name)
            top = 1.1 * max(limit["tensor cores"] for limit in limits)
            axes.set_ylim(0, top)
            if limits[0]["exp2"] > top:
                note = f"exp2: {limits[0]['exp2']:.0f} to {limits[-1]['exp2']:.0f}"
                axes.annotate(note, (0.02, 0.98), xycoords="axes fraction", va="top", fontsize=7)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    legend = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=6, fontsize=7)
    env = result["environment"]
    figure.suptitle(f"{gpu}, torch {env['packages']['torch']}, commit {env['commit']}, {env['date']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> int:
    """Draw the plot of a result file again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON written by gpu_attention.py")
    parser.add_argument("picture", type=Path, help="PNG to write")
    args = parser.parse_args()
    plot(json.loads(args.result.read_text()), args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
