"""What runs recorded and what was measured on them, gathered into one plain structure: the content of comparison.json.

Reads files only. HTML and Markdown are views of what is built here.
"""

import datetime
import itertools
import json
import math
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_softpick.analysis.run_records import KINDS, finite, gather_run, lookup
from hf_softpick.errors import RecipeError
from hf_softpick.modeling.normalizers import NORMALIZERS
from hf_softpick.versions import versions

# Recipe values that decide where a run writes and how often it looks, not what it learns.
NOT_TRAINING = {
    "model.attn_implementation",
    "data.num_proc",
    "data.cache_dir",
    "training.export_dtype",
    "training.max_consecutive_skips",
    "training.disable_tqdm",
    "training.report_to",
    "training.output_dir",
    "training.per_device_eval_batch_size",
    "training.logging_nan_inf_filter",
}
NOT_TRAINING_PREFIXES = (
    "run.",
    "eval.",
    "training.logging_",
    "training.save_",
    "training.dataloader_",
    "training.hub_",
)
# What must be equal before figures of two runs are set side by side.
CONDITIONS = {
    "statistics": (
        *(f"data.{n}" for n in ("description", "seq_len", "row_length", "sequences", "tokens")),
        *("data.sink_sequences", "data.min_sink_tokens", "thresholds", "model.dtype", "model.add_bos"),
    ),
    "quantization": ("data.description", "data.tokens", "baseline.dtype", "model.add_bos"),
    "passkey": ("lengths", "depths", "samples", "seed", "choice_chance", "model.dtype", "model.add_bos"),
    "downstream": (),
}

UNTRAINED_SHARE = 0.7
"""Of ln(vocabulary), the loss of a uniform guess: a model whose loss is above this share of it has learned little."""


def gather(sources: Sequence[str | Path], results: Path | None = None) -> dict[str, Any]:
    """Everything that is recorded about two or more runs or models, as plain values.

    Args:
        sources: run folders, model folders or Hub ids. A run that has not finished is taken with what it has.
        results: a folder with NAME/KIND.json, looked at before each run's own report folder.

    Raises:
        CheckpointError: a source is neither a run nor a model.
        RecipeError: fewer than two sources, or one given twice.
        DataError, via `read_json`: a result file is damaged.
    """
    if len(sources) < 2:
        raise RecipeError(f"a comparison needs at least two runs or models, {len(sources)} given")
    runs = [gather_run(source, results) for source in sources]
    for first, second in itertools.combinations(runs, 2):
        if first["place"] == second["place"]:
            raise RecipeError(f"{second['source']} is given twice; name different runs")
    for run in runs:
        same = [other for other in runs if other["name"] == run["name"]]
        if len(same) > 1 and results is not None:
            raise RecipeError(
                f"--results holds one folder for each name, but {len(same)} of the runs are called {run['name']}. "
                "Leave it out: each run has a report folder of its own."
            )
        # Two runs may have one name in different folders; a label is unique.
        run["label"] = run["name"] if len(same) == 1 else f"{run['name']} ({same.index(run) + 1})"
    differences = recipe_differences(runs)
    pair = choose_pair(runs, differences)
    return {
        "schema": 1,
        "kind": "comparison",
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "runs": runs,
        "recipe_differences": differences,
        "pair": pair,
        "warnings": [*_pair_warnings(runs, pair), *_run_warnings(runs), *_mixed_conditions(runs)],
    }


def recipe_differences(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Recipe values in which runs differ.

    Returns:
        [{"key", "values": one per run (None where absent or the run has no recipe), "training": whether it can change
        what the model learns}], those that can first.
    """
    recipes = [run["recipe"] for run in runs]
    known = [recipe for recipe in recipes if recipe is not None]
    keys = dict.fromkeys(key for recipe in known for key in recipe)
    found = []
    for key in keys:
        if len({json.dumps(recipe.get(key), sort_keys=True) for recipe in known}) > 1:
            values = [recipe.get(key) if recipe is not None else None for recipe in recipes]
            found.append({"key": key, "values": values, "training": changes_training(key)})
    return sorted(found, key=lambda item: not item["training"])


def changes_training(key: str) -> bool:
    """Whether a recipe value, by its dotted key, can change what the model learns."""
    return key not in NOT_TRAINING and not key.startswith(NOT_TRAINING_PREFIXES)


def choose_pair(runs: Sequence[dict[str, Any]], differences: list[dict[str, Any]]) -> dict[str, Any]:
    """The softpick run and the softmax run whose recipes differ least; both scaled or neither, if there is a choice.

    Runs come before models whose recipe is not known.

    Returns:
        softpick, softmax: labels, or None; other_differences: recipe keys besides the normalizer that differ and
        change training; unknown: why nothing can be said about that, or None.
    """
    known = [(run, NORMALIZERS[run["normalizer"]]) for run in runs if run["normalizer"] in NORMALIZERS]
    picks = [run for run, normalizer in known if normalizer.paper_claims]
    baselines = [run for run, normalizer in known if normalizer.is_softmax]

    def others(pick: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
        found = [d["key"] for d in recipe_differences([pick, baseline]) if d["training"]]
        sizes = ("layers", "heads", "key_heads", "hidden_size", "vocab_size")
        if pick["recipe"] is None or baseline["recipe"] is None:
            found = [f"model {s}" for s in sizes if pick["model"].get(s) != baseline["model"].get(s)]
        steps = [lookup(run, "finished.step") for run in (pick, baseline)]
        if None not in steps and steps[0] != steps[1] and "training.max_steps" not in found:
            found.append("trained steps")
        return [key for key in found if key != "model.normalizer"]

    def scaled(run: dict[str, Any]) -> bool:
        return NORMALIZERS[run["normalizer"]].scaled

    def order(pair: tuple[dict[str, Any], dict[str, Any]]) -> tuple[int, bool, bool]:
        return len(others(*pair)), len(set(map(scaled, pair))) > 1, any(run["recipe"] is None for run in pair)

    pairs = sorted(itertools.product(picks, baselines), key=order)
    first, base = pairs[0] if pairs else (next(iter(side), {"label": None}) for side in (picks, baselines))
    found = {"softpick": first["label"], "softmax": base["label"], "other_differences": [], "unknown": None}
    if pairs:
        without = [run["label"] for run in (first, base) if run["recipe"] is None]
        found["unknown"] = f"no recipe of {' and '.join(without)}" if without else None
        scaling = ["scaling of the scores (scaled_)"] if scaled(first) != scaled(base) else []
        found["other_differences"] = others(first, base) + scaling
    return found


def mismatch(kind: str, runs: Sequence[dict[str, Any]]) -> str | None:
    """How the conditions of a measurement differ between runs that have it; None if they are equal."""
    measured = [run for run in runs if run[kind]]
    for path in CONDITIONS[kind]:
        values = {run["label"]: lookup(run[kind], path) for run in measured}
        if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
            return f"{path.removeprefix('data.')} differs: " + ", ".join(f"{k} {v}" for k, v in values.items())
    return None


def undertrained(run: dict[str, Any]) -> str | None:
    """Why nothing can be concluded from a run that has hardly learned; None if it has, or if its loss is unknown."""
    curves = run["curves"] or {}
    vocabulary = finite(run["model"].get("vocab_size"))
    loss = next((x for name in ("last_eval_loss", "last_train_loss") if (x := curves.get(name)) is not None), None)
    if loss is None or vocabulary is None or vocabulary < 2 or loss <= UNTRAINED_SHARE * math.log(vocabulary):
        return None
    return (
        f"{run['label']} is undertrained: loss {loss:.4f} of ln(vocabulary) {math.log(vocabulary):.4f}, "
        f"more than {UNTRAINED_SHARE:.0%} of it."
    )


def equal_groups(keys: Sequence[Hashable | None]) -> list[list[int]]:
    """Places of equal keys, at least two a group: what may be ranked among itself. None belongs to no group."""
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        if key is not None:
            groups.setdefault(key, []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def comparable(kind: str, runs: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Groups of runs whose results of one kind were measured under equal conditions and are not stale, by place."""
    usable = [run[kind] and kind not in run["stale"] for run in runs]
    conditions = [json.dumps([lookup(run[kind], path) for path in CONDITIONS[kind]], sort_keys=True) for run in runs]
    return equal_groups([key if good else None for key, good in zip(conditions, usable, strict=True)])


def ranked_among(kind: str, runs: Sequence[dict[str, Any]]) -> str:
    """Which runs are ranked nevertheless, where `mismatch` says that conditions differ."""
    groups = [" and ".join(runs[place]["label"] for place in group) for group in comparable(kind, runs)]
    return f"ranked only among {'; among '.join(groups)}" if groups else "not ranked"


def _pair_warnings(runs: list[dict[str, Any]], pair: dict[str, Any]) -> Iterator[str]:
    names = f"{pair['softpick']} and {pair['softmax']}"
    if None not in (pair["softpick"], pair["softmax"]):
        if pair["other_differences"]:
            keys = ", ".join(pair["other_differences"])
            yield f"{names} differ in more than the normalizer: {keys}. No contrast between them is judged."
        elif pair["unknown"]:
            yield f"It cannot be checked that {names} differ in the normalizer alone: {pair['unknown']}."
    for run in runs:
        if reason := undertrained(run):
            judged = pair["softpick"] and run["label"] in (pair["softpick"], pair["softmax"])
            yield f"{reason} No claim is judged." if judged else reason


def _mixed_conditions(runs: list[dict[str, Any]]) -> Iterator[str]:
    for kind in KINDS:
        if reason := mismatch(kind, runs):
            yield f"{kind} was measured under different conditions and is {ranked_among(kind, runs)}: {reason}."
    sizes = {run["label"]: run["model"].get("vocab_size") for run in runs if run["model"].get("vocab_size")}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{label} {size:,}" for label, size in sizes.items())
        yield f"The vocabularies differ ({shown}): losses per token cannot be compared."


def _run_warnings(runs: list[dict[str, Any]]) -> Iterator[str]:
    for run in runs:
        if run["is_run"] and (run["finished"] is None or not run["has_model"]):
            yield f"{run['label']} has not finished; its figures are those of an unfinished run."
        yield from (f"{run['label']}: {reason}" for reason in run["stale"].values())
        if run["curves"] and run["curves"]["nonfinite"]:
            yield f"{run['label']}: {run['curves']['nonfinite']} log lines have a loss that is not finite."
        if bad := sum(item.get("count", 0) for item in (run["statistics"] or {}).get("nonfinite", [])):
            yield f"{run['label']}: {bad:,} values inside it are not finite; figures there are not numbers."
