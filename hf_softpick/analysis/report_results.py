"""Sections of a comparison about what the models achieve: loss, quantization, tasks, passkey."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from hf_softpick.analysis.claims import QUANTIZATION_TIE, measured_formats
from hf_softpick.analysis.comparison import changes_training, comparable, equal_groups, recipe_differences
from hf_softpick.analysis.report_blocks import (
    Cell,
    Figure,
    Table,
    Text,
    increase,
    loss,
    notes,
    percent,
    plain_number,
    ranked,
    words,
)
from hf_softpick.analysis.report_figures import Series, brief, colour_bar, heat_map, line_chart
from hf_softpick.analysis.run_records import finite, lookup, number


def training(runs: list[dict[str, Any]]) -> Iterator[Table | Figure | Text]:
    """Loss curves, last losses and throughput."""
    curves = [(i, run["label"], run["curves"]) for i, run in enumerate(runs) if run["curves"]]
    without = [run["label"] for run in runs if not run["curves"]]
    if without:
        yield Text(f"No run folder, so no curves: {', '.join(without)}.")
    lines = [Series(f"{label}, training", i, c["train"]) for i, label, c in curves]
    lines += [Series(f"{label}, validation", i, c["eval"], hollow=True) for i, label, c in curves]
    chart = line_chart("Loss by training step", lines, "step", "loss (nats per token)")
    if not chart:
        yield Text("Not measured: no run has a metrics.jsonl with losses.")
        return
    drawings = [("Loss", chart)]
    late = [s._replace(points=[p for p in s.points if p[0] >= 0.5 * s.points[-1][0]]) for s in lines if s.points]
    if max(len(s.points) for s in late) > 2:
        drawings.append(("Second half", line_chart("Loss, second half", late, "step", "loss (nats per token)")))
    yield Figure("Training loss (line) and validation loss (circles).", drawings, runs=True)
    values = [run["curves"] or {} for run in runs]
    conditions = [_condition(run) for run in runs]
    groups = equal_groups(conditions)
    if obstacle := _unequal(runs):
        yield _marked(f"The runs {obstacle}", "losses are", "loss is", groups, runs)
    # Recipes may differ in how many rows they validate on.
    validated = equal_groups([c and (c, v.get("eval_tokens")) for c, v in zip(conditions, values, strict=True)])
    quantities = (
        ("Training loss, mean of the last tenth", "last_train_loss", "lower", loss, groups),
        ("  its log lines", "last_train_lines", None, plain_number),
        ("  their standard deviation", "last_train_deviation", None, loss),
        ("Validation loss, last", "last_eval_loss", "lower", loss, validated),
        ("  its tokens", "eval_tokens", None, plain_number),
        ("Steps", "last_step", None, plain_number),
        ("Tokens seen", "tokens_seen", None, plain_number),
    )
    rows = [ranked(title, [v.get(key) for v in values], *rest) for title, key, *rest in quantities]
    yield Table("Loss in nats per token", ["", *(run["label"] for run in runs)], rows)
    machines = [_machine(run) for run in runs]
    alike = equal_groups([machine or None for machine in machines])
    if len(set(machines)) > 1 or not machines[0]:
        yield _marked("The runs were trained on different or unknown hardware", *["throughput is"] * 2, alike, runs)
    alike = [group for group in alike if _apart([values[i] for i in group])]
    rows = [
        ranked("Tokens per second, median", [v.get("tokens_per_second") for v in values], "higher", _whole, alike),
        ranked("  20th percentile", [v.get("tokens_per_second_20") for v in values], None, _whole),
        ranked("  80th percentile", [v.get("tokens_per_second_80") for v in values], None, _whole),
        ranked("Peak memory, GiB", [v.get("memory_gib") for v in values], None, plain_number),
        ["Hardware", *(machine or "\u2013" for machine in machines)],
    ]
    caption = "Throughput over the log lines, the first left out; marked where the percentiles do not overlap"
    yield Table(caption, ["", *(run["label"] for run in runs)], rows)


def _marked(why: str, many: str, none: str, groups: list[list[int]], runs: Sequence[dict[str, Any]]) -> Text:
    """Among which runs values are ranked nevertheless."""
    among = "; ".join(" and ".join(runs[i]["label"] for i in group) for group in groups)
    return Text(f"{why}, so {f'{many} marked only among {among}' if among else f'no {none} marked'}.", "flag")


def _unequal(runs: Sequence[dict[str, Any]]) -> str | None:
    """Why losses of these runs cannot be ranked: other steps, other data, other tokens."""
    if len({run["curves"]["last_step"] for run in runs if run["curves"]}) > 1:
        return "stand at different steps"
    keys = [item["key"] for item in recipe_differences(runs) if item["training"]]
    keys = [key for key in keys if key.startswith(("data.", "tokenizer."))]
    return f"differ in {', '.join(keys)}" if keys else None


def _condition(run: dict[str, Any]) -> str | None:
    """Equal for runs whose losses may be ranked: as many steps, the same tokens; None for a model without curves."""
    read = {k: v for k, v in (run["recipe"] or {}).items() if k.startswith(("data.", "tokenizer."))}
    read = {k: v for k, v in read.items() if changes_training(k)}
    return json.dumps([run["curves"]["last_step"], read], sort_keys=True) if run["curves"] else None


def _apart(values: list[dict[str, Any]]) -> bool:
    """Whether the fastest run's 20th percentile lies above every other's 80th."""
    known = sorted((v for v in values if v.get("tokens_per_second")), key=lambda v: -v["tokens_per_second"])
    return bool(known) and all(known[0]["tokens_per_second_20"] > v["tokens_per_second_80"] for v in known[1:])


def _whole(value: Any) -> str:
    value = finite(value)
    return brief(None) if value is None else f"{value:,.0f}"


def _machine(run: dict[str, Any]) -> str:
    launch = run["environment"]
    if not launch:
        return ""
    names = ", ".join(map(str, launch.get("gpus") or []))
    return f"{names or str(launch.get('cpus')) + ' CPUs'}, processes: {launch.get('processes')}"


def quantization(runs: list[dict[str, Any]]) -> Iterator[Table | Figure | Text]:
    """Loss increase by format, from many bits to few."""
    yield from notes("quantization", runs)
    if not any(run["quantization"] for run in runs):
        return
    measured = [measured_formats(run) for run in runs]
    bits = {name: finite(item.get("bits")) or 0 for found in measured for name, item in found.items()}
    order = sorted(bits, key=lambda name: (-bits[name], name))
    lines, scatter = [], []
    for i, (run, found) in enumerate(zip(runs, measured, strict=True)):
        losses = {name: finite(found[name].get("loss_increase")) for name in order if name in found}
        losses = {name: y for name, y in losses.items() if y is not None}
        lines.append(Series(run["label"], i, [(order.index(name), y) for name, y in losses.items()]))
        known = [(finite(found[name].get("bits_per_weight")), y, name) for name, y in losses.items()]
        known = sorted(item for item in known if item[0] is not None)
        scatter.append(Series(run["label"], i, [item[:2] for item in known], names=[item[2] for item in known]))
    names = [f"{name} ({bits[name]:g} bit)" if str(int(bits[name])) not in name else name for name in order]
    title = "Loss increase by format, from many bits to few"
    chart = line_chart(title, lines, "format", "loss increase (nats)", x_names=names, from_zero=True, dots=True)
    heading, axis = "By bits stored for a weight", "bits stored per weight"
    label = f"Loss increase {heading.lower()}, scales included"
    plot = line_chart(label, scatter, axis, "loss increase (nats)", from_zero=True, dots=True)
    if chart:
        drawings = [*([(heading, plot)] if plot else []), ("By format, from many bits to few", chart)]
        yield Figure("Loss increase under quantization.", drawings, runs=True)
    yield Text(
        "Losses here are over rows made for measuring, of beginnings of documents, in the unquantized model too; they "
        "differ from the validation loss of training."
    )
    groups, tie = comparable("quantization", runs), QUANTIZATION_TIE
    baseline = [lookup(run["quantization"], "baseline.loss") for run in runs]
    rows: list[Sequence[str | Cell]] = [ranked("unquantized: loss", baseline, "lower", loss, groups, tie)]
    for title, key, show in (("loss increase", "loss_increase", increase), ("loss", "loss", loss)):
        for name in order:
            values = [f.get(name, {}).get(key) for f in measured]
            rows.append(ranked(f"{name}: {title}", values, "lower", show, groups, tie))
    for name, reasons in _unmeasured_formats(runs).items():
        rows.append([name, *reasons])
    caption = f"Loss in nats per token; a side is marked if it leads by more than {tie}"
    yield Table(caption, ["", *(run["label"] for run in runs)], rows)
    rows = [[name, *(_size(found.get(name)) for found in measured)] for name in order]
    if any(cell != "\u2013" for _, *cells in rows for cell in cells):
        caption = "Bits stored for a quantized weight, scales included, and share of all parameters that is quantized"
        yield Table(caption, ["Format", *(run["label"] for run in runs)], rows)


def _size(item: dict[str, Any] | None) -> str:
    bits, share = finite((item or {}).get("bits_per_weight")), finite((item or {}).get("quantized_share"))
    if bits is None:
        return "\u2013"
    return f"{bits:.2f} bits" + ("" if share is None else f", {share:.1%}")


def _unmeasured_formats(runs: list[dict[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        for item in (run["quantization"] or {}).get("formats", []):
            if item.get("status") != "measured":
                reasons = found.setdefault(item["format"], ["\u2013"] * len(runs))
                reasons[i] = f"{item.get('status')}: {item.get('reason', 'no reason given')}"
    return found


def downstream(runs: list[dict[str, Any]]) -> Iterator[Table | Figure | Text]:
    """Tasks of lm-eval."""
    yield from notes("downstream", runs)
    if not any(run["downstream"] for run in runs):
        return
    limits = {run["label"]: limit for run in runs if (limit := lookup(run["downstream"], "limit")) is not None}
    if limits:
        shown = ", ".join(f"{label} {limit}" for label, limit in limits.items())
        text = f"A trial: only the first documents of each task ({shown}); not comparable with full results."
        yield Text(text, "flag")
    groups = comparable("downstream", runs)
    tasks = dict.fromkeys(task for run in runs for task in (run["downstream"] or {}).get("tasks", {}))
    rows = []
    for task in tasks:
        results = [(lookup(run["downstream"], "tasks") or {}).get(task) or {} for run in runs]
        metrics = dict.fromkeys(metric for found in results for metric in found.get("metrics", {}))
        rows += [_task_row(f"{task}, {metric}", metric, results, groups) for metric in metrics]
        if any("error" in found for found in results):
            rows.append([f"{task}, not measured", "\u2013", *(str(found.get("error", "\u2013")) for found in results)])
    caption = "Value and standard error; a side is marked if it leads by more than twice the joint standard error"
    yield Table(caption, ["Task", "Samples", *(run["label"] for run in runs)], rows)
    bos = {run["label"]: lookup(run["downstream"], "bos.add_bos_token") for run in runs if run["downstream"]}
    if len(set(bos.values())) > 1:
        yield Text("Prompts began with BOS in some runs only, each as it was trained.", "flag")


def _task_row(label: str, metric: str, results: list[dict[str, Any]], groups: list[list[int]]) -> list[str | Cell]:
    items = [found.get("metrics", {}).get(metric, {}) for found in results]
    values, errors = [finite(i.get("value")) for i in items], [finite(i.get("stderr")) for i in items]
    samples = dict.fromkeys(found.get("samples") for found in results if found.get("metrics"))
    conditions = [str([found.get(name) for name in ("version", "num_fewshot", "samples")]) for found in results]
    higher = next((i["higher_is_better"] for i in items if i.get("higher_is_better") is not None), None)
    usable = {place for group in groups for place in group}
    best = set()
    keys = [c if i in usable and values[i] is not None else None for i, c in enumerate(conditions)]
    for group in equal_groups(keys):
        first, second = sorted(group, key=values.__getitem__, reverse=bool(higher))[:2]
        known = higher is not None and None not in (errors[first], errors[second])
        if known and abs(values[first] - values[second]) > 2 * math.hypot(errors[first], errors[second]):
            best.add(first)
    errors = ["" if None in pair else f" \u00b1 {brief(pair[1])}" for pair in zip(values, errors, strict=True)]
    count = " / ".join(plain_number(n) for n in samples) or "\u2013"
    return [label, count, *(Cell(brief(v) + errors[i], i in best) for i, v in enumerate(values))]


GRIDS = (("accuracy", "Share of keys written out"), ("choice_accuracy", "Share of keys preferred among distractors"))


def passkey(runs: list[dict[str, Any]]) -> Iterator[Table | Figure | Text]:
    """Share of keys retrieved by length and depth."""
    yield from notes("passkey", runs)
    measured = [run for run in runs if run["passkey"]]
    if not measured:
        return
    for run in measured:
        for refused in run["passkey"].get("refused") or []:
            yield Text(f"{run['label']} refused: {words(refused)}.")
    samples = ", ".join(f"{run['label']} {run['passkey']['samples']}" for run in measured)
    captions = {grid: f"{title}. Prompts per cell: {samples}." for grid, title in GRIDS}
    if chances := {percent(chance) for run in measured if (chance := finite(run["passkey"].get("choice_chance")))}:
        captions["choice_accuracy"] += f" Chance is {' / '.join(sorted(chances))}."
    for grid, title in GRIDS:
        drawings = [(run["label"], _grid(run, grid, title)) for run in measured if run["passkey"].get(grid)]
        if drawings:
            yield Figure(captions[grid], drawings, colour_bar("share of keys", percent=True))
    if len({str(run["passkey"]["depths"]) for run in measured}) == 1:
        header = ["Run", "Tokens", *(f"depth {depth:.0%}" for depth in measured[0]["passkey"]["depths"])]
        for grid, _ in GRIDS:
            rows = [
                [run["label"], f"{length:,}", *map(percent, row)]
                for run in measured
                for length, row in zip(run["passkey"]["lengths"], run["passkey"].get(grid) or [], strict=False)
            ]
            if rows:
                yield Table(captions[grid].removesuffix("."), header, rows, folded=True)


def _grid(run: dict[str, Any], grid: str, title: str) -> str:
    record = run["passkey"]
    values = [[number(v) for v in row] for row in record[grid]]
    lengths, depths = [f"{n:,}" for n in record["lengths"]], [f"{depth:.0%}" for depth in record["depths"]]
    title = f"{title}, {run['label']}, by length and depth"
    return heat_map(title, values, "tokens", "depth of the key", lengths, depths, 34)
