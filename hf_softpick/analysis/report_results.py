"""Sections of a comparison about what the models achieve: loss, quantization, tasks, passkey."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from hf_softpick.analysis.claims import QUANTIZATION_TIE, measured_formats
from hf_softpick.analysis.comparison import recipe_differences
from hf_softpick.analysis.report_blocks import (
    Cell,
    Figure,
    Table,
    Text,
    flags,
    increase,
    loss,
    missing,
    percent,
    plain_number,
    rankable,
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
    late = [
        s._replace(points=[p for p in s.points if p[0] >= 0.5 * max(x for x, _ in s.points)])
        for s in lines
        if s.points
    ]
    if max(len(s.points) for s in late) > 2:
        drawings.append(("Second half", line_chart("Loss, second half", late, "step", "loss (nats per token)")))
    yield Figure("Training loss (line) and validation loss (circles).", drawings, runs=True)
    values = [run["curves"] or {} for run in runs]
    obstacle = _unequal(runs)
    if obstacle:
        yield Text(f"The runs {obstacle}, so no loss is marked.", "flag")
    lower = None if obstacle else "lower"
    # Recipes may differ in how many rows they validate on.
    same_rows = len({v.get("eval_tokens") for v in values}) == 1
    rows = [
        ranked("Training loss, mean of the last tenth", [v.get("last_train_loss") for v in values], lower, loss),
        ranked("  its log lines", [v.get("last_train_lines") for v in values], None, plain_number),
        ranked("  their standard deviation", [v.get("last_train_deviation") for v in values], None, loss),
        ranked("Validation loss, last", [v.get("last_eval_loss") for v in values], lower if same_rows else None, loss),
        ranked("  its tokens", [v.get("eval_tokens") for v in values], None, plain_number),
        ranked("Steps", [v.get("last_step") for v in values], None, plain_number),
        ranked("Tokens seen", [v.get("tokens_seen") for v in values], None, plain_number),
    ]
    yield Table("Loss in nats per token", ["", *(run["label"] for run in runs)], rows)
    machines = [_machine(run) for run in runs]
    equal = len(set(machines)) == 1 and machines[0]
    if not equal:
        yield Text("The runs were trained on different or unknown hardware, so no throughput is marked.", "flag")
    faster = "higher" if equal and _apart(values) else None
    rows = [
        ranked("Tokens per second, median", [v.get("tokens_per_second") for v in values], faster, _whole),
        ranked("  20th percentile", [v.get("tokens_per_second_20") for v in values], None, _whole),
        ranked("  80th percentile", [v.get("tokens_per_second_80") for v in values], None, _whole),
        ranked("Peak memory, GiB", [v.get("memory_gib") for v in values], None, plain_number),
        ["Hardware", *(machine or "\u2013" for machine in machines)],
    ]
    caption = "Throughput over the log lines, the first left out; marked where the percentiles do not overlap"
    yield Table(caption, ["", *(run["label"] for run in runs)], rows)


def _unequal(runs: Sequence[dict[str, Any]]) -> str | None:
    """Why losses of these runs cannot be ranked: other steps, other data, other tokens."""
    if len({run["curves"]["last_step"] for run in runs if run["curves"]}) > 1:
        return "stand at different steps"
    keys = [item["key"] for item in recipe_differences(runs) if item["training"]]
    keys = [key for key in keys if key.startswith(("data.", "tokenizer."))]
    return f"differ in {', '.join(keys)}" if keys else None


def _apart(values: list[dict[str, Any]]) -> bool:
    """Whether the fastest run's 20th percentile lies above every other's 80th."""
    known = sorted((v for v in values if v.get("tokens_per_second")), key=lambda v: -v["tokens_per_second"])
    return all(known[0]["tokens_per_second_20"] > v["tokens_per_second_80"] for v in known[1:])


def _whole(value: Any) -> str:
    value = finite(value)
    return brief(None) if value is None else f"{value:,.0f}"


def _machine(run: dict[str, Any]) -> str:
    launch = run["environment"]
    if not launch:
        return ""
    gpus = launch.get("gpus") or []
    names = ", ".join(str(g.get("name", g) if isinstance(g, dict) else g) for g in gpus)
    return f"{names or str(launch.get('cpus')) + ' CPUs'}, processes: {launch.get('processes')}"


def quantization(runs: list[dict[str, Any]]) -> Iterator[Table | Figure | Text]:
    """Loss increase by format, from many bits to few."""
    yield from missing("quantization", runs)
    if not any(run["quantization"] for run in runs):
        return
    yield from flags("quantization", runs)
    measured = [measured_formats(run) for run in runs]
    bits = {name: finite(item.get("bits")) or 0 for found in measured for name, item in found.items()}
    order = sorted(bits, key=lambda name: (-bits[name], name))
    lines = []
    for i, (run, found) in enumerate(zip(runs, measured, strict=True)):
        points = [
            (x, y)
            for x, name in enumerate(order)
            if (y := finite(found.get(name, {}).get("loss_increase"))) is not None
        ]
        lines.append(Series(run["label"], i, points))
    names = [f"{name} ({bits[name]:g} bit)" if str(int(bits[name])) not in name else name for name in order]
    title = "Loss increase by format, from many bits to few"
    chart = line_chart(title, lines, "format", "loss increase (nats)", x_names=names, from_zero=True, dots=True)
    if chart:
        yield Figure(f"{title}.", [("", chart)], runs=True)
    rank, tie = "lower" if rankable("quantization", runs) else None, QUANTIZATION_TIE
    rows: list[Sequence[str | Cell]] = [
        ranked("unquantized: loss", [lookup(r["quantization"], "baseline.loss") for r in runs], rank, loss, tie)
    ]
    for name in order:
        values = [f.get(name, {}).get("loss_increase") for f in measured]
        rows.append(ranked(f"{name}: loss increase", values, rank, increase, tie))
    for name in order:
        rows.append(ranked(f"{name}: loss", [f.get(name, {}).get("loss") for f in measured], rank, loss, tie))
    for name, reasons in _unmeasured_formats(runs).items():
        rows.append([name, *reasons])
    caption = f"Loss in nats per token; a side is marked if it leads by more than {tie}"
    yield Table(caption, ["", *(run["label"] for run in runs)], rows)


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
    yield from missing("downstream", runs)
    if not any(run["downstream"] for run in runs):
        return
    yield from flags("downstream", runs)
    tasks = dict.fromkeys(task for run in runs for task in (run["downstream"] or {}).get("tasks", {}))
    rows = []
    for task in tasks:
        results = [lookup(run["downstream"], "tasks") or {} for run in runs]
        results = [found.get(task) or {} for found in results]
        metrics = dict.fromkeys(metric for found in results for metric in found.get("metrics", {}))
        for metric in metrics:
            rows.append(_task_row(f"{task}, {metric}", metric, results, rankable("downstream", runs)))
        if any("error" in found for found in results):
            rows.append([f"{task}, not measured", "\u2013", *(str(found.get("error", "\u2013")) for found in results)])
    caption = "Value and standard error; a side is marked if it leads by more than twice the joint standard error"
    yield Table(caption, ["Task", "Samples", *(run["label"] for run in runs)], rows)
    bos = {run["label"]: lookup(run["downstream"], "bos.add_bos_token") for run in runs if run["downstream"]}
    if len(set(bos.values())) > 1:
        yield Text("Prompts began with BOS in some runs only, each as it was trained.", "flag")


def _task_row(label: str, metric: str, results: list[dict[str, Any]], rank: bool) -> list[str | Cell]:
    items = [found.get("metrics", {}).get(metric, {}) for found in results]
    values, errors = [finite(i.get("value")) for i in items], [finite(i.get("stderr")) for i in items]
    samples = dict.fromkeys(found.get("samples") for found in results if found.get("metrics"))
    conditions = {str([found.get(k) for k in ("version", "num_fewshot", "samples")]) for found in results if found}
    higher = next((i["higher_is_better"] for i in items if i.get("higher_is_better") is not None), None)
    order = sorted((i for i, v in enumerate(values) if v is not None), key=lambda i: values[i], reverse=bool(higher))
    best = None
    if rank and higher is not None and len(conditions) == 1 and len(order) > 1:
        first, second = order[:2]
        lead = abs(values[first] - values[second])
        known = None not in (errors[first], errors[second])
        best = first if known and lead > 2 * math.hypot(errors[first], errors[second]) else None
    texts = [
        brief(v) + (f" \u00b1 {brief(e)}" if v is not None and e is not None else "")
        for v, e in zip(values, errors, strict=True)
    ]
    count = " / ".join(plain_number(n) for n in samples) or "\u2013"
    return [label, count, *(Cell(text, i == best) for i, text in enumerate(texts))]


GRIDS = (
    ("accuracy", "Share of keys written out"),
    ("choice_accuracy", "Share of keys preferred among distractors"),
)


def passkey(runs: list[dict[str, Any]]) -> Iterator[Table | Figure | Text]:
    """Share of keys retrieved by length and depth."""
    yield from missing("passkey", runs)
    measured = [run for run in runs if run["passkey"]]
    if not measured:
        return
    yield from flags("passkey", runs)
    for run in measured:
        for refused in run["passkey"].get("refused") or []:
            yield Text(f"{run['label']} refused: {refused if isinstance(refused, str) else words(refused)}.")
    samples = ", ".join(f"{run['label']} {run['passkey']['samples']}" for run in measured)
    for grid, title in GRIDS:
        drawings = [(run["label"], _grid(run, grid, title)) for run in measured if run["passkey"].get(grid)]
        chance = finite(measured[0]["passkey"].get("choice_chance")) if grid != "accuracy" else None
        guess = f" Chance is {percent(chance)}." if chance else ""
        if drawings:
            caption = f"{title}. Prompts per cell: {samples}.{guess}"
            yield Figure(caption, drawings, colour_bar("share of keys", percent=True))
    if len({str(run["passkey"]["depths"]) for run in measured}) == 1:
        header = ["Run", "Tokens", *(f"depth {depth:.0%}" for depth in measured[0]["passkey"]["depths"])]
        for grid, title in GRIDS:
            rows = [
                [run["label"], f"{length:,}", *map(percent, row)]
                for run in measured
                for length, row in zip(run["passkey"]["lengths"], run["passkey"].get(grid) or [], strict=False)
            ]
            if rows:
                yield Table(title, header, rows, folded=True)


def _grid(run: dict[str, Any], grid: str, title: str) -> str:
    record = run["passkey"]
    values = [[number(v) for v in row] for row in record[grid]]
    lengths, depths = [f"{n:,}" for n in record["lengths"]], [f"{depth:.0%}" for depth in record["depths"]]
    title = f"{title}, {run['label']}, by length and depth"
    return heat_map(title, values, "tokens", "depth of the key", 1.0, lengths, depths, 34)
