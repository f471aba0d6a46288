"""README.md of a finished model: what it is, how to load it, what it was trained on, what must not be done with it."""

import json
from collections.abc import Sequence
from typing import Any

from hf_softpick.training.recipe import Recipe

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
    recipe_text: str,
    results: dict[str, Any],
    data_report: dict[str, Any],
    versions: dict[str, str],
    parameters: int,
    changes: Sequence[dict[str, Any]] = (),
) -> str:
    """Text of the model card.

    Args:
        recipe_text: the resolved recipe as YAML.
        results: step, tokens_seen, last_loss, eval_loss, ... of the end of the run.
        changes: settings that the recipe did not have from the first step on, as `resume.listed` makes them.
    """
    normalizer = recipe.model.normalizer
    tags = ["softpick", f"{normalizer}-attention", "text-generation", "hf_softpick"]
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags)]
    if recipe.model.from_ is not None:
        front.append(f"base_model: {recipe.model.from_}")
    return "\n".join(
        [
            "---",
            *front,
            "---",
            f"# {recipe.run.name}",
            "",
            f"A causal language model with {parameters:,} parameters and {normalizer} attention, trained with "
            "hf_softpick.",
            "",
            _SOFTMAX if normalizer == "softmax" else _WARNING.format(normalizer=normalizer),
            "## Load",
            "",
            _LOAD,
            "## Results",
            "",
            _table(results),
            "## Data",
            "",
            f"Sources: {', '.join(source.path for source in recipe.data.sources)}.",
            "",
            _table(data_report),
            "## Versions",
            "",
            _table(versions),
            "## Recipe",
            "",
            f"```yaml\n{recipe_text.strip()}\n```",
            "",
            *_changed(changes),
        ]
    )


def _changed(changes: Sequence[dict[str, Any]]) -> list[str]:
    changes = [change for change in changes if not change["setting"].startswith("run.")]
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
