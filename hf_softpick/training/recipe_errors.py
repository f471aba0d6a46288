"""Words what is wrong with a recipe: place, what was given, what is allowed, what was probably meant."""

import difflib
import re
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..data.settings import Section
from . import recipe_arguments, recipe_model
from .recipe_text import Document, KeyPath, dotted, shorten, walk

_SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{20,}|://[^/\s]*:[^/\s]*@")


def find_secrets(document: Document) -> list[str]:
    """Keys and values that must not be in a recipe at all. Never repeats the value."""
    problems = []
    for path, value in walk(document.data):
        key = path[-1] if path else None
        if isinstance(key, str) and key in recipe_arguments.SECRETS:
            problems.append(
                f"{document.place(path, True)}: {dotted(path)} cannot be set: {recipe_arguments.SECRETS[key]}"
            )
        elif isinstance(value, str) and _SECRET_VALUE.search(value):
            problems.append(
                f"{document.place(path)}: {dotted(path)} holds what looks like a token or password; a recipe is saved and shared"
            )
    return problems


def word_error(error: ValidationError, document: Document, schema: type[BaseModel]) -> list[str]:
    """One line for each wrong place, in the order of the recipe's sections."""
    lines: dict[KeyPath, str] = {}
    for problem in error.errors(include_url=False, include_context=False):
        path = _real_path(problem["loc"], document, problem["type"] in ("extra_forbidden", "missing"))
        if path not in lines:
            lines[path] = _line(problem, path, document, schema)
    return list(lines.values())


def _real_path(loc: KeyPath, document: Document, keep_last: bool) -> KeyPath:
    """`loc` without what pydantic adds for the members of a union."""
    known = document.known(loc)
    return (*known, loc[-1]) if keep_last and len(loc) == len(known) + 1 else known


def _line(problem: Any, path: KeyPath, document: Document, schema: type[BaseModel]) -> str:
    kind, name = problem["type"], dotted(path) or "the recipe"
    if kind == "extra_forbidden":
        return f"{document.place(path, True)}: {name} {_unknown(path, schema)}"
    field = _field(path, schema)
    if kind == "missing":
        return f"{document.place(path)}: {name} is missing, expected {_expected(field)}"
    if kind == "value_error":
        return f"{document.place(path)}: {name} is {_given(problem['input'])}: {problem['msg'].removeprefix('Value error, ')}"
    given = _look_up(document.data, path)
    return f"{document.place(path)}: {name} is {_given(given)}, expected {_expected(field)}{_hint(given, field)}"


def _unknown(path: KeyPath, schema: type[BaseModel]) -> str:
    section, key = path[:-1], str(path[-1])
    if section == ("training",):
        if key in recipe_arguments.REFUSED:
            return f"cannot be set: {recipe_arguments.REFUSED[key]}"
        if key in recipe_arguments.REMOVED:
            return f"is unknown: {recipe_arguments.REMOVED[key]}"
    if section == ("model",) and key in recipe_model.HINTS:
        return f"is unknown: {recipe_model.HINTS[key]}"
    known = _keys(_section(section, schema))
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if close:
        return f"is unknown; did you mean {dotted((*section, close[0]))}?"
    for other in _keys(schema):
        if key in _keys(_section((other,), schema)):
            return f"is unknown here; it belongs to {other}.{key}"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"is unknown; did you mean {dotted((*section, close[0]))}?"
    return (
        f"is unknown; allowed: {', '.join(known)}"
        if len(known) <= 25
        else "is unknown; allowed: names of transformers.TrainingArguments"
    )


def _keys(section: type[BaseModel] | None) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()] if section else []


def _field(path: KeyPath, schema: type[BaseModel]) -> FieldInfo | None:
    section = _section(path[:-1], schema)
    for name, field in section.model_fields.items() if section else ():
        if (field.alias or name) == path[-1]:
            return field
    return _field(path[:-1], schema) if path else None


def _section(path: KeyPath, schema: type[BaseModel] | None) -> type[BaseModel] | None:
    """The section class that holds what stands at `path`."""
    for key in path:
        if isinstance(key, int):
            continue
        field = next((f for name, f in schema.model_fields.items() if (f.alias or name) == key), None)
        schema = _section_of(field.annotation) if field else None
        if schema is None:
            return None
    return schema


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_of, get_args(annotation))), None)


def _expected(field: FieldInfo | None) -> str:
    if field is None:
        return "the sections model, tokenizer, data, training, eval and run"
    text = _describe(field.annotation, list(field.metadata))
    return text + (f" (for example {field.examples[0]})" if field.examples else "")


_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def _describe(annotation: Any, bounds: list[Any]) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _describe(args[0], list(annotation.__metadata__))
    if annotation in _NAMES:
        numeric = annotation in (int, float)
        return _NAMES[annotation] + (_bounds(bounds) if numeric else "")
    if origin is Literal:
        values = ["true" if value is True else "false" if value is False else str(value) for value in args]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if origin is list:
        return f"a list, each item {_describe(args[0], [])}"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "a mapping of keys to values"
    if args:
        return " or ".join(dict.fromkeys(_describe(arg, bounds) for arg in args))
    return "another value"


def _bounds(bounds: list[Any]) -> str:
    found = []
    for bound in bounds:
        for kind, sign, name in ((Ge, ">=", "ge"), (Gt, ">", "gt"), (Le, "<=", "le"), (Lt, "<", "lt")):
            if isinstance(bound, kind):
                found.append(
                    f"{sign} {getattr(bound, name):g}"
                    if getattr(bound, name) < 1e6
                    else f"{sign} {getattr(bound, name)}"
                )
        if isinstance(bound, MultipleOf):
            found.append(f"a multiple of {bound.multiple_of}")
    return f" {' and '.join(found)}" if found else ""


def _hint(given: Any, field: FieldInfo | None) -> str:
    """What a person who wrote this value probably has to change."""
    kinds = {part for part in (get_args(field.annotation) or (field.annotation,))} if field else set()
    if (
        isinstance(given, str)
        and bool in kinds
        and given.lower() in ("true", "false", "yes", "no", "on", "off", "y", "n")
    ):
        return f"; write {'true' if given.lower() in ('true', 'yes', 'on', 'y') else 'false'}, without quotes"
    if isinstance(given, str) and {int, float} & kinds:
        try:
            float(given)
        except ValueError:
            return ""
        return f"; write {given.replace('_', '')} without quotes or underscores"
    if isinstance(given, float) and int in kinds and given.is_integer():
        return f"; write {int(given)}"
    if isinstance(given, str) and field and get_origin(field.annotation) is Literal:
        close = difflib.get_close_matches(given, map(str, get_args(field.annotation)), n=1)
        return f"; did you mean {close[0]}?" if close else ""
    return ""


def _given(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a mapping"
    return shorten(repr(value))


def _look_up(data: Any, path: KeyPath) -> Any:
    for key in path:
        data = data[key]
    return data
