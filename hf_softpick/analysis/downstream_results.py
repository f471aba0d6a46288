"""Results of downstream tasks: several calls in one file, task by task, and tables of them."""

import json
from pathlib import Path
from typing import Any

from hf_softpick.errors import StorageError
from hf_softpick.files import write_json, write_text

FILE, TABLE, LM_EVAL = "downstream.json", "downstream.md", "results_downstream.json"
_SETTINGS = ("limit", "num_fewshot_given", "batch_size", "batch_size_from", "max_length")
_LIBRARIES = ("hf_softpick", "torch", "transformers", "datasets", "lm_eval")
_LOADING = ("dtype", "attn_implementation")
_PLACE = ("name", "path")


class Report:
    """The downstream results of one model in one folder: what earlier calls measured stays, task by task.

    A task that is measured again replaces its earlier result; one that fails does not, the failure becomes its
    last_error. Results of other weights are left out.
    """

    def __init__(self, folder: Path, model: dict[str, Any], versions: dict[str, str], own: bool) -> None:
        """Read what `folder` has.

        Args:
            model: `describe(loaded)`.
            own: the folder is the report of the model's own run, which may have been moved.

        Raises:
            StorageError: a file there is not what this class writes.
        """
        self.folder, self.own = folder, own
        self.head = {"schema": 1, "kind": "downstream", "model": model, "versions": versions}
        self.earlier: dict[str, dict[str, Any]] = {}
        self.earlier_lm_eval: dict[str, Any] = {}
        self.dropped: str | None = None
        """A line for the user where results of other weights were left out."""
        saved = _read(folder / FILE)
        if not saved.get("tasks"):
            return
        if difference := _difference(saved.get("model") or {}, model, own):
            tasks = ", ".join(saved["tasks"])
            self.dropped = f"{folder / FILE}: earlier results ({tasks}) are left out, {difference}"
            return
        self.earlier = {name: _labelled(task, saved) for name, task in saved["tasks"].items()}
        self.earlier_lm_eval = _read(folder / LM_EVAL)

    def joined(self, result: dict[str, Any]) -> dict[str, Any]:
        """A result of `evaluate_tasks` and the earlier tasks, each with the settings that it was measured with.

        limit is the smallest of any task; other settings are what all tasks share, else None.
        """
        tasks = dict(self.earlier)
        for name, task in result["tasks"].items():
            before = tasks.get(name, {})
            if "error" in task and "metrics" in before:
                tasks[name] = before | {"last_error": task["error"]}
            else:
                tasks[name] = _labelled(task, self.head | result)
        measured = [task for task in tasks.values() if "metrics" in task]
        limits = [task["limit"] for task in measured if task.get("limit") is not None]
        shared = {}
        for key in _SETTINGS:
            values = [task.get(key) for task in measured]
            shared[key] = values[0] if values and values.count(values[0]) == len(values) else None
        shared["num_fewshot"] = shared.pop("num_fewshot_given")
        rest = {key: value for key, value in result.items() if key not in ("tasks", *_SETTINGS, "num_fewshot")}
        return rest | shared | {"limit": min(limits, default=None), "tasks": tasks}

    def save(self, result: dict[str, Any], lm_eval_result: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Write downstream.json, its table and lm-eval's results, each whole or not at all; returns `joined`.

        Raises:
            StorageError: a file cannot be written.
        """
        joined = self.joined(result)
        write_json(self.folder / LM_EVAL, merge(self.earlier_lm_eval, lm_eval_result))
        name = self.head["model"]["name"]
        write_text(self.folder / TABLE, format_table({name: joined}) + "\n")
        write_json(self.folder / FILE, self.head | {"seconds": round(seconds, 3)} | joined | {"lm_eval": LM_EVAL})
        return joined


def merge(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Results of lm-eval; keys that hold a mapping by task are joined, the others are the later ones."""
    by_task = [
        k for k, v in later.items() if k != "config" and isinstance(v, dict) and isinstance(earlier.get(k), dict)
    ]
    return earlier | later | {key: earlier[key] | later[key] for key in by_task}


def _labelled(task: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """A task with the settings of its call, unless it has them already; numbers read from JSON as numbers again."""
    if "metrics" not in task:
        return task
    metrics = {name: dict(score) for name, score in task["metrics"].items()}
    for score in metrics.values():
        score |= {key: float(score[key]) for key in ("value", "stderr") if score.get(key) is not None}
    # num_fewshot of a task is what it used.
    settings = {key: result.get(key) for key in _SETTINGS} | {"num_fewshot_given": result.get("num_fewshot")}
    settings |= {key: result["model"].get(key) for key in _LOADING}
    settings["versions"] = {key: value for key, value in result["versions"].items() if key in _LIBRARIES}
    return settings | task | {"metrics": metrics}


def _difference(old: dict[str, Any], new: dict[str, Any], own: bool) -> str | None:
    """Why results of `old` are not those of the same weights, None if they are."""
    for key in sorted(set(old) | set(new)):
        if key not in (*_PLACE, *_LOADING) and old.get(key) != new.get(key):
            return f"{key} was {old.get(key)} and is {new.get(key)}"
    old_path, new_path = (Path(one.get("path") or "") for one in (old, new))
    # The same folder, as named from another working directory, if one path is the end of the other.
    shared = 1 if own else min(len(old_path.parts), len(new_path.parts))
    same = shared > 0 and old_path.parts[-shared:] == new_path.parts[-shared:]
    return None if same else f"path was {old_path} and is {new_path}"


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read: {error}. Move it away; new results would replace it.") from None
    if not isinstance(value, dict):
        raise StorageError(f"{path} holds no results. Move it away; new results would replace it.")
    return value


def failed(result: dict[str, Any]) -> list[str]:
    """Names of the tasks that failed."""
    return [name for name, task in result["tasks"].items() if "error" in task]


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of several models' results, by name: tasks and metrics as rows, value +- standard error.

    documents: how many were scored; several numbers, in the order of the models, where these differ.
    """
    rows: dict[tuple[str, str], dict[str, str]] = {}
    arrows = {True: "higher", False: "lower", None: ""}
    counts: dict[str, dict[str, int]] = {}
    for model, result in results.items():
        for task, entry in result["tasks"].items():
            if entry.get("samples") is not None:
                counts.setdefault(task, {})[model] = entry["samples"]
            for metric, score in entry.get("metrics", {}).items():
                row = rows.setdefault((task, metric), {"better": arrows[score["higher_is_better"]]})
                row[model] = _number(score["value"]) + (
                    "" if score["stderr"] is None else f" +- {score['stderr']:.4f}"
                )
    for model, result in results.items():
        for task in failed(result):
            for key in [key for key in rows if key[0] == task] or [(task, "")]:
                rows.setdefault(key, {"better": ""})[model] = "failed"
    documents = {task: " / ".join(map(str, dict.fromkeys(found.values()))) for task, found in counts.items()}
    cells = [["task", "documents", "metric", "better", *results]]
    cells += [
        [task, documents.get(task, ""), metric, row["better"], *(row.get(model, "") for model in results)]
        for (task, metric), row in sorted(rows.items())
    ]
    widths = [max(3, *(len(line[column]) for line in cells)) for column in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([*lines, *_truncated(results), *_trial(results)])


def _truncated(results: dict[str, dict[str, Any]]) -> list[str]:
    """A few-shot prompt that was cut is no longer the prompt that the table names."""
    lines = []
    for model, result in results.items():
        for name, task in result["tasks"].items():
            if task.get("truncated_prompts"):
                length = task.get("max_length") or result.get("max_length")
                lines.append(
                    f"\n{model}, {name}: {task['truncated_prompts']} of {task['prompts']} prompts "
                    f"({task.get('num_fewshot') or 0}-shot) are longer than the {length} tokens that the model reads "
                    "and lost their beginning."
                )
    return lines


def _trial(results: dict[str, dict[str, Any]]) -> list[str]:
    """What a limit makes of the figures: by task where the results say so."""
    limits: dict[int, list[str]] = {}
    whole = False
    for result in results.values():
        for name, task in result["tasks"].items():
            if "metrics" in task:
                limit = task.get("limit", result["limit"])
                whole |= limit is None
                if limit is not None and name not in limits.setdefault(limit, []):
                    limits[limit].append(name)
    lines = []
    for limit, names in sorted(limits.items()):
        which = f"each of {', '.join(names)}" if whole or len(limits) > 1 else "each task"
        lines.append(f"\nA trial: only the first {limit} documents of {which}, not comparable with full results.")
    return lines


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.6g}"
