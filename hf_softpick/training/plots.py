"""The picture of a run: training and validation loss, PNG."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from hf_softpick.files import write_bytes


def plot_losses(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the losses of metrics.jsonl over the optimizer steps.

    Args:
        records: lines of metrics.jsonl; those without a finite loss are left out.
        path: the PNG to write.

    Raises:
        StorageError: it cannot be written.
    """
    # Slow to import, and needed once at the end of a run.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o--")):
        points = [(record["step"], record[key]) for record in records if isinstance(record.get(key), float)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    content = BytesIO()
    figure.savefig(content, format="png")
    write_bytes(path, content.getvalue())
