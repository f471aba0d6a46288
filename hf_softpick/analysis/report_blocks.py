"""What a report is made of: texts, tables and figures, and how their numbers are written and ranked."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from hf_softpick.analysis.comparison import mismatch, ranked_among
from hf_softpick.analysis.report_figures import brief
from hf_softpick.analysis.run_records import command, finite, lookup, number


class Cell(NamedTuple):
    """A value of a table; `better` marks the better side."""

    text: str
    better: bool = False
    kind: str = ""


class Table(NamedTuple):
    """Header and rows of equal length; the first cell of a row names it. `folded`: shown when asked for."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    folded: bool = False


class Figure(NamedTuple):
    """Drawings side by side under one caption; `scale` is a colour scale. `runs`: lines are told apart by a legend."""

    caption: str
    drawings: Sequence[tuple[str, str]]  # (heading or "", svg)
    scale: str = ""
    runs: bool = False


class Text(NamedTuple):
    """A paragraph. kind: "" or "flag", for what limits the comparison; `code` is a command on a line of its own."""

    text: str
    kind: str = ""
    code: str = ""


class Section(NamedTuple):
    """A heading and what stands under it."""

    name: str
    title: str
    blocks: Sequence[Table | Figure | Text]


def percent(value: Any) -> str:
    """A share as a percentage."""
    value = number(value)
    if value is None or not math.isfinite(value):
        return brief(value)
    if value in (0, 1):
        return f"{value:.0%}"
    return f"{value:.2%}" if abs(value) >= 1e-4 else f"{value * 100:.1g}%"


def loss(value: Any) -> str:
    """A loss in nats, four decimals."""
    value = number(value)
    # No "-0.0000".
    return f"{round(value, 4) + 0.0:.4f}" if value is not None and math.isfinite(value) else brief(value)


def increase(value: Any) -> str:
    """A difference of losses in nats, with its sign."""
    value = number(value)
    if value is None or not math.isfinite(value):
        return brief(value)
    return f"{value:+.4f}" if round(value, 4) else "0.0000"


def plain_number(value: Any) -> str:
    """Any number of a result file."""
    return brief(value if isinstance(value, int) and not isinstance(value, bool) else number(value))


def value_text(value: Any) -> str:
    """A value of a recipe or of a model, for a table."""
    if value is None:
        return "\u2013"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def words(record: dict[str, Any]) -> str:
    """A small record as text: "length 64, reason ..."."""
    return ", ".join(f"{key} {item}" for key, item in record.items())


def readable(name: str) -> str:
    """A name of JSON in words."""
    return name.replace("_", " ")


def value_rows(
    names: Iterable[str], records: Sequence[Any], path: str = "{}", show: Callable[[str], str] = readable
) -> list[list[str]]:
    """A row for each name with the values of several records; `path` tells where a record has them."""
    return [[show(name), *(value_text(lookup(record, path.format(name))) for record in records)] for name in names]


def visible(token: str) -> str:
    """A token as a label: spaces shown, at most 12 characters."""
    shown = token.replace(" ", "\u00b7").replace("\r\n", "\n").replace("\n", "\u21b5").replace("\t", "\u21e5")
    return shown if len(shown) <= 12 else shown[:11] + "\u2026"


def ranked(
    label: str,
    values: Sequence[Any],
    better: str | None,
    show: Callable[[Any], str],
    groups: Sequence[Sequence[int]] = (),
    margin: float = 0.0,
) -> list[str | Cell]:
    """A row with the best value of each group of places marked: better is "lower", "higher" or None.

    A lead up to `margin` marks nobody.
    """
    numbers = [finite(value) for value in values]
    best = set()
    for group in groups if better else ():
        order = sorted((i for i in group if numbers[i] is not None), key=numbers.__getitem__)
        order = order if better == "lower" else order[::-1]
        if len(order) > 1 and abs(numbers[order[0]] - numbers[order[1]]) > margin:
            best.add(order[0])
    return [label, *(Cell(show(value), i in best) for i, value in enumerate(values))]


def notes(kind: str, runs: Sequence[dict[str, Any]]) -> Iterator[Text]:
    """Which runs have no such result, with the command that measures it; and what forbids ranking the others."""
    without = [run for run in runs if run[kind] is None]
    if without:
        names = ", ".join(run["label"] for run in without)
        yield Text(f"Not measured: {names}. Measure with", code=command(kind, *(run["source"] for run in without)))
    for run in runs:
        if kind in run["stale"]:
            yield Text(f"{run['label']}: {run['stale'][kind]}", "flag")
    if reason := mismatch(kind, runs):
        yield Text(
            f"Measured under different conditions, so results are {ranked_among(kind, runs)}: {reason}.", "flag"
        )
