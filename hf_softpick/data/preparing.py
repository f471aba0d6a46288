"""The whole way from data settings to packed rows on disk, done once and reused; every rank may call it."""

import contextlib
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_softpick.data.cache import build_once, cache_root, fingerprint, read_manifest
from hf_softpick.data.contents import Contents, progress_bar
from hf_softpick.data.identity import FORMAT, asked_for, content_of, identity_of, older_name
from hf_softpick.data.packing import RowPlan, first_by_hash, hold_out, plan_rows
from hf_softpick.data.redaction import redact, redacted_errors
from hf_softpick.data.settings import DataSettings, TokenizerSettings
from hf_softpick.data.sources import Source, SourceGone, open_sources
from hf_softpick.data.special_tokens import was_forgeable
from hf_softpick.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from hf_softpick.data.tokenizing import TokenizedCorpus, tokenize
from hf_softpick.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from hf_softpick.data.rows import PackedRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """Packed rows, the tokenizer that made them, and the report of what became of every document."""

    train: "PackedRows"
    validation: "PackedRows | None"
    tokenizer: "PreTrainedTokenizerFast"
    directory: Path
    report: dict[str, Any]
    content: str
    """Identity of the rows and of what their ids mean: the same wherever the sources and the cache lie."""
    older_name: str | None = None
    """What format 2 would call the cache folder of today's sources, None where it would make other rows of them."""

    def matches(self, recorded: str) -> bool:
        """Whether `recorded`, a `content` or the name of an older version's cache folder, stands for the same rows.

        An older name is proved by the rows in that folder, where it is still beside this one, else by sources whose
        paths, sizes and times are what they were.
        """
        if not re.fullmatch("packed-[0-9a-f]{32}", recorded):
            return recorded == self.content
        older = self.directory.with_name(recorded)
        # A folder of any age and state: whatever cannot be read is no proof.
        with contextlib.suppress(Exception):
            return content_of(older) == self.content
        return recorded == self.older_name

    def require_rows(self, num_rows: int) -> None:
        """Raise DataError unless there are `num_rows` training rows, one optimizer step's worth."""
        if len(self.train) < num_rows:
            raise DataError(
                f"{len(self.train)} training rows of {self.report['seq_len']} tokens, but one optimizer step takes "
                f"{num_rows}. Add data, or lower data.seq_len, the batch size or the accumulation steps. "
                f"Of {self.report['documents']} documents, dropped: {self.report['dropped'] or 'none'}."
            )


@redacted_errors()
def prepare_data(data: DataSettings, tokenizer: TokenizerSettings, progress: bool = True) -> PreparedData:
    """Tokenize and pack the sources, or load what an earlier call with the same inputs made.

    Args:
        progress: show progress bars with the time left, in the process that does the work.

    Returns:
        Rows with columns input_ids, position_ids (int32, seq_len each) and num_tokens; train rows are shuffled.

    Raises:
        DataError: the data cannot be read or nothing usable is left of it.
        StorageError: the cache folder cannot be written.
    """
    contents = Contents(cache_root(data.cache_dir), progress)
    asked = asked_for(data, tokenizer)
    try:
        sources = open_sources(data.sources)
    except SourceGone as error:
        directory = contents.path.with_name(contents.recall(asked) or "nothing")
        manifest = read_manifest(directory, contents)
        if manifest is None:
            raise
        notice = f"{redact(str(error))} Going on with what was prepared when it was there, {directory}."
        logger.warning("%s", notice)
        return _load(directory, manifest, False, {"notices": [notice]})
    notices = [redact(line) for source in sources for line in source.notices()]
    for line in notices if os.environ.get("RANK", "0") == "0" else ():
        logger.warning("%s", line)
    loaded = load_tokenizer(tokenizer) if tokenizer.from_ is not None else None
    identity = identity_of(data, tokenizer, sources, loaded, contents)
    directory = contents.path.with_name(f"packed-{fingerprint(identity)}")

    def build(staging: Path) -> dict[str, Any]:
        return _build(staging, data, tokenizer, sources, loaded, progress) | {"identity": identity}

    manifest, is_new = build_once(directory, build, contents)
    contents.remember(asked, directory.name)
    seen = {"notices": notices, "commits": {redact(s.settings.path): s.commit for s in sources if s.commit}}
    return _load(directory, manifest, is_new, seen, older_name(data, tokenizer, sources, loaded))


def _build(
    staging: Path,
    data: DataSettings,
    settings: TokenizerSettings,
    sources: list[Source],
    tokenizer: "PreTrainedTokenizerFast | None",
    progress: bool,
) -> dict[str, Any]:
    """Fill the staging folder; returns the manifest with its report."""
    from hf_softpick.data.rows import write_rows

    begin = time.perf_counter()
    if tokenizer is None:
        tokenizer = train_tokenizer(sources, settings.train_bpe)
    save_tokenizer(tokenizer, settings, staging / "tokenizer")
    after_tokenizer = time.perf_counter()
    token_file = staging / "tokens.bin"
    corpus = tokenize(sources, tokenizer, settings, token_file, data.seed, data.num_proc, progress)
    if not len(corpus.lengths):
        reasons = ", ".join(f"{count} {reason}" for reason, count in corpus.dropped.items())
        raise DataError(
            f"no document is left of {corpus.documents} read ({reasons or 'none dropped'}). "
            f"Check the sources {[source.settings.path for source in sources]} and their text_column and weight."
        )
    after_tokenizing = time.perf_counter()
    chosen_by = (corpus.hashes, corpus.lengths, data.validation)
    is_validation = hold_out(*chosen_by)
    as_format_2 = bool(
        not corpus.num_split and (is_validation == first_by_hash(*chosen_by)).all() and not was_forgeable(tokenizer)
    )
    if is_validation.all():
        raise DataError(
            f"data.validation={data.validation} leaves nothing to train on: there are {len(is_validation)} usable "
            "documents, all with the same text. Add data, or set data.validation=0."
        )
    plans = {"train": _plan(corpus, ~is_validation, data, repeat=True)}
    if data.validation:
        plans["validation"] = _plan(corpus, is_validation, data, repeat=False)
    # Padding is never attended to by text and never a target: any id of the vocabulary will do.
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    with progress_bar(sum(plan.num_tokens for plan in plans.values()), "Packing", "tok", progress) as bar:
        for split, plan in plans.items():
            write_rows(staging / f"{split}.arrow", plan, corpus.tokens, pad, data.isolate_documents, bar)
    token_file.unlink()
    facts: dict[str, Any] = {}
    for split, plan in plans.items():
        facts |= {f"{split}_rows": plan.num_rows, f"{split}_tokens": plan.num_tokens}
        facts |= {f"{split}_padding": round(plan.padding, 6), f"{split}_cut_documents": plan.num_cut}
    report = {
        "seq_len": data.seq_len,
        "vocab_size": len(tokenizer),
        "max_token_id": corpus.max_token_id,
        "documents": corpus.documents,
        "dropped": corpus.dropped,
        "special_tokens_in_text": {tokenizer.convert_ids_to_tokens(i): count for i, count in corpus.special.items()},
        "megabytes": round(corpus.num_bytes / 1e6, 3),
        "tokens": int(corpus.lengths.sum()),
        "train_documents": int((~is_validation).sum()),
        "validation_documents": int(is_validation.sum()),
        **facts,
        "seconds_tokenizer": round(after_tokenizer - begin, 3),
        "seconds_tokenizing": round(after_tokenizing - after_tokenizer, 3),
        "seconds_packing": round(time.perf_counter() - after_tokenizing, 3),
    }
    return {"format": FORMAT, "report": report, "content": content_of(staging), "as_format_2": as_format_2}


def _plan(corpus: TokenizedCorpus, chosen: np.ndarray, data: DataSettings, repeat: bool) -> RowPlan:
    documents = np.flatnonzero(chosen)
    if repeat:
        documents = np.repeat(documents, corpus.copies[documents])
    else:
        # A text that occurs twice would count twice in the loss.
        documents = documents[np.unique(corpus.hashes[documents], return_index=True)[1]]
    lengths, alone = corpus.lengths[documents], data.packing == "one_document"
    return plan_rows(corpus.starts[documents], lengths, data.seq_len, data.seed, alone)


def _load(
    directory: Path, manifest: dict[str, Any], is_new: bool, seen: dict[str, Any], older_name: str | None = None
) -> PreparedData:
    from transformers import AutoTokenizer

    from hf_softpick.data.rows import PackedRows

    report = manifest["report"]
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer", trust_remote_code=False)
    if len(tokenizer) <= report["max_token_id"]:
        raise DataError(
            f"{directory}: token id {report['max_token_id']} in rows of a tokenizer with {len(tokenizer)} ids."
        )
    validation = directory / "validation.arrow"
    return PreparedData(
        train=PackedRows.open(directory / "train.arrow"),
        validation=PackedRows.open(validation) if validation.is_file() else None,
        tokenizer=tokenizer,
        directory=directory,
        report=report | {"from_cache": not is_new} | seen,
        content=manifest["content"],
        older_name=older_name if manifest.get("as_format_2") else None,
    )
