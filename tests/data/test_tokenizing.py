"""Documents to ids: nothing dropped without being counted, special tokens once, processes like threads."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hf_softpick.data import tokenizing
from hf_softpick.data.settings import SourceSettings, TokenizerSettings
from hf_softpick.data.sources import open_sources
from hf_softpick.data.tokenizer import train_tokenizer
from hf_softpick.data.tokenizing import tokenize
from hf_softpick.errors import DataError

TEXTS = [f"document {number}: the quick brown fox, ümlaut\n" * (number % 7 + 1) for number in range(120)]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path):
    return SourceSettings(path=str(write(tmp_path / "a.jsonl", TEXTS)))


@pytest.fixture
def tokenizer(source):
    """One that adds BOS and EOS by itself, as many on the Hub do; a corpus must not get them twice."""
    tokenizer = train_tokenizer(open_sources([source]), 300)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    return tokenizer


def run(sources, tokenizer, path, settings=None, **kwargs):
    settings = settings or TokenizerSettings(train_bpe=300)
    return tokenize(open_sources(sources), tokenizer, settings, path / "tokens.bin", seed=0, **kwargs)


def documents(corpus):
    return [
        corpus.tokens[start : start + length].tolist()
        for start, length in zip(corpus.starts, corpus.lengths, strict=True)
    ]


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_special_tokens_once_a_document(source, tokenizer, tmp_path, add_bos, add_eos):
    settings = TokenizerSettings(train_bpe=300, add_bos=add_bos, add_eos=add_eos)
    corpus = run([source], tokenizer, tmp_path, settings)
    bare = tokenizer(TEXTS, add_special_tokens=False).input_ids
    assert documents(corpus) == [[0] * add_bos + ids + [1] * add_eos for ids in bare]
    assert corpus.max_token_id == max(max(ids) for ids in bare)
    assert corpus.num_bytes == sum(len(text.encode()) for text in TEXTS)


def test_small_batches_and_pieces_change_nothing(source, tokenizer, tmp_path, monkeypatch):
    """A document may span pieces and batches; it still gets one BOS and one EOS."""
    whole = documents(run([source], tokenizer, tmp_path))
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 100)
    assert documents(run([source], tokenizer, tmp_path)) == whole
    monkeypatch.setattr(tokenizing.split_text, "__defaults__", (60,))
    corpus = run([source], tokenizer, tmp_path)
    assert documents(corpus) == whole and corpus.num_split > 50


def test_processes_give_what_threads_give(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 2000)
    text = "spelled <bos> is text <eos>"
    extra = SourceSettings(path=str(write(tmp_path / "b.jsonl", [text])))
    threads = run([source, extra], tokenizer, tmp_path)
    expected = documents(threads)
    assert documents(run([source, extra], tokenizer, tmp_path, num_proc=2)) == expected
    assert expected[-1].count(0) == 1 and tokenizer.decode(expected[-1]) == f"<bos>{text}<eos>"


def test_dropped_documents_are_counted(tokenizer, tmp_path):
    records = [{"text": "x"}, {"text": ""}, {"text": " \n\t"}, {"text": None}, {"other": 1}, {"text": "y"}]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    corpus = run([SourceSettings(path=str(tmp_path / "b.jsonl"))], tokenizer, tmp_path)
    assert corpus.documents == 6
    assert corpus.dropped == {"empty": 2, "null or missing": 2}
    assert len(corpus.lengths) == 2


def test_weights_repeat_and_choose(source, tokenizer, tmp_path):
    double = run([source.model_copy(update={"weight": 2.0})], tokenizer, tmp_path)
    assert double.copies.tolist() == [2] * len(TEXTS)
    half = run([source.model_copy(update={"weight": 0.5})], tokenizer, tmp_path)
    assert set(half.copies.tolist()) == {1}
    assert 40 <= len(half.copies) <= 80
    assert half.dropped == {"weight": len(TEXTS) - len(half.copies)}
    again = run([source.model_copy(update={"weight": 0.5})], tokenizer, tmp_path)
    assert (again.hashes == half.hashes).all()
    mixed = run([source.model_copy(update={"weight": 1.5})], tokenizer, tmp_path)
    assert 160 <= mixed.copies.sum() <= 200


def test_max_documents(source, tokenizer, tmp_path):
    limited = source.model_copy(update={"max_documents": 5})
    corpus = run([limited, source], tokenizer, tmp_path)
    assert len(corpus.lengths) == 5 + len(TEXTS)
    assert (corpus.hashes[:5] == corpus.hashes[5:10]).all()


def test_id_beyond_the_vocabulary_is_refused_with_the_document(source, tokenizer, tmp_path):
    class Short(type(tokenizer)):
        def __len__(self):
            return 290

    tokenizer.__class__ = Short
    with pytest.raises(DataError, match=r"a.jsonl:\d+: token id 29\d, but the tokenizer counts 290 tokens"):
        run([source], tokenizer, tmp_path)


def test_special_token_of_one_character_is_counted(tmp_path):
    """A line end must be encoded, even where somebody made it the end of a document."""
    backend = Tokenizer(models.WordLevel({"\n": 0, "a": 1, "<s>": 2}, unk_token="a"))
    backend.pre_tokenizer = Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="\n")
    corpus = run([SourceSettings(path=str(write(tmp_path / "b.jsonl", ["a\naa\n", "a"])))], tokenizer, tmp_path)
    assert documents(corpus) == [[2, 1, 0, 1, 1, 0, 0], [2, 1, 0]] and corpus.special == {0: 2}


def test_hashes_follow_text_and_seed(source, tokenizer, tmp_path):
    first = run([source], tokenizer, tmp_path)
    settings = TokenizerSettings(train_bpe=300)
    other = tokenize(open_sources([source]), tokenizer, settings, tmp_path / "t.bin", seed=1)
    assert len(np.unique(first.hashes)) == len(set(TEXTS))
    assert not set(first.hashes.tolist()) & set(other.hashes.tolist())
