"""docs/architecture.md against the code: its files and names, the arrows of its diagram, the order of its rooms."""

import re

import pytest
from test_layering import ALLOWED, PACKAGE, _ours

ROOT = PACKAGE.parent
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
DIAGRAM = re.search(r"```mermaid\n(.*?)```", PAGE, re.S)[1]
FILE = re.compile(r"[\w/.-]+\.py")
NODES = {node: label.split("<br/>")[0].split()[-1] for node, label in re.findall(r'(\w+)\["(.+?)"\]', DIAGRAM)}
ARROWS = [
    (NODES[begin], NODES[end], call)
    for begin, call, end in re.findall(r'^\s*(\w+)(?:\[".+?"\])? (?:-->|-\. "(.+?)" \.->) (\w+)', DIAGRAM, re.M)
]


def _file(name):
    path = PACKAGE / name if (PACKAGE / name).is_file() else ROOT / name
    assert path.is_file(), f"docs/architecture.md names {name}, which is not there"
    return path


def _names_by_file():
    """(file, name in backticks) for names that follow a file in the same cell, list item or paragraph."""
    for part in re.split(r"\n(?=\d+\. )|\n\n|\s\|\s", PAGE.replace(f"```mermaid\n{DIAGRAM}```", "")):
        file = None
        for word in re.findall(r"`([^`\n]+)`", part):
            if FILE.fullmatch(word):
                file = word
                yield file, ""
            elif file is not None:
                yield file, word


@pytest.mark.parametrize(("file", "name"), sorted(set(_names_by_file())))
def test_files_and_names_are_there(file, name):
    assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", _file(file).read_text(encoding="utf-8")), (
        f"no {name} in {file}"
    )


@pytest.mark.parametrize(("begin", "end", "call"), ARROWS)
def test_arrows_are_imports_or_calls(begin, end, call):
    source = _file(begin)
    module = end if not FILE.fullmatch(end) else ".".join(_file(end).relative_to(ROOT).with_suffix("").parts)
    if call:
        assert call in source.read_text(encoding="utf-8"), f"no {call} in {begin}"
    else:
        imported = {name for _, name in _ours(source)}
        assert any(f"{name}.".startswith(f"{module}.") for name in imported), f"{begin} does not import {end}"


def test_every_line_of_the_diagram_is_read():
    assert len(ARROWS) == len(DIAGRAM.strip().splitlines()) - 1 > 20
    assert len(set(_names_by_file())) > 40


def test_rooms_are_those_of_the_layering_test():
    table = PAGE.split("| room | may import |")[1].split("\n\n")[0]
    rows = [re.findall(r"`([\w.]+)`", row) for row in table.strip().splitlines()[1:]]
    told = {room: set(names) for room, *names in rows if room != "errors"}
    told |= {room: set() for row in rows if row[0] == "errors" for room in row}
    assert told == ALLOWED
    order = [room for row in rows for room in (row if row[0] == "errors" else row[:1])]
    upward = [
        (room, name) for room in told for name in told[room] & ALLOWED.keys() if order.index(name) < order.index(room)
    ]
    assert not upward, upward
