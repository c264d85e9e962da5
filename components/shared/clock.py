"""What a stage takes: how long its models compute (the rest is overhead, to be cut), and how much memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_seconds = 0.0
_inside = 0


@contextmanager
def arithmetic() -> Iterator[None]:
    """Count what is inside as model arithmetic (forward, backward, optimizer); nested, once."""
    global _inside, _seconds
    started = time.perf_counter()
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1
        if not _inside:
            _seconds += time.perf_counter() - started


def arithmetic_seconds() -> float:
    """Seconds inside `arithmetic` since this process began."""
    return _seconds


def peak_memory_gib() -> float:
    """Most resident memory, in GiB, since this process began; a stage has one to itself."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
