"""What a source is, whatever it was opened from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hf_softpick.data.contents import Contents
from hf_softpick.data.readers import Record
from hf_softpick.data.settings import SourceSettings
from hf_softpick.errors import DataError


class SourceGone(DataError):
    """A source is not where it was, or cannot be reached."""


@dataclass(frozen=True)
class Shard:
    """A part of a source that can be read alone: usually a file."""

    label: str
    origin: list[Any] = field(repr=False)
    """Path, size and time, by which older versions knew it: nothing but their records is recognised by it."""
    num_bytes: int
    """Estimated bytes of text, for progress and sampling."""
    read: Callable[[], Iterator[Record]] = field(repr=False)


@dataclass(frozen=True)
class Source:
    """One entry of data.sources, resolved to shards in a fixed order."""

    settings: SourceSettings
    shards: list[Shard]
    content: Callable[[Contents], Any] = field(repr=False)
    """What the shards hold, wherever and since whenever it lies there, as a JSON value."""
    doubts: dict[str, list[str]] = field(default_factory=dict)
    """What a user may not expect, and of which files below the path: most of all, why they are passed over."""
    commit: str | None = None
    """Of the Hub repository that was read."""

    def notices(self) -> list[str]:
        """One line for each of the doubts."""
        lines = []
        for doubt, names in self.doubts.items():
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            lines.append(f"source '{self.settings.path}': {doubt}: {shown}")
        return lines


def refuse_options(settings: SourceSettings, what: str, *allowed: str) -> None:
    """Raise DataError if options are set that `what` does not take: they would change nothing, without a word."""
    options = ("name", "split", "revision", "data_files", "text_column")
    values = {name: getattr(settings, name) for name in options if name not in allowed}
    found = [f"{n}={v!r}" for n, v in values.items() if v != SourceSettings.model_fields[n].default]
    if found:
        raise DataError(
            f"source '{settings.path}': {what} takes no {', '.join(found)}. Remove what has no effect; "
            "max_documents limits a source."
        )
