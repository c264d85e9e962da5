"""Files that travel with examples: an example names one by its path below the folder of its artifact."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from components.shared import examples, jsonl

# Below it `<2>/<sha256 of the bytes><suffix>`, so that equal files are there once.
FOLDER = "media"
FIELDS = tuple(name for name, kind in examples.NOT_TEXT.items() if kind == "media")


class BadMedia(Exception):
    """A file that is no usable image or recording.

    Args:
        reason: code, for the account of the quarantine.
        detail: what was seen.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def rooted(rows: Iterable[Mapping[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """The same examples, their files as paths of this machine."""
    for row in rows:
        yield {**row, **{name: str(folder / row[name]) for name in FIELDS if name in row}}


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """The examples of an artifact, their files as paths of this machine.

    Raises:
        TuneyardError: a line is no JSON object.
    """
    return rooted(jsonl.read(folder / "examples.jsonl"), folder)


def carry(rows: Iterable[Mapping[str, Any]], source: Path, target: Path) -> None:
    """Put the files of examples, which name them below `source`, into another artifact's folder too."""
    for name in dict.fromkeys(row[field] for row in rows for field in FIELDS if field in row):
        lay(source / name, target / name)


def lay(source: Path, target: Path) -> None:
    """A second name for a file, or a copy on another disk; nothing where it is there already."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
