"""A comparison as Markdown: the texts and tables of the page, without its figures."""

import re
from typing import Any

from hf_softpick.analysis.report_blocks import Cell, Figure, Table, Text
from hf_softpick.analysis.report_sections import claims_table, headline, sections

_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")


def escape(text: object) -> str:
    """`text` so that Markdown shows it as it is, on one line; nothing in it becomes markup, HTML or a link."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text).strip()
    )
    shown = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # "://" and "www." would be linked by some renderers.
    return _MARKUP.sub(r"\\\1", shown).replace("://", ":&#47;/").replace("www.", "www&#46;")


def render_markdown(comparison: dict[str, Any]) -> str:
    """The report, from the content of comparison.json."""
    parts = [f"# Comparison of {', '.join(escape(run['label']) for run in comparison['runs'])}"]
    parts.append(escape(headline(comparison)))
    parts += [f"> **Note:** {escape(text)}" for text in comparison["warnings"]]
    parts.append(_table(claims_table(comparison)))
    parts.append("Bold marks the better side, where one side is better by definition. Figures are in comparison.html.")
    for section in sections(comparison):
        parts.append(f"## {escape(section.title)}")
        parts += filter(None, map(_block, section.blocks))
    return "\n\n".join(parts) + "\n"


def _block(block: Table | Figure | Text) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return ""
    text = f"> **Note:** {escape(block.text)}" if block.kind else escape(block.text)
    if not block.code:
        return text
    # Indented, so that no fence inside can end it.
    return text + "\n\n" + "\n".join(f"    {line}" for line in block.code.splitlines())


def _table(table: Table) -> str:
    rows = [" | ".join(map(_cell, row)) for row in table.rows]
    head = " | ".join(escape(name) for name in table.header)
    lines = [f"| {head} |", f"|{' --- |' * len(table.header)}", *(f"| {row} |" for row in rows)]
    return f"{escape(table.caption)}:\n\n" + "\n".join(lines)


def _cell(value: str | Cell) -> str:
    text = value.text if isinstance(value, Cell) else value
    shown = escape(text)
    return f"**{shown}**" if isinstance(value, Cell) and value.better and shown else shown
