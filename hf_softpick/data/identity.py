"""What makes prepared data the same: the name of its cache folder before it is made, its content afterwards."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_softpick.data.cache import fingerprint
from hf_softpick.data.contents import Contents
from hf_softpick.data.settings import DataSettings, TokenizerSettings
from hf_softpick.data.shards import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 3
"""Raise it whenever the same settings would give other rows: older caches are then rebuilt."""
_OF_EACH_DOCUMENT = {"text_column", "weight", "max_documents"}
_FORMAT_2 = {
    "data": {"seq_len", "packing", "isolate_documents", "validation", "seed"},
    "source": _OF_EACH_DOCUMENT | {"path", "name", "split", "revision", "data_files"},
    "tokenizer": {"train_bpe", "add_bos", "add_eos"},
}


def asked_for(data: DataSettings, tokenizer: TokenizerSettings) -> str:
    """A name of the settings alone, as what they gave may be asked for when the sources are gone."""
    settings = data.model_dump(mode="json", exclude={"cache_dir", "num_proc"}), tokenizer.model_dump(mode="json")
    return f"asked {fingerprint([*settings, [os.path.abspath(source.path) for source in data.sources]])}"


def identity_of(
    data: DataSettings,
    settings: TokenizerSettings,
    sources: list[Source],
    tokenizer: "PreTrainedTokenizerFast | None",
    contents: Contents,
) -> dict[str, Any]:
    """All that the rows depend on: of sources and tokenizer what they hold, not where they lie or since when."""
    return {
        "format": FORMAT,
        "data": data.model_dump(mode="json", exclude={"cache_dir", "num_proc", "sources"}),
        "tokenizer": settings.model_dump(mode="json", exclude={"from_", "revision"}),
        "sources": [
            [source.settings.model_dump(include=_OF_EACH_DOCUMENT), fingerprint(source.content(contents))]
            for source in sources
        ],
        **_tokenizer_content(tokenizer),
    }


def older_name(
    data: DataSettings, settings: TokenizerSettings, sources: list[Source], tokenizer: "PreTrainedTokenizerFast | None"
) -> str:
    """What format 2 called the folder: it took sources by path, size and time."""
    listed = [source.model_dump(mode="json", include=_FORMAT_2["source"]) for source in data.sources]
    identity = {
        "format": 2,
        "data": data.model_dump(mode="json", include=_FORMAT_2["data"]) | {"sources": listed},
        "tokenizer": settings.model_dump(mode="json", include=_FORMAT_2["tokenizer"]),
        "sources": [fingerprint([shard.origin for shard in source.shards]) for source in sources],
        **_tokenizer_content(tokenizer),
    }
    return f"packed-{fingerprint(identity)}"


def _tokenizer_content(tokenizer: "PreTrainedTokenizerFast | None") -> dict[str, str]:
    if tokenizer is None:
        return {}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {"tokenizer_content": fingerprint([tokenizer.backend_tokenizer.to_str(), special])}


def content_of(directory: Path) -> str:
    """Identity of a folder's rows and of what their ids mean; no version of a library moves it."""
    from transformers import AutoTokenizer

    from hf_softpick.data.rows import PackedRows

    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer", trust_remote_code=False)
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    rows = {path.stem: PackedRows.open(path).digest() for path in sorted(directory.glob("*.arrow"))}
    return f"rows-{fingerprint([rows, tokenizer.get_vocab(), ends])}"
