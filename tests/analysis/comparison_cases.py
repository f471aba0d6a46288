"""Run folders with results as the measuring commands write them, for the tests of the comparison."""

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

LAYERS, HEADS, STEPS = 4, 6, 1000

RECIPE = {
    "model": {"normalizer": "softpick", "hidden_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS},
    "data": {"seq_len": 256, "seed": 42},
    "training": {"max_steps": STEPS, "learning_rate": 3e-3, "seed": 1, "save_steps": 100},
    "run": {"name": "a", "root": "runs"},
}


def recipe(normalizer: str, name: str, **changes: Any) -> dict[str, Any]:
    """RECIPE of a run; `changes` are dotted keys with __ for the dot."""
    found = copy.deepcopy(RECIPE)
    found["model"]["normalizer"], found["run"]["name"] = normalizer, name
    for key, value in changes.items():
        section, field = key.split("__")
        found[section][field] = value
    return found


def write_run(root: Path, name: str, normalizer: str, loss: float = 3.0, **changes: Any) -> Path:
    """A finished run without weights; no results yet."""
    folder = root / name
    (folder / "final").mkdir(parents=True)
    write(folder / "recipe.yaml", recipe(normalizer, name, **changes))
    config = {"model_type": "softpick", "architectures": ["SoftpickForCausalLM"], "normalizer": normalizer}
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_size": 96, "vocab_size": 4096}
    write(folder / "final/config.json", {**config, **sizes})
    launch = {"platform": "Linux", "cpus": 2, "gpus": [], "processes": 1, "commit": "abc"}
    write(folder / "environment.json", {"launches": [{**launch, "versions": {"torch": "2.13"}}]})
    write(folder / "finished.json", {"step": STEPS, "results": {"parameters": 1234567, "eval_loss": loss + 0.1}})
    draw = random.Random(name)
    with (folder / "metrics.jsonl").open("w") as file:
        if "softpick" in normalizer:
            file.write(json.dumps({"step": 0, "stats_sparsity": 0.4895}) + "\n")
        for step in range(10, STEPS + 1, 10):
            value = loss + 5 * math.exp(-step / 120) + draw.gauss(0, 0.002)
            record = {"step": step, "loss": value, "tokens_per_second": 8000 + draw.gauss(0, 50), "memory_gib": 1.1}
            file.write(json.dumps({**record, "tokens_seen": 2048 * step}) + "\n")
            if step % 200 == 0:
                file.write(json.dumps({"step": step, "eval_loss": value + 0.1, "eval_tokens": 8125}) + "\n")
                logged = {
                    "sink_rate": 0.0,
                    "first_mass": 0.02,
                    "sparsity": 0.45,
                    "kurtosis": "nan",
                    "hidden_max": 8.0,
                    "hidden_min": -9.5,
                }
                file.write(json.dumps({"step": step, **{f"stats_{k}": v for k, v in logged.items()}}) + "\n")
    return folder


def write(path: Path, value: Any) -> Path:
    """JSON, which is YAML too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def model(name: str, normalizer: str, step: int | None = STEPS) -> dict[str, Any]:
    """The "model" part of a result."""
    sizes = {"layers": LAYERS, "heads": HEADS, "key_heads": HEADS, "hidden_size": 96, "vocab_size": 4096}
    return {"name": name, "path": f"runs/{name}/final", "normalizer": normalizer, "trained_steps": step, **sizes}


def statistics(name: str, normalizer: str, sink: float, kurtosis: float, largest: float, sparsity: float) -> dict:
    """A statistics.json whose summary has these figures."""
    draw = random.Random(name)
    layers = []
    for layer in range(LAYERS):
        grow = (layer + 1) / LAYERS
        heads = {key: [draw.random() * sink for _ in range(HEADS)] for key in ("sink_rate", "first_mass")}
        heads["row_mass"] = [1.0 if "softmax" in normalizer else draw.random() for _ in range(HEADS)]
        heads["sparsity"] = [min(1.0, sparsity * (0.5 + draw.random())) for _ in range(HEADS)]
        heads["sparsity_small"] = heads["sparsity"]
        heads["empty_tiles_64"] = [0.0] * HEADS
        top = {"row": 0, "position": 0, "token": "<bos>", "channel": 17, "value": largest * grow}
        hidden = {"kurtosis": kurtosis * grow, "max": largest * grow, "min": -1.0, "largest": top, "massive_at": []}
        layers.append({"layer": layer, "heads": heads, "hidden": hidden, "attention": None, "mlp": None})
    summary = {"sink_rate": sink, "sink_rate_first4": sink, "sink_rate_any": sink, "sparsity": sparsity}
    summary |= {"kurtosis": kurtosis, "kurtosis_max": kurtosis, "hidden_max": largest, "hidden_min": -largest / 2}
    summary |= {"sparsity_small": sparsity, "empty_tiles_64": 0.0, "empty_tiles_128": 0.0, "first_mass": sink / 2}
    summary |= {
        "empty_rows": 0.0,
        "massive_activations": 0,
        "entropy": 2.1,
        "distance": 30.5,
        "dormant_heads": 0,
        "row_mass": 0.8,
    }
    return {
        "schema": 1,
        "kind": "statistics",
        "model": model(name, normalizer),
        "versions": {"torch": "2.13.0"},
        "seconds": 1.5,
        "data": {"description": "validation", "rows": 32, "sequences": 40, "tokens": 8192, "sink_sequences": 36},
        "thresholds": {"sink": [0.3]},
        "sink_rate": {"first": {"0.3": sink}, "first4": {"0.3": sink}, "any": {"0.3": sink}},
        "summary": summary,
        "layers": layers,
        "nonfinite": [],
    }


def quantization(name: str, normalizer: str, increases: dict[str, Any]) -> dict[str, Any]:
    """A quantization.json with the loss increase of some formats; one more is missing."""
    formats = [
        {
            "format": f,
            "bits": int(f[-1]),
            "bits_per_weight": int(f[-1]) + 0.25,
            "quantized_share": 0.753,
            "status": "measured",
            "loss_increase": x,
            "loss": x if isinstance(x, str) else 3 + x,
        }
        for f, x in increases.items()
    ]
    formats.append({"format": "gptq-int4", "status": "missing", "reason": "gptqmodel is not installed"})
    return {
        "kind": "quantization",
        "model": model(name, normalizer),
        "data": {"description": "validation", "tokens": 8192},
        "baseline": {"dtype": "float32", "bits": 32, "loss": 3.0},
        "formats": formats,
    }


def downstream(name: str, normalizer: str, accuracy: float) -> dict[str, Any]:
    """A downstream.json with one task that worked and one that did not."""
    metric = {"value": accuracy, "stderr": 0.01, "higher_is_better": True}
    tasks = {"piqa": {"samples": 1838, "version": 1, "metrics": {"acc": metric}}, "sciq": {"error": "no network"}}
    return {"kind": "downstream", "model": model(name, normalizer), "bos": {"add_bos_token": True}, "tasks": tasks}


def passkey(name: str, normalizer: str, last: float) -> dict[str, Any]:
    """A passkey.json of two lengths and three depths."""
    accuracy = [[1.0, 0.8, 1.0], [0.6, 0.2, last]]
    grid = {
        "choice_accuracy": accuracy,
        "choice_chance": 0.1,
        "seed": 0,
        "lengths": [128, 1256],
        "depths": [0.0, 0.5, 1.0],
        "samples": 5,
        "accuracy": accuracy,
        "refused": [],
    }
    return {"kind": "passkey", "model": model(name, normalizer), **grid}


def maps(run_name: str, softpick: bool) -> dict[str, Any]:
    """Attention maps as `analysis.attention_maps` returns them."""
    tokens = [
        "<bos>",
        "def",
        " area",
        "(",
        "width",
        ",",
        " height",
        "):",
        "\n",
        "   ",
        " return",
        " width",
        " *",
        " h",
    ]
    draw = random.Random(run_name)
    rows = []
    for i in range(len(tokens)):
        row = [draw.random() ** 4 if not softpick or draw.random() > 0.5 else 0.0 for _ in range(i + 1)]
        total = sum(row) + (draw.random() if softpick else 0)
        rows.append([w / total if total else 0.0 for w in row])
    item = {"weights": rows, "row_mass": [sum(row) for row in rows], "first_mass": 0.2}
    heads = [{"layer": 0, "head": 1, "why": "most attention to the first token", **item}]
    heads.append({"layer": 2, "head": 3, "why": "median attention to the first token", **item})
    text = "def area(width, height):\n    return width * h"
    return {"text": text, "tokens": tokens, "cut": False, "chosen_by": "this text", "maps": heads}


def write_pair(root: Path, results: bool = True) -> list[Path]:
    """A softmax run and a softpick run as the paper would have them."""
    runs = [write_run(root, "softmax-a", "softmax", 3.0), write_run(root, "softpick-a", "softpick", 3.004)]
    if results:
        figures = ((0.63, 33510.0, 240.0, 0.0), (0.0, 340.0, 36.0, 0.47))
        losses = ({"int8": 0.002, "int4": 0.3, "int2": 5.1}, {"int8": 0.0002, "int4": 0.1, "int2": 2.2})
        for run, figure, loss, accuracy in zip(runs, figures, losses, (0.60, 0.65), strict=True):
            name, kind = run.name, run.name.split("-")[0]
            write(run / "report/statistics.json", statistics(name, kind, *figure))
            write(run / "report/quantization.json", quantization(name, kind, loss))
            write(run / "report/downstream.json", downstream(name, kind, accuracy))
            write(run / "report/passkey.json", passkey(name, kind, accuracy))
    return runs


def full(root: Path, with_maps: bool = True) -> dict[str, Any]:
    """A whole comparison of `write_pair`, judged."""
    from hf_softpick.analysis.claims import judge
    from hf_softpick.analysis.comparison import gather

    found = gather(write_pair(root))
    if with_maps:
        for run in found["runs"]:
            run["attention_maps"] = maps(run["name"], run["normalizer"] == "softpick")
    found["claims"] = judge(found)
    return found
