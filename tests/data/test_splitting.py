"""Long documents in pieces: the ids are those of the whole."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from hf_softpick.data.splitting import split_text

TEXT = "".join(f"def f{n}(x):\n    return  x + {n}  # it's Straße {n}, 你好\n\n" for n in range(60))
PREFIXED = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
KINDS = {
    "SentencePiece, as Llama's": (PREFIXED, None),
    "Metaspace": (None, pre_tokenizers.Metaspace()),
    "Metaspace, first": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "ByteLevel": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "ByteLevel with a space": (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "stripped": (normalizers.Strip(), pre_tokenizers.WhitespaceSplit()),
}


@pytest.fixture(scope="module", params=KINDS)
def encode(request):
    normalizer, splitter = KINDS[request.param]
    tokenizer = Tokenizer(models.BPE())
    # Tokens of real vocabularies end at a space, whatever splits the text afterwards.
    is_bytes = isinstance(splitter, pre_tokenizers.ByteLevel)
    tokenizer.pre_tokenizer = splitter if is_bytes else pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    content = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if normalizer:
        tokenizer.normalizer = normalizer
    if splitter:
        tokenizer.pre_tokenizer = splitter
    return lambda text: tokenizer.encode(text).ids


@pytest.mark.parametrize("limit", [97, 500])
def test_ids_of_pieces_are_those_of_the_whole(encode, limit):
    pieces = list(split_text(TEXT, encode, limit))
    assert len(pieces) > len(TEXT) // limit // 2
    assert [token for piece in pieces for token in encode(piece)] == encode(TEXT)


@pytest.mark.parametrize("text", ["你好世界" * 300, "a" * 900 + " b" * 300, "x\n" * 500, " \n" * 500 + "end"])
def test_text_without_good_places(encode, text):
    """Rather whole than wrong."""
    assert [token for piece in split_text(text, encode, 200) for token in encode(piece)] == encode(text)


@settings(deadline=None)
@given(text=st.text(alphabet="ab \n", max_size=300), limit=st.integers(1, 50))
def test_pieces_are_the_text(text, limit):
    """With an encoder that adds nothing, every place is good."""
    pieces = list(split_text(text, lambda part: list(part.encode()), limit))
    assert "".join(pieces) == text and all(len(piece) <= limit for piece in pieces)
    assert all(pieces) or not text
