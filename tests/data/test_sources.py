"""Documents from files and from `datasets`, and the message for everything that can be wrong with them."""

import bz2
import gzip
import json
import lzma
import os
import sysconfig
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from hf_softpick.data import readers
from hf_softpick.data.contents import Contents
from hf_softpick.data.library import commit_of
from hf_softpick.data.settings import SourceSettings
from hf_softpick.data.sources import open_sources, splits_in_names
from hf_softpick.errors import DataError

TEXTS = ["one", "zwei äöü", "three\nlines\n"]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_parquet(path, texts, column="text"):
    pyarrow.parquet.write_table(pyarrow.table({column: texts, "other": list(range(len(texts)))}), path)
    return path


def read(path, **settings):
    [source] = open_sources([SourceSettings(path=str(path), **settings)])
    return [record.text for shard in source.shards for record in shard.read()]


COMPRESSIONS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": readers.zstd.compress}


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.json", "a.parquet", *(f"a.jsonl{c}" for c in COMPRESSIONS)]
)
def test_formats_give_the_same_documents(tmp_path, name):
    path = tmp_path / name
    records = [{"text": text, "other": 1} for text in TEXTS]
    if name in ("a.jsonl", "a.ndjson"):
        write_jsonl(path, records)
    elif name == "a.json":
        path.write_text(json.dumps(records, indent=1))
    elif name == "a.parquet":
        write_parquet(path, TEXTS)
    else:
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(COMPRESSIONS[path.suffix](text))
    assert read(path) == read(tmp_path) == TEXTS


def test_json_suffix_with_json_lines(tmp_path):
    assert read(write_jsonl(tmp_path / "a.json", [{"text": text} for text in TEXTS])) == TEXTS


def test_text_file_is_one_document_without_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\n\nb")
    assert read(tmp_path / "a.txt") == ["a\r\n\nb"]


def test_null_and_missing_records_have_a_reason(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"other": 1}, {"text": None}, {"text": "x"}])
    [source] = open_sources([SourceSettings(path=str(path))])
    records = list(source.shards[0].read())
    assert [record.text for record in records] == [None, None, "x"]
    assert {record.reason for record in records[:2]} == {"null or missing"}


def test_glob_and_folder_are_sorted(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "README.md").write_text("not data")
    assert read(tmp_path) == ["a.txt", "b.txt", "sub/c.txt"]
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]


def test_glob_with_links_gives_each_file_once(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "sub/c.txt"]


def test_folder_with_named_splits_gives_only_the_split(tmp_path):
    """Reading every file of such a folder would train on its test set."""
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", [split])
    assert read(tmp_path) == ["train"]
    assert read(tmp_path, split="test") == ["test"]
    with pytest.raises(DataError, match="no file of split 'validation'.*test.*train"):
        read(tmp_path, split="validation")


def notices(path, **settings):
    [source] = open_sources([SourceSettings(path=str(path), **settings)])
    return "\n".join(source.notices())


def test_title_is_no_split(tmp_path):
    names = ["a.txt", "the_great_train_robbery.txt", "the_test_of_time.txt"]
    for name in names:
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == names
    assert "a split's name is a part of theirs: the_great_train_robbery.txt, the_test_of_time.txt" in notices(tmp_path)


@pytest.mark.parametrize(
    ("train", "other"),
    [
        ("train.jsonl", "test.jsonl"),
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
        ("c4-train.00000-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz"),
        ("train1.txt", "dev1.txt"),
        ("data/train/a.txt", "data/test/b.txt"),
        ("train.en.txt", "test.en.txt"),
        ("train_data/a.txt", "test_data/b.txt"),
        ("old-train-v2/a.txt", "old-eval-v2/b.txt"),
    ],
)
def test_splits_in_names(train, other):
    splits, titles = splits_in_names([Path(train), Path(other), Path("x.txt")])
    assert splits[Path(train)] == "train" and splits[Path(other)] in ("test", "validation")
    assert splits[Path("x.txt")] is None and not titles


def test_every_file_passed_over_is_named(tmp_path):
    for name in ("a.txt", "b.csv", ".hidden.txt", "my-test.txt", "_sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "_sub")
    assert read(tmp_path) == ["a.txt"]
    lines = notices(tmp_path).splitlines()
    assert len(lines) == 4 and all("passed over" in line for line in lines)
    ends = {line.rpartition(": ")[2] for line in lines}
    assert ends == {"b.csv", ".hidden.txt, _sub", "my-test.txt", "link"}
    (tmp_path / "train.txt").write_text("train")
    assert read(tmp_path) == ["train"] and "not named after the split 'train' as others: a.txt" in notices(tmp_path)
    assert read(tmp_path / "*.txt") == ["a.txt", "my-test.txt", "train"]
    pattern = notices(tmp_path / "*")
    assert (
        "are read: " in pattern and "b.csv" in pattern and "only ** reads folders: " in pattern and "_sub" in pattern
    )
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    assert "a link to none: " in notices(tmp_path / "**" / "*") and "gone.txt" in notices(tmp_path / "**" / "*")


def test_option_without_effect_is_refused(tmp_path):
    text, lines = tmp_path / "a.txt", write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    text.write_text("x")
    saved = tmp_path / "saved"
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": TEXTS})).save_to_disk(saved)
    single = tmp_path / "single"
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(single)
    some = {"name": "x", "split": "test", "revision": "x", "data_files": "x", "text_column": "body"}
    without = {
        "stdlib": set(some),
        text: set(some),
        lines: set(some) - {"text_column"},
        tmp_path / "*.txt": set(some),
        saved: {"name", "revision", "data_files"},
    }
    for path, options in without.items():
        for option in options:
            with pytest.raises(DataError, match=f"takes no {option}='{some[option]}'.*max_documents"):
                read(path, **{option: some[option]})
    with pytest.raises(DataError, match=r"no split 'train\[:1\]'; found \['train'\].*no slices"):
        read(saved, split="train[:1]")
    with pytest.raises(DataError, match="no split 'test'; found"):
        read(single, split="test")
    with pytest.raises(DataError, match="takes no slice"):
        read(tmp_path, split="train[:1]")
    for option in ("name", "revision"):
        with pytest.raises(DataError, match=f"the builder 'json' of datasets takes no {option}='x'"):
            read("json", data_files=str(lines), **{option: "x"})
    with pytest.raises(DataError, match="a folder takes no revision"):
        read(tmp_path, data_files="a.jsonl", revision="x")


def test_builder_of_texts_makes_a_document_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert read("text", data_files=str(tmp_path / "a.txt")) == ["one\ntwo\n"] == read(tmp_path, data_files="a.txt")


def test_commit_of_a_repository():
    commit = "0123456789" * 4
    files = {"train": [f"hf://datasets/owner/name@{commit}/data/train.parquet"]}
    assert commit_of("x", files) == commit_of(commit, None) == commit
    assert commit_of("0" * 64, {"train": ["/local/file.parquet"]}) is None


def test_parquet_with_a_struct_beside_a_flat_name(tmp_path):
    """Asked for `doc.text`, Parquet reads the struct's field too."""
    table = pyarrow.table({"doc": [{"text": "inner"}], "doc.text": ["flat"], "n": [{"doc": {"text": 1}}]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_column="doc.text") == ["flat"]
    assert read("parquet", data_files=str(tmp_path / "a.parquet"), text_column="doc.text") == ["flat"]
    with pytest.raises(DataError, match="holds struct"):
        read(tmp_path / "a.parquet", text_column="doc")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(DataError, match="2 columns are called 'text'"):
        read(tmp_path / "b.parquet")


def test_load_dataset_arguments(tmp_path):
    write_parquet(tmp_path / "x.parquet", TEXTS)
    write_jsonl(tmp_path / "y.jsonl", [{"body": "from json"}])
    assert read("parquet", data_files=str(tmp_path / "x.parquet")) == TEXTS
    assert read(tmp_path, data_files="x.parquet", split="train[:2]") == TEXTS[:2]
    assert read("json", data_files=[str(tmp_path / "y.jsonl")], text_column="body") == ["from json"]


def test_load_dataset_content_is_that_of_the_texts(tmp_path):
    """The fingerprint of `datasets` is a path and a time."""

    def content(texts, name):
        write_parquet(tmp_path / name, texts)
        [source] = open_sources([SourceSettings(path="parquet", data_files=str(tmp_path / name))])
        return source.content(Contents(tmp_path / "cache"))

    assert content(TEXTS, "x.parquet") == content(TEXTS, "x.parquet") == content(TEXTS, "y.parquet")
    before, other = (tmp_path / "x.parquet").stat(), ["ONE", *TEXTS[1:]]
    write_parquet(tmp_path / "x.parquet", other)
    os.utime(tmp_path / "x.parquet", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read("parquet", data_files=str(tmp_path / "x.parquet")) == other, "datasets knows it by path and time"
    assert content(other, "x.parquet") != content(TEXTS, "y.parquet")


def test_folder_of_save_to_disk(tmp_path):
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": TEXTS})).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == TEXTS


def test_standard_library():
    [source] = open_sources([SourceSettings(path="stdlib")])
    labels = [shard.label for shard in source.shards]
    root = Path(sysconfig.get_paths()["stdlib"])
    assert str(root / "os.py") in labels
    assert not any("site-packages" in label for label in labels)
    assert sorted(labels, key=Path) == labels
    assert sum(shard.num_bytes for shard in source.shards) > 5e6
    [text] = [record.text for record in source.shards[labels.index(str(root / "os.py"))].read()]
    assert text == (root / "os.py").read_bytes().decode()


WRONG = {
    "no such column in json": ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl: no column 'text'; found \['body'\]"),
    "cut off line": ("a.jsonl", b'{"text": "x"}\n{"text": "y', r"a.jsonl:2: not valid JSON .* cut off"),
    "line in the middle": ("a.jsonl", b'{"text": "x"}\n{"text" "y"}\n{"text": "z"}\n', r"a.jsonl:2: not valid JSON"),
    "not an object": ("a.jsonl", b'"x"\n', r"a.jsonl:1: .*JSON object.*got str"),
    "number as text": ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"a.jsonl:2: 'text' is int"),
    "not UTF-8 in json": ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a.jsonl:2: not UTF-8"),
    "not UTF-8 in text": ("a.txt", b"a\nb\nc\xe9d", r"a.txt:3: not UTF-8 .*0xe9"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), r"a.txt:1: not UTF-8.*UTF-16"),
    "lone surrogate": ("a.jsonl", b'{"text": "a\\ud800b"}\n', r"a.jsonl:1: .*\\ud800"),
    "broken array": ("a.json", b'[{"text": "x"},\n{"text": ]', r"a.json:2: not valid JSON"),
    "not parquet": ("a.parquet", b"PAR1 no", r"a.parquet: not a readable Parquet file"),
    **{
        f"cut off {kind}": (f"a.txt{kind}", compress(b"x" * 1000)[:-5], rf"a.txt\{kind}: cannot be read")
        for kind, compress in COMPRESSIONS.items()
    },
    **{f"not {kind}": (f"a.txt{kind}", b"\xff" * 50, rf"a.txt\{kind}: cannot be read") for kind in COMPRESSIONS},
    "corrupt gzip": ("a.jsonl.gz", gzip.compress(b"x")[:10] + b"\xff" * 50, r"a.jsonl.gz: cannot be read"),
    "deep array": ("a.json", b"[" * 200_000, r"a.json: JSON nested too deeply"),
    "deep line": ("a.jsonl", b'{"text": ' + b"[" * 200_000, r"a.jsonl:1: JSON nested too deeply"),
    "long integer": ("a.json", b'[{"n": ' + b"1" * 5000 + b"}]", r"a.json: an integer of over 4300 digits"),
    "long integer in a line": ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}", r"a.jsonl:1: an integer of over"),
    "unknown suffix": ("a.docx", b"", r"unknown kind of file; allowed are .jsonl"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_file_is_named_with_its_line(tmp_path, case):
    name, content, message = WRONG[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_wrong_parquet_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS, column="body")
    with pytest.raises(DataError, match=r"no column 'text'; found \['body', 'other'\]"):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds int64"):
        read(tmp_path / "a.parquet", text_column="other")
    with pytest.raises(DataError, match=r"no column 'text'; found \['body', 'other'\]"):
        read("parquet", data_files=str(tmp_path / "a.parquet"))


def test_column_missing_in_a_later_file_is_found_before_any_work(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    write_jsonl(tmp_path / "b.jsonl", [{"body": "x"}])
    with pytest.raises(DataError, match=r"b.jsonl: no column 'text'"):
        open_sources([SourceSettings(path=str(tmp_path))])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/such/file.jsonl", "no such file or folder"),
        ("./nothing", "no such file or folder"),
        ("~no-such-user/x.txt", "not a usable path"),
        ("a\0b.txt", "not a usable path"),
        ("x" * 300, "not a usable path"),
        ("nothing-*.jsonl", "matches no file"),
        ("someone/not-here", "could not load it.*OfflineModeIsEnabled"),
    ],
)
def test_path_that_is_not_there(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        read(path)


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"no file of a kind that is read \(\.jsonl"):
        read(tmp_path)


def test_single_file_takes_no_split_slice(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="max_documents"):
        read(path, split="train[:1]")
