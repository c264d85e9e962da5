"""What one home remembers between two commands, and the lock that lets one command at a time change it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from components.shared.errors import TuneyardError
from pipelines.embedded.private_files import private_folder, write_private

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """The contents of platform.json.

    Attributes:
        home: the home that wrote it; a copied or moved checkout must not take over the other one's services.
        runtime: the folder of the unix sockets.
        ports: port by name (see ports.PORT_NAMES).
    """

    home: str
    runtime: str = ""
    ports: dict[str, int] = field(default_factory=dict)


def state_path(home: Path) -> Path:
    """Where the ports of `home` are remembered."""
    return home / "platform.json"


def load_state(home: Path) -> State:
    """What `home` remembers; an empty State when there is nothing, or nothing that can be used."""
    path = state_path(home)
    if not path.is_file():
        return State(str(home))
    try:
        found = json.loads(path.read_text())
        ports = {str(name): int(port) for name, port in found["ports"].items()}
        state = State(str(found["home"]), str(found["runtime"]), ports)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # Nothing in it is precious: ports and a socket folder are found again.
        log.warning("%s is damaged (%s); picking new ports", path, error)
        return State(str(home))
    if state.home != str(home):
        log.info(
            "%s was written for %s, a checkout that was copied or moved; picking new ports", path, state.home
        )
        return State(str(home))
    return state


def save_state(home: Path, state: State) -> None:
    """Remember `state` in `home`."""
    write_private(state_path(home), json.dumps(asdict(state), indent=2) + "\n")


def runtime_folder(state: State) -> Path:
    """The folder for unix sockets: the remembered one when it is still ours, else a new one.

    Not in the home: a socket's path may have 107 bytes on Linux and 103 on macOS, which a deep checkout
    exceeds, and network or shared folders often hold no sockets at all. Not in $XDG_RUNTIME_DIR: it is
    emptied when the user logs out, and cron or ssh see another one. mkdtemp gives a short, unguessable
    name that only we may enter, so nobody can sit on it first; a lost one (reboot, clean-up) is replaced.
    """
    if state.runtime:
        try:
            found = os.lstat(state.runtime)
        except OSError:
            found = None
        if (
            found
            and stat.S_ISDIR(found.st_mode)
            and found.st_uid == os.getuid()
            and not found.st_mode & 0o077
        ):
            return Path(state.runtime)
    folder = tempfile.mkdtemp(prefix="tuneyard-")
    if len(os.fsencode(folder)) > 80 or not re.fullmatch(r"[\w./+-]+", folder, re.ASCII):
        # TMPDIR itself may be deep (a scratch folder of a batch job), or hold what supervisor's settings
        # cannot; /tmp exists on every POSIX system.
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="tuneyard-", dir="/tmp")
    return Path(folder)


def forget_runtime(state: State) -> None:
    """Remove the socket folder, once nothing listens there."""
    if state.runtime and Path(state.runtime).name.startswith("tuneyard-"):
        shutil.rmtree(state.runtime, ignore_errors=True)


@contextmanager
def locked(home: Path, wait_seconds: float) -> Iterator[None]:
    """Hold the lock of `home`: `up`, `down` and `ui` change things one after the other.

    The kernel releases it when its holder dies, however it dies, so there is no stale lock.

    Raises:
        TuneyardError: somebody else held it for all of `wait_seconds`.
    """
    path = private_folder(home) / "platform.lock"
    deadline = time.monotonic() + wait_seconds
    with path.open("a") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise TuneyardError(
                        f"another command has been changing the platform in {home} for {wait_seconds:.0f} s",
                        f"wait for it to end, or see who holds {path} (`fuser {path}`)",
                    ) from error
            if not told:
                log.info("another command is starting or stopping the platform; waiting for it")
                told = True
            time.sleep(0.05)
        yield
