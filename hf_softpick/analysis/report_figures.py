"""Charts as small inline SVG: lines and heat maps, coloured by the page's CSS, so that they follow dark mode.

Classes used: c0 to c5 (a run's colour), heat (cells; the value is the opacity), grid, frame, tick, dot. Every text
that comes from a run goes through `clean` and is escaped.
"""

import html
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

COLOURS = 6
# Of the line of each run: colour is never the only difference.
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2")
WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 12, 44
# The least opacity of a value above 0: an exact 0 is told from a small weight.
FAINTEST = 0.12


class Series(NamedTuple):
    """One line: points with an x and a finite y; `run` gives its colour; `hollow` marks a second quantity of a run."""

    label: str
    run: int
    points: Sequence[tuple[float, float]]
    hollow: bool = False
    names: Sequence[str] = ()
    """Of the points, for their tips; all of them are drawn."""


def clean(text: object) -> str:
    """`text` for HTML: escaped, line ends and tabs shown, and what cannot be printed as an escape sequence."""
    shown = str(text).replace("\r\n", "\n").replace("\n", "\u21b5").replace("\t", "\u21e5")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in shown)
    return html.escape(shown, quote=True)


def brief(value: float | int | None) -> str:
    """A number for a reader: about four digits, thousands separated; a dash for None."""
    if value is None:
        return "\u2013"
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    value = value or 0.0  # not -0.0
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if value == 0 or size >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.2e}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high], with 2 and 5 times them where there are few; other round numbers if narrow."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples = (1,) if len(powers) > 4 else (1, 2, 5)
    found = [m * 10.0**p for p in powers for m in multiples]
    found = [t for t in found if low * 0.999 <= t <= high * 1.001]
    if len(found) < 3:
        return [t for t in ticks(low, high, 4) if t > 0] or [low, high]
    return found[:: math.ceil(len(found) / 7)]


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    log_y: bool = False,
    x_names: Sequence[str] | None = None,
    from_zero: bool = False,
    dots: bool = False,
) -> str:
    """An SVG of lines with axes; "" where there is nothing to draw.

    Args:
        log_y: logarithmic; points at or below 0 are left out.
        x_names: names of x = 0, 1, ...: a scale of categories.
        from_zero: the y axis begins at 0 (or below).
        dots: mark every point, for few points.
    """
    series = [s if s.names else s._replace(points=[p for p in s.points if _drawable(p[1], log_y)]) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return ""
    x_low, x_high = _range([x for s in series for x, _ in s.points], 0.04 if any(s.names for s in series) else 0.0)
    if x_names:
        x_low, x_high = -0.3, len(x_names) - 0.7
    y_values = [math.log10(y) if log_y else y for s in series for _, y in s.points]
    y_low, y_high = _range([*y_values, 0.0] if from_zero and not log_y else y_values, 0.06)
    if from_zero and min(y_values) >= 0:
        y_low = 0.0
    marks = log_ticks(10**y_low, 10**y_high) if log_y else ticks(y_low, y_high)
    bottom = BOTTOM + (34 if x_names else 0)
    height = HEIGHT + (34 if x_names else 0)

    def at_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        value = math.log10(y) if log_y else y
        return height - bottom - (value - y_low) / (y_high - y_low) * (height - bottom - TOP)

    parts = []
    for mark in marks:
        y = at_y(mark)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(mark)}</text>')
    if x_names:
        for x, name in enumerate(x_names):
            place = f'x="{at_x(x):.1f}" y="{height - bottom + 14}"'
            turn = f'transform="rotate(-28 {at_x(x):.1f} {height - bottom + 14})"'
            parts.append(f'<text class="tick" {place} {turn} text-anchor="end">{clean(name)}</text>')
    else:
        for mark in ticks(x_low, x_high) if x_high - x_low > 4 else range(math.ceil(x_low), math.floor(x_high) + 1):
            place = f'x="{at_x(mark):.1f}" y="{height - bottom + 16}"'
            parts.append(f'<text class="tick" {place} text-anchor="middle">{_tick(mark)}</text>')
    parts.append(f'<path class="frame" d="M{LEFT} {TOP}V{height - bottom}H{WIDTH - RIGHT}"/>')
    parts += _axes(((LEFT + WIDTH - RIGHT) / 2, height - 6, x_label), (13, (TOP + height - bottom) / 2, y_label))
    for s in series:
        path = "".join(f"{'L' if i else 'M'}{at_x(x):.1f} {at_y(y):.1f}" for i, (x, y) in enumerate(s.points))
        parts.append(_path(s.run, path, " second" if s.hollow else ""))
        for i, (x, y) in enumerate(s.points):
            where = clean(x_names[int(x)]) if x_names else f"{clean(x_label)} {brief(x if x % 1 else int(x))}"
            where = f"{clean(s.names[i])}, {where}" if s.names else where
            kind = ("dot hollow" if s.hollow else "dot") if dots or s.hollow or len(s.points) == 1 else "hover"
            parts.append(
                f'<circle class="{kind} c{s.run % COLOURS}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3.5">'
                f"<title>{clean(s.label)}, {where}: {brief(y)}</title></circle>"
            )
    return _svg(title, WIDTH, height, parts, "chart")


def _axes(below: tuple[float, float, str], beside: tuple[float, float, str]) -> Iterator[str]:
    """The names of both axes, each with its place."""
    for (x, y, label), turn in ((below, ""), (beside, ' transform="rotate(-90 {} {})"')):
        yield f'<text class="axis" x="{x}" y="{y}" text-anchor="middle"{turn.format(x, y)}>{clean(label)}</text>'


def _drawable(y: float, log_y: bool) -> bool:
    return math.isfinite(y) and (y > 0 or not log_y)


def heat_map(
    title: str,
    values: Sequence[Sequence[float | None]],
    row_label: str,
    column_label: str,
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    cell: int = 18,
    root: bool = False,
    bars: Sequence[float] | None = None,
) -> str:
    """An SVG of cells whose colour is the value from 0 to 1; rows may be of unequal length (a triangle).

    Args:
        root: the colour follows the square root, so that small weights can be seen.
        bars: a length from 0 to 1 drawn to the right of every row (the mass of an attention row).
    """
    rows, columns = len(values), max(map(len, values))
    row_names = row_names or [str(i) for i in range(rows)]
    column_names = column_names or [str(i) for i in range(columns)]
    longest_row, longest_column = max(map(len, row_names)), max(map(len, column_names))
    left = 24 + round(6.2 * longest_row)
    turned = longest_column > 4
    bottom = 24 + (round(6.2 * longest_column) if turned else 14)
    right = 70 if bars is not None else 8
    width, height = left + columns * cell + right, 6 + rows * cell + bottom
    end = 6 + rows * cell
    parts = []
    for r, row in enumerate(values):
        y = 6 + r * cell
        for c, value in enumerate(row):
            if value is None:
                continue
            place = f'x="{left + c * cell}" y="{y}" width="{cell}" height="{cell}"'
            tip = f"<title>{clean(row_names[r])}, {clean(column_names[c])}: {brief(value)}</title>"
            if not math.isfinite(value):
                parts.append(f'<rect class="bad" {place}>{tip}</rect>')
                continue
            parts.append(f'<rect class="heat" {place} fill-opacity="{_opacity(value, root)}">{tip}</rect>')
        if bars is not None and math.isfinite(bars[r]):
            x = left + columns * cell + 8
            length = max(0.0, min(1.0, bars[r])) * 50
            tip = f"<title>{clean(row_names[r])}: row mass {brief(bars[r])}</title>"
            parts.append(
                f'<rect class="bar" x="{x}" y="{y + 2}" width="{length:.1f}" height="{cell - 4}">{tip}</rect>'
            )
    every = max(1, math.ceil(11 / cell))
    for r in range(0, rows, every):
        place = f'x="{left - 5}" y="{6 + (r + 0.5) * cell + 3.5:.1f}"'
        parts.append(f'<text class="tick" {place} text-anchor="end">{clean(row_names[r])}</text>')
    every = max(1, math.ceil((11 if turned else 6.2 * longest_column + 4) / cell))
    for c in range(0, columns, every):
        x = left + (c + 0.5) * cell
        place = f'x="{x:.1f}" y="{end + 13}" text-anchor="middle"'
        if turned:
            x, y = f"{x + 3.5:.1f}", end + 6
            place = f'x="{x}" y="{y}" transform="rotate(-90 {x} {y})" text-anchor="end"'
        parts.append(f'<text class="tick" {place}>{clean(column_names[c])}</text>')
    parts.append(f'<path class="frame" d="M{left} 6V{end}H{left + columns * cell}"/>')
    if bars is not None:
        x = left + columns * cell + 8
        parts.append(f'<path class="frame" d="M{x} 6V{end}"/><path class="grid" d="M{x + 50} 6V{end}"/>')
        for text, at in (("0", x), ("1", x + 50)):
            parts.append(f'<text class="tick" x="{at}" y="{end + 13}" text-anchor="middle">{text}</text>')
        parts.append(f'<text class="axis" x="{x + 25}" y="{end + 26}" text-anchor="middle">row mass</text>')
    parts += _axes((left + columns * cell / 2, height - 4, column_label), (12, 6 + rows * cell / 2, row_label))
    return _svg(title, width, height, parts, "map")


def colour_bar(label: str, root: bool = False, percent: bool = False) -> str:
    """The legend of heat maps: an exact 0, then the scale up to 1."""
    parts = []
    for i in range(20):
        place = f'x="{40 + i * 8}" y="4" width="8" height="12"'
        parts.append(f'<rect class="heat" {place} fill-opacity="{_opacity((i + 0.5) / 20, root)}"/>')
    parts.append('<rect class="heat zero" x="8" y="4" width="16" height="12" fill-opacity="0"/>')
    parts.append('<text class="tick" x="16" y="29" text-anchor="middle">0</text>')
    for share in (0.0, 0.5, 1.0):
        text = "above 0" if share == 0 else f"{share:.0%}" if percent else brief(share)
        anchor = "start" if share == 0 else "middle" if share < 1 else "end"
        parts.append(f'<text class="tick" x="{40 + share * 160:.0f}" y="29" text-anchor="{anchor}">{text}</text>')
    scale = ", square-root scale" if root else ""
    parts.append(f'<text class="axis" x="8" y="45">{clean(label)}{scale}</text>')
    return _svg(f"Colour scale: {label}, from 0 to 1{scale}", 260, 50, parts, "scale")


def legend_mark(run: int) -> str:
    """A short line in a run's colour and dash, for legends and table heads."""
    line = _path(run, "M0 6H28")
    return f'<svg class="mark" viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">{line}</svg>'


def _path(run: int, path: str, more: str = "") -> str:
    dash = DASHES[run % COLOURS]
    style = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="line c{run % COLOURS}{more}" d="{path}"{style}/>'


def _opacity(share: float, root: bool) -> str:
    if share <= 0:
        return "0"
    share = min(1.0, share)
    return f"{FAINTEST + (1 - FAINTEST) * (math.sqrt(share) if root else share):.3g}"


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        half = abs(low) * 0.1 or 0.5
        return low - half, high + half
    return low - margin * (high - low), high + margin * (high - low)


def _tick(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:g}"


def _svg(title: str, width: float, height: float, parts: list[str], kind: str) -> str:
    # The natural width is the largest, so that few cells are not blown up; labels are still read at 0.8 of it.
    least = f' style="min-width:{0.8 * width:.0f}px"' if kind == "map" else ""
    return (
        f'<svg class="{kind}" role="img" aria-label="{clean(title)}" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"{least}>{"".join(parts)}</svg>'
    )
