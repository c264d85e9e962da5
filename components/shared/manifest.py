"""A manifest names the files of a data set or a model by content; it travels instead of the bytes."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from components.shared import digest
from components.shared.errors import TuneyardError

SCHEMA = "tuneyard/manifest/1"


@dataclass(frozen=True)
class FileEntry:
    """One file of a tree: its POSIX path inside the tree, size in bytes and hex sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a data set or a model consists of.

    Args:
        kind: `dataset`, `model` or `report`.
        files: sorted by path.
        metadata: facts about the content that a reader needs before the bytes (counts, format, labels).
        made_by: stage, key, code digest, settings and input digests: where it comes from.
    """

    kind: str
    files: tuple[FileEntry, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hex sha256 of kind and files: equal bytes have equal digests, whoever made them and when."""
        return digest.of_value({"kind": self.kind, "files": [asdict(entry) for entry in self.files]})

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)

    def to_json(self) -> str:
        """The manifest as JSON text, its digest included so that a torn copy is noticed."""
        return json.dumps(
            {"schema": SCHEMA, "digest": self.digest, **asdict(self)}, indent=1, ensure_ascii=False
        )

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Read a manifest and verify its own digest.

        Args:
            text: what `to_json` wrote.
            where: path or URI, for the error message.

        Raises:
            TuneyardError: not a manifest of this schema, or its digest does not match its files.
        """
        try:
            raw = json.loads(text)
            files = tuple(FileEntry(**entry) for entry in raw["files"])
            manifest = cls(raw["kind"], files, raw["metadata"], raw["made_by"])
            stated = raw["digest"]
        except (ValueError, KeyError, TypeError) as error:
            raise TuneyardError(
                f"{where} is not a Tuneyard manifest ({error})", "submit again to remake it"
            ) from error
        if raw.get("schema") != SCHEMA or stated != manifest.digest:
            raise TuneyardError(
                f"{where}: manifest says digest {stated[:12]}, its files give {manifest.digest[:12]}",
                "the manifest was changed or cut; delete it and submit again",
            )
        return manifest


def describe(folder: Path) -> tuple[FileEntry, ...]:
    """Digest every file below a folder.

    Raises:
        TuneyardError: the folder holds no file, or a symbolic link.
    """
    paths = sorted(p for p in folder.rglob("*") if not p.is_dir())
    links = [str(p) for p in paths if p.is_symlink()]
    if links or not paths:
        found = f"symbolic links {links}" if links else "no file"
        raise TuneyardError(f"{folder}: {found}; an artifact needs plain files", "write real files into it")

    def entry(path: Path) -> FileEntry:
        return FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, digest.of_file(path))

    # hashlib lets other threads run: shards are hashed on as many cores as there are.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(sorted(pool.map(entry, paths), key=lambda entry: entry.path))
