"""Readers of single local files: text, JSON lines, JSON arrays and Parquet, one document at a time in bounded memory.

What makes a document usable (not empty, chosen by weight) is decided later; here a record is read or refused by name.
"""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from hf_softpick.errors import DataError

try:
    from compression import zstd  # from Python 3.14
except ImportError:
    try:
        from backports import zstd
    except ImportError:
        zstd = None

KINDS = (".jsonl", ".ndjson", ".json", ".txt")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (".parquet", *(kind + compression for kind in KINDS for compression in ("", *COMPRESSIONS)))
ALLOWED = f"{', '.join(KINDS)}, each also with {', '.join(COMPRESSIONS)}, and .parquet"
# A file whose first records all lack the text column is refused at once, not after hours of counting them as missing.
_RECORDS_WITHOUT_COLUMN = 100
_PARQUET_BATCH = 256
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, *([zstd.ZstdError] if zstd else []))


class Record(NamedTuple):
    """One document: its line (JSON) or row (Parquet) from 1, and its text or the reason why there is none."""

    number: int
    text: str | None
    reason: str = ""


def suffix_of(path: Path) -> str | None:
    """The supported suffix of `path`, or None."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def kind_of(path: Path) -> str | None:
    """The supported suffix of `path` without compression, `.jsonl` for `.ndjson`, or None."""
    suffix = suffix_of(path)
    for compression in COMPRESSIONS if suffix else ():
        suffix = suffix.removesuffix(compression)
    return ".jsonl" if suffix == ".ndjson" else suffix


def read_file(path: Path, column: str) -> Iterator[Record]:
    """Yield the records of one local file, chosen by its suffix.

    Raises:
        DataError: unreadable, not UTF-8, not JSON, no such column, or text that is not a string; names file and line.
    """
    read = {".txt": read_text, ".jsonl": read_json_lines, ".json": read_json, ".parquet": read_parquet}[kind_of(path)]
    try:
        yield from read(path) if read is read_text else read(path, column)
    except _UNREADABLE as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Check the path, its permissions and its compression."
        ) from error


def read_text(path: Path, encoding_errors_drop: bool = False) -> Iterator[Record]:
    """Yield the whole file as one document; `encoding_errors_drop` drops what is not UTF-8 instead."""
    with _open(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not encoding_errors_drop:
            raise _not_utf8(path, content.count(b"\n", 0, error.start) + 1, error) from error
        yield Record(1, None, "not UTF-8")
    else:
        yield Record(1, text)


def read_json_lines(path: Path, column: str) -> Iterator[Record]:
    """Yield one document per line; blank lines are no documents."""
    with _open(path) as file:
        yield from _texts(path, column, _json_lines(path, file))


def read_json(path: Path, column: str) -> Iterator[Record]:
    """Yield the records of a JSON array (read whole), or of JSON lines under the wrong suffix (streamed)."""
    with _open(path) as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        yield from read_json_lines(path, column)
        return
    with _open(path) as file:
        content = file.read()
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, content.count(b"\n", 0, error.start) + 1, error) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}). Repair or re-export the file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise _beyond_limits(str(path), error, "Repair or re-export the file.") from error
    yield from _texts(path, column, enumerate(records, 1))


def read_parquet(path: Path, column: str) -> Iterator[Record]:
    """Yield the rows of one Parquet column, a few hundred at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise missing_column(str(path), column, schema.names)
            if schema.names.count(column) > 1:
                raise DataError(f"{path}: {schema.names.count(column)} columns are called '{column}'. Rename them.")
            kind = schema.field(column).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            strings = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
            if not any(check(kind) for check in strings):
                raise DataError(
                    f"{path}: column '{column}' holds {kind}, expected strings. Set text_column to a text column."
                )
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=[column]):
                try:
                    # By name: a struct `doc` with a field `text` comes along when `doc.text` is asked for.
                    texts = batch.column(column).to_pylist()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}: rows {number + 1} to {number + batch.num_rows}: '{column}' is not UTF-8 ({error}). "
                        "Export the data again as UTF-8."
                    ) from error
                for text in texts:
                    number += 1
                    yield Record(number, text, "" if text is not None else "null or missing")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}). Download or export it again.") from error


def parquet_text_bytes(path: Path, column: str) -> int:
    """Bytes of the text column before compression, an estimate for progress bars; the file size when unknown."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError):
        return path.stat().st_size
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    chunks = (group.column(i) for group in groups for i in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


def missing_column(place: str, column: str, found: list[str]) -> DataError:
    """The error for a text column that is not there."""
    return DataError(
        f"{place}: no column '{column}'; found {sorted(found)}. Set text_column of this source to one of them."
    )


def _open(path: Path) -> IO[bytes]:
    readers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
    return readers.get(path.suffix.lower(), open)(path, "rb")


def _open_zst(path: Path, mode: str) -> IO[bytes]:
    if zstd is None:
        raise DataError(f"{path}: .zst is read by the package backports.zstd. Run pip install backports.zstd.")
    return zstd.open(path, mode)


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    hint = "it looks like UTF-16; " if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
    return DataError(
        f"{path}:{line}: not UTF-8 ({error.reason}, byte 0x{error.object[error.start]:02x}); "
        f"{hint}convert the file to UTF-8."
    )


def _json_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise _not_utf8(path, number, error) from error
        except json.JSONDecodeError as error:
            cut_off = "" if line.endswith(b"\n") else "; the last line seems to be cut off"
            raise DataError(
                f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno}){cut_off}. "
                "Each line must be one JSON object; repair or remove this line."
            ) from error
        except (ValueError, RecursionError) as error:
            raise _beyond_limits(f"{path}:{number}", error, "Repair or remove this line.") from error


def _beyond_limits(place: str, error: Exception, hint: str) -> DataError:
    """The error for valid JSON that Python refuses."""
    what = "JSON nested too deeply" if isinstance(error, RecursionError) else "an integer of over 4300 digits"
    return DataError(f"{place}: {what}. {hint}")


def _texts(path: Path, column: str, records: Iterator[tuple[int, Any]]) -> Iterator[Record]:
    seen, found = 0, None
    for number, record in records:
        if not isinstance(record, dict):
            raise DataError(
                f"{path}:{number}: a record must be a JSON object with a '{column}' key, got {type(record).__name__}."
            )
        if found is None or not found:
            found = column in record
            seen += 1
            if not found and seen == _RECORDS_WITHOUT_COLUMN:
                raise missing_column(str(path), column, list(record))
        text = record.get(column)
        if text is None:
            yield Record(number, None, "null or missing")
        elif isinstance(text, str):
            try:  # JSON can escape half of a surrogate pair, which is no character and which no tokenizer takes
                text.isascii() or text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{path}:{number}: the text holds \\u{ord(text[error.start]):04x}, half of a surrogate pair, "
                    "which is no character. Remove it or export the data again."
                ) from error
            yield Record(number, text)
        else:
            raise DataError(
                f"{path}:{number}: '{column}' is {type(text).__name__}, expected a string. "
                "Set text_column to a text column."
            )
    if found is False:
        raise missing_column(str(path), column, list(record))
