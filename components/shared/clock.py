"""How long a stage's models compute; whatever else its time goes to is overhead, to be shown and cut."""

from __future__ import annotations

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
