"""Rows that name a file: the file is found, read to its end, measured, and laid beside the examples."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.ingest.config import IngestConfig
from components.ingest.reading import Fault, Rows
from components.shared import examples, images, media, sounds
from components.shared.media import BadMedia

# A file of more is no picture to learn from; it would only fill the memory.
_MAX_BYTES = 512 * 2**20


def is_media(path: Path, field: str) -> bool:
    """Whether a file's name says that it may be what the field holds."""
    suffixes = images.SUFFIXES if field == "image" else sounds.SUFFIXES
    return path.suffix.lower() in suffixes


def located(rows: Rows, column: str, folder: Path) -> Rows:
    """The rows of a list of files, each name replaced by the path it means, below the list's own folder."""
    for line, row in rows:
        if isinstance(row, Fault) or not isinstance(row.get(column), str | dict):
            yield line, row
            continue
        value = row[column]
        if isinstance(value, dict):  # as data sets in Parquet hold files
            inside = value.get("bytes")
            value = inside if isinstance(inside, bytes) and inside else value.get("path")
        yield line, {**row, column: _found(value, folder) if isinstance(value, str) else value}


def _found(name: str, folder: Path) -> Path | Fault:
    path = Path(os.path.normpath(folder / name))
    if Path(name).is_absolute() or not path.is_relative_to(folder):
        what = f"{name!r} leaves the folder of the list; write names relative to it"
        return Fault("outside_folder", "", what)
    return path


def by_folder(name: str, path: Path, source: str, config: IngestConfig) -> Rows:
    """The one row of a file that no list names.

    A picture's class is the folder that it lies in; a recording's transcript is the text file of its name.

    Args:
        name: of the file, as it is shown.
        path: of it.
        source: what the pipeline file names.
        config: settings.
    """
    if config.format == "transcribed-audio":
        yield 1, _beside(path, config)
        return
    if "/" not in name.removeprefix(source.rstrip("/") + "/"):
        yield 1, Fault("missing_field", "label", "the file lies in no folder that could be its class")
        return
    field, label = (config.columns.get(name) or name for name in examples.REQUIRED[config.format])
    yield 1, {field: path, label: path.parent.name}


def _beside(path: Path, config: IngestConfig) -> dict[str, Any] | Fault:
    text, (audio, said) = path.with_suffix(".txt"), examples.REQUIRED[config.format]
    try:
        transcript = text.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return Fault("bad_encoding", "text", f"{text.name}: {error}")
    except OSError:
        return Fault(
            "missing_field", "text", f"no list names {path.name}, and there is no {text.name} beside it"
        )
    return {config.columns.get(audio) or audio: path, config.columns.get(said) or said: transcript}


@dataclass(frozen=True)
class Shelf:
    """Where the files of examples go: the folder of their artifact."""

    folder: Path

    def take(self, field: str, value: Any) -> dict[str, Any] | Fault:
        """Lay a file beside the examples.

        Args:
            field: of the dataset type.
            value: path of the file, its bytes, or why there is none.

        Returns:
            The field and what examples.MEASURED has beside it, or what is wrong with the file.
        """
        if isinstance(value, Fault):
            return Fault(value.reason, field, value.detail)
        if not isinstance(value, Path | bytes):
            what = "null" if value is None else f"{type(value).__name__}, no name of a file"
            return Fault("missing_field" if value is None else "wrong_type", field, what)
        try:
            raw = _bytes(value) if isinstance(value, Path) else value
            if field == "image":
                image, suffix, channels = images.decode(raw)
                found = images.measured(image, channels)
            else:
                suffix = sounds.SUFFIXES[0]
                found = sounds.measured(*sounds.decode(raw))
        except BadMedia as error:
            return Fault(error.reason, field, f"{_shown(value)}: {error.detail}")
        sha256 = hashlib.sha256(raw).hexdigest()
        name = f"{media.FOLDER}/{sha256[:2]}/{sha256}{suffix}"
        target = self.folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(raw)
        return {field: name, **found}


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise BadMedia("too_large", f"{size:,} bytes, over {_MAX_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise BadMedia("missing_file", f"{type(error).__name__}: no such file can be read") from error


def _shown(value: Path | bytes) -> str:
    return value.name if isinstance(value, Path) else "the row's own bytes"


def identity(example: dict[str, Any], dataset_type: str) -> dict[str, Any]:
    """What an example's id is made of: its fields, a file by what is in it."""
    field, measured = examples.media_field(dataset_type), examples.MEASURED.get(dataset_type, ())
    return {k: v for k, v in example.items() if k != field and k not in measured[1:]}
