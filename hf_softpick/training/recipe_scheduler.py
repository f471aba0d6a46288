"""Whether a learning rate schedule means what it says: its keywords, their types and ranges, warm-up and length.

transformers reads training.lr_scheduler_kwargs when training begins, and takes values that mean nothing. What it knows
is read from the installed source, without importing it.
"""

import ast
import difflib
import math
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .recipe_arguments import annotated_type, read_module, string_members
from .recipe_model import Problem
from .recipe_text import shorten

_GIVEN_BY_TRAINER = {"self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
_WHERE = ("training", "lr_scheduler_kwargs")
# Their state is the learning rate; they change it after an evaluation.
ADAPTIVE = ("reduce_lr_on_plateau", "greedy")
_POSITIVE = ("num_decay_steps", "num_cycles", "timescale")
_CHOICES = {
    "warmup_type": ("linear", "cosine", "1-sqrt"),
    "decay_type": ("linear", "cosine", "1-sqrt"),
    "mode": ("min", "max"),
    "threshold_mode": ("rel", "abs"),
}


def check_scheduler(given: dict[str, Any], evaluates: bool) -> Iterator[Problem]:
    """What is wrong with the schedule of the training arguments `given`.

    Args:
        evaluates: there are evaluations while training goes on.
    """
    kind, keywords = given.get("lr_scheduler_type", "linear"), given.get("lr_scheduler_kwargs") or {}
    if kind in ADAPTIVE and not evaluates:
        yield (
            ("training", "lr_scheduler_type"),
            f"is {kind!r}, which follows the validation loss; set eval.every and data.validation",
        )
    if given.get("warmup_steps") and kind in ("constant", *ADAPTIVE):
        hint = " or use constant_with_warmup" if kind == "constant" else ""
        yield ("training", "warmup_steps"), f"has no meaning for lr_scheduler_type {kind}; leave it out{hint}"
    arguments = _arguments(kind) if kind != "linear" or keywords else None
    if arguments is None:
        return
    problems = dict(_check_keywords(kind, keywords, arguments))
    yield from problems.items()
    if not problems:
        yield from _check_values(given, kind, keywords)


def _check_keywords(kind: str, keywords: dict[str, Any], arguments: ast.arguments) -> Iterator[Problem]:
    named = {argument.arg: argument for argument in arguments.args}
    defaults = dict(zip(reversed(named), reversed(arguments.defaults), strict=False))
    allowed = [name for name in named if name not in _GIVEN_BY_TRAINER]
    for name in sorted(set(allowed) - defaults.keys() - keywords.keys()):
        yield (*_WHERE, name), f"is missing; lr_scheduler_type {kind} needs it"
    for name in sorted(keywords):
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(allowed) or 'nothing'}"
            yield (*_WHERE, name), f"is unknown to lr_scheduler_type {kind}; {hint}"
        elif problem := _value_problem(name, keywords[name], named[name].annotation, defaults.get(name)):
            yield (*_WHERE, name), f"is {shorten(repr(keywords[name]))}, expected {problem}"
    # transformers raises for both and for neither, when training begins.
    if "min_lr_rate" in allowed and len(keywords.keys() & {"min_lr", "min_lr_rate"}) != 1:
        yield _WHERE, f"must hold exactly one of min_lr and min_lr_rate for lr_scheduler_type {kind}"


def _value_problem(name: str, value: Any, annotation: ast.expr | None, default: ast.expr | None) -> str | None:
    """What was expected instead of `value`, None when it is right."""
    if name in _CHOICES and value not in _CHOICES[name]:
        return f"one of {', '.join(_CHOICES[name])}"
    if annotation is None:
        annotation = ast.Name(type(ast.literal_eval(default)).__name__)
    try:
        TypeAdapter(annotated_type(annotation)).validate_python(value, strict=True)
    except ValidationError:
        return {"int": "an integer", "float": "a number"}.get(ast.unparse(annotation), ast.unparse(annotation))
    if isinstance(value, (int, float)) and (value < 0 or (value == 0 and name in _POSITIVE)):
        return "a number > 0" if name in _POSITIVE else "a number >= 0"
    return "a number < 1" if name == "factor" and value >= 1 else None


def _check_values(given: dict[str, Any], kind: str, keywords: dict[str, Any]) -> Iterator[Problem]:
    rate = given.get("learning_rate", 5e-5)
    for name, highest in (("min_lr", rate), ("lr_end", rate), ("min_lr_rate", 1), ("min_lr_ratio", 1)):
        value = keywords.get(name)
        if isinstance(value, (int, float)) and value > highest and kind != "greedy":
            yield (*_WHERE, name), f"is {value:g}, higher than what it is the lower end of, {highest:g}"
    total = given.get("max_steps")
    if kind == "warmup_stable_decay" and total:
        warmup = given.get("warmup_steps", 0)
        warmup = math.ceil(total * warmup) if warmup < 1 else int(warmup)
        stable, decay = keywords.get("num_stable_steps") or 0, keywords["num_decay_steps"]
        if warmup + stable + decay > total:
            yield (
                (*_WHERE, "num_decay_steps"),
                f"is {decay}: with {warmup} warm-up and {stable} stable steps the decay would end after "
                f"training.max_steps = {total}",
            )


def _arguments(kind: str) -> ast.arguments | None:
    """Arguments of what makes the schedule, by way of transformers' own table."""
    module = read_module("optimization.py")
    if kind in ADAPTIVE:  # their functions hand everything on
        module = module if kind == "greedy" else read_module("optim/lr_scheduler.py", "torch")
        name = "GreedyLR" if kind == "greedy" else "ReduceLROnPlateau"
        holder = next((n for n in module.body if isinstance(n, ast.ClassDef) and n.name == name), None)
        return _function(holder.body, "__init__") if holder is not None else None
    types = next(n for n in read_module("trainer_utils.py").body if getattr(n, "name", None) == "SchedulerType")
    member = next((name for name, value in string_members(types).items() if value == kind), None)
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TYPE_TO_SCHEDULER_FUNCTION":
            table = {
                ast.unparse(key): ast.unparse(value)
                for key, value in zip(node.value.keys, node.value.values, strict=True)
            }
            return _function(module.body, table.get(f"SchedulerType.{member}"))
    return None


def _function(body: list[ast.stmt], name: str | None) -> ast.arguments | None:
    return next((n.args for n in body if isinstance(n, ast.FunctionDef) and n.name == name), None)
