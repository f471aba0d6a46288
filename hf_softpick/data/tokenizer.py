"""Which tokenizer a run uses, trained or loaded, and what it does to a prompt. tokenizing.py encodes a corpus."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_softpick.data.settings import TokenizerSettings
from hf_softpick.data.sources import Source
from hf_softpick.data.special_tokens import hide_special_tokens
from hf_softpick.errors import DataError, StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
SAMPLE_BYTES = 64 * 2**20
"""Text on which a BPE is trained at most: more costs minutes and moves no merge that matters."""
_PROBES = ("Hello world", "It's 1234.5 %", "Grüße, 你好 🙂", "def f(x):\n    return  x", " a", "<b>")
_LONGEST_WORD = 256
"""Bytes. Training takes the square of a word's length: longer runs without a break are learned from in pieces."""


def train_tokenizer(sources: Sequence[Source], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE on a bounded, deterministic sample of the sources; ids 0, 1, 2 are BOS, EOS and PAD.

    A corpus with too few distinct pairs gives a smaller vocabulary: trust len(tokenizer), not `vocab_size`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = pre_tokenizers.Split(Regex(f".{{{_LONGEST_WORD}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pieces])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(sources, SAMPLE_BYTES), trainer)
    tokenizer.pre_tokenizer = words
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def sample_texts(sources: Sequence[Source], max_bytes: int) -> Iterator[str]:
    """Yield about `max_bytes` of text spread evenly over the shards, weighted sources in proportion; no randomness."""
    total = sum(source.settings.weight for source in sources)
    for source in sources:
        budget = max_bytes * source.settings.weight / total
        # Small shards leave budget to the larger ones: water-fill from the smallest.
        sizes = sorted(shard.num_bytes for shard in source.shards)
        share, left = float("inf"), budget
        for position, size in enumerate(sizes):
            share = left / (len(sizes) - position)
            if size > share:
                break
            left -= size
            share = float("inf")
        for shard in source.shards:
            used = 0
            for record in itertools.islice(shard.read(), source.settings.max_documents):
                if used >= share:
                    break
                if record.text:
                    used += len(record.text)
                    yield from (record.text[at : at + 2**20] for at in range(0, len(record.text), 2**20))


def load_tokenizer(settings: TokenizerSettings) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of `settings.from_`, a folder or a Hub id; never runs code from there.

    Raises:
        DataError: it cannot be loaded, has no fast form, or lacks a special token that the recipe asks for.
    """
    from transformers import AutoTokenizer

    place = f"tokenizer '{settings.from_}'"
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.from_, revision=settings.revision, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly everything for a wrong path, a damaged file or no network
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"{place} cannot be loaded: {type(error).__name__}: {reason} "
            "Give a folder with tokenizer.json or a Hub id; repository code is never run."
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{place} has no fast form (tokenizer.json). Convert it with transformers and give that folder."
        )
    for name, is_wanted in {"bos": settings.add_bos, "eos": settings.add_eos}.items():
        if is_wanted and getattr(tokenizer, f"{name}_token_id") is None:
            raise DataError(
                f"{place} has no {name.upper()} token, but tokenizer.add_{name} is true. "
                f"Set tokenizer.add_{name}=false, or add a {name}_token to its tokenizer_config.json."
            )
    _check_own_ids(place, tokenizer)
    largest = max(tokenizer.get_vocab().values())
    if largest >= len(tokenizer):
        raise DataError(
            f"{place} has {len(tokenizer)} tokens, but ids up to {largest}: there are holes, and a model with one row "
            "for each token would have none for the last ids. Number its tokens without holes."
        )
    return tokenizer


def encoder_of(tokenizer: "PreTrainedTokenizerFast") -> Any:
    """A `tokenizers.Tokenizer` for corpora: no special tokens, neither its own nor spelled; nothing cut or padded."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(hide_special_tokens(tokenizer))
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", settings: TokenizerSettings, folder: Path) -> None:
    """Save such that a prompt gets what a training document begins with: BOS if the recipe adds it, and never EOS.

    Raises:
        DataError: something in it cannot be written, or its own class overrules this when it is loaded again.
        StorageError: no space for it.
    """
    from tokenizers import processors
    from transformers import AutoTokenizer

    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if not _prompt_is_right(tokenizer, settings):
        bos = tokenizer.bos_token if settings.add_bos else None
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A" if bos else "$A",
            pair=f"{bos} $A {bos}:1 $B:1" if bos else "$A $B:1",
            special_tokens=[(bos, tokenizer.bos_token_id)] if bos else [],
        )
    # A batch of prompts is padded on the side where nothing is generated. Training never pads by the tokenizer.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # only what is in init_kwargs is saved
    try:
        tokenizer.save_pretrained(folder)
    except (TypeError, ValueError) as error:
        raise DataError(f"tokenizer '{settings.from_ or 'train_bpe'}' cannot be saved: {error}") from error
    except Exception as error:
        if "(os error " not in str(error):  # what `tokenizers` makes of a full disk is no OSError
            raise
        raise StorageError(f"{folder} cannot be written: {error}. Make room, or set data.cache_dir.") from error
    if not _prompt_is_right(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), settings):
        raise DataError(
            f"tokenizer '{settings.from_ or 'train_bpe'}' cannot be saved so that a prompt starts "
            f"{'with' if settings.add_bos else 'without'} BOS and ends without EOS. Change tokenizer.add_bos."
        )


def _prompt_is_right(tokenizer: "PreTrainedTokenizerFast", settings: TokenizerSettings) -> bool:
    bare = tokenizer("a b", add_special_tokens=False).input_ids
    return tokenizer("a b").input_ids == ([tokenizer.bos_token_id] if settings.add_bos else []) + bare


def _check_own_ids(place: str, tokenizer: "PreTrainedTokenizerFast") -> None:
    """A tokenizer that was made of a .model file alone must give the ids that SentencePiece itself gives.

    Transformers guesses what other files would say, and loses the space in front of a text, or several in a row.
    """
    model = Path(getattr(tokenizer, "vocab_file", None) or "")
    if model.suffix != ".model" or model.with_name("tokenizer.json").is_file():
        return
    try:
        from sentencepiece import SentencePieceProcessor

        own = SentencePieceProcessor(model_file=str(model))
    except ImportError:
        reason = "without the package sentencepiece nobody can tell whether its ids are right"
    except (OSError, RuntimeError):
        reason = "SentencePiece cannot read it, and what else it means is a guess"
    else:
        wrong = next((t for t in _PROBES if own.encode(t) != tokenizer(t, add_special_tokens=False).input_ids), None)
        if wrong is None:
            return
        reason = (
            f"{wrong!r} would be {tokenizer(wrong, add_special_tokens=False).input_ids}, but its own ids are "
            f"{own.encode(wrong)}"
        )
    raise DataError(
        f"{place} holds {model.name} and no tokenizer.json: {reason}. Give a folder with the tokenizer.json of its "
        "authors."
    )
