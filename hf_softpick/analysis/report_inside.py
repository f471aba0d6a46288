"""Sections of a comparison about the inside of the models: sinks, maps, hidden states, sparsity."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from hf_softpick.analysis.claims import largest
from hf_softpick.analysis.comparison import comparable
from hf_softpick.analysis.report_blocks import Figure, Table, Text, notes, percent, plain_number, ranked, visible
from hf_softpick.analysis.report_figures import Series, colour_bar, heat_map, line_chart
from hf_softpick.analysis.run_records import extreme, finite, lookup, number
from hf_softpick.modeling.normalizers import NORMALIZERS


def sinks(runs: list[dict[str, Any]]) -> Iterator[Table | Figure | Text]:
    """Sink rate, row mass and what else describes where a head looks."""
    yield from notes("statistics", runs)
    measured = [run for run in runs if run["statistics"]]
    if not measured:
        return
    yield statistics_table("Statistics of the attention", SINK_ROWS, runs)
    for caption, name, title, bar in HEAD_MAPS:
        yield Figure(caption, [(run["label"], _layer_map(run, name, title)) for run in measured], bar)
    charts = [("Sink rate", "sink_rate", False), ("Mean weight of the first token", "first_mass", False)]
    yield from _while_training(runs, charts)


def _while_training(
    runs: list[dict[str, Any]], charts: Sequence[tuple[str, str | None, bool]]
) -> Iterator[Table | Figure | Text]:
    """Charts (heading, name, logarithmic) of what was logged while the models trained, if it was."""
    drawings = []
    for heading, name, log in charts:
        lines = [Series(run["label"], i, _logged(run, name)) for i, run in enumerate(runs)]
        title, axis = f"{heading} while training", heading.lower()
        if chart := line_chart(title, lines, "step", axis, log, from_zero=not log, dots=True):
            drawings.append((heading, chart))
    if drawings:
        yield Figure("While training, on the same few rows each time (stats_* in metrics.jsonl).", drawings, runs=True)


def _logged(run: dict[str, Any], name: str | None) -> list[tuple[float, float]]:
    """Points of one quantity; None is the largest absolute hidden value."""
    logged = (run["curves"] or {}).get("statistics") or {}
    if name is not None:
        return [tuple(point) for point in logged.get(name, [])]
    low = {step: abs(value) for step, value in logged.get("hidden_min", [])}
    return [(step, max(abs(value), low.get(step, 0.0))) for step, value in logged.get("hidden_max", [])]


_ALWAYS_ONE = " and ".join(n.name for n in NORMALIZERS.values() if n.rows_sum_to_one)
HEAD_MAPS = (
    (
        "Sink rate: share of sequences in which a head gives the first token a mean weight above 0.3.",
        "sink_rate",
        "Sink rate",
        colour_bar("sink rate", percent=True),
    ),
    (
        "Mean weight that a head gives the first token, what the sink rate holds against 0.3.",
        "first_mass",
        "Mean weight of the first token",
        colour_bar("mean weight"),
    ),
    (
        f"Row mass: mean sum of a row of weights. Always 1 with {_ALWAYS_ONE}; the others may give less, down to 0.",
        "row_mass",
        "Row mass",
        colour_bar("row mass"),
    ),
)
SINK_ROWS = (
    ("Sink rate, first token", "sink_rate", "lower", percent),
    ("Sink rate, first 4 tokens", "sink_rate_first4", "lower", percent),
    ("Sink rate, any position", "sink_rate_any", "lower", percent),
    ("Mean weight of the first token", "first_mass", None, plain_number),
    ("Row mass", "row_mass", None, plain_number),
    ("Rows without any weight", "empty_rows", None, percent),
    ("Entropy, mean over heads, nats", "entropy", None, plain_number),
    ("Distance attended, mean over heads, tokens", "distance", None, plain_number),
    ("Dormant heads", "dormant_heads", "lower", plain_number),
)
HIDDEN_ROWS = (
    ("Kurtosis, mean over layers", "kurtosis", "lower", plain_number),
    ("Kurtosis, largest layer", "kurtosis_max", "lower", plain_number),
    ("Largest absolute value", None, "lower", plain_number),
    ("Massive activations", "massive_activations", "lower", plain_number),
)
SPARSITY_ROWS = (
    ("Weights exactly 0", "sparsity", None, percent),
    ("Weights up to 1e-5", "sparsity_small", None, percent),
    ("Empty tiles of 64 x 64", "empty_tiles_64", None, percent),
    ("Empty tiles of 128 x 128", "empty_tiles_128", None, percent),
)


def statistics_table(caption: str, rows: Sequence[tuple], runs: list[dict[str, Any]]) -> Table:
    """Part of the summary of statistics.json of every run, with its sample size."""
    groups = comparable("statistics", runs)
    table = []
    for name, key, better, show in rows:
        values = [(largest(r) if key is None else lookup(r["statistics"], f"summary.{key}")) for r in runs]
        table.append(ranked(name, values, better, show, groups))
    sample = [lookup(run["statistics"], "data.tokens") for run in runs]
    table.append(ranked("Tokens measured", sample, None, plain_number))
    return Table(caption, ["", *(run["label"] for run in runs)], table)


def _layer_map(run: dict[str, Any], name: str, title: str) -> str:
    layers = run["statistics"]["layers"]
    values = [[number(v) for v in layer["heads"][name]] for layer in layers]
    cell = max(8, min(28, 420 // max(len(values), *map(len, values))))
    title = f"{title} of {run['label']} by layer and head"
    return heat_map(title, values, "layer", "head", [str(layer["layer"]) for layer in layers], cell=cell)


def maps(comparison: dict[str, Any]) -> Iterator[Table | Figure | Text]:
    """The maps of chosen heads on the short text."""
    rows = []
    for run in comparison["runs"]:
        maps = run.get("attention_maps")
        if not maps:
            reason = run.get("attention_maps_reason") or "left out with --no-maps"
            yield Text(f"Not measured: {run['label']} ({reason}).")
            continue
        drawings = []
        for item in maps["maps"]:
            names = [visible(token) for token in maps["tokens"]]
            drawing = heat_map(
                f"Attention of {run['label']}, layer {item['layer']}, head {item['head']}",
                [[number(w) for w in row] for row in item["weights"]],
                "query token",
                "key token",
                row_names=names,
                column_names=names,
                cell=max(11, min(18, 330 // len(names))),  # two side by side on a desk, one on a phone
                root=True,
                bars=[number(mass) for mass in item["row_mass"]],
            )
            drawings.append((f"Layer {item['layer']}, head {item['head']}: {item['why']}", drawing))
            weights = [number(w) for row in item["weights"] for w in row]
            zero = sum(w == 0 for w in weights) / len(weights)
            mean_mass = sum(number(m) for m in item["row_mass"]) / len(item["row_mass"])
            where = f"{run['label']}, layer {item['layer']}, head {item['head']}"
            rows.append([where, item["why"], plain_number(item["first_mass"]), plain_number(mean_mass), percent(zero)])
        cut = ", where the text is cut" if maps["cut"] else ""
        yield Figure(
            f"{run['label']}: weights on {len(maps['tokens'])} tokens{cut}; heads chosen by {maps['chosen_by']}.",
            drawings,
            colour_bar("weight", root=True),
        )
    if rows:
        header = ["Head", "Why", "Mean weight of the first token", "Mean row mass", "Exactly 0"]
        yield Table("The maps in figures, on this one text", header, rows)


def _by_layer(runs: list[dict[str, Any]], value: Callable[[dict[str, Any]], Any]) -> list[Series]:
    series = []
    for i, run in enumerate(runs):
        layers = (run["statistics"] or {}).get("layers", [])
        points = [(layer["layer"], y) for layer in layers if (y := finite(value(layer))) is not None]
        series += [Series(run["label"], i, points)] if run["statistics"] else []
    return series


def _mean_heads(name: str, layer: dict[str, Any]) -> float | None:
    values = [v for v in map(finite, layer["heads"].get(name, [])) if v is not None]
    return sum(values) / len(values) if values else None


def _layer_table(caption: str, names: Sequence[str], series: Sequence[Sequence[Series]], show: Callable) -> Table:
    """One row a layer, one column a run and quantity."""
    layers = sorted({x for lines in series for line in lines for x, _ in line.points})
    header = ["Layer", *(f"{line.label}: {name}" for name, lines in zip(names, series, strict=True) for line in lines)]
    values = [dict(line.points) for lines in series for line in lines]
    return Table(caption, header, [[str(x), *(show(v.get(x)) for v in values)] for x in layers], folded=True)


def activations(runs: list[dict[str, Any]]) -> Iterator[Table | Figure | Text]:
    """Maximum and kurtosis of the hidden states by layer."""
    yield from notes("statistics", runs)
    if not any(run["statistics"] for run in runs):
        return
    yield statistics_table("Statistics of the hidden states after each block", HIDDEN_ROWS, runs)
    largest_lines = _by_layer(runs, lambda layer: extreme(*map(layer["hidden"].get, ("max", "min"))))
    kurtosis = _by_layer(runs, lambda layer: layer["hidden"].get("kurtosis"))
    chart = line_chart("Largest hidden value", largest_lines, "layer", "largest |h|", True, dots=True)
    drawings = [("Largest absolute value", chart)]
    chart = line_chart("Kurtosis of hidden states", kurtosis, "layer", "kurtosis", True, dots=True)
    drawings.append(("Kurtosis", chart))
    yield Figure("Hidden states after each block, by layer, on logarithmic axes.", drawings, runs=True)
    yield from _while_training(runs, [("Largest absolute value", None, True), ("Kurtosis", "kurtosis", True)])
    rows = []
    for run in runs:
        layers = (run["statistics"] or {}).get("layers", [])
        values = [finite(lookup(layer, "hidden.largest.value")) for layer in layers]
        if found := [(abs(v), -i) for i, v in enumerate(values) if v is not None]:
            layer = layers[-max(found)[1]]
            place = layer["hidden"]["largest"]
            token = visible(str(place["token"])) if place.get("token") is not None else "\u2013"
            numbers = [plain_number(place.get(key)) for key in ("value", "channel", "position")]
            rows.append([run["label"], numbers[0], str(layer["layer"]), numbers[1], numbers[2], token])
    if rows:
        header = ["", "Largest value", "Layer", "Channel", "Position in the row", "Token"]
        yield Table("Where the largest hidden value stands", header, rows)
    yield _layer_table("Hidden states by layer", ["largest |h|", "kurtosis"], [largest_lines, kurtosis], plain_number)


def sparsity(runs: list[dict[str, Any]]) -> Iterator[Table | Figure | Text]:
    """Zeros and small weights by layer."""
    yield from notes("statistics", runs)
    if not any(run["statistics"] for run in runs):
        return
    yield statistics_table("Sparsity, mean over layers and heads", SPARSITY_ROWS, runs)
    quantities = ("sparsity", "sparsity_small", "empty_tiles_64")
    exact, small, tiles = (_by_layer(runs, partial(_mean_heads, name)) for name in quantities)
    share = "share of weights"
    drawings = [
        ("Exactly 0", line_chart("Share of weights exactly 0", exact, "layer", share, from_zero=True, dots=True)),
        ("Up to 1e-5", line_chart("Share of weights up to 1e-5", small, "layer", share, from_zero=True, dots=True)),
    ]
    yield Figure("Visible attention weights, mean over the heads of a layer.", drawings, runs=True)
    yield from _while_training(runs, [("Share of weights exactly 0", "sparsity", False)])
    names = ["exactly 0", "up to 1e-5", "empty tiles of 64 x 64"]
    yield _layer_table("Sparsity by layer", names, [exact, small, tiles], percent)
