"""A comparison as one HTML page that needs no network and no script, readable on a phone and in the dark."""

from collections.abc import Sequence
from typing import Any

from hf_softpick.analysis.report_blocks import Cell, Figure, Section, Table, Text
from hf_softpick.analysis.report_figures import clean, legend_mark
from hf_softpick.analysis.report_sections import claims_table, headline, sections
from hf_softpick.analysis.report_style import CSS

# Nothing from outside and no script, whatever a run is called.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def render_html(comparison: dict[str, Any]) -> str:
    """The page, from the content of comparison.json; every text that comes from a run is escaped."""
    runs = comparison["runs"]
    names = [run["label"] for run in runs]
    title = clean(" and ".join(names) if len(names) < 3 else ", ".join(names))
    parts = sections(comparison)
    links = "".join(f'<li><a href="#{part.name}">{clean(part.title)}</a></li>' for part in parts)
    flags = "".join(f'<p class="flag">{clean(text)}</p>' for text in comparison["warnings"])
    legend = _legend([f"{run['label']}: {run['normalizer'] or 'unknown normalizer'}" for run in runs])
    body = "\n".join(_section(part, names) for part in parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Comparison of {title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f'<header>\n<h1>Comparison of {title}</h1>\n<p class="lead">{clean(headline(comparison))}</p>\n'
        f'<ul class="legend" aria-label="Runs">{legend}</ul>\n{flags}\n{_table(claims_table(comparison), "claims")}\n'
        "<p>In tables, bold and \u25c2 mark the better side, where one side is better by definition.</p>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n<main>\n{body}\n</main>\n'
        "<footer>One file, no network: figures are drawn inside. comparison.json holds every number.</footer>\n"
        "</body>\n</html>\n"
    )


def _section(section: Section, labels: Sequence[str]) -> str:
    blocks = "\n".join(_block(block, labels) for block in section.blocks)
    heading = f'<h2 id="{section.name}">{clean(section.title)}</h2>'
    return f'<section aria-labelledby="{section.name}">\n{heading}\n{blocks}\n</section>'


def _block(block: Table | Figure | Text, labels: Sequence[str]) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return _figure(block, labels)
    code = "\n".join(map(clean, block.code.split("\n")))
    command = f"<pre><code>{code}</code></pre>" if code else ""
    kind = ' class="flag"' if block.kind else ""
    return f"<p{kind}>{clean(block.text)}</p>{command}"


def _legend(labels: Sequence[str]) -> str:
    return "".join(f"<li>{legend_mark(i)}{clean(label)}</li>" for i, label in enumerate(labels))


def _figure(figure: Figure, labels: Sequence[str]) -> str:
    legend = f'<ul class="legend">{_legend(labels)}</ul>' if figure.runs else ""
    drawings = "".join(_drawing(heading, svg) for heading, svg in figure.drawings if svg)
    caption = f"<figcaption>{clean(figure.caption)}</figcaption>"
    return f'<figure>{caption}{legend}<div class="drawings">{drawings}</div>{figure.scale}</figure>'


def _drawing(heading: str, svg: str) -> str:
    title = f"<h3>{clean(heading)}</h3>" if heading else ""
    if 'class="chart"' in svg[:40]:
        return f'<div class="wide">{title}{svg}</div>'
    # A map keeps its size, or its labels could not be read on a phone; it scrolls inside its own box.
    return f'<div>{title}<div class="scroll" tabindex="0" role="group" aria-label="{clean(heading)}">{svg}</div></div>'


def _table(table: Table, kind: str = "") -> str:
    head = "".join(f'<th scope="col">{clean(name)}</th>' for name in table.header)
    # On a phone the claims are stacked, each value under its column's name.
    labels = [f' data-label="{clean(name)}"' if kind else "" for name in table.header]
    rows = "".join(f"<tr>{''.join(map(_cell, range(len(row)), row, labels))}</tr>\n" for row in table.rows)
    name = f' class="{kind}"' if kind else ""
    whole = (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{clean(table.caption)}"><table{name}>'
        f"<caption>{clean(table.caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>"
    )
    return f"<details><summary>{clean(table.caption)}</summary>{whole}</details>" if table.folded else whole


def _cell(index: int, value: str | Cell, label: str) -> str:
    if isinstance(value, Cell):
        kind = " ".join(filter(None, (value.kind, "better" if value.better else "")))
        name = f' class="{kind}"' if kind else ""
        return f"<td{name}{label}>{clean(value.text)}</td>"
    if index == 0:
        indent = ' class="indent"' if value.startswith("  ") else ""
        return f'<th scope="row"{indent}>{clean(value.strip())}</th>'
    wide = ' class="wide"' if len(value) > 60 else ""
    return f"<td{wide}{label}>{clean(value)}</td>"
