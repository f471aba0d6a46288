"""Digests of files: right after every change, taken once otherwise."""

import os

import pytest

from hf_softpick.data import contents
from hf_softpick.data.contents import Contents
from hf_softpick.errors import DataError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"first")
    return path


def test_file_is_read_once(file, tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "_TICK", -1)
    [digest] = Contents(tmp_path).digests([file])
    monkeypatch.setattr(Contents, "_read", lambda *_: "read again")
    assert Contents(tmp_path).digests([file]) == [digest]
    os.utime(file)
    assert Contents(tmp_path).digests([file]) == ["read again"]


def test_file_of_a_renamed_folder_is_not_read_again(file, tmp_path, monkeypatch):
    """As prepared data is: read while it is staged, named when it is whole."""
    monkeypatch.setattr(contents, "_TICK", -1)
    (tmp_path / "staging").mkdir()
    staged = file.rename(tmp_path / "staging" / "a.txt")
    [digest] = Contents(tmp_path).digests([staged])
    named = staged.parent.rename(tmp_path / "named") / "a.txt"
    monkeypatch.setattr(Contents, "_read", lambda *_: "read again")
    assert Contents(tmp_path).digests([named]) == [digest]


def test_two_changes_within_one_tick(file, tmp_path):
    """They may have one ctime: nothing so young is trusted."""
    before = Contents(tmp_path).digests([file])
    state = os.stat(file)
    file.write_bytes(b"other")
    known = Contents(tmp_path)
    name, now = contents._state(os.stat(file))
    known.known[name][:3] = now  # as if the clock had not moved
    assert state.st_size == os.stat(file).st_size and known.digests([file]) != before


def test_damaged_memory_is_none(file, tmp_path):
    right = Contents(tmp_path).digests([file])
    for damage in ("{", "[]", '{"a": 1}', "[" * 100_000, "\0"):
        (tmp_path / "contents.json").write_text(damage)
        assert Contents(tmp_path).digests([file]) == right


def test_folder_that_cannot_be_written(file, tmp_path):
    """As a shared cache may be: slower, not refused."""
    (tmp_path / "no folder").write_text("")
    assert Contents(tmp_path / "no folder").digests([file]) == Contents(tmp_path).digests([file])


def test_file_that_changes_or_is_not_there(file, tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "sha256_of", lambda name: name.write_bytes(b"longer than before"))
    with pytest.raises(DataError, match=r"a.txt changes while it is read"):
        Contents(tmp_path).digests([file])
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"cannot be read"):
        Contents(tmp_path)._read(tmp_path / "none.txt")
