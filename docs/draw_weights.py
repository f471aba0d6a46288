"""Draw the picture of the README: softmax and softpick weights of the same scores.

python docs/draw_weights.py [docs/softmax_softpick.png]
"""

import sys

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_softpick.modeling.attention_reference import softmax, softpick

ROWS = {
    "two keys matter": [-1.2, -0.4, 2.6, -0.8, 0.3, 1.7, -1.5, -0.2],
    "no key matters": [-0.3, -1.4, -0.8, -2.1, -0.6, -1.1, -1.7, -0.9],
}
COLORS = {"score": "#6b7280", "softmax": "#d97706", "softpick": "#2563eb"}


def draw(path: str) -> None:
    """Two rows of scores, each beside its weights."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, width_ratios=(1, 1.5))
    functions = {"softmax": softmax, "softpick": softpick}
    for (left, right), (title, row) in zip(axes, ROWS.items(), strict=True):
        scores = torch.tensor(row)
        keys = range(len(row))
        left.bar(keys, row, color=COLORS["score"])
        left.axhline(0, color="black", linewidth=0.8)
        left.set(title=f"scores: {title}", ylim=(-2.5, 3), xticks=[])
        for offset, (name, function) in zip((-0.2, 0.2), functions.items(), strict=True):
            weights = function(scores)
            label = f"{name}, sum {float(weights.sum()):.2f}, {int((weights == 0).sum())} of {len(row)} exactly 0"
            right.bar([k + offset for k in keys], weights.tolist(), 0.4, color=COLORS[name], label=label)
        right.set(title="weights", ylim=(0, 0.75), xticks=[])
        right.legend(frameon=False, fontsize=9)
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, facecolor="white")


if __name__ == "__main__":
    draw(sys.argv[1] if len(sys.argv) > 1 else "docs/softmax_softpick.png")
