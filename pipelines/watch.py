"""What a person sees while a run goes: stage lines, a moving progress line, everything in the log file."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path
from typing import IO

from components.shared.progress import PREFIX
from components.shared.recording import STARTED

# Between the stages KFP prints inputs and outputs of its own; they go to the log file only, as do these.
_KFP = ("[KFP Executor", "Task ", "Cleaned up workspace")
_INDENT = re.compile(r"^( {4}){1,2}")
_NOISE = re.compile(
    # The launcher of Kubeflow Pipelines logs through glog and Argo's through logrus.
    r"^(\s*$|-+$|[IWEF]\d{4} |time=\"|Loading weights|Writing model shards|"
    r".*(FutureWarning|UserWarning|warnings\.warn))"
)
_QUIET_SECONDS = 10.0


class Watcher(io.TextIOBase):
    """A text stream that takes the lines of the stages.

    Args:
        log: file that gets every line.
        screen: where a person looks, or None.
    """

    def __init__(self, log: Path, screen: IO[str] | None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a", encoding="utf-8")
        self._screen = screen
        self._moves = bool(screen and screen.isatty())
        self._pending = ""
        self._in_stage = False
        self._open_line = False
        self._last_progress = 0.0

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str) -> int:
        """Take text in pieces; whole lines are shown."""
        self._pending += text
        *lines, self._pending = self._pending.split("\n")
        for line in lines:
            self._line(line)
        return len(text)

    def flush(self) -> None:
        """Push what is written to the file and the screen."""
        if not self._log.closed:
            self._log.flush()
        if self._screen:
            self._screen.flush()

    def close(self) -> None:
        """Write the last line and close the log file."""
        if not self._log.closed:
            if self._pending:
                self._line(self._pending)
            self._log.close()
        super().close()

    def _line(self, line: str) -> None:
        self._log.write(line + "\n")
        # KFP indents the lines of a pipeline's task, by how much depends on its log level.
        line = _INDENT.sub("", line)
        if line.startswith(STARTED):
            self._in_stage = True
        elif line.startswith(_KFP):
            self._in_stage = False
        if self._screen is None or not self._in_stage or _NOISE.match(line.strip()):
            return
        if not line.startswith(PREFIX):
            print(("\r\x1b[K" if self._open_line else "") + line, file=self._screen)
            self._open_line = False
        elif self._moves:
            print("\r\x1b[K" + line, end="", file=self._screen)
            self._open_line = True
        elif time.monotonic() - self._last_progress >= _QUIET_SECONDS:
            self._last_progress = time.monotonic()
            print(line, file=self._screen)
        self._screen.flush()
