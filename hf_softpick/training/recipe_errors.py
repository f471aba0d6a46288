"""Words what is wrong with a recipe: place, what was given, what is allowed, what was probably meant."""

import difflib
import re
from functools import reduce
from operator import getitem
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..data.redaction import SECRET
from . import recipe_arguments, recipe_model
from .recipe_text import Document, KeyPath, dotted, shorten, walk

Schema = type[BaseModel]

_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}  # of annotated_types
_YES, _NO = ("true", "yes", "on", "y"), ("false", "no", "off", "n")


def find_secrets(document: Document) -> dict[KeyPath, str]:
    """Keys and values that must not be in a recipe at all. Never repeats the value."""
    problems = {}
    for path, value in walk(document.data):
        reason = recipe_arguments.SECRETS.get(path[-1]) if path and isinstance(path[-1], str) else None
        if reason:
            problems[path] = f"{document.place(path, True)}: {dotted(path)} cannot be set: {reason}"
        elif (path and SECRET.search(str(path[-1]))) or (isinstance(value, str) and SECRET.search(value)):
            what = "holds what looks like a token or password; a recipe is saved and shared"
            problems[path] = f"{document.place(path)}: {dotted(path)} {what}"
    return problems


def word_error(error: ValidationError, document: Document, schema: Schema) -> dict[KeyPath, str]:
    """One line for each wrong place, in the order of the recipe's sections."""
    lines: dict[KeyPath, str] = {}
    for problem in error.errors(include_url=False, include_context=False):
        path = _real_path(problem["loc"], document, problem["type"] in ("extra_forbidden", "missing"))
        if path not in lines:
            lines[path] = _line(problem, path, document, schema)
    return lines


def _real_path(loc: KeyPath, document: Document, keep_last: bool) -> KeyPath:
    """`loc` without what pydantic adds for the members of a union."""
    known = document.known(loc)
    return (*known, loc[-1]) if keep_last and len(loc) == len(known) + 1 else known


def _line(problem: Any, path: KeyPath, document: Document, schema: Schema) -> str:
    kind, name = problem["type"], dotted(path) or "the recipe"
    if kind == "extra_forbidden":
        return f"{document.place(path, True)}: {name} {_unknown(path, schema)}"
    place, field = document.place(path), _field(path, schema)
    if kind == "missing":
        return f"{place}: {name} is missing, expected {_expected(field, path)}"
    given = reduce(getitem, path, document.data)
    if kind == "value_error":
        return f"{place}: {name} is {_given(given)}: {problem['msg'].removeprefix('Value error, ')}"
    return f"{place}: {name} is {_given(given)}, expected {_expected(field, path)}{_hint(given, field)}"


def _unknown(path: KeyPath, schema: Schema) -> str:
    section, key = path[:-1], str(path[-1])
    if section == ("training",) and key in recipe_arguments.REFUSED:
        return f"cannot be set: {recipe_arguments.REFUSED[key]}"
    hints = {("training",): recipe_arguments.REMOVED, ("model",): recipe_model.HINTS}.get(section, {})
    if key in hints:
        return f"is unknown: {hints[key]}"
    known = fields_of(_section(section, schema))
    for cutoff in (0.8, 0.55):
        close = difflib.get_close_matches(key, known, n=1, cutoff=cutoff)
        if close:
            return f"is unknown; did you mean {dotted((*section, close[0]))}?"
        # A key in the wrong section is likelier than a typing mistake that is far from everything.
        for other in fields_of(schema):
            if key in fields_of(_section((other,), schema)):
                return f"is unknown here; it belongs to {other}.{key}"
    few = len(known) <= 30
    return f"is unknown; allowed: {', '.join(known) if few else 'the names of transformers.TrainingArguments'}"


def fields_of(section: Schema | None) -> dict[str, FieldInfo]:
    """The fields of a section under the names that recipes use; {} for no section."""
    return {field.alias or name: field for name, field in section.model_fields.items()} if section else {}


def _field(path: KeyPath, schema: Schema) -> FieldInfo | None:
    """The field that decides what may stand at `path`: for something inside a list or mapping, that of the whole."""
    if not path:
        return None
    return fields_of(_section(path[:-1], schema)).get(path[-1]) or _field(path[:-1], schema)


def _section(path: KeyPath, schema: Schema | None) -> Schema | None:
    """The section class that holds what stands at `path`."""
    for key in path:
        if not isinstance(key, int):
            field = fields_of(schema).get(key)
            schema = _section_in(field.annotation) if field else None
    return schema


def _section_in(annotation: Any) -> Schema | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _expected(field: FieldInfo | None, path: KeyPath) -> str:
    if field is None:
        return "the sections model, tokenizer, data, training, eval and run"
    annotation = field.annotation
    if path and isinstance(path[-1], int):
        lists = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is list]
        annotation = get_args(lists[0])[0] if lists else Any
    text = _describe(annotation, list(field.metadata))
    return text + (f" (for example {field.examples[0]})" if field.examples else "")


def _describe(annotation: Any, bounds: list[Any]) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _describe(args[0], list(annotation.__metadata__))
    if annotation in _NAMES:
        return _NAMES[annotation] + (_bounds(bounds) if annotation in (int, float) else "")
    if origin is Literal:
        values = [_given(value) if isinstance(value, bool) else str(value) for value in args]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if origin is list:
        return f"a list, each item {_describe(args[0], [])}"
    if origin is dict or _section_in(annotation) is annotation:
        return "a mapping of keys to values"
    return " or ".join(dict.fromkeys(_describe(arg, bounds) for arg in args)) or "another value"


def _bounds(bounds: list[Any]) -> str:
    pairs = ((bound, name) for bound in bounds for name in _SIGNS if hasattr(bound, name))
    found = [f"{_SIGNS[name]} {getattr(bound, name)}" for bound, name in pairs]
    return f" {' and '.join(found)}" if found else ""


def _hint(given: Any, field: FieldInfo | None) -> str:
    """What a person who wrote this value probably has to change."""
    kinds = set(get_args(field.annotation) or (field.annotation,)) if field else set()
    if isinstance(given, float) and int in kinds and given.is_integer():
        return f"; write {int(given)}"
    if not isinstance(given, str):
        return ""
    if bool in kinds and given.lower() in (*_YES, *_NO):
        return f"; write {'true' if given.lower() in _YES else 'false'}, without quotes"
    if {int, float} & kinds and re.fullmatch(r"[-+]?[\d_]*\.?[\d_]+([eE][-+]?\d+)?", given):
        return f"; write {given.replace('_', '')}, without quotes and underscores"
    if get_origin(field.annotation) is Literal:
        close = difflib.get_close_matches(given, map(str, get_args(field.annotation)), n=1)
        return f"; did you mean {close[0]}?" if close else ""
    return ""


def _given(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "a mapping" if isinstance(value, dict) else shorten(repr(value))
