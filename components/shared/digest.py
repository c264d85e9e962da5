"""Digests: the only thing that decides whether two things are the same."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

TREE_ROOT = Path(__file__).resolve().parents[2]


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, so that equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def of_value(value: Any) -> str:
    """Hex sha256 of a JSON value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def source_files(*folders: str) -> list[Path]:
    """The source files below folders of this tree, and the dependency locks: what `of_folders` is over."""
    found: list[Path] = []
    for folder in folders:
        found += [
            p for p in (TREE_ROOT / folder).rglob("*") if p.suffix in (".py", ".jinja", ".html", ".json")
        ]
    return sorted(found) + sorted((TREE_ROOT / "requirements").glob("*.txt"))


@cache
def of_folders(*folders: str) -> str:
    """Hex sha256 over the source files below folders of this tree and over the dependency locks."""
    return of_value([[str(path.relative_to(TREE_ROOT)), of_file(path)] for path in source_files(*folders)])


def of_code(stage: str) -> str:
    """Hex sha256 over the code that decides what a stage produces.

    That is the stage's folder, components/shared and the dependency locks; for deploy also serving/,
    since a new server must be put in service like a new model.
    """
    folders = [f"components/{stage}", "components/shared"] + (["serving"] if stage == "deploy" else [])
    return of_folders(*folders)
