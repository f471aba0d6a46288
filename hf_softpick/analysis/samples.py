"""Text for measuring: rows of tokens from the validation split of a recipe, a file, a data set, or the stdlib."""

import contextlib
import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_softpick.analysis.run_records import launches
from hf_softpick.data.packing import best_fit
from hf_softpick.data.preparing import PreparedData, prepare_data
from hf_softpick.data.settings import DataSettings, SourceSettings, TokenizerSettings
from hf_softpick.data.sources import SourceGone, open_sources
from hf_softpick.data.splitting import split_text
from hf_softpick.data.tokenizer import encoder_of, sample_texts
from hf_softpick.errors import DataError
from hf_softpick.modeling.documents import document_begins

CANDIDATE_CHARACTERS = 64 * 2**20
"""Of a source without a validation split, documents are chosen among about this much text."""
_CHARACTERS_A_TOKEN = 32
"""More than text has: what lies behind cannot be needed."""
_MIN_TOKENS = 2


class Samples(NamedTuple):
    """Rows to measure on.

    description: where they come from and how many documents they hold, for reports. rows: each has input_ids [T] and
    position_ids [T], int64 on the CPU, T <= seq_len and no padding; documents in a row restart the positions at 0.
    """

    description: str
    rows: list[dict[str, Tensor]]


def as_launched(run: Path, data: DataSettings, tokenizer: TokenizerSettings) -> tuple[DataSettings, TokenizerSettings]:
    """What the recipe of a run folder says, with relative paths from where the run was launched, not from here.

    A folder of a tokenizer that is gone is replaced by final/, which holds the same one.
    """
    folders = [each["directory"] for each in reversed(launches(run / "environment.json")) if "directory" in each]

    def find(path: str) -> str:
        places = (os.path.join(folder, path) for folder in folders if path != "stdlib")
        return next((place for place in places if os.path.exists(place) or glob.glob(place, recursive=True)), path)

    sources = [source.model_copy(update={"path": find(source.path)}) for source in data.sources]
    origin = tokenizer.from_ and find(tokenizer.from_)
    is_path = origin is not None and (origin.count("/") != 1 or origin.startswith((".", "~")))
    if is_path and not os.path.exists(os.path.expanduser(origin)) and (run / "final" / "tokenizer.json").is_file():
        origin = str(run / "final")
    return data.model_copy(update={"sources": sources}), tokenizer.model_copy(update={"from_": origin})


class _Document(NamedTuple):
    ids: np.ndarray
    """Without BOS."""
    is_start: bool
    """Not a later part of a document that was cut."""


def load_samples(
    data: DataSettings | SourceSettings | str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_bos: bool,
    seq_len: int,
    count: int,
    tokenizer_settings: TokenizerSettings | None = None,
    calibration: bool = False,
    progress: bool = True,
) -> Samples:
    """Choose documents and make rows of them; the same arguments give the same rows.

    The choice is spread over the corpus by a seeded hash. A row is one document cut at `seq_len`, or several shorter
    ones. Later parts of long documents are used only where there are too few beginnings. Special tokens that are
    spelled in a text are text.

    Args:
        data: the data section of a recipe (its validation split is read), else a source as in data.sources, or its
            path alone; None is "stdlib".
        tokenizer: of the model to be measured. Where the recipe's is another one, its documents are tokenized anew.
        add_bos: every document begins with BOS.
        seq_len: tokens of a row at most.
        count: rows at most; fewer where the corpus is too small.
        tokenizer_settings: the tokenizer section of the recipe, with `data` from a recipe.
        calibration: other documents than those measured on: the training split of a recipe, or the other end of the
            order.

    Raises:
        DataError: nothing can be read, or no validation split was held out.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "the model's tokenizer has no fast form (tokenizer.json). Convert it with transformers, and save it with "
            "the model."
        )
    if add_bos and tokenizer.bos_token_id is None:
        raise DataError("documents should begin with BOS, but the model's tokenizer has no BOS token.")
    if seq_len < _MIN_TOKENS or count < 1:
        raise ValueError(f"seq_len={seq_len} and count={count}; expected at least {_MIN_TOKENS} and 1")
    if isinstance(data, DataSettings):
        if tokenizer_settings is None:
            raise ValueError("the data section of a recipe needs the recipe's tokenizer section, tokenizer_settings")
        _require_held_out(data)
        longest = data.model_copy(update={"seq_len": max(seq_len, data.seq_len)})
        prepared = prepare_data(longest, tokenizer_settings, progress)
        source, documents = _recipe_documents(prepared, tokenizer, tokenizer_settings.add_bos, calibration)
    else:
        settings = data if isinstance(data, SourceSettings) else SourceSettings(path=data or "stdlib")
        source = settings.path if settings.path == "stdlib" else f"{settings.path}, split {settings.split}"
        documents = _encoded(_texts(settings, count * seq_len, calibration), tokenizer, count * seq_len)
    bos = tokenizer.bos_token_id if add_bos else None
    pieces = _pieces(documents, seq_len, count * seq_len, bos)
    if not pieces:
        raise DataError(f"{source}: no document has {_MIN_TOKENS} tokens. Give other data.")
    rows, used = _rows(pieces, seq_len, count)
    tokens = sum(len(row["input_ids"]) for row in rows)
    return Samples(f"{source}: {used:,} documents, {tokens:,} tokens in {len(rows):,} rows of {seq_len:,}", rows)


def check_text(data: DataSettings | SourceSettings) -> None:
    """Look at the sources of `load_samples`, and read none: what is wrong with them can be said early.

    Raises:
        DataError: there is no such text, or a recipe that holds out none.
    """
    if isinstance(data, SourceSettings):
        open_sources([data])
        return
    _require_held_out(data)
    with contextlib.suppress(SourceGone):  # its rows may have been prepared while it was there
        open_sources(data.sources)


def _require_held_out(data: DataSettings) -> None:
    if not data.validation:
        raise DataError(
            "the recipe holds out no documents (data.validation is 0), so there is nothing that the model has not "
            "seen. Give other text with --data."
        )


def batches(samples: Samples, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Stack rows of equal length, unpadded: input_ids and position_ids, int64 [B, T] with B <= batch_size.

    Longer rows come first, so that memory that does not suffice shows at once.
    """
    longest_first = sorted(samples.rows, key=lambda row: -len(row["input_ids"]))
    for _, equal in itertools.groupby(longest_first, key=lambda row: len(row["input_ids"])):
        while rows := list(itertools.islice(equal, batch_size)):
            yield {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "position_ids")}


def one_document_a_row(samples: Samples) -> Samples:
    """The same documents in rows of their own, for models that do not keep packed documents apart."""
    rows = []
    for row in samples.rows:
        starts = document_begins(row["position_ids"]).nonzero()[:, 0].tolist()
        for begin, end in itertools.pairwise([*starts, len(row["input_ids"])]):
            rows.append({name: values[begin:end] for name, values in row.items()})
    return samples._replace(rows=rows)


def _recipe_documents(
    prepared: PreparedData, tokenizer: PreTrainedTokenizerBase, rows_have_bos: bool, calibration: bool
) -> tuple[str, Iterator[_Document]]:
    """The documents of packed rows, which lie there in a seeded random order, and what to call them."""
    name = "training" if calibration else "validation"
    rows = prepared.train if calibration else prepared.validation
    bos = prepared.tokenizer.bos_token_id if rows_have_bos else None
    documents = _unpacked(rows, bos)
    if prepared.tokenizer.get_vocab() == tokenizer.get_vocab():
        return f"{name} split of the recipe", documents
    # Specials were added, not written, so what is skipped here is no text.
    texts = (
        (prepared.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False), is_start)
        for ids, is_start in documents
    )
    return f"{name} split of the recipe, tokenized anew for this model", _encoded(texts, tokenizer, None)


def _unpacked(rows: Iterable, bos: int | None) -> Iterator[_Document]:
    for row in rows:
        ids = np.asarray(row["input_ids"])[: int(row["num_tokens"])]
        begins = document_begins(torch.tensor(row["position_ids"][: len(ids)]))
        for document in np.split(ids, begins.numpy().nonzero()[0][1:]):
            is_start = bos is None or document[0] == bos
            yield _Document(document[int(bos is not None and is_start) :], is_start)


def _texts(settings: SourceSettings, tokens: int, reverse: bool) -> Iterator[tuple[str, bool]]:
    """Different documents of a source in the order of a hash; of a source beyond the bound, a part of every shard."""
    limit = max(CANDIDATE_CHARACTERS, _CHARACTERS_A_TOKEN * tokens)
    texts = sample_texts(open_sources([settings]), limit)
    encoded = ((text, text.encode(errors="surrogatepass")) for text in texts if not text.isspace())
    found = {blake2b(content, digest_size=16, key=b"samples").digest(): text for text, content in encoded}
    for key in sorted(found, reverse=reverse):
        yield found[key], True


def _encoded(
    texts: Iterator[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase, tokens: int | None
) -> Iterator[_Document]:
    """Token ids of each text, without special tokens; of a long text at least the first `tokens`, if given."""
    encoder = encoder_of(tokenizer)

    def encode(part: str) -> list[int]:
        return encoder.encode(part, add_special_tokens=False).ids

    limit = None if tokens is None else _CHARACTERS_A_TOKEN * tokens
    for text, is_start in texts:
        parts = [encode(part) for part in split_text(text[:limit], encode)]
        yield _Document(np.array(list(itertools.chain.from_iterable(parts)), np.int64), is_start)


def _pieces(
    documents: Iterator[_Document], seq_len: int, tokens: int, bos: int | None
) -> list[tuple[int, np.ndarray]]:
    """(number of the document, ids with BOS) of at most seq_len tokens each, until there are `tokens` of them.

    First the beginnings of all documents; only then later parts.
    """
    head = np.array([] if bos is None else [bos], np.int64)
    step = seq_len - len(head)
    pieces: list[tuple[int, np.ndarray]] = []
    later: list[tuple[int, np.ndarray]] = []
    missing = tokens

    def cut(number: int, ids: np.ndarray) -> np.ndarray:
        """Make a piece of the beginning, unless it has no target; returns the rest."""
        nonlocal missing
        piece = np.concatenate([head, ids[:step]])
        if len(ids) and len(piece) >= _MIN_TOKENS:
            pieces.append((number, piece))
            missing -= len(piece)
        return ids[step:]

    for number, (ids, is_start) in enumerate(documents):
        if missing <= 0:
            break
        later.append((number, cut(number, ids) if is_start else ids))
    while missing > 0 and (later := [(number, ids) for number, ids in later if len(ids)]):
        later = [(number, cut(number, ids) if missing > 0 else ids) for number, ids in later]
    return pieces


def _rows(pieces: Sequence[tuple[int, np.ndarray]], seq_len: int, count: int) -> tuple[list[dict[str, Tensor]], int]:
    """Pack pieces; the fullest `count` rows in the order of their first pieces, and the number of documents there."""
    lengths = np.array([len(ids) for _, ids in pieces])
    row_of, num_rows = best_fit(lengths, seq_len)
    filled = np.bincount(row_of, weights=lengths, minlength=num_rows)
    kept = set(np.argsort(-filled, kind="stable")[:count].tolist())
    members: dict[int, list[int]] = {}
    for index, row in enumerate(row_of.tolist()):
        if row in kept:
            members.setdefault(row, []).append(index)
    rows = [
        {
            "input_ids": torch.from_numpy(np.concatenate([pieces[index][1] for index in row])).long(),
            "position_ids": torch.cat([torch.arange(len(pieces[index][1])) for index in row]),
        }
        for row in members.values()
    ]
    return rows, len({pieces[index][0] for row in members.values() for index in row})
