"""Ctrl-C and SIGTERM, held back while something is done that must be done whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM wait; at the end they do what they would have done.

    Python runs a signal's handler between any two of its instructions, so also between the updates of two
    weights. Other threads are never interrupted, and need nothing.

    Returns:
        The numbers of the signals that wait, which grows.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    waiting: list[int] = []
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda got, _: waiting.append(got))
    try:
        yield waiting
    finally:
        for number, handler in before.items():
            # None: installed by something that is no Python; it cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for got in waiting[:1]:
            signal.raise_signal(got)
