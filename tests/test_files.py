"""JSON files: strict, whole or absent, and a plain message where they cannot be written."""

import json
import math

import numpy as np
import pytest
import torch

from hf_softpick.errors import StorageError
from hf_softpick.files import read_json_lines, write_json


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
