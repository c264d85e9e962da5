"""The objects of a node: each once, under its sha256, read-only, and verified once.

To hash 10 GB at each hand-over would take 10 s; not to look would let whoever writes through a hard link
change every later stage. So a file that was verified is *sealed*: it is made read-only, its time of change
is set some seconds back, and a record beside it keeps size, time, inode and the boot of the machine. A write
through any of its names sets the time to now, which the record then contradicts; another file in its place
has another inode; after a crash, which can lose bytes that were never synced, it is another boot. In each
case the file is hashed again, and fetched again when it is not what its name says.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from components.shared import digest
from components.shared.placing import into_place, link

# Below this a file is copied: it costs nothing, and a stage may edit its own config.json.
_LINKED_FROM_BYTES = 2**20
# Kernels stamp files by a clock that ticks each few milliseconds.
_BACK_NANOSECONDS = 2 * 10**9

Stamp = tuple[int, int, int]


def path_of(cache: Path, sha256: str) -> Path:
    """Where an object lies, if it is there."""
    return cache / "objects" / sha256[:2] / sha256


def stamp(path: Path) -> Stamp:
    """Size, time of change and inode: what any write or replacement changes."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def freeze(path: Path) -> Stamp:
    """Make a file read-only and set its time back, before it is hashed: a write from now on shows."""
    path.chmod(0o444)
    past = time.time_ns() - _BACK_NANOSECONDS
    os.utime(path, ns=(past, past))
    return stamp(path)


def obtain(cache: Path, sha256: str, fetch: Callable[[IO[bytes]], None]) -> Path:
    """An object of the cache, verified; fetched where it is not there or not whole.

    Args:
        cache: of this node.
        sha256: its digest.
        fetch: completes and verifies the file that it gets. One process at a time is in it for one object.

    Returns:
        Its path. Link it or read it; never write to it.
    """
    path = path_of(cache, sha256)
    if _sealed(cache, sha256):
        return path
    with alone(path.with_name(f".{sha256}.partial")) as stream:
        partial = path.with_name(f".{sha256}.partial")
        if not _sealed(cache, sha256) and not _verify(cache, sha256):
            fetch(stream)
            found = freeze(partial)
            os.replace(partial, path)
            _seal(cache, sha256, found)
        partial.unlink(missing_ok=True)
    return path


def lay(source: Path, target: Path) -> None:
    """A file of the cache under another name: a hard link, or a copy of its own when it is small."""
    if source.stat().st_size < _LINKED_FROM_BYTES:
        shutil.copyfile(source, target)
    else:
        link(source, target)


def adopt(cache: Path, sha256: str, path: Path, frozen: Stamp) -> None:
    """Make a file that its owner is done with the cached object: by a hard link, so without a copy.

    Args:
        cache: of this node.
        sha256: digest of its bytes, taken after it was frozen.
        path: the file.
        frozen: what `freeze` returned.
    """
    target = path_of(cache, sha256)
    if target.exists():
        return
    if path.stat().st_nlink > 1:
        # It has another name, and who holds that is not done with it.
        keep_copy(cache, sha256, path)
        return
    into_place(target, lambda aside: link(path, aside))
    if stamp(target) == frozen:
        _seal(cache, sha256, frozen)


def keep_copy(cache: Path, sha256: str, path: Path) -> None:
    """Copy a file into the cache; it is verified when it is first asked for."""
    target = path_of(cache, sha256)
    if not target.exists():
        into_place(target, lambda aside: shutil.copyfile(path, aside))


def forget(cache: Path, sha256: str) -> None:
    """Drop an object from the cache; who has linked it keeps it."""
    path_of(cache, sha256).unlink(missing_ok=True)
    _record(cache, sha256).unlink(missing_ok=True)


@contextmanager
def alone(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading and appending; who else wants it waits. It may be renamed or removed inside.

    The kernel lets go of the lock when its holder dies, however it dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            try:
                ours = os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
            except FileNotFoundError:
                ours = False
            if ours:
                yield stream
                return
        # The one before us has renamed it away: what we waited for is another file.


def _verify(cache: Path, sha256: str) -> bool:
    """Hash a cached file that has no seal; seal it, or remove it."""
    path = path_of(cache, sha256)
    if not path.exists():
        return False
    frozen = freeze(path)
    if digest.of_file(path) == sha256 and stamp(path) == frozen:
        _seal(cache, sha256, frozen)
        return True
    path.unlink()
    return False


def _sealed(cache: Path, sha256: str) -> bool:
    try:
        return _record(cache, sha256).read_text(errors="replace") == _text(stamp(path_of(cache, sha256)))
    except FileNotFoundError:
        return False


def _seal(cache: Path, sha256: str, frozen: Stamp) -> None:
    record = _record(cache, sha256)
    record.unlink(missing_ok=True)
    into_place(record, lambda aside: aside.write_text(_text(frozen)))


def _record(cache: Path, sha256: str) -> Path:
    return cache / "verified" / sha256[:2] / sha256


def _text(found: Stamp) -> str:
    return " ".join(map(str, (*found, _boot())))


@functools.cache
def _boot() -> str:
    """Which boot of the machine this is; '' where no such file tells (then a seal outlives a crash)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
