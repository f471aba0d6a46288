"""Rows to measure on: the recipe's own validation documents, whole texts, nothing padded, the same every time."""

import argparse
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from byte_models import BOS, byte_tokenizer
from training_runs import write_recipe
from transformers import PreTrainedTokenizerFast

from hf_softpick.analysis.samples import Samples, as_launched, batches, load_samples, one_document_a_row
from hf_softpick.commands import exit_code
from hf_softpick.data.preparing import prepare_data
from hf_softpick.data.settings import DataSettings, SourceSettings, TokenizerSettings
from hf_softpick.errors import CheckpointError, DataError, RecipeError
from hf_softpick.training.environment import describe, record_launch
from hf_softpick.training.recipe import load_recipe

EVAL = Path(__file__).parents[2] / "eval"


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return load_recipe(write_recipe(tmp_path_factory.mktemp("samples"), tokenizer={"train_bpe": 300}))


def _common():
    spec = importlib.util.spec_from_file_location("eval_common", EVAL / "common.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _documents(samples):
    """Token ids of every document of every row."""
    for row in samples.rows:
        starts = (row["position_ids"] == 0).nonzero()[:, 0].tolist()
        lengths = torch.tensor([*starts, len(row["input_ids"])]).diff().tolist()
        for ids, positions in zip(row["input_ids"].split(lengths), row["position_ids"].split(lengths), strict=True):
            assert positions.tolist() == list(range(len(positions)))
            yield ids


def _write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def test_documents_of_a_file_with_bos_none_padded_none_twice(tmp_path, bytes_tokenizer):
    texts = [f"document {n} " + "x" * (n % 40) for n in range(200)] + ["document 0 "]
    path = _write(tmp_path / "a.jsonl", texts)
    samples = load_samples(path, bytes_tokenizer, add_bos=True, seq_len=64, count=20)
    assert len(samples.rows) == 20
    assert all(row["input_ids"].dtype == row["position_ids"].dtype == torch.long for row in samples.rows)
    assert min(len(row["input_ids"]) for row in samples.rows) > 40
    assert max(len(row["input_ids"]) for row in samples.rows) <= 64
    documents = list(_documents(samples))
    assert len(documents) > 20
    read = [bytes_tokenizer.decode(ids[1:]) for ids in documents]
    assert all(ids[0] == BOS and BOS not in ids[1:] for ids in documents)
    assert set(read) <= {text[:63] for text in texts} and len(set(read)) == len(read)
    assert f"{len(documents)} documents" in samples.description
    numbers = [int(text.split()[1]) for text in read]
    assert max(numbers) > 150 and numbers != sorted(numbers), "not spread over the file"


def test_the_choice_is_the_same_every_time_and_other_for_calibration(tmp_path, bytes_tokenizer):
    path = _write(tmp_path / "a.jsonl", [f"document {n} " + "x" * 50 for n in range(100)])
    options = {"add_bos": False, "seq_len": 64, "count": 10}
    first, again = (load_samples(path, bytes_tokenizer, **options) for _ in range(2))
    assert first.description == again.description
    for left, right in zip(first.rows, again.rows, strict=True):
        assert torch.equal(left["input_ids"], right["input_ids"])
    other = load_samples(path, bytes_tokenizer, **options, calibration=True)
    known = {tuple(ids.tolist()) for ids in _documents(first)}
    assert not known & {tuple(ids.tolist()) for ids in _documents(other)}


def test_a_long_document_is_cut_and_its_later_parts_serve_where_beginnings_are_too_few(tmp_path, bytes_tokenizer):
    text = "".join(f"{n:04d}" for n in range(100))
    (tmp_path / "book.txt").write_text(text)
    one, many = (
        load_samples(str(tmp_path / "book.txt"), bytes_tokenizer, add_bos=True, seq_len=41, count=count)
        for count in (1, 99)
    )
    assert [bytes_tokenizer.decode(ids[1:]) for ids in _documents(one)] == [text[:40]]
    assert [bytes_tokenizer.decode(ids[1:]) for ids in _documents(many)] == [
        text[at : at + 40] for at in range(0, 400, 40)
    ]
    assert all(ids[0] == BOS for ids in _documents(many))
    assert "1 documents" in many.description and "10 rows" in many.description


def test_special_tokens_in_a_text_are_text(tmp_path, bytes_tokenizer):
    path = _write(tmp_path / "a.jsonl", ["before <bos> after"])
    samples = load_samples(path, bytes_tokenizer, add_bos=False, seq_len=64, count=1)
    assert BOS not in samples.rows[0]["input_ids"].tolist()


@pytest.mark.parametrize("seq_len", [16, 64, 200])
def test_the_validation_split_of_a_recipe_and_nothing_else(recipe, seq_len):
    """Longer than the recipe's rows: the same held-out documents, whole."""
    prepared = prepare_data(recipe.data, recipe.tokenizer, progress=False)
    samples = load_samples(
        recipe.data,
        prepared.tokenizer,
        add_bos=True,
        seq_len=seq_len,
        count=10**4,
        tokenizer_settings=recipe.tokenizer,
        progress=False,
    )
    longest = prepare_data(recipe.data.model_copy(update={"seq_len": 4096}), recipe.tokenizer, progress=False)
    held_out, trained_on = set(), set()
    for rows, texts in ((longest.validation, held_out), (longest.train, trained_on)):
        for row in rows:
            text = prepared.tokenizer.decode(row["input_ids"][: int(row["num_tokens"])])
            texts.update(text.replace("<eos>", "").split("<bos>")[1:])
    assert held_out and not held_out & trained_on
    read = []
    for ids in _documents(samples):
        assert ids[0] == prepared.tokenizer.bos_token_id and prepared.tokenizer.pad_token_id not in ids
        assert len(ids) <= seq_len
        read.append(prepared.tokenizer.decode(ids[1:]).replace("<eos>", ""))
    assert all(any(part in text for text in held_out) for part in read)
    assert sum(map(len, read)) >= 0.98 * sum(map(len, held_out)), "something of the split is left out"
    if seq_len == 200:
        assert set(read) == held_out
    assert "validation split" in samples.description and "anew" not in samples.description


def test_a_recipe_with_another_tokenizer_is_tokenized_anew(recipe, bytes_tokenizer):
    samples = load_samples(
        recipe.data,
        bytes_tokenizer,
        add_bos=True,
        seq_len=400,
        count=5,
        tokenizer_settings=recipe.tokenizer,
        progress=False,
    )
    assert "tokenized anew" in samples.description
    texts = {json.loads(line)["text"] for line in open(recipe.data.sources[0].path)}
    read = [bytes_tokenizer.decode(ids[1:]) for ids in _documents(samples)]
    assert len(read) >= 5 and all(any(text.startswith(part) for text in texts) for part in read)


def test_the_standard_library_is_the_default(bytes_tokenizer):
    samples = load_samples(None, bytes_tokenizer, add_bos=False, seq_len=128, count=4)
    assert samples.description.startswith("stdlib: 4 documents, 512 tokens in 4 rows of 128")


def test_what_cannot_be_is_refused_by_name(tmp_path, recipe, bytes_tokenizer):
    options = {"add_bos": True, "seq_len": 64, "count": 4}
    with pytest.raises(DataError, match="no such file"):
        load_samples("./nothing.jsonl", bytes_tokenizer, **options)
    with pytest.raises(DataError, match="lacks|column"):
        source = SourceSettings(path=_write(tmp_path / "a.jsonl", ["a"]), text_column="content")
        load_samples(source, bytes_tokenizer, **options)
    with pytest.raises(DataError, match="no document"):
        load_samples(_write(tmp_path / "b.jsonl", [" "]), bytes_tokenizer, **options)
    none = recipe.data.model_copy(update={"validation": 0.0})
    with pytest.raises(DataError, match="holds out no documents"):
        load_samples(none, bytes_tokenizer, **options, tokenizer_settings=recipe.tokenizer, progress=False)
    without = PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="no BOS"):
        load_samples(None, without, **options)


def test_batches_stack_rows_of_one_length(tmp_path, bytes_tokenizer):
    path = _write(tmp_path / "a.jsonl", ["x" * n for n in (64, 63, 64, 60, 64, 60, 64)])
    path2 = _write(tmp_path / "b.jsonl", [c * n for c, n in zip("abcdefg", (64, 63, 64, 60, 64, 60, 64), strict=True)])
    assert len(load_samples(path, bytes_tokenizer, add_bos=False, seq_len=64, count=9).rows) == 3
    samples = load_samples(path2, bytes_tokenizer, add_bos=False, seq_len=64, count=9)
    found = list(batches(samples, 3))
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(3, 64), (1, 64), (1, 63), (2, 60)]
    assert all(batch["position_ids"].shape == batch["input_ids"].shape for batch in found)
    flat = sorted(ids.tolist() for batch in found for ids in batch["input_ids"])
    assert flat == sorted(row["input_ids"].tolist() for row in samples.rows)


def _options(*arguments):
    common = _common()
    parser = argparse.ArgumentParser()
    common.add_model_arguments(parser)
    common.add_sample_arguments(parser)
    return common, parser.parse_args(["model", *map(str, arguments)])


def _loaded(tokenizer, run=None, longest=256):
    config = SimpleNamespace(max_position_embeddings=longest)
    whole = SimpleNamespace(get_text_config=lambda: config, model_type="softpick")
    embeddings = SimpleNamespace(num_embeddings=len(tokenizer))
    model = SimpleNamespace(config=whole, get_input_embeddings=lambda: embeddings)
    return SimpleNamespace(model=model, tokenizer=tokenizer, run=run, add_bos=True, name="model")


def test_options_default_to_the_recipe_of_the_run(recipe, tmp_path, bytes_tokenizer):
    write_recipe(tmp_path)
    common, options = _options("--samples", 3)
    samples = common.samples_for(options, _loaded(bytes_tokenizer, run=tmp_path))
    assert "validation split" in samples.description and "3 rows of 64" in samples.description
    samples = common.samples_for(options, _loaded(bytes_tokenizer))
    assert samples.description.startswith("stdlib") and "rows of 256" in samples.description
    _, options = _options("--samples", 3, "--seq-len", 32, "--data", tmp_path / "text.jsonl")
    assert "3 rows of 32" in common.samples_for(options, _loaded(bytes_tokenizer, run=tmp_path)).description


def test_rows_that_are_prepared_outlive_their_sources(tmp_path, bytes_tokenizer):
    """A run goes on with them; so does what measures it."""
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    write_recipe(tmp_path)
    common, options = _options("--samples", 3)
    before = common.samples_for(options, _loaded(bytes_tokenizer, run=tmp_path))
    (tmp_path / "text.jsonl").unlink()
    common.check_text(options, str(tmp_path))
    assert common.samples_for(options, _loaded(bytes_tokenizer, run=tmp_path)).description == before.description
    _, options = _options("--data", tmp_path / "text.jsonl")
    with pytest.raises(DataError, match="no such file"):
        common.check_text(options, str(tmp_path))


def test_options_refuse_and_exit_codes(bytes_tokenizer, capsys):
    common, options = _options("--data", "missing.yaml")
    with pytest.raises(RecipeError, match="no such recipe"):
        common.samples_for(options, _loaded(bytes_tokenizer))
    for wrong in (("--samples", "0"), ("--seq-len", "1"), ("--seq-len", "x")):
        with pytest.raises(SystemExit) as stopped:
            _options(*wrong)
        assert stopped.value.code == 2
    assert exit_code(lambda: common.samples_for(options, _loaded(bytes_tokenizer))) == 2
    assert "missing.yaml" in capsys.readouterr().err


def test_rows_that_do_not_fit_the_model_are_refused(bytes_tokenizer):
    common, options = _options("--data", "stdlib", "--seq-len", "65")
    with pytest.raises(RecipeError, match="65 is longer than the 64 tokens that model reads"):
        common.samples_for(options, _loaded(bytes_tokenizer, longest=64))
    small = _loaded(bytes_tokenizer)
    small.model.get_input_embeddings = lambda: SimpleNamespace(num_embeddings=3)
    _, options = _options("--data", "stdlib")
    with pytest.raises(CheckpointError, match="do not belong together"):
        common.samples_for(options, small)


def test_results_go_to_the_run_or_where_told(tmp_path):
    common, options = _options()
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    (tmp_path / "run" / "recipe.yaml").write_text("")
    run = str(tmp_path / "run")
    assert common.report_folder(options, run) == tmp_path / "run" / "report"
    assert common.report_folder(options, "owner/name") == Path("report", "owner--name")
    _, options = _options("--out", "there")
    assert common.report_folder(options, run) == Path("there")
    _, options = _options("second", "--out", "there")
    assert common.report_folder(options, run) == Path("there", "run")
    _, options = _options("elsewhere/run", "--out", "there")
    with pytest.raises(RecipeError, match="two of the models are called run"):
        common.report_folder(SimpleNamespace(**{**vars(options), "models": [run, run]}), run)


def test_one_document_a_row():
    """For architectures that do not keep packed documents apart."""
    ids, position_ids = torch.arange(9), torch.tensor([0, 1, 2, 0, 0, 1, 2, 3, 4])
    apart = one_document_a_row(Samples("text", [{"input_ids": ids, "position_ids": position_ids}]))
    assert apart.description == "text"
    assert [row["input_ids"].tolist() for row in apart.rows] == [[0, 1, 2], [3], [4, 5, 6, 7, 8]]
    assert [row["position_ids"].tolist() for row in apart.rows] == [[0, 1, 2], [0], [0, 1, 2, 3, 4]]


def test_relative_paths_of_a_run_are_from_where_it_was_launched(tmp_path, monkeypatch):
    for name in ("here", "there/tokenizer", "there/run/final"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "there" / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path / "there")
    record_launch(tmp_path / "there/run/environment.json", describe("one process", 1))
    data = DataSettings(seq_len=8, sources=[SourceSettings(path=path) for path in ("a.txt", "*.txt", "stdlib", "a/b")])
    tokenizer = TokenizerSettings(from_="tokenizer")
    monkeypatch.chdir(tmp_path / "here")
    found, from_there = as_launched(tmp_path / "there/run", data, tokenizer)
    there = str(tmp_path / "there")
    assert [source.path for source in found.sources] == [f"{there}/a.txt", f"{there}/*.txt", "stdlib", "a/b"]
    assert from_there.from_ == f"{there}/tokenizer"
    write_recipe(tmp_path / "there", data={"sources": [{"path": "a.txt"}]}).rename(tmp_path / "there/run/recipe.yaml")
    options = argparse.Namespace(data=None, seq_len=None)
    assert _common()._text(options, tmp_path / "there/run")[0].sources[0].path == f"{there}/a.txt"
    (tmp_path / "there" / "tokenizer").rmdir()
    (tmp_path / "there" / "run" / "final" / "tokenizer.json").write_text("{}")
    assert as_launched(tmp_path / "there/run", data, tokenizer)[1].from_ == f"{there}/run/final"
    hub = TokenizerSettings(from_="owner/name")
    assert as_launched(tmp_path / "there/run", data, hub)[1] == hub
    (tmp_path / "there/run/environment.json").unlink()
    assert as_launched(tmp_path / "there/run", data, hub) == (data, hub)
