"""No text spells a special token, whatever the tokenizer's model; other text is encoded as ever."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_softpick.data.special_tokens import special_ids, was_forgeable
from hf_softpick.data.tokenizer import encoder_of

SPECIAL = ["<unk>", "<s>", "</s>"]
PLAIN = "the cat sat on the mat and more words\n\n  indented x"
TEXT = PLAIN + " <s> and </s> more <unk> words <S>the</S> </s><s>\n<|call|> <|CALL|>"
BYTES = {"initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet())}
WORDS = pre_tokenizers.WhitespaceSplit()
MODELS = {
    "Unigram": (models.Unigram(), trainers.UnigramTrainer, pre_tokenizers.Metaspace(), {"unk_token": "<unk>"}),
    "WordLevel": (
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer,
        WORDS,
        {},
    ),
    "WordPiece": (
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer,
        WORDS,
        {},
    ),
    "BPE of words": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer, WORDS, {}),
    "BPE of bytes": (models.BPE(), trainers.BpeTrainer, pre_tokenizers.ByteLevel(False, use_regex=False), BYTES),
}


def make(name, lower=False, ignore_merges=False):
    model, trainer, splitter, options = MODELS[name]
    backend = Tokenizer(model)
    backend.pre_tokenizer = splitter
    if lower:
        backend.normalizer = normalizers.Lowercase()
    size = {} if name == "WordLevel" else {"vocab_size": 330 if name == "BPE of bytes" else 90}
    backend.train_from_iterator([TEXT] * 30, trainer(special_tokens=SPECIAL, show_progress=False, **size, **options))
    backend.add_special_tokens([AddedToken("<|call|>", normalized=True, special=True)])
    if ignore_merges:
        content = json.loads(backend.to_str())
        content["model"]["ignore_merges"] = True
        backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def encoded(encoder, text):
    return encoder.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("lower", [False, True], ids=["", "lower"])
@pytest.mark.parametrize(
    ("name", "ignore_merges"), [*((name, False) for name in MODELS), ("BPE of words", True), ("BPE of bytes", True)]
)
def test_no_text_spells_a_special_token(name, lower, ignore_merges):
    tokenizer = make(name, lower, ignore_merges)
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.encode_special_tokens = True
    special, encoder = special_ids(tokenizer), encoder_of(tokenizer)
    assert len(special) == 3 and special.isdisjoint(encoded(encoder, TEXT))
    assert encoded(encoder, PLAIN) == encoded(plain, PLAIN)
    assert was_forgeable(tokenizer) >= (not special.isdisjoint(encoded(plain, TEXT)))


def test_the_switch_of_the_encoder_is_not_enough():
    """Else there would be nothing to do here."""
    assert was_forgeable(make("Unigram")) and was_forgeable(make("WordLevel")) and was_forgeable(make("BPE of words"))


def test_boundary_that_is_not_called_special():
    """`special: false` for the end of a document, as some files have it."""
    tokenizer = make("BPE of bytes")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = False
    backend = Tokenizer.from_str(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|call|>")
    assert special_ids(tokenizer).isdisjoint(encoded(encoder_of(tokenizer), TEXT)) and tokenizer.eos_token_id == 330
