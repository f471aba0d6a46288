"""What a recipe says of data and tokenizer, as validated objects. Imports pydantic alone: recipes check fast."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of every recipe section: unknown keys and implicit conversions are errors, values never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)


class SourceSettings(Section):
    """One text source: `stdlib`, a local .jsonl/.json/.parquet/.txt file, glob, folder, or `load_dataset` options."""

    path: str = Field(min_length=1)
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | list[str] | None = None
    text_column: str = Field(default="text", min_length=1)
    weight: float = Field(default=1.0, gt=0, le=1000)
    max_documents: int | None = Field(default=None, ge=1)


class TokenizerSettings(Section):
    """Exactly one of `from` (any Hugging Face tokenizer) and `train_bpe` (vocabulary size of a byte-level BPE)."""

    from_: str | None = Field(default=None, alias="from", min_length=1)
    revision: str | None = None
    train_bpe: int | None = Field(default=None, ge=260)
    add_bos: bool = True
    add_eos: bool = True

    @model_validator(mode="after")
    def _one_origin(self) -> "TokenizerSettings":
        if (self.from_ is None) == (self.train_bpe is None):
            raise ValueError("give exactly one of 'from' (a tokenizer to load) and 'train_bpe' (a vocabulary size)")
        return self


class DataSettings(Section):
    """Sources, packing and the held-out share."""

    seq_len: int = Field(ge=8, le=2**24)
    sources: list[SourceSettings] = Field(default_factory=lambda: [SourceSettings(path="stdlib")], min_length=1)
    packing: Literal["best_fit", "one_document"] = "best_fit"
    """one_document: a row holds one document and padding, for models that cannot keep packed documents apart."""
    isolate_documents: bool = True
    validation: float = Field(default=0.005, ge=0, lt=1)
    seed: int = Field(default=42, ge=0, lt=2**32)
    num_proc: int | None = Field(default=None, ge=1)
    cache_dir: str | None = None
