"""The whole way from settings to rows, and the cache: made once, never half, never trusted when damaged."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import psutil
import pytest
from datasets import Dataset

from hf_softpick.data import preparing
from hf_softpick.data.cache import MANIFEST, _seal, build_once, fingerprint
from hf_softpick.data.contents import Contents
from hf_softpick.data.preparing import prepare_data
from hf_softpick.data.settings import DataSettings, SourceSettings, TokenizerSettings
from hf_softpick.errors import DataError, StorageError
from hf_softpick.prepare import format_report

TOKENIZER = TokenizerSettings(train_bpe=280)
TEXTS = [f"document {number}: " + "the quick brown fox\n" * (number % 9 + 1) for number in range(200)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return DataSettings(
        seq_len=64, sources=[SourceSettings(path=str(path))], validation=0.05, cache_dir=str(tmp_path / "cache")
    )


def prepare(data, tokenizer=TOKENIZER, **changes):
    return prepare_data(data.model_copy(update=changes), tokenizer, progress=False)


def texts_of(rows, tokenizer):
    """The documents of packed rows, put together again from pieces that are not cut."""
    found = []
    for row in rows:
        count = row["num_tokens"]
        bounds = [*np.flatnonzero(row["position_ids"][:count] == 0), count]
        found += [tokenizer.decode(row["input_ids"][a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return found


def test_every_document_is_in_one_split_once(data):
    prepared = prepare(data, seq_len=256)
    train = texts_of(prepared.train, prepared.tokenizer)
    validation = texts_of(prepared.validation, prepared.tokenizer)
    assert sorted(train + validation) == sorted(f"<bos>{text}<eos>" for text in TEXTS)
    assert 0 < len(validation) < 20
    report = prepared.report
    assert report["documents"] == 200 and report["dropped"] == {}
    assert (report["train_documents"], report["validation_documents"]) == (len(train), len(validation))
    assert report["train_tokens"] == sum(row["num_tokens"] for row in prepared.train)
    assert report["train_tokens"] + report["validation_tokens"] == report["tokens"]
    assert report["max_token_id"] < len(prepared.tokenizer) == report["vocab_size"]
    assert report["train_padding"] == pytest.approx(1 - report["train_tokens"] / (len(prepared.train) * 256), abs=1e-5)


def test_rows_are_an_ordinary_dataset(data):
    train = prepare(data).train
    assert isinstance(train, Dataset)
    assert train.column_names == ["input_ids", "position_ids", "num_tokens"]
    assert {str(train.features[name].feature.dtype) for name in ("input_ids", "position_ids")} == {"int32"}
    assert {len(train[0][name]) for name in ("input_ids", "position_ids")} == {64}
    assert train.cache_files, "rows are memory-mapped, not loaded"


def test_second_call_reuses_and_is_equal(data, monkeypatch):
    first = prepare(data)
    assert not first.report["from_cache"]
    monkeypatch.setattr(preparing, "tokenize", None)
    second = prepare(data, num_proc=2)
    assert second.report["from_cache"] and second.directory == first.directory
    assert (np.array(second.train["input_ids"]) == np.array(first.train["input_ids"])).all()


def test_rebuild_elsewhere_is_equal(data, tmp_path):
    first, second = prepare(data), prepare(data, cache_dir=str(tmp_path / "other"), num_proc=2)
    assert not second.report["from_cache"] and second.content == first.content
    for name in ("train.arrow", "validation.arrow", "tokenizer/tokenizer.json"):
        assert (first.directory / name).read_bytes() == (second.directory / name).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"seq_len": 32}, {"seed": 1}, {"validation": 0.1}, {"isolate_documents": False}],
    ids=lambda changes: next(iter(changes)),
)
def test_changed_setting_gives_another_cache(data, changes):
    assert prepare(data).directory != prepare(data, **changes).directory


def test_changed_file_gives_another_cache(data, tmp_path):
    first = prepare(data)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    second = prepare(data)
    assert second.report["documents"] == 201 and second.directory != first.directory


def test_source_is_known_by_its_content(data, tmp_path):
    """Same size and time with other content is another source; touched, copied and moved is the same one."""
    path, first = tmp_path / "a.jsonl", prepare(data)
    content, before = path.read_text(), path.stat()
    path.write_text(content.replace("document 7", "document 8", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size
    changed = prepare(data)
    assert changed.directory != first.directory and not first.matches(changed.content)
    path.unlink()
    (tmp_path / "moved.jsonl").write_text(content)
    moved = prepare(data, sources=[SourceSettings(path=str(tmp_path / "moved.jsonl"))])
    assert moved.report["from_cache"] and moved.directory == first.directory and first.matches(moved.content)


def test_records_of_older_versions(data, tmp_path):
    """They hold the name of the cache folder: the rows there prove what they stand for, else unchanged sources do."""
    prepared = prepare(data)
    older, unknown = prepared.older_name, f"packed-{0:032x}"
    assert prepared.matches(older) and not prepared.matches(unknown) and not prepared.matches("")
    shutil.copytree(prepared.directory, prepared.directory.with_name(unknown))
    assert prepared.matches(unknown)
    shutil.copytree(prepare(data, seed=1).directory, prepared.directory.with_name(older))
    assert not prepared.matches(older)
    shutil.rmtree(prepared.directory.with_name(older))
    os.utime(tmp_path / "a.jsonl")
    assert not prepare(data).matches(older) and prepare(data).matches(unknown)


def test_name_of_format_2(data, tmp_path):
    """Settings that later versions add must not move it."""
    path, settings = str(tmp_path / "a.jsonl"), {"train_bpe": 280, "add_bos": True, "add_eos": True}
    source = {"path": path, "name": None, "split": "train", "revision": None, "data_files": None}
    source |= {"text_column": "text", "weight": 1.0, "max_documents": None}
    read = {"seq_len": 64, "sources": [source], "packing": "best_fit", "isolate_documents": True}
    stat = os.stat(path)
    identity = {
        "format": 2,
        "data": read | {"validation": 0.05, "seed": 42},
        "tokenizer": settings,
        "sources": [fingerprint([[path, stat.st_size, stat.st_mtime_ns]])],
    }
    assert prepare(data).older_name == f"packed-{fingerprint(identity)}"


def test_source_that_is_gone(data, tmp_path, caplog):
    first = prepare(data)
    (tmp_path / "a.jsonl").unlink()
    assert prepare(data).content == first.content
    [notice] = prepare(data).report["notices"]
    assert "no such file" in notice and str(first.directory) in notice and notice in caplog.text
    with pytest.raises(DataError, match="no such file"):
        prepare(data, seed=1)


def test_file_passed_over_is_named(data, tmp_path, caplog):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "folder" / "a.jsonl")
    sources = [SourceSettings(path=str(tmp_path / "folder"))]
    assert prepare(data, sources=sources).report["notices"] == []
    (tmp_path / "folder" / "b.csv").write_text("text")
    prepared = prepare(data, sources=sources)
    [notice] = prepared.report["notices"]
    assert (
        prepared.report["from_cache"]
        and "b.csv" in notice
        and notice in caplog.text
        and notice in format_report(prepared)
    )


def test_changed_tokenizer_gives_another_cache(data, tmp_path):
    first = prepare(data)
    assert prepare(data, TokenizerSettings(train_bpe=281)).directory != first.directory
    assert prepare(data, TokenizerSettings(train_bpe=280, add_eos=False)).directory != first.directory
    shutil.copytree(first.directory / "tokenizer", tmp_path / "tokenizer")
    loaded = TokenizerSettings(from_=str(tmp_path / "tokenizer"))
    second = prepare(data, loaded)
    assert (np.array(second.train["input_ids"]) == np.array(first.train["input_ids"])).all()
    path = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
    path.write_text(json.dumps(content))
    third = prepare(data, loaded)
    assert third.directory != second.directory
    assert texts_of(third.train, third.tokenizer) == texts_of(second.train, second.tokenizer)


def flip_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_manifest(folder, **changes):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip_last_bit(folder / "train.arrow"),
        lambda folder: os.truncate(folder / "train.arrow", 1000),
        lambda folder: (folder / "validation.arrow").unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text('{"files": 3}'),
        lambda folder: (folder / MANIFEST).write_text('{"files": {}}'),
        lambda folder: edit_manifest(folder, report={}),
        lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{}"),
    ],
    ids=[
        "flipped bit",
        "truncated",
        "no validation",
        "no manifest",
        "wrong manifest",
        "empty manifest",
        "no report",
        "tokenizer",
    ],
)
def test_damaged_cache_is_rebuilt(data, damage):
    first = prepare(data)
    content = (first.directory / "train.arrow").read_bytes()
    del first
    folder = prepare(data).directory
    damage(folder)
    again = prepare(data)
    assert not again.report["from_cache"]
    assert (again.directory / "train.arrow").read_bytes() == content
    assert len(again.validation) and prepare(data).report["from_cache"]


def prepare_in_process(serialized):
    prepared = prepare_data(DataSettings.model_validate_json(serialized), TOKENIZER, progress=False)
    return prepared.report["from_cache"], len(prepared.train), str(prepared.directory)


def test_processes_at_once_build_once(data):
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        results = list(pool.map(prepare_in_process, [data.model_dump_json()] * 2))
    assert sorted(from_cache for from_cache, _, _ in results) == [False, True]
    assert len({result[1:] for result in results}) == 1


KILLED = """
import sys
from hf_softpick.data import preparing, rows, tokenizing
from hf_softpick.data.settings import DataSettings, TokenizerSettings
def stop(*args):
    print("packing", flush=True)
    import time
    time.sleep(60)
rows.fill_rows = stop
if sys.argv[2:]:
    tokenizing._Writer.join = stop
preparing.prepare_data(DataSettings.model_validate_json(sys.argv[1]), TokenizerSettings(train_bpe=280), progress=False)
"""


def test_killed_while_packing_leaves_nothing_that_looks_whole(data, tmp_path):
    command = [sys.executable, "-c", KILLED, data.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "packing\n"
        process.send_signal(signal.SIGKILL)
    left = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(left) == 1 and "staging" in left[0].name
    begin = time.monotonic()
    prepared = prepare(data)
    assert time.monotonic() - begin < 30, "the lock of a killed process must not be waited for"
    assert not prepared.report["from_cache"]
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [prepared.directory]


def test_workers_of_a_killed_preparation_leave(data):
    data = data.model_copy(update={"num_proc": 2})
    command = [sys.executable, "-c", KILLED, data.model_dump_json(), "while tokenizing"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "packing\n"
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        process.send_signal(signal.SIGKILL)
        assert not psutil.wait_procs(workers, timeout=20)[1]


def test_weights_repeat_training_documents_only(data):
    source = data.sources[0]
    once = prepare(data)
    twice = prepare(data, sources=[source.model_copy(update={"weight": 2.0})])
    assert twice.report["train_tokens"] == 2 * once.report["train_tokens"]
    assert twice.report["validation_tokens"] == once.report["validation_tokens"]


def test_same_text_in_two_sources_stays_on_one_side(data, tmp_path):
    copy = tmp_path / "b.jsonl"
    copy.write_text((tmp_path / "a.jsonl").read_text())
    prepared = prepare(data, seq_len=256, sources=[*data.sources, SourceSettings(path=str(copy))])
    train = texts_of(prepared.train, prepared.tokenizer)
    validation = texts_of(prepared.validation, prepared.tokenizer)
    assert validation and not set(train) & set(validation)
    assert len(validation) == len(set(validation)), "a duplicate would count twice in the loss"


def test_no_validation(data):
    prepared = prepare(data, validation=0.0)
    assert prepared.validation is None
    assert prepared.report["train_documents"] == 200


def test_nothing_left_says_why(data, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    with pytest.raises(DataError, match="no document is left of 2 read .1 empty, 1 null or missing.*text_column"):
        prepare(data)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_single_document_cannot_be_split(data, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "alone"}\n')
    with pytest.raises(DataError, match="data.validation=0"):
        prepare(data)
    assert len(prepare(data, validation=0.0).train) == 1


def test_fewer_rows_than_a_step_takes(data):
    prepared = prepare(data)
    prepared.require_rows(len(prepared.train))
    with pytest.raises(DataError, match="training rows of 64 tokens, but one optimizer step takes 100000"):
        prepared.require_rows(100_000)


def test_cache_folder_that_cannot_be_made(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="data.cache_dir"):
        prepare(data, cache_dir=str(tmp_path / "file" / "cache"))


@pytest.mark.parametrize(
    ("place", "message"),
    [("/dev/full", "no space left while preparing .*data.cache_dir"), (".", "preparing .* failed: .*directory")],
)
def test_cache_folder_that_cannot_be_filled(tmp_path, place, message):
    def build(staging):
        with open(place, "w", buffering=1) as file:
            file.write("rows\n")

    with pytest.raises(StorageError, match=message):
        build_once(tmp_path / "packed", build, Contents(tmp_path))
    assert not (tmp_path / "packed").exists()


def test_full_disk_below_the_tokenizer(data):
    """The package tokenizers raises nothing more exact than Exception."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(StorageError, match="tokenizer cannot be written: File too large"):
            prepare(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_tokenizer_that_lost_tokens(data):
    """As one may when it is saved and loaded again: a model of its size would have no row for the last ids."""
    folder = prepare(data).directory
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["report"]["max_token_id"] = 280
    (folder / MANIFEST).write_text(json.dumps(manifest | {"seal": _seal(manifest)}))
    with pytest.raises(DataError, match="token id 280 in rows of a tokenizer with 280 ids"):
        prepare(data)


@pytest.mark.parametrize("name", ["a\0b", "~no-such-user/x", "x" * 300])
def test_cache_folder_that_is_no_path(data, name):
    with pytest.raises(DataError, match="data.cache_dir .*not a usable path"):
        prepare(data, cache_dir=name)


def test_huge_document_in_one_line(data, tmp_path):
    """3 MB in one line: tokenized in pieces, cut into rows, nothing lost."""
    text = "word and NUL \x00 " * 200_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + '\n{"text": "small"}\n')
    prepared = prepare(data, seq_len=4096, validation=0.0)
    assert prepared.report["train_cut_documents"] == 1
    total = sum(int(row["num_tokens"]) for row in prepared.train)
    assert total == prepared.report["tokens"] > 200_000


def test_nothing_is_pickled(data):
    folder = prepare(data).directory
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.suffix in (".json", ".arrow")
            assert not path.read_bytes().startswith(b"\x80")


def test_secrets_are_not_repeated(data, tmp_path):
    source = SourceSettings(path=str(tmp_path / "missing.txt?token=sesame"))
    with pytest.raises(DataError, match="<hidden>") as caught:
        prepare(data, sources=[source])
    assert "sesame" not in str(caught.value)
