"""Names that recipes had in older versions: one table for files that people kept and for records of runs.

A new field needs nothing here: where it is absent, it had its default. Imports neither torch nor transformers.
"""

from typing import Any

from .recipe_text import Document, KeyPath, dotted, walk

RENAMED: dict[str, str] = {}
"""Old dotted name of a field -> the present one; `*` stands for a place in a list, the same number on both sides."""

DROPPED: dict[str, Any] = {}
"""Dotted name of a field that is gone -> the value that it had where a recipe did not say it."""


def present_path(path: KeyPath) -> KeyPath:
    """The path that a field of an older recipe has now; of what is inside a renamed one, too."""
    for length in range(len(path), 0, -1):
        now = RENAMED.get(_pattern(path[:length]))
        if now is not None:
            places = iter(part for part in path if isinstance(part, int))
            return (*(next(places) if part == "*" else part for part in now.split(".")), *path[length:])
    return path


def was_default(path: KeyPath, value: Any) -> bool:
    """Whether a field that is gone had the value that means the same as its absence."""
    name = _pattern(path)
    return name in DROPPED and DROPPED[name] == value


def migrate(document: Document) -> None:
    """Bring the fields of an older recipe under their present names; a field under both names is a problem."""
    for path, value in list(walk(document.data)):
        is_renamed = _pattern(path) in RENAMED
        if not is_renamed and not was_default(path, value):
            continue
        holder: Any = document.data
        for part in path[:-1]:
            holder = holder[part]
        del holder[path[-1]]
        if is_renamed:
            _move(document, path, present_path(path), value)


def _move(document: Document, path: KeyPath, now: KeyPath, value: Any) -> None:
    place = document.place(path)
    holder: Any = document.data
    for part in now[:-1]:
        holder = holder[part] if isinstance(part, int) else holder.setdefault(part, {})
    # An override under the old name wins over the file, as it does under the present one.
    if now[-1] in holder and not place.startswith("override"):
        document.problems[now] = f"{place}: {dotted(path)} is called {dotted(now)}, which is given too; keep one"
    holder[now[-1]] = value
    document.keys[now] = document.values[now] = place


def _pattern(path: KeyPath) -> str:
    return ".".join("*" if isinstance(part, int) else part for part in path)
