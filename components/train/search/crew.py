"""The processes that make trials: started, spoken with, and ended."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What a trial may take to save a checkpoint when it is interrupted.
_PATIENCE_SECONDS = 20.0
_LOG_CHARACTERS = 2000


class Crew:
    """As many processes as trials are made at a time, each started when it is first needed.

    Args:
        folder: of the search, with job.json.
        size: how many.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.size = size
        self._folder = folder
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._heard: dict[int, bytes] = {}
        self._selector = selectors.DefaultSelector()

    def tell(self, slot: int, **message: Any) -> None:
        """Tell a process something; one that is gone is started anew."""
        if slot not in self._running:
            self._start(slot)
        stream = self._running[slot].stdin
        assert stream is not None
        try:
            stream.write(json.dumps(message).encode() + b"\n")
            stream.flush()
        except BrokenPipeError:
            return  # its end is heard as the end of what it says

    def _start(self, slot: int) -> None:
        cores = max(1, _cores() // self.size)
        log = (self._folder / f"worker-{slot}.log").open("ab")
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", "components.train.search.worker", str(self._folder), str(slot)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "false"},
                # Ctrl-C is for the stage, which then ends them in its own time.
                start_new_session=True,
            )
        assert process.stdout is not None
        self._running[slot], self._heard[slot] = process, b""
        self._selector.register(process.stdout, selectors.EVENT_READ, slot)

    def heard(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(slot, message) of what processes say next; of one that has ended `gone`: how."""
        for found, _ in self._selector.select():
            slot = found.data
            stream = self._running[slot].stdout
            assert stream is not None
            chunk = os.read(stream.fileno(), 1 << 16)
            *lines, self._heard[slot] = (self._heard[slot] + chunk).split(b"\n")
            yield from ((slot, json.loads(line)) for line in lines)
            if not chunk:
                yield slot, {"gone": self._bury(slot)}

    def _bury(self, slot: int) -> str:
        process = self._running.pop(slot)
        self._selector.unregister(process.stdout)  # type: ignore[arg-type]
        status = process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        how = f"signal {-status}{' (out of memory?)' if status == -9 else ''}" if status < 0 else f"{status}"
        return f"its process ended with {how}"

    def last_words(self, slot: int) -> str:
        """The end of what a process wrote into its log."""
        return (self._folder / f"worker-{slot}.log").read_text(errors="replace")[-_LOG_CHARACTERS:].strip()

    def stop(self) -> None:
        """End all of them; a trial that is being made saves a checkpoint."""
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)
        for slot, process in list(self._running.items()):
            try:
                process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            self._bury(slot)
        self._selector.close()


def _cores() -> int:
    """Processor cores that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() else len(os.sched_getaffinity(0))
