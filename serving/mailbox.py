"""The bounded queue in front of a model's worker thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from serving import faults

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """Requests that wait for one worker.

    Args:
        limit: how many may wait; one more is refused.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item) -> None:
        """Queue an item.

        Raises:
            Fault: 429, the queue is full.
            Retired: the model is being replaced.
        """
        with self._changed:
            if self._closed:
                raise faults.Retired
            if len(self._items) >= self._limit:
                raise faults.busy(len(self._items))
            self._items.append(item)
            self._changed.notify()

    def take(self, fits: Callable[[Item], bool], wait_seconds: float | None) -> Item | None:
        """The first item, or None.

        Args:
            fits: whether there is room for it now; nobody overtakes an item that must wait.
            wait_seconds: for an item to come; None: until one comes or the mailbox is closed.
        """
        until = None if wait_seconds is None else time.monotonic() + wait_seconds
        with self._changed:
            while not self._items and not self._closed:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)
            if self._items and fits(self._items[0]):
                return self._items.popleft()
            return None

    def discard(self, item: Item) -> None:
        """Forget an item if it still waits."""
        with self._changed:
            if item in self._items:
                self._items.remove(item)

    def close(self) -> None:
        """Accept no more. What waits already is still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def exhausted(self) -> bool:
        """Closed, and everything handed out."""
        with self._changed:
            return self._closed and not self._items
