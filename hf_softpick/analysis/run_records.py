"""What one run recorded and what was measured on it, read from its folder. Nothing here loads a model."""

import json
import math
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_softpick.errors import CheckpointError, DataError
from hf_softpick.files import read_json_lines, read_object
from hf_softpick.modeling.normalizers import NORMALIZERS

COMMANDS = {
    "statistics": "python eval/activations.py",
    "downstream": "python eval/downstream.py",
    "passkey": "python eval/passkey.py",
    "quantization": "python eval/quantization.py",
}
KINDS = tuple(COMMANDS)

MAX_POINTS = 400
# Of what `eval.statistics` logs while a model trains, as stats_NAME.
WHILE_TRAINING = ("sink_rate", "first_mass", "sparsity", "kurtosis", "hidden_max", "hidden_min")


def command(kind: str, *sources: str) -> str:
    """What measures a kind of result of runs, ready for a shell."""
    return f"{COMMANDS[kind]} {shlex.join(sources)}"


def number(value: Any) -> float | None:
    """A float of what result files hold: numbers, or "nan", "inf", "-inf"; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int) and abs(value) >= 1 << 1000:
        return None  # beyond floats
    if isinstance(value, (int, float)) or value in ("nan", "inf", "-inf"):
        return float(value)
    return None


def finite(value: Any) -> float | None:
    """As `number`, but None for what is not finite."""
    value = number(value)
    return value if value is not None and math.isfinite(value) else None


def extreme(*values: Any) -> float | None:
    """The largest size among `values`; None if one is no number."""
    numbers = [number(value) for value in values]
    return None if None in numbers else max(map(abs, numbers))


def lookup(record: Any, path: str) -> Any:
    """`record["a"]["b"]` for the path "a.b"; None where a part is missing."""
    for part in path.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def gather_run(source: str | Path, results: Path | None = None) -> dict[str, Any]:
    """One run's or model's records; parts that do not exist are None or empty. Errors as in `gather`."""
    from hf_softpick.analysis.loading import locate

    try:
        path, folder, name = locate(source)
    except CheckpointError:
        folder = Path(source)
        if not (folder / "recipe.yaml").is_file():
            raise
        path, name = None, folder.resolve().name
    finished = read_json(folder / "finished.json") if folder else None
    report = folder / "report" if folder else Path("report") / name
    places = [*([Path(results) / name] if results else []), report]
    files = {kind: [place / f"{kind}.json" for place in places] for kind in KINDS}
    found = {kind: next(filter(Path.is_file, paths), None) for kind, paths in files.items()}
    records = {kind: read_json(file) if file else None for kind, file in found.items()}
    run = {
        "name": name,
        "source": str(source),
        "place": str((folder or Path(path)).resolve()) if folder or Path(path).exists() else str(path),
        "is_run": folder is not None,
        "has_model": path is not None,
        "recipe": read_recipe(folder / "recipe.yaml") if folder else None,
        "finished": finished,
        "environment": (launches(folder / "environment.json") or [None])[-1] if folder else None,
        "curves": curves(read_json_lines(folder / "metrics.jsonl")) if folder else None,
        **records,
        "files": {kind: str(file) if file else None for kind, file in found.items()},
    }
    run["model"] = _model(run, path)
    run["normalizer"] = run["model"].get("normalizer")
    run["stale"] = {kind: reason for kind in KINDS if (reason := _stale(kind, run, path))}
    return run


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is no file.

    Raises:
        DataError: the file holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}). Measure again, or remove the file.") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, not an object. Measure again, or remove the file.")
    return value


def read_recipe(path: Path) -> dict[str, Any] | None:
    """A saved recipe with dotted keys, {"model.normalizer": "softpick", ...}; lists stay whole."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not path.is_file():
        return None
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    return dict(_flatten(tree)) if isinstance(tree, dict) else None


def _flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            # A date or another YAML type would not be JSON.
            yield f"{prefix}{key}", json.loads(json.dumps(value, default=str))


def curves(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss curves of at most MAX_POINTS points (means of equal stretches), and what a run cost.

    Returns:
        train, eval: [[step, loss in nats], ...]; last_train_loss: mean over the last tenth of the logged steps, with
        its log lines and standard deviation; tokens_per_second: median and 20th and 80th percentile over log lines,
        without the first, which holds the warm-up; memory_gib: the peak; nonfinite: log lines without a finite loss;
        statistics: {name: [[step, value], ...]} of WHILE_TRAINING, finite values alone; untrained_sparsity: the share
        of weights that are exactly 0 at step 0, or None.
    """
    records = [record for record in records if isinstance(record.get("step"), int)]
    lines = {key: {r["step"]: number(r[key]) for r in records if key in r} for key in ("loss", "eval_loss")}
    train, evaluated = (
        [[step, loss] for step, loss in sorted(lines[key].items()) if finite(loss) is not None] for key in lines
    )
    last = train[-1][0] if train else 0
    tail = [loss for step, loss in train if step > 0.9 * last]
    speed = [s for r in records if (s := finite(r.get("tokens_per_second"))) is not None]
    speed = sorted(speed[1:] or speed)
    memory = [m for r in records if (m := finite(r.get("memory_gib"))) is not None]
    return {
        "train": _thin(train),
        "eval": _thin(evaluated),
        "log_lines": len(lines["loss"]),
        "last_train_loss": statistics.fmean(tail) if tail else None,
        "last_train_lines": len(tail),
        "last_train_deviation": statistics.stdev(tail) if len(tail) > 1 else None,
        "last_eval_loss": evaluated[-1][1] if evaluated else None,
        "last_step": last,
        "eval_tokens": next((r["eval_tokens"] for r in reversed(records) if "eval_tokens" in r), None),
        "tokens_seen": next((r["tokens_seen"] for r in reversed(records) if "tokens_seen" in r), None),
        "tokens_per_second": statistics.median(speed) if speed else None,
        "tokens_per_second_20": speed[int(0.2 * (len(speed) - 1))] if speed else None,
        "tokens_per_second_80": speed[math.ceil(0.8 * (len(speed) - 1))] if speed else None,
        "memory_gib": max(memory, default=None),
        "nonfinite": sum(finite(loss) is None for loss in lines["loss"].values()),
        "statistics": {
            name: _thin([[r["step"], v] for r in records if (v := finite(r.get(f"stats_{name}"))) is not None])
            for name in WHILE_TRAINING
        },
        "untrained_sparsity": next((finite(r.get("stats_sparsity")) for r in records if r["step"] == 0), None),
    }


def _thin(points: list[list[float]]) -> list[list[float]]:
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return points
    stretches = (points[i : i + size] for i in range(0, len(points), size))
    return [[s[-1][0], statistics.fmean(loss for _, loss in s)] for s in stretches]


def _stale(kind: str, run: dict[str, Any], path: str | None) -> str | None:
    """Why a result does not belong to the model as it is now, or None."""
    record = run[kind]
    if record is None:
        return None
    measured, trained = lookup(record, "model.trained_steps"), lookup(run, "finished.step")
    again = f"Measure again: {command(kind, run['source'])}"
    if trained is not None and measured != trained:
        when = "a model of unknown step" if measured is None else f"step {measured:,}"
        return f"{kind}.json was measured on {when}, the run finished at step {trained:,}. {again}"
    saved = {name: run["model"].get(name) for name in ("normalizer", "layers", "heads", "hidden_size", "vocab_size")}
    for name, value in saved.items():
        given = lookup(record, f"model.{name}")
        if None not in (given, value) and given != value:
            return f"{kind}.json was measured on a model with {name} {given}, this one has {value}. {again}"
    other = lookup(record, "model.path")
    if not run["is_run"] and other is not None and Path(other).resolve() != Path(path).resolve():
        return f"{kind}.json was measured on {other}, another model of the same name. {again}"
    return None


def launches(path: Path) -> list[dict[str, Any]]:
    """The launches of a run that environment.json holds, oldest first; [] where it cannot be read."""
    found = read_object(path).get("launches")
    return [launch for launch in found if isinstance(launch, dict)] if isinstance(found, list) else []


def _model(run: dict[str, Any], path: str | None) -> dict[str, Any]:
    """What config.json or the recipe says, and the "model" part of a result, which knows more, where there is one."""
    described = next((run[kind]["model"] for kind in KINDS if isinstance(lookup(run[kind], "model"), dict)), {})
    config = (read_json(Path(path) / "config.json") if path else None) or {}
    recipe = {key.removeprefix("model."): v for key, v in (run["recipe"] or {}).items() if key.startswith("model.")}
    config = (config.get("softpick_sealed") or [config])[0]  # a foreign architecture, see modeling.attention_guard
    config = {**recipe, **config}
    normalizer = config.get("normalizer")
    if normalizer is None and config:
        saved = config.get("attn_implementation")
        # Version 0.1 saved our names as a foreign architecture's attention; everything else there is softmax.
        normalizer = saved if saved in NORMALIZERS else "softmax"
    found = {
        "normalizer": normalizer,
        "architecture": next(iter(config.get("architectures") or []), None),
        "layers": config.get("num_hidden_layers"),
        "heads": config.get("num_attention_heads"),
        "key_heads": config.get("num_key_value_heads") or config.get("num_attention_heads"),
        "hidden_size": config.get("hidden_size"),
        "vocab_size": config.get("vocab_size"),
        "parameters": lookup(run, "finished.results.parameters"),
    }
    # A result may have come from another model: what is saved here has the last word.
    return described | {key: value for key, value in found.items() if value is not None}
