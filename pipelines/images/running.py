"""Programs that build, fetch and ask: their lines shown as they come, their failures explained."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from components.shared.errors import TuneyardError

log = logging.getLogger("tuneyard.images")

_LINES = 15
_WIDTH = 200
# pip says so of each of several folders that a distribution is not in.
_NOISE = re.compile(r"WARNING: Location .* is ignored|\s*$")
_OFFLINE = (
    "Could not fetch URL",
    "Temporary failure",
    "connection refused",
    "dial tcp",
    "i/o timeout",
    "no such host",
    "pinging container registry",
    "(from versions: none)",
)


def stream(
    command: Sequence[str],
    todo: Callable[[str], str],
    environment: Mapping[str, str] | None = None,
    collect: bool = False,
) -> str:
    """Run a program, its lines in our log as they come.

    Args:
        command: the program and its arguments.
        todo: from the last lines of a failure to what the reader can do.
        environment: laid over ours.
        collect: return what it says on standard output; its other lines stay in the log.

    Raises:
        TuneyardError: it ended with another code than 0; with its last lines.
    """
    last: deque[str] = deque(maxlen=_LINES)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if collect else subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | dict(environment or {}),
    ) as process:
        assert process.stdout is not None
        kept = []
        for line in process.stdout:
            if collect:
                kept.append(line)
            elif not _NOISE.match(line):
                last.append(line.rstrip()[:_WIDTH])
                log.info("  %s", last[-1])
    if process.returncode:
        said = "\n".join(f"    {line}" for line in last) or "    (nothing)"
        what = f"`{' '.join(command[:3])} ...` ended with {process.returncode}; its last lines:\n{said}"
        raise TuneyardError(what, todo("\n".join(last)))
    return "".join(kept)


def offline(text: str) -> bool:
    """Whether a failure's lines speak of the network."""
    return any(sign.lower() in text.lower() for sign in _OFFLINE)
