"""JSON files: strict, whole or absent, and a plain message where they cannot be written."""

import json
import math
import os
import resource

import numpy as np
import pytest
import torch

from hf_softpick.errors import StorageError
from hf_softpick.files import append_line, clear, read_json_lines, write_json, write_text


def test_nothing_is_rounded_away(tmp_path):
    value = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "tensor": torch.tensor([1.5, math.nan]),
        "n": np.float32(2),
    }
    path = tmp_path / "new" / "folder" / "value.json"
    write_json(path, value)
    expected = {"nan": "nan", "inf": ["inf", "-inf"], "tensor": [1.5, "nan"], "n": 2.0}
    assert json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name)) == expected
    assert [entry.name for entry in path.parent.iterdir()] == ["value.json"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="value.json cannot be written: "):
        write_json(tmp_path / "file" / "value.json", {})


def test_lines_that_a_crash_spoilt_are_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_json_lines(path) == []
    path.write_bytes(b'{"a": 1}\n[2]\n\xff\xfe\n{"b": 3}\n{"c": ')
    assert read_json_lines(path) == [{"a": 1}, {"b": 3}]


def test_links_are_not_followed(tmp_path):
    """Neither at the place itself nor at the temporary file beside it."""
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("mine")
    (folder / "kept").mkdir(parents=True)
    for name in ("a.json", f"a.json.{os.getpid()}.tmp", "lines.jsonl"):
        (tmp_path / name).symlink_to(victim)
    write_text(tmp_path / "a.json", "ours")
    assert (tmp_path / "a.json").read_text() == "ours" and not (tmp_path / "a.json").is_symlink()
    with pytest.raises(StorageError, match="lines.jsonl cannot be written"):
        append_line(tmp_path / "lines.jsonl", {})
    (tmp_path / "link").symlink_to(folder)
    clear(tmp_path / "link")
    assert victim.read_text() == "mine" and (folder / "kept").is_dir() and not (tmp_path / "link").exists()


def test_a_line_is_whole_or_absent(tmp_path):
    """Half a line would spoil the next one too."""
    path, before = tmp_path / "lines.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    append_line(path, {"a": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(StorageError, match="No space left|File too large"):
            append_line(path, {"b": "x" * 50})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    append_line(path, {"c": math.inf})
    assert read_json_lines(path) == [{"a": 1}, {"c": "inf"}]
