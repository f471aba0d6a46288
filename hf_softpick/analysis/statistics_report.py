"""Statistics of models as a table for the terminal and as a picture."""

from pathlib import Path
from typing import Any

import numpy as np

ROWS = (
    ("sink rate, first token", "sink_rate", "{:.1%}"),
    ("sink rate, first 4 tokens", "sink_rate_first4", "{:.1%}"),
    ("sink rate, any position", "sink_rate_any", "{:.1%}"),
    ("mean attention to the first token", "first_mass", "{:.4f}"),
    ("weights exactly 0", "sparsity", "{:.2%}"),
    ("weights <= 1e-5", "sparsity_small", "{:.2%}"),
    ("64x64 tiles without a positive score", "empty_tiles_64", "{:.2%}"),
    ("128x128 tiles without a positive score", "empty_tiles_128", "{:.2%}"),
    ("row mass", "row_mass", "{:.4f}"),
    ("rows without mass", "empty_rows", "{:.2%}"),
    ("entropy, nats", "entropy", "{:.3f}"),
    ("attention distance, tokens", "distance", "{:.1f}"),
    ("dormant heads", "dormant_heads", "{:,}"),
    ("hidden-state kurtosis, mean over layers", "kurtosis", "{:,.2f}"),
    ("hidden-state kurtosis, largest layer", "kurtosis_max", "{:,.2f}"),
    ("hidden-state maximum", "hidden_max", "{:,.2f}"),
    ("hidden-state minimum", "hidden_min", "{:,.2f}"),
    ("massive activations", "massive_activations", "{:,}"),
)


def format_statistics(results: dict[str, dict[str, Any]]) -> str:
    """The scalars of several models, {name: statistics.json}, one column each."""
    lines = [["", *results]]
    lines += [
        [title, *(form.format(result["summary"][key]) for result in results.values())] for title, key, form in ROWS
    ]
    counts = (("rows", "rows"), ("documents", "sequences"), ("documents counted for sinks", "sink_sequences"))
    for title, key in (*counts, ("tokens", "tokens")):
        lines.append([title, *(f"{result['data'][key]:,}" for result in results.values())])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )


def plot_statistics(result: dict[str, Any], path: Path) -> None:
    """Maps of layer x head and curves by layer of one model, as PNG.

    Args:
        result: the content of statistics.json.
    """
    # Slow to import, and needed once.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    layers = result["layers"]
    axes = figure.subplots(2, 3)
    maps = (
        ("mean attention to the first token", "first_mass"),
        ("row mass", "row_mass"),
        ("weights exactly 0", "sparsity"),
    )
    for axis, (title, name) in zip(axes[0], maps, strict=True):
        values = np.array([layer["heads"][name] for layer in layers], dtype=float)
        image = axis.imshow(values, vmin=0, vmax=1, aspect="auto", cmap="viridis", interpolation="nearest")
        axis.set(title=title, xlabel="head", ylabel="layer")
        figure.colorbar(image, ax=axis)
    curves = (
        ("kurtosis", {"hidden": "kurtosis"}),
        ("largest and smallest hidden state", {"max": "max", "min": "min"}),
        ("top 1 and median |hidden state|", {"top 1": "top3", "median": "median"}),
    )
    for axis, (title, names) in zip(axes[1], curves, strict=True):
        for label, name in names.items():
            values = [layer["hidden"][name] for layer in layers]
            values = [value[0] if isinstance(value, list) else value for value in values]
            axis.plot(range(len(layers)), np.array(values, dtype=float), "o-", label=label, markersize=3)
        axis.set(title=title, xlabel="layer")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend()
    axes[1][0].set_yscale("log")
    axes[1][2].set_yscale("log")
    figure.suptitle(f"{result['model']['name']} ({result['model']['normalizer']})")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
