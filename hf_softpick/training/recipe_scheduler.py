"""Which keywords a learning rate schedule takes, read from the installed transformers' source without importing it.

transformers reads training.lr_scheduler_kwargs when training begins: a wrong one is found after the data is made.
"""

import ast
import difflib
from collections.abc import Iterator
from typing import Any

from .recipe_arguments import read_module, string_members
from .recipe_model import Problem

_GIVEN_BY_TRAINER = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
_WHERE = ("training", "lr_scheduler_kwargs")


def check_scheduler(kind: str, keywords: dict[str, Any]) -> Iterator[Problem]:
    """Keywords that the schedule `kind` does not know, and required ones that are missing."""
    function = _function(kind)
    if function is None:
        return
    arguments = function.args
    names = [argument.arg for argument in arguments.args]
    required = set(names[: len(names) - len(arguments.defaults)]) - _GIVEN_BY_TRAINER
    allowed = [name for name in names if name not in _GIVEN_BY_TRAINER]
    for name in sorted(required - keywords.keys()):
        yield (*_WHERE, name), f"is missing; lr_scheduler_type {kind} needs it"
    for name in sorted(keywords.keys() - set(allowed) if arguments.kwarg is None else ()):
        close = difflib.get_close_matches(name, allowed, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(allowed) or 'nothing'}"
        yield (*_WHERE, name), f"is unknown to lr_scheduler_type {kind}; {hint}"
    # transformers raises for both and for neither, when training begins.
    if "min_lr_rate" in allowed and len(keywords.keys() & {"min_lr", "min_lr_rate"}) != 1:
        yield _WHERE, f"must hold exactly one of min_lr and min_lr_rate for lr_scheduler_type {kind}"


def _function(kind: str) -> ast.FunctionDef | None:
    """The function that makes the schedule, by way of transformers' own table."""
    module = read_module("optimization.py")
    types = next(n for n in read_module("trainer_utils.py").body if getattr(n, "name", None) == "SchedulerType")
    member = next((name for name, value in string_members(types).items() if value == kind), None)
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TYPE_TO_SCHEDULER_FUNCTION":
            table = {
                ast.unparse(key): ast.unparse(value)
                for key, value in zip(node.value.keys, node.value.values, strict=True)
            }
            name = table.get(f"SchedulerType.{member}")
            return next((n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == name), None)
    return None
