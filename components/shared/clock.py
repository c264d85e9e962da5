"""What a stage takes: how long its models compute (the rest is overhead, to be cut), and how much memory."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_seconds = 0.0
_inside = 0

# What of the time may go into giving memory back.
_TIDYING_SHARE = 0.025
_tidied_at = _tidying_seconds = 0.0


@contextmanager
def arithmetic() -> Iterator[None]:
    """Count what is inside as model arithmetic (forward, backward, optimizer); nested, once.

    After it, and now and then, what it freed goes back to the kernel: see `give_back_memory`.
    """
    global _inside, _seconds
    started = time.perf_counter()
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1
        if not _inside:
            _seconds += time.perf_counter() - started
            _tidy()


def arithmetic_seconds() -> float:
    """Seconds inside `arithmetic` since this process began."""
    return _seconds


def peak_memory_gib() -> float:
    """Most resident memory, in GiB, since this process began; a stage has one to itself."""
    status = Path("/proc/self/status")
    if status.is_file():
        # What getrusage says on Linux includes the process that this one was forked from.
        marked = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert marked
        return int(marked[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def _tidy() -> None:
    """Give memory back, as seldom as its share of the time demands: it costs more the more there is."""
    global _tidied_at, _tidying_seconds
    began = time.perf_counter()
    if began - _tidied_at < _tidying_seconds / _TIDYING_SHARE:
        return
    give_back_memory()
    _tidied_at = time.perf_counter()
    _tidying_seconds = _tidied_at - began


def keep_few_kernels() -> None:
    """Let oneDNN forget the kernels of shapes that were not met for long; before the first product.

    It keeps one of every product for each shape, a thousand unless told: of batches of ragged lengths that is
    a GiB. Those of a layer are enough, since the next layer has the same.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def give_back_memory() -> None:
    """Let the C library return what is free to the kernel.

    glibc keeps freed blocks of up to 32 MiB, and a weight seldom fits into the block that another left.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)
