"""README.md of a finished model: what it is, how to load it, what it was trained on, what must not be done with it."""

import json
from collections.abc import Sequence
from typing import Any

from hf_softpick.training.recipe import Recipe

_WARNING = """\
> **The weights belong to {normalizer} attention.** Load them with `trust_remote_code=True` or with hf_softpick
> installed. An engine that converts checkpoints, or a class of another architecture that is told to use `sdpa` or
> flash attention, computes softmax over them: text without an error message, and wrong numbers.
"""

_SOFTMAX = "> The attention is ordinary softmax; any implementation computes what was trained.\n"


def model_card(
    recipe: Recipe,
    recipe_text: str,
    results: dict[str, Any],
    data_report: dict[str, Any],
    versions: dict[str, str],
    parameters: int,
    foreign: bool,
    changes: Sequence[dict[str, Any]] = (),
) -> str:
    """Text of the model card.

    Args:
        recipe_text: the resolved recipe as YAML.
        results: step, tokens_seen, last_loss, eval_loss, ... of the end of the run.
        changes: settings that the recipe did not have from the first step on, as `resume.listed` makes them.
        foreign: the architecture is one of transformers' own, run with our attention.
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
            _loading(foreign and normalizer != "softmax", normalizer),
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


def _loading(needs_package: bool, normalizer: str) -> str:
    if needs_package:
        return (
            "```python\nimport hf_softpick  # registers the attention; without it loading is an error\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="{normalizer}")\n'
            "tokenizer = AutoTokenizer.from_pretrained(path)\n```\n"
        )
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)  # or: import hf_softpick first\n"
        "tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)\n```\n"
    )


def _table(values: dict[str, Any]) -> str:
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows, ""])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.replace("|", "\\|").replace("\n", " ")
