"""README.md of a finished model: what it is, how to load it, what it was trained on, what must not be done with it."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hf_softpick.modeling.normalizers import NORMALIZERS
from hf_softpick.training.recipe import Recipe, to_yaml

# Absolute, relative to a home or to a folder above: what may name a person or a machine.
_PATH = re.compile(r"(?:file:/|~|\.{0,2}/)[^\n]*\Z")

_WARNING = """\
> **The weights belong to {normalizer} attention.** Load them with `trust_remote_code=True` or with hf_softpick
> installed. Everything else refuses this folder; what is made to read the weights all the same computes softmax over
> them: text without an error message, and wrong numbers.
"""

_LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)  # or: import hf_softpick first
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
```
"""

_SOFTMAX = "> The attention is ordinary softmax; any implementation computes what was trained.\n"


def model_card(
    recipe: Recipe,
    results: dict[str, Any],
    data_report: dict[str, Any],
    versions: dict[str, str],
    parameters: int,
    changes: Sequence[dict[str, Any]] = (),
    commits: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Text of the model card. It is made to be published: of paths on this machine it holds the last part alone.

    Args:
        results: step, tokens_seen, last_loss, eval_loss, ... of the end of the run.
        changes: settings that the recipe did not have from the first step on, as `resume.listed` makes them.
        commits: of what the recipe names on the Hub, by the recipe's key.
    """
    normalizer = recipe.model.normalizer
    tags = ["softpick", f"{normalizer}-attention", "text-generation", "hf_softpick"]
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags)]
    source = recipe.model.from_
    if source is not None and source == without_paths(source) and not os.path.exists(source):
        front.append(f"base_model: {source}")
    card = "\n".join(
        [
            "---",
            *front,
            "---",
            f"# {recipe.run.name}",
            "",
            f"A causal language model with {parameters:,} parameters and {normalizer} attention, trained with "
            "hf_softpick.",
            "",
            _SOFTMAX if NORMALIZERS[normalizer].is_plain_softmax else _WARNING.format(normalizer=normalizer),
            "## Load",
            "",
            _LOAD,
            "## Results",
            "",
            _table(results),
            "## Data",
            "",
            f"Sources: {', '.join(without_paths(source.path) for source in recipe.data.sources)}.",
            "",
            _table(without_paths(data_report)),
            "## Versions",
            "",
            _table({**versions, **{f"commit of {key}": commit for key, commit in commits.items()}}),
            "## Recipe",
            "",
            f"```yaml\n{to_yaml(without_paths(recipe.resolved())).strip()}\n```",
            "",
            *_changed(without_paths(changes)),
        ]
    )
    home = str(Path.home())
    return card.replace(f"{home}/", ".../") if len(home) > 1 else card


def without_paths(value: Any) -> Any:
    """`value` (plain values, nested) with ".../NAME" for each path of this machine; prompts are text, and stay."""
    if isinstance(value, Mapping):
        return {without_paths(key): item if key == "prompts" else without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and _PATH.match(value):
        return f".../{value.rstrip('/').rpartition('/')[2]}"
    return value


def _changed(changes: Sequence[dict[str, Any]]) -> list[str]:
    if not changes:
        return []
    rows = [
        "| " + " | ".join(_cell(change[name]) for name in ("step", "setting", "before", "after")) + " |"
        for change in changes
    ]
    text = "The recipe is that of the last launch. These settings were changed when the run went on from a checkpoint:"
    return [text, "", "| after step | setting | before | after |", "| --- | --- | --- | --- |", *rows, ""]


def _table(values: dict[str, Any]) -> str:
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows, ""])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.replace("|", "\\|").replace("\n", " ")
