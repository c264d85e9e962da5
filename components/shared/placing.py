"""Files into their place: whole or not at all; and what to say when there is no room for them."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from components.shared.errors import TuneyardError


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


def room(folder: Path) -> str:
    """How many bytes are free under a folder, in words; it need not exist yet."""
    folder = folder.resolve()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return f"{shutil.disk_usage(there).free:,} bytes are free under {there}"


def disk_full(error: BaseException, folder: Path) -> TuneyardError | None:
    """The same error in our words when it says that a disk is full, else None.

    Args:
        error: an OSError, or what a library in another language made of one (then only its text tells).
        folder: where was written, for an error that names no file.
    """
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, TuneyardError) or not (full or os.strerror(errno.ENOSPC) in str(error)):
        return None
    name = getattr(error, "filename", None)
    return TuneyardError(
        f"the disk is full ({error}): {room(Path(os.fsdecode(name)) if name else folder)}",
        "free some, or set TUNEYARD_HOME to a folder on a larger disk; then submit again",
    )
