"""Results of quantization: a table, a line for a log, and the picture."""

import math
import textwrap
from pathlib import Path
from typing import Any

from hf_softpick.analysis.quantization_formats import FORMATS

_MARKERS = "osDdP^v<*Xph8"
_LINEAR_BELOW = 1e-3
"""Nats. The axis of the increase is linear up to here, and logarithmic beyond, on both sides of 0."""


def format_table(result: dict[str, Any]) -> str:
    """The results of one model as a Markdown table, and under it what was not measured and why.

    quantized: the share of all parameters that the format stores; the rest is in float.
    """
    baseline = result["baseline"]
    lines = [
        "| format | bits | stored bits a weight | quantized | loss | increase | perplexity |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| as saved ({baseline['dtype']}) | {baseline['bits']} | {baseline['bits']} | 0 % | {baseline['loss']:.4f} | "
        f"| {baseline['perplexity']:.2f} |",
    ]
    left = []
    for entry in result["formats"]:
        if entry["status"] == "measured":
            lines.append(
                f"| {entry['format']} | {entry['bits']} | {entry['bits_per_weight']:.2f} | "
                f"{entry['quantized_share']:.0%} | ".replace("%", " %")
                + f"{entry['loss']:.4f} | {_increase(entry['loss_increase'])} | {entry['perplexity']:.2f} |"
            )
            if entry["in_float"]:
                count = len(entry["in_float"])
                left.append(f"{entry['format']}: {count} layers stayed in float, for instance {entry['in_float'][0]}")
        else:
            left.append(f"{entry['format']}: {entry['status']}: {entry['reason']}")
    return "\n".join([*lines, *([""] + left if left else [])])


def _increase(value: float) -> str:
    text = f"{value:+.4f}"
    return "0.0000" if text in ("+0.0000", "-0.0000") else text


def format_last(result: dict[str, Any]) -> str:
    """One line for the part of a result that was measured last."""
    if not result["formats"]:
        baseline = result["baseline"]
        return f"as saved ({baseline['dtype']}): loss {baseline['loss']:.4f}, {baseline['seconds']:.1f} s"
    entry = result["formats"][-1]
    seconds = f"{entry['seconds']:.1f} s"
    if entry["status"] != "measured":
        return f"{entry['format']}: {entry['status']}: {entry['reason']}, {seconds}"
    return f"{entry['format']}: loss {entry['loss']:.4f} ({_increase(entry['loss_increase'])}), {seconds}"


def plot_quantization(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the increase of the loss over the stored bits of a weight, scales included: one colour a model, one marker
    a format. A logarithmic axis of both signs, linear around 0. What is not finite is named in the title.

    Args:
        results: by name of the model.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    draw_quantization(results, figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_quantization(results: dict[str, dict[str, Any]], figure: Any) -> None:
    """What `plot_quantization` saves, on a figure of matplotlib."""
    from matplotlib.lines import Line2D

    axes = figure.subplots()
    axes.set_yscale("symlog", linthresh=_LINEAR_BELOW)
    axes.margins(y=0.1)
    axes.axhline(0, color="black", linestyle="--", linewidth=1)
    broken, drawn, titles = [], {}, []
    handles = []
    for index, (name, result) in enumerate(results.items()):
        color, data = f"C{index}", result["data"]
        titles.append(f"{name}: {data['tokens']:,} tokens measured, {data['description']}")
        handles.append(Line2D([], [], color=color, marker="s", linestyle="", label=name))
        for entry in result["formats"]:
            if entry["status"] != "measured":
                continue
            if not math.isfinite(entry["loss_increase"]):
                broken.append(f"{name} {entry['format']}: {entry['loss']}")
                continue
            known = entry["format"] in FORMATS
            marker = _MARKERS[list(FORMATS).index(entry["format"]) if known else len(FORMATS)]
            drawn[entry["format"]] = marker
            style = {"color": color, "marker": marker, "linestyle": "", "alpha": 0.7}
            label = f"{name} {entry['format']}"
            axes.plot(entry["bits_per_weight"], entry["loss_increase"], label=label, **style)
    for name, marker in drawn.items():
        handles.append(Line2D([], [], color="gray", marker=marker, linestyle="", label=name))
    axes.set(
        xlabel="stored bits a weight, scales included",
        ylabel="increase of the loss, nats a token (dashed: as saved)",
        xlim=(0, None),
    )
    if broken:
        titles.append("not finite: " + ", ".join(broken))
    axes.set_title("\n".join(textwrap.fill(title, 80) for title in titles), fontsize=7)
    axes.grid(alpha=0.3)
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
