"""Rows out of files: JSONL, CSV or Parquet, plain, .gz or .zst, one at a time and each with its line.

A reader yields `(line, row)` for a good row and `(line, Fault)` for one that cannot be read; it never stops
at a bad row. Lines count from 1 in text files (the line a row begins on) and rows from 1 in Parquet.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import zstandard

from components.shared.errors import StageStopped, TuneyardError

MAX_LINE_BYTES = 16 * 2**20
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Fault:
    """Why a row went to quarantine: a reason code, the field (empty for the whole row), and what was seen."""

    reason: str
    field: str
    detail: str
    raw: str = ""


Rows = Iterator[tuple[int, "dict[str, Any] | Fault"]]


def data_suffix(path: Path) -> str:
    """`.jsonl`, `.csv`, `.tsv` or `.parquet`, whatever compression comes after it; empty for other files."""
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in (".gz", ".zst")]
    last = suffixes[-1] if suffixes else ""
    if last in (".ndjson", ".json"):
        return ".jsonl"
    return last if last in _SUFFIXES else ""


_CHUNK_BYTES = 2**18


def _chunks(path: Path) -> Iterator[bytes | Fault]:
    """Bytes of a possibly compressed file; a torn stream ends in one Fault after all that could be read.

    One underlying read at a time: a buffered reader would lose what it holds when the stream breaks off.
    """
    suffix = path.suffix.lower()
    try:
        with path.open("rb") as raw:
            if suffix == ".gz":
                with gzip.GzipFile(fileobj=raw) as plain:
                    yield from iter(lambda: plain.read1(_CHUNK_BYTES), b"")
            elif suffix == ".zst":
                with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as reader:
                    yield from iter(lambda: reader.read1(_CHUNK_BYTES), b"")
            else:
                yield from iter(lambda: raw.read(_CHUNK_BYTES), b"")
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        yield Fault("torn_file", "", f"{type(error).__name__}: {error}")


def _lines(path: Path) -> Iterator[tuple[int, bytes | Fault]]:
    """Lines with their numbers; an over-long line and a torn end are one Fault each."""
    number, pending, size, torn = 1, [], 0, None
    for chunk in _chunks(path):
        if isinstance(chunk, Fault):
            torn = chunk
            break
        *ended, rest = chunk.split(b"\n")
        for end in ended:
            pending.append(end)
            yield number, _line(pending, size + len(end))
            number, pending, size = number + 1, [], 0
        size += len(rest)
        if size <= MAX_LINE_BYTES:
            pending.append(rest)
    if torn:
        yield number, torn
    elif size:
        yield number, _line(pending, size)


def _line(parts: list[bytes], size: int) -> bytes | Fault:
    if size <= MAX_LINE_BYTES:
        return b"".join(parts)
    return Fault("line_too_long", "", f"{size} bytes, over {MAX_LINE_BYTES}", _shown(b"".join(parts)))


def _shown(raw: bytes) -> str:
    return raw[:500].decode("utf-8", "backslashreplace")


_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_jsonl(path: Path) -> Rows:
    """One JSON object a line; blank lines are no rows."""
    for number, line in _lines(path):
        if isinstance(line, Fault):
            yield number, line
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            reason = "bad_encoding" if "UTF-8" in str(error) or _LONE_SURROGATE.search(line) else "bad_json"
            yield number, Fault(reason, "", str(error), _shown(line))
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            yield number, Fault("not_an_object", "", f"a JSON {type(row).__name__}", _shown(line))


def _each_once(path: Path, names: Sequence[str]) -> list[str]:
    """Column names. A row is a mapping, so of two columns with one name it would keep only the last.

    Columns without a name cannot be asked for, so it does not matter how many there are.

    Raises:
        StageStopped: a name stands twice.
    """
    twice = sorted(name for name, count in Counter(names).items() if name and count > 1)
    if twice:
        raise StageStopped(
            f"{path.name}: more than one column is named {', '.join(map(repr, twice))}",
            "rename or remove the columns that are not meant, so that each name stands once",
        )
    return list(names)


def read_csv(path: Path, delimiter: str = ",") -> Rows:
    """CSV with a header row (RFC 4180); the line is the one a row begins on.

    Raises:
        StageStopped: two columns have one name.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    bad: list[tuple[int, Fault]] = []
    at = 0

    def decoded() -> Iterator[str]:
        nonlocal at
        for number, line in _lines(path):
            at = number
            if isinstance(line, Fault):
                bad.append((number, line))
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad.append((number, Fault("bad_encoding", "", str(error), _shown(line))))
                continue
            if "\0" in text:
                bad.append((number, Fault("bad_csv", "", "a NUL character", _shown(line))))
                continue
            yield text + "\n"

    reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    began = 1
    while True:
        began = at + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            yield began, Fault("bad_csv", "", str(error))
            continue
        finally:
            yield from bad
            bad.clear()
        if header is None:
            header = _each_once(path, [cell.strip() for cell in cells])
        elif len(cells) != len(header):
            if cells:
                detail = f"{len(cells)} cells under {len(header)} column names"
                yield began, Fault("bad_csv", "", detail, delimiter.join(cells)[:500])
        else:
            yield began, dict(zip(header, cells, strict=True))


def read_parquet(path: Path) -> Rows:
    """Parquet, one row group at a time.

    Raises:
        StageStopped: two columns have one name.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _each_once(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        yield number + 1, Fault("torn_file", "", f"{type(error).__name__}: {error}")


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": lambda path: read_csv(path, "\t"),
    ".parquet": read_parquet,
}


def read(path: Path) -> Rows:
    """Rows of a file, by its name.

    Raises:
        TuneyardError: the name tells no known format.
    """
    suffix = data_suffix(path)
    if not suffix:
        raise TuneyardError(
            f"{path.name}: no known data format",
            "name it .jsonl, .csv, .tsv or .parquet (also with .gz or .zst)",
        )
    return _READERS[suffix](path)
