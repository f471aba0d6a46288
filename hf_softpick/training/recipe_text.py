"""Reads YAML 1.2 text and dotted overrides into plain values that remember where they stand.

Only the YAML core schema: no tags, no anchors, no merge keys, so that a recipe is data and every value has one place.
What the values mean is decided in recipe.py.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ..data.redaction import redact
from ..errors import RecipeError

KeyPath = tuple[str | int, ...]

_NULL = re.compile(r"(?:null|Null|NULL|~|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_NOT_FINITE = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")
_LARGEST_INT = 2**63 - 1
_CORE_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "map", "seq", "timestamp")
}


@dataclass
class Document:
    """Plain values, the place of each key and value ("file:line:column" or the override), and problems so far."""

    data: dict[str, Any]
    keys: dict[KeyPath, str] = field(default_factory=dict)
    values: dict[KeyPath, str] = field(default_factory=dict)
    problems: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath, of_key: bool = False) -> str:
        """Where `path` stands; for something that is not there, where the section stands that should hold it."""
        if of_key and path in self.keys:
            return self.keys[path]
        return self.values[self.known(path)]

    def known(self, path: KeyPath) -> KeyPath:
        """The longest part of `path` that the document holds."""
        while path and path not in self.values:
            path = path[:-1]
        return path


def read_document(path: str | Path) -> Document:
    """Read one YAML file whose top level is a mapping.

    Raises:
        RecipeError: the file cannot be read or is not YAML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe file{_beside(Path(path))}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}); save the recipe as UTF-8") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    document = Document({}, values={(): f"{path}:1:1"})
    node = _compose(text, str(path))
    if not isinstance(node, MappingNode):
        what = "empty" if node is None else "not a mapping"
        raise RecipeError(f"{path}: is {what}, expected the sections model, tokenizer, data, training, eval and run")
    document.data = _Builder(document, str(path)).build(node, ())
    return document


def apply_override(document: Document, text: str) -> None:
    """Set one value from `section.key=value`; the value is YAML, a number in the path is a place in a list."""
    name, equals, value = text.partition("=")
    # The name alone: a value that should not be here, such as a token, must not be repeated.
    where = f"override {shorten(name)}"
    if not _is_unicode(name):
        raise RecipeError(f"override {shorten(repr(name))}: the name is not UTF-8 text; expected section.key=value")
    parts = name.split(".")
    if not equals or not all(parts):
        raise RecipeError(f"{where}: expected section.key=value, for example training.max_steps=5")
    holder: Any = document.data
    path: KeyPath = ()
    for part in parts[:-1]:
        key = _item(holder, part)
        path = (*path, key)
        if isinstance(holder, dict) and holder.get(key) is None:
            holder[key] = {}
            document.keys[path] = document.values[path] = where
        if not _has(holder, key):
            raise RecipeError(f"{where}: {dotted(path)} is not there, so nothing in it can be set")
        holder = holder[key]
    key = _item(holder, parts[-1])
    if not (isinstance(holder, dict) or _has(holder, key)):
        raise RecipeError(f"{where}: {dotted(path)} has no item {key!r}")
    path = (*path, key)
    _forget(document, path)
    document.keys[path] = document.values[path] = where
    node = _compose(value, where)
    holder[key] = None if node is None else _Builder(document, where, with_lines=False).build(node, path)


class _Builder:
    """Turns YAML nodes into plain values and notes places and problems in the document."""

    def __init__(self, document: Document, name: str, with_lines: bool = True):
        self.document, self.name, self.with_lines = document, name, with_lines
        self.seen: set[int] = set()

    def place(self, node: Node) -> str:
        mark = node.start_mark
        return f"{self.name}:{mark.line + 1}:{mark.column + 1}" if self.with_lines else self.name

    def problem(self, node: Node, path: KeyPath, text: str) -> None:
        self.document.problems[path] = f"{self.place(node)}: {dotted(path) or 'the recipe'} {text}"

    def build(self, node: Node, path: KeyPath) -> Any:
        if path or not self.with_lines:
            self.document.values[path] = self.place(node)
        # An alias is the same node a second time; following it could also make a small file expand without bound.
        if id(node) in self.seen or node.anchor:
            self.problem(node, path, "uses a YAML anchor or alias; write the value out")
            return None
        self.seen.add(id(node))
        if str(node.tag) not in _CORE_TAGS:
            self.problem(node, path, f"has the YAML tag {shorten(str(node.tag))}; recipes hold plain values only")
            return None
        if isinstance(node, MappingNode):
            return self.mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        return self.scalar(node, path)

    def mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode) or key_node.value == "<<":
                self.problem(key_node, path, "has a key that is not plain text")
                continue
            key = key_node.value
            if key in result:
                first = self.document.keys[(*path, key)]
                self.problem(key_node, (*path, key), f"is given twice (first at {first}); keep one")
                continue
            self.document.keys[(*path, key)] = self.place(key_node)
            result[key] = self.build(value_node, (*path, key))
        return result

    def scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        text = node.value
        if not _is_unicode(text):
            try:  # JSON writes a character beyond 16 bits as two escapes, which YAML takes for two characters
                text = text.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                self.problem(node, path, "holds half of a surrogate pair, which no file can hold; write the character")
        if node.style is not None:
            return text
        if _NULL.match(text):
            return None
        if _BOOL.match(text):
            return text.lower() == "true"
        if _INT.match(text):
            return self.integer(node, path)
        if _FLOAT.match(text) or _NOT_FINITE.match(text):
            value = float(text) if _FLOAT.match(text) else math.nan
            if not math.isfinite(value):
                self.problem(node, path, f"is {shorten(text)}, expected a finite number")
            return value
        return text

    def integer(self, node: ScalarNode, path: KeyPath) -> int:
        text = node.value
        value = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)) if len(text) < 40 else _LARGEST_INT + 1
        if abs(value) > _LARGEST_INT:
            self.problem(node, path, f"is {shorten(text)}, beyond 64-bit integers")
        return value


def _compose(text: str, name: str) -> Node | None:
    try:
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark and not name.startswith("override") else name
        raise RecipeError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {shorten(str(error).splitlines()[0])}") from None
    except RecursionError:
        raise RecipeError(f"{name}: not valid YAML: nested too deeply") from None


def _is_unicode(text: str) -> bool:
    """Bytes of a command line that are not UTF-8 become halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _forget(document: Document, path: KeyPath) -> None:
    for places in (document.keys, document.values):
        for known in [known for known in places if known[: len(path)] == path]:
            del places[known]


def _item(holder: Any, part: str) -> str | int:
    return int(part) if isinstance(holder, list) and part.isdecimal() and len(part) < 9 else part


def _has(holder: Any, key: str | int) -> bool:
    if isinstance(holder, list):
        return isinstance(key, int) and key < len(holder)
    return isinstance(holder, dict) and key in holder


def walk(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value inside `value` with its path, containers before what they hold."""
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from walk(item, (*path, key))


def dotted(path: KeyPath) -> str:
    """`path` as it is written in overrides and messages, without what looks like a secret."""
    return redact(".".join(map(str, path)))


def shorten(text: str, limit: int = 60) -> str:
    """`text` without what looks like a secret, cut where a message would drown in it."""
    text = redact(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _beside(path: Path) -> str:
    try:
        names = sorted(str(found) for found in path.parent.glob("*.yaml"))[:12]
    except (OSError, ValueError):
        return ""
    return f"; recipes there: {', '.join(names)}" if names else ""
