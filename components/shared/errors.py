"""The exceptions that cross a wall of the house, and the exit code each one ends a command with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 3
EXIT_INTERRUPTED = 130  # 128 and the number of SIGINT, as shells have it


class TuneyardError(Exception):
    """Something failed, and the message says what, the value, where, and what to do.

    Args:
        what: one sentence with the offending value and its place in it.
        todo: what the reader can do about it; empty when `what` already says so.
    """

    exit_code = EXIT_FAILED

    def __init__(self, what: str, todo: str = "") -> None:
        self.what = what
        self.todo = todo
        super().__init__(f"{what}\n  -> {todo}" if todo else what)

    def facts(self) -> dict[str, Any]:
        """The error for a record or a report."""
        return {"what": self.what, "todo": self.todo, "exit_code": self.exit_code}


class StoreError(TuneyardError):
    """The S3 store does not answer, or refuses: which says nothing of what it holds."""


class UsageError(TuneyardError):
    """A wrong command line or a wrong pipeline file: nothing has started."""

    exit_code = EXIT_USAGE


class SpecError(UsageError):
    """A pipeline file with faults: all of them, each with its line.

    Args:
        path: the file as the user named it.
        faults: one sentence for each fault, in file order.
    """

    def __init__(self, path: str, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        count = f"{len(self.faults)} fault{'s' if len(self.faults) != 1 else ''}"
        super().__init__(f"{path}: {count}\n" + "\n".join(f"  {fault}" for fault in self.faults))


class StageStopped(TuneyardError):
    """A gate or a data check stopped the line. What led to it has been saved.

    Args:
        what: which check, the observed value and its bound.
        todo: what the reader can do about it.
    """

    exit_code = EXIT_STOPPED
