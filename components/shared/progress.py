"""Live progress of long work as lines that a person can read and `submit` can draw in place.

A stage writes `PREFIX` lines on standard error; the runner in front (pipelines/watch.py) draws them as one
moving line on a terminal, and a log file keeps one each few seconds.
"""

from __future__ import annotations

import sys
import time

PREFIX = "\u23f3 "
_INTERVAL_SECONDS = 1.0


class Progress:
    """Counts work that takes a while.

    Args:
        what: a few words, e.g. `train`.
        total: how many units there are; 0 when unknown.
        unit: e.g. `steps`, `examples`.
        done: units that an earlier attempt did; the time left is reckoned without them.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self._first = done
        self._started = time.monotonic()
        self._shown = 0.0

    def advance(self, units: int = 1, **facts: str) -> None:
        """Some units are done; facts (`loss="2.31"`) are shown beside the count."""
        self.done += units
        now = time.monotonic()
        if now - self._shown < _INTERVAL_SECONDS and self.done != self.total:
            return
        self._shown = now
        shown = "  ".join(f"{name} {value}" for name, value in facts.items())
        of_total = f"/{self.total}" if self.total else ""
        line = f"{PREFIX}{self.what}  {self.done}{of_total} {self.unit}  {shown}  {self._left(now)}"
        sys.stderr.write(line.rstrip() + "\n")
        sys.stderr.flush()

    def _left(self, now: float) -> str:
        fresh = self.done - self._first
        if not self.total or fresh <= 0:
            return ""
        seconds = int((now - self._started) / fresh * (self.total - self.done))
        return f"{seconds // 60}:{seconds % 60:02d} left"
