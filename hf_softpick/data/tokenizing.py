"""From documents to one flat file of token ids, in bounded memory and on all cores. packing.py makes rows of it.

Batches of texts are encoded by encoding.py; here documents become batches, and ids become documents again.
"""

from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hf_softpick.data.contents import progress_bar
from hf_softpick.data.encoding import encoders
from hf_softpick.data.settings import TokenizerSettings
from hf_softpick.data.sources import Source
from hf_softpick.data.special_tokens import special_ids
from hf_softpick.data.splitting import split_text
from hf_softpick.data.tokenizer import encoder_of
from hf_softpick.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_CHARACTERS = 2**21


@dataclass(frozen=True)
class TokenizedCorpus:
    """All documents as token ids in one file; the arrays have one entry per document, in source order."""

    path: Path
    dtype: np.dtype
    lengths: np.ndarray
    """int64, tokens with BOS and EOS."""
    copies: np.ndarray
    """int64, how often weights repeat the document in training."""
    hashes: np.ndarray
    """uint64, seeded hash of the text: equal texts have equal hashes."""
    documents: int
    """Documents read, dropped ones included."""
    dropped: dict[str, int]
    """Reason to number of documents."""
    num_bytes: int
    """UTF-8 bytes of the documents kept."""
    max_token_id: int
    special: dict[int, int]
    """Special id to how often text has it, where one character is a special token."""
    num_split: int
    """Documents encoded in pieces."""

    @property
    def tokens(self) -> np.ndarray:
        """[num_tokens] memory-mapped ids."""
        return np.memmap(self.path, dtype=self.dtype, mode="r")

    @property
    def starts(self) -> np.ndarray:
        """int64, where each document begins in `tokens`."""
        return np.cumsum(self.lengths) - self.lengths


class _Piece(NamedTuple):
    text: str
    place: str
    """Of the document, for messages; empty in all but its last piece."""


def tokenize(
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerFast",
    settings: TokenizerSettings,
    path: Path,
    seed: int,
    num_proc: int | None = None,
    progress: bool = False,
) -> TokenizedCorpus:
    """Encode every usable document once and write the ids to `path`, with the BOS and EOS that the recipe asks for.

    Args:
        num_proc: processes to encode in; None or 1 uses the threads of `tokenizers` in this process.

    Raises:
        DataError: a document cannot be read, or got an id that the tokenizer does not count; names the document.
    """
    encoder = encoder_of(tokenizer)
    writer = _Writer(path, tokenizer, settings)
    documents = _Documents(sources, seed, lambda text: encoder.encode(text, add_special_tokens=False).ids)
    total = int(sum(shard.num_bytes for source in sources for shard in source.shards))
    bar = progress_bar(total, "Tokenizing", "B", progress, mininterval=0.5)
    with path.open("wb") as file, encoders(encoder, num_proc) as (submit, lookahead), bar:
        pending: deque[tuple[list[_Piece], Future]] = deque()

        def finish() -> None:
            batch, future = pending.popleft()
            file.write(writer.join(batch, *future.result()))
            bar.update(documents.position - bar.n)

        for batch in _batches(documents):
            pending.append((batch, submit([piece.text for piece in batch])))
            if len(pending) > lookahead:
                finish()
        while pending:
            finish()
    kept = np.frombuffer(writer.has_tokens, np.uint8).astype(bool)
    dropped = documents.dropped + Counter({"no tokens": int((~kept).sum())})
    return TokenizedCorpus(
        path=path,
        dtype=writer.dtype,
        lengths=np.frombuffer(writer.lengths, np.int64)[kept],
        copies=np.frombuffer(documents.copies, np.int64)[kept],
        hashes=np.frombuffer(documents.hashes, np.uint64)[kept],
        documents=documents.num_read,
        dropped={reason: count for reason, count in sorted(dropped.items()) if count},
        num_bytes=documents.num_bytes,
        max_token_id=writer.max_token_id,
        special={int(i): int(writer.special_counts[i]) for i in np.flatnonzero(writer.special_counts)},
        num_split=documents.num_split,
    )


class _Documents:
    """The usable documents of all sources in order, as pieces; counts what it drops, remembers what it yields."""

    def __init__(self, sources: Sequence[Source], seed: int, encode: Callable[[str], list[int]]):
        self.sources, self.encode = sources, encode
        self.key = str(seed).encode()
        self.num_read = self.num_bytes = self.num_split = 0
        self.position = 0  # bytes of shards read, as their sizes estimate them
        self.dropped: Counter[str] = Counter()
        self.copies = array("q")
        self.hashes = array("Q")

    def __iter__(self) -> Iterator[_Piece]:
        for index, source in enumerate(self.sources):
            limit = source.settings.max_documents or float("inf")
            taken = 0
            end_of_source = self.position + sum(shard.num_bytes for shard in source.shards)
            for shard in source.shards:
                if taken >= limit:
                    break
                end_of_shard = self.position + shard.num_bytes
                for record in shard.read():
                    self.num_read += 1
                    text = record.text
                    self.position = min(end_of_shard, self.position + len(text or ""))
                    if text is None or not text or text.isspace():
                        self.dropped[record.reason or "empty"] += 1
                        continue
                    taken += 1
                    place = f"{shard.label}:{record.number}"
                    if self._remember(text, f"{index}:{taken}", source.settings.weight):
                        *firsts, last = split_text(text, self.encode)
                        self.num_split += bool(firsts)
                        yield from (_Piece(piece, "") for piece in firsts)
                        yield _Piece(last, place)
                    if taken >= limit:
                        break
                self.position = end_of_shard
            self.position = end_of_source

    def _remember(self, text: str, key: str, weight: float) -> int:
        """How often the weight takes this document: 2.3 is twice, and a third time for 30% by a seeded hash."""
        part = blake2b(key.encode(), digest_size=8, key=self.key).digest()
        copies = int(weight) + (int.from_bytes(part, "little") / 2**64 < weight % 1)
        if not copies:
            self.dropped["weight"] += 1
            return 0
        content = text.encode()
        self.copies.append(copies)
        self.hashes.append(int.from_bytes(blake2b(content, digest_size=8, key=self.key).digest(), "little"))
        self.num_bytes += len(content)
        return copies


class _Writer:
    """Joins encoded pieces to documents with BOS and EOS, and checks the ids."""

    def __init__(self, path: Path, tokenizer: "PreTrainedTokenizerFast", settings: TokenizerSettings):
        self.vocab_size = len(tokenizer)
        special = [tokenizer.bos_token_id] * settings.add_bos, [tokenizer.eos_token_id] * settings.add_eos
        self.max_token_id = max(*special[0], *special[1], 0, 0)
        self.dtype = np.dtype(np.uint16 if max(self.vocab_size, self.max_token_id) <= 2**16 else np.uint32)
        self.bos, self.eos = (np.array(token_id, self.dtype) for token_id in special)
        self.special = np.zeros(self.vocab_size, bool)
        self.special[[token_id for token_id in special_ids(tokenizer) if token_id < self.vocab_size]] = True
        self.special_counts = np.zeros(self.vocab_size, np.int64)
        self.lengths, self.has_tokens = array("q"), array("B")
        self.length = 0

    def join(self, batch: list[_Piece], ids: np.ndarray, lengths: np.ndarray) -> memoryview:
        """The bytes to write for one batch: `ids` of all pieces, `lengths` per piece."""
        if len(ids):
            self._check(batch, ids, lengths)
        ids = ids.astype(self.dtype, copy=False)
        parts, end = [], 0
        for piece, length in zip(batch, lengths.tolist(), strict=True):
            begin, end = end, end + length
            if length:
                if not self.length:
                    parts.append(self.bos)
                    self.length += len(self.bos)
                parts.append(ids[begin:end])
                self.length += length
            if piece.place:
                if self.length:
                    parts.append(self.eos)
                    self.length += len(self.eos)
                self.lengths.append(self.length)
                self.has_tokens.append(self.length > 0)
                self.length = 0
        return memoryview(np.concatenate(parts)) if parts else memoryview(b"")

    def _check(self, batch: list[_Piece], ids: np.ndarray, lengths: np.ndarray) -> None:
        self.max_token_id = max(self.max_token_id, int(ids.max()))
        if self.max_token_id >= self.vocab_size:
            at = int(np.searchsorted(np.cumsum(lengths), int(np.argmax(ids)), side="right"))
            place = next((piece.place for piece in batch[at:] if piece.place), "a long document")
            raise DataError(
                f"{place}: token id {self.max_token_id}, but the tokenizer counts {self.vocab_size} tokens, and so "
                "would the model. Its tokenizer.json has holes or belongs to another vocabulary; use a matching one."
            )
        spelled = ids[self.special[ids]]
        if len(spelled):
            self.special_counts += np.bincount(spelled, minlength=self.vocab_size)


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
