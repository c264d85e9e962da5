"""Files into their place: whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the filesystem has none."""
    try:
        os.link(source, target)
    except OSError:
        # Another filesystem: a link is impossible there, a copy is not.
        shutil.copyfile(source, target)


def into_place(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file or folder aside, then rename it into place; a rival that was first has made the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        make(aside)
        if path.exists():
            return
        os.replace(aside, path)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)
