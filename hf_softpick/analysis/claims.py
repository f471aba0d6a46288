"""The claims of the softpick paper (Zuhri, Fuadi, Aji 2025, arXiv 2504.20966), tried on the runs of a comparison.

A claim is "reproduced", "not reproduced" or "not measured". The last also stands for what these runs cannot decide:
runs that have hardly learned, a contrast of runs that differ in more than the normalizer, a stale result, or nothing
there to be better at. The rule and its tolerance are part of every row, so that a reader can judge the verdict.
"""

from typing import Any, NamedTuple

from hf_softpick.analysis.comparison import mismatch, undertrained
from hf_softpick.analysis.report_figures import brief
from hf_softpick.analysis.run_records import command, extreme, finite, lookup, number

REPRODUCED, NOT_REPRODUCED, NOT_MEASURED = "reproduced", "not reproduced", "not measured"

SINK_EPSILON = 0.3
# Single runs of one seed: a difference below these is not called one.
LOWER_BY = 0.2
SPARSE_FROM = 0.25
LOSS_WITHIN = 0.01
QUANTIZATION_TIE = 0.001
LEAST_LOG_LINES = 3

COLUMNS = ("claim", "paper", "rule", "verdict", "trivial", "figures", "sample", "detail")


class Sides(NamedTuple):
    """The two runs of a comparison; either may be missing."""

    softpick: dict[str, Any] | None
    softmax: dict[str, Any] | None
    obstacle: str | None  # why figures of the two must not be held against each other


def judge(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per claim.

    Args:
        comparison: what `comparison.gather` returns.

    Returns:
        [{"claim", "paper": the published figure, "rule": with its tolerance, "verdict", "figures": {label: {name:
        value}} in the order of the runs, "sample": what the figures rest on, "detail": some sentences, "trivial":
        whether it is reproduced, but softmax would pass as well, so that it is no evidence}].
    """
    sides = _sides(comparison)
    labels = [run["label"] for run in comparison["runs"]]
    weak = [reason for run in sides[:2] if run is not None and (reason := undertrained(run))]
    rows = []
    for claim in (_sink_rate, _sinks_removed, _kurtosis, _maximum, _sparse, _quantization, _training_loss):
        row = {"verdict": NOT_MEASURED, "sample": None, "trivial": False, **claim(sides)}
        row["figures"] = {label: row["figures"][label] for label in labels if label in row["figures"]}
        if weak and sides.softpick is not None:
            row |= {"verdict": NOT_MEASURED, "trivial": False, "detail": " ".join(weak)}
        rows.append({key: row[key] for key in COLUMNS})
    return rows


def _sides(comparison: dict[str, Any]) -> Sides:
    runs = {run["label"]: run for run in comparison["runs"]}
    pair = comparison["pair"]
    softpick, softmax = runs.get(pair["softpick"]), runs.get(pair["softmax"])
    obstacle = None
    if softpick is None or softmax is None:
        missing = "softpick" if softpick is None else "softmax"
        obstacle = f"No run with {missing} is among those given."
    elif pair["other_differences"]:
        obstacle = (
            f"{softpick['label']} and {softmax['label']} differ in more than the normalizer "
            f"({', '.join(pair['other_differences'][:4])}), so a difference cannot be put down to it."
        )
    return Sides(softpick, softmax, obstacle)


def _absent(kind: str, runs: list[dict[str, Any]]) -> str | None:
    """Why `kind` of these runs cannot be used, with the command that helps; None if it can."""
    for run in runs:
        if run[kind] is None:
            return f"{run['label']} has no {kind}.json. Measure it: {command(kind, run['source'])}"
        if kind in run["stale"]:
            return f"{run['label']}: {run['stale'][kind]}"
    if reason := mismatch(kind, runs):
        return f"{kind} was measured under different conditions: {reason}."
    return None


def _figures(sides: Sides, paths: dict[str, str]) -> dict[str, dict[str, Any]]:
    return {
        run["label"]: {name: lookup(run["statistics"], path) for name, path in paths.items()}
        for run in sides[:2]
        if run is not None and run["statistics"] is not None
    }


def _sample(run: dict[str, Any]) -> str | None:
    tokens, sequences = (finite(lookup(run["statistics"], f"data.{name}")) for name in ("tokens", "sequences"))
    if tokens is None or sequences is None:
        return None
    return f"{tokens:,.0f} tokens in {sequences:,.0f} sequences"


def _maps(run: dict[str, Any]) -> int | None:
    """Attention maps behind a sink rate: sequences that are long enough, times layers and heads."""
    sequences = lookup(run["statistics"], "data.sink_sequences")
    layers, heads = run["model"].get("layers"), run["model"].get("heads")
    return sequences * layers * heads if None not in (sequences, layers, heads) else None


def _sink(run: dict[str, Any]) -> float | None:
    return finite(lookup(run["statistics"], "summary.sink_rate"))


def _sink_rate(sides: Sides) -> dict[str, Any]:
    row = {
        "claim": "Softpick has a sink rate of 0",
        "paper": "0% (340M and 1.8B)",
        "rule": f"No attention map of the softpick run gives its first token a mean weight above {SINK_EPSILON}.",
        "figures": _figures(sides, {"sink rate": "summary.sink_rate"}),
    }
    run = sides.softpick
    if run is None:
        return {**row, "detail": "No run with softpick is among those given."}
    if reason := _absent("statistics", [run]):
        return {**row, "detail": reason}
    rate, maps = _sink(run), _maps(run)
    if rate is None or not maps:
        return {**row, "detail": "No sequence was long enough to tell, or the rate is not a number."}
    row["sample"] = f"{maps:,} maps, {lookup(run['statistics'], 'data.sink_sequences'):,} sequences"
    if rate == 0:
        detail = f"No map has a sink; a rate below {1 / maps:.2%} would not show."
        both = sides.softmax is not None and _absent("statistics", [run, sides.softmax]) is None
        trivial = both and _sink(sides.softmax) == 0
        if trivial:
            detail += f" It holds trivially: {sides.softmax['label']} has no sink either, so it is no evidence."
        return {**row, "verdict": REPRODUCED, "trivial": trivial, "detail": detail}
    return {**row, "verdict": NOT_REPRODUCED, "detail": f"{rate:.2%} of the maps have a sink."}


def _sinks_removed(sides: Sides) -> dict[str, Any]:
    row = {
        "claim": "Softmax has sinks, softpick removes them",
        "paper": "softpick 0%, sinks with softmax",
        "rule": "The sink rate of the softmax run is above 0, that of the softpick run is 0.",
        "figures": _figures(sides, {"sink rate": "summary.sink_rate"}),
    }
    if reason := _no_contrast(sides, "statistics"):
        return {**row, "detail": reason}
    pick, base = _sink(sides.softpick), _sink(sides.softmax)
    row["sample"] = _sample(sides.softpick)
    if pick is None or base is None:
        return {**row, "detail": "A sink rate is not a number."}
    if base == 0:
        detail = "Softmax shows no sink either in these runs; there is nothing to remove."
        if pick == 0:
            return {**row, "detail": detail}
        return {**row, "verdict": NOT_REPRODUCED, "detail": f"{detail} Softpick shows {pick:.2%}."}
    verdict = REPRODUCED if pick == 0 else NOT_REPRODUCED
    return {**row, "verdict": verdict, "detail": f"Sink rate {base:.2%} with softmax, {pick:.2%} with softpick."}


def _no_contrast(sides: Sides, kind: str) -> str | None:
    return sides.obstacle or _absent(kind, [sides.softpick, sides.softmax])


def _lower(sides: Sides, row: dict[str, Any], pick: float | None, base: float | None) -> dict[str, Any]:
    """The verdict of "softpick's figure is lower", LOWER_BY or more."""
    row = {**row, "sample": _sample(sides.softpick)}
    if pick is None or base is None:
        return {**row, "detail": "A figure is missing or not finite."}
    if base <= 0:
        return {**row, "detail": f"Softmax's figure is {brief(base)}, so a ratio says nothing."}
    change = pick / base - 1
    way = "lower" if change < 0 else "higher"
    short = "" if change >= 0 or change <= -LOWER_BY else f", which is less than the {LOWER_BY:.0%} asked for"
    detail = f"Softpick {brief(pick)}, softmax {brief(base)}: {abs(change):.1%} {way}{short}."
    return {**row, "verdict": REPRODUCED if change <= -LOWER_BY else NOT_REPRODUCED, "detail": detail}


def _kurtosis(sides: Sides) -> dict[str, Any]:
    row = {
        "claim": "Lower kurtosis of the hidden states",
        "paper": "340 against 33,510 (340M)",
        "rule": f"Mean over layers, at least {LOWER_BY:.0%} below softmax.",
        "figures": _figures(sides, {"kurtosis": "summary.kurtosis"}),
    }
    if reason := _no_contrast(sides, "statistics"):
        return {**row, "detail": reason}
    return _lower(sides, row, *(finite(lookup(r["statistics"], "summary.kurtosis")) for r in sides[:2]))


def largest(run: dict[str, Any]) -> float | None:
    """The largest absolute hidden value that statistics.json reports."""
    return extreme(*(lookup(run["statistics"], f"summary.hidden_{end}") for end in ("max", "min")))


def _maximum(sides: Sides) -> dict[str, Any]:
    row = {
        "claim": "Lower maximum of the hidden states",
        "paper": "no massive activations",
        "rule": f"Largest absolute value after any block, at least {LOWER_BY:.0%} below softmax.",
        "figures": _figures(sides, {"massive activations": "summary.massive_activations"}),
    }
    for run in filter(None, sides[:2]):
        if run["label"] in row["figures"]:
            row["figures"][run["label"]] = {"maximum": largest(run), **row["figures"][run["label"]]}
    if reason := _no_contrast(sides, "statistics"):
        return {**row, "detail": reason}
    row = _lower(sides, row, *(finite(largest(run)) for run in sides[:2]))
    if all(lookup(run["statistics"], "summary.massive_activations") == 0 for run in sides[:2]):
        row["detail"] += " By the usual thresholds neither has massive activations."
    return row


def _sparse(sides: Sides) -> dict[str, Any]:
    row = {
        "claim": "Sparse attention maps",
        "paper": "46.97% (340M, weights up to 1e-5)",
        "rule": f"At least {SPARSE_FROM:.0%} of the visible weights of the softpick run are exactly 0.",
        "figures": _figures(sides, {"exact zeros": "summary.sparsity", "up to 1e-5": "summary.sparsity_small"}),
    }
    run = sides.softpick
    if run is None:
        return {**row, "detail": "No run with softpick is among those given."}
    if reason := _absent("statistics", [run]):
        return {**row, "detail": reason}
    share = finite(lookup(run["statistics"], "summary.sparsity"))
    if share is None:
        return {**row, "detail": "The share is not a number."}
    detail = f"{share:.2%} of the visible weights are exactly 0."
    small = [(r["label"], finite(lookup(r["statistics"], "summary.sparsity_small"))) for r in sides[:2] if r]
    if small := [f"{label} {value:.2%}" for label, value in small if value is not None]:
        detail += f" By the paper's measure, up to 1e-5: {', '.join(small)}."
    before = (run["curves"] or {}).get("untrained_sparsity")
    if before is not None:
        detail += f" Random weights, at step 0, gave {before:.2%} exact zeros."
    verdict = REPRODUCED if share >= SPARSE_FROM else NOT_REPRODUCED
    return {**row, "verdict": verdict, "sample": _sample(run), "detail": detail}


def measured_formats(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Formats of quantization.json that were measured, by name; empty without the file."""
    formats = (run["quantization"] or {}).get("formats", [])
    return {item["format"]: item for item in formats if item.get("status") == "measured"}


def _quantization(sides: Sides) -> dict[str, Any]:
    row = {
        "claim": "Smaller loss increase under quantization",
        "paper": "consistently, most at few bits",
        "rule": "The loss increases less in every format measured in both runs; formats in which neither loses more "
        f"than {QUANTIZATION_TIE} nats, or they differ by less, do not count.",
        "figures": {
            run["label"]: {name: item.get("loss_increase") for name, item in measured_formats(run).items()}
            for run in sides[:2]
            if run is not None
        },
    }
    if reason := _no_contrast(sides, "quantization"):
        return {**row, "detail": reason}
    picks, bases = (measured_formats(run) for run in sides[:2])
    tokens = lookup(sides.softpick["quantization"], "data.tokens")
    row["sample"] = f"{tokens:,} tokens" if isinstance(tokens, int) else None
    better, worse, ties = [], [], []
    for name in (name for name in picks if name in bases):
        pick, base = (number(item[name].get("loss_increase")) for item in (picks, bases))
        # A model whose quantized loss is not finite has lost everything.
        pick, base = (float("inf") if x is not None and x != x else x for x in (pick, base))
        known = pick is not None and base is not None and pick != base
        if not known or max(pick, base) <= QUANTIZATION_TIE or abs(pick - base) < QUANTIZATION_TIE:
            ties.append(name)
        else:
            (better if pick < base else worse).append(name)
    if not better and not worse:
        why = "no format was measured in both runs" if not ties else f"they lose the same in {', '.join(ties)}"
        return {**row, "detail": f"Nothing to tell them apart: {why}."}
    parts = [f"softpick loses {how} in {', '.join(n)}" for how, n in (("less", better), ("more", worse)) if n]
    parts += [f"no difference in {', '.join(ties)}"] if ties else []
    detail = "; ".join(parts)
    detail = f"{detail[0].upper()}{detail[1:]}."
    return {**row, "verdict": NOT_REPRODUCED if worse else REPRODUCED, "detail": detail}


def _training_loss(sides: Sides) -> dict[str, Any]:
    row = {
        "claim": "Equal training loss",
        "paper": "the same as softmax",
        "rule": "Mean training loss over the last tenth of the steps, within "
        f"{LOSS_WITHIN:.0%} of softmax's, either way; at least {LEAST_LOG_LINES} log lines of each.",
        "figures": {
            run["label"]: {
                "training loss": run["curves"]["last_train_loss"],
                "validation loss": run["curves"]["last_eval_loss"],
            }
            for run in sides[:2]
            if run is not None and run["curves"] is not None
        },
    }
    if sides.obstacle:
        return {**row, "detail": sides.obstacle}
    recorded = [run["curves"] and run["curves"]["last_train_loss"] for run in sides[:2]]
    if None in recorded:
        return {**row, "detail": "Not both have a metrics.jsonl with finite losses."}
    steps = [run["curves"]["last_step"] for run in sides[:2]]
    if steps[0] != steps[1]:
        return {**row, "detail": f"They stand at different steps: softpick {steps[0]:,}, softmax {steps[1]:,}."}
    lines = min(run["curves"]["last_train_lines"] for run in sides[:2])
    row["sample"] = f"{lines:,} log line{'' if lines == 1 else 's'}, one seed each"
    if lines < LEAST_LOG_LINES:
        return {**row, "detail": f"Fewer than {LEAST_LOG_LINES} log lines in the last tenth of the steps."}
    pick, base = recorded
    change = pick / base - 1
    way = "higher" if change > 0 else "lower"
    detail = f"Softpick {pick:.4f}, softmax {base:.4f}: {abs(pick - base):.4f} nats ({abs(change):.2%}) {way}."
    if change < -LOSS_WITHIN:
        detail += " Softpick is better than equal here."
    return {**row, "verdict": REPRODUCED if abs(change) <= LOSS_WITHIN else NOT_REPRODUCED, "detail": detail}
