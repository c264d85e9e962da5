"""pip inside .venv: what it is asked, what of its answer is shown, and what its failures mean."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHOWN_EVERY_SECONDS = 10.0
NOISE = re.compile(r"^(WARNING: Location .* is ignored|Looking in |\[notice\]|\s*$)")
TAKEN = re.compile(r"^(?:Collecting|Processing|Ignoring|Requirement already satisfied:) ?(\S*?)(?:[=:; ]|$)")
# These would send the files elsewhere or ask for more than the lock.
NOT_FOR_US = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_CONSTRAINT")
NO_SUCH_FILE = ("No matching distribution found", "DO NOT MATCH THE HASHES")
UNREACHABLE = (
    "(from versions: none)",
    "Connection",
    "connection",
    "Could not fetch URL",
    "Max retries exceeded",
    "NewConnectionError",
    "ProxyError",
    "ReadTimeout",
    "Retrying (",
    "SSLError",
    "Temporary failure in name resolution",
    "HTTP error 4",
    "HTTP error 5",
)


class SetupError(Exception):
    """Set-up cannot go on: what is wrong, and what to do about it."""

    def __init__(self, what: str, todo: str) -> None:
        super().__init__(f"{what}\n  -> {todo}")


def say(line: str) -> None:
    """Tells the reader how it goes, on stderr: stdout belongs to the command that comes after set-up."""
    print(f"setup: {line}", file=sys.stderr, flush=True)


def explain(lines: list[str], log: Path) -> SetupError:
    """The error that pip's last lines amount to.

    Args:
        lines: what the failed pip said, without its noise.
        log: where all of it is.
    """
    text = "\n".join(lines)
    last = "".join(f"\n     {line}" for line in lines[-6:])
    tail = f"pip's last lines (all of them: {log}):{last}"
    if "No space left on device" in text:
        what = "The disk is full."
        todo = "Free some space (TMPDIR=... moves the temporary files) and run make setup again."
    elif "DO NOT MATCH THE HASHES" in text:
        what = "A download is not the file that the lock names."
        todo = (
            "Run make setup again. If it stays so, the mirror that pip uses serves another file: use another."
        )
    elif any(sign in text for sign in UNREACHABLE):
        what = "pip cannot get what it needs from its package index."
        todo = (
            "Check the network and run make setup again: it goes on from here. Behind a proxy set"
            " HTTPS_PROXY; for a mirror set PIP_INDEX_URL; for a company's certificates set PIP_CERT."
        )
    elif "No matching distribution found" in text:
        version = ".".join(str(part) for part in sys.version_info[:2])
        what = f"The index has no prebuilt file of a distribution for Python {version} on this machine."
        todo = "Use Python 3.11 (PYTHON=python3.11 make setup) or a mirror that is complete."
    else:
        what = "pip failed."
        todo = "Run make setup again: it goes on from here. If it stays so, remove .venv and start anew."
    return SetupError(f"{what} {tail}", todo)


class Pip:
    """The pip of one .venv.

    Args:
        venv: the environment's folder.
        lock_descriptor: an open descriptor that pip inherits, so that a pip that outlives set-up holds the
            set-up lock.
    """

    def __init__(self, venv: Path, lock_descriptor: int) -> None:
        self.python = venv / "bin" / "python"
        self.log = venv / "setup.log"
        self.lock_descriptor = lock_descriptor
        self.expected = 0
        self._taken = 0
        self._shown_at = time.monotonic()

    @staticmethod
    def works(venv: Path) -> bool:
        """Whether the environment's Python starts and has pip."""
        command = [str(venv / "bin" / "python"), "-m", "pip", "--version"]
        return subprocess.run(command, capture_output=True).returncode == 0

    def install(self, pins: list[str], *options: str) -> None:
        """Installs these pins and nothing else, each file checked against its hashes.

        Raises:
            SetupError: pip failed.
        """
        code, lines = self._install(pins, *options)
        if code:
            raise explain(lines, self.log)

    def install_if_offered(self, pins: list[str]) -> bool:
        """Installs these pins; False when pip reaches its indexes and none has such a file.

        Raises:
            SetupError: pip failed otherwise.
        """
        code, lines = self._install(pins, "--only-binary=:all:")
        if code == 0:
            return True
        text = "\n".join(lines)
        if any(sign in text for sign in NO_SUCH_FILE) and not any(sign in text for sign in UNREACHABLE):
            return False
        raise explain(lines, self.log)

    def run(self, *arguments: str) -> None:
        """Runs pip with these arguments.

        Raises:
            SetupError: pip failed.
        """
        code, lines = self._call(*arguments)
        if code:
            raise explain(lines, self.log)

    def _install(self, pins: list[str], *options: str) -> tuple[int, list[str]]:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("".join(pins))
            file.flush()
            # Byte code is left to the first import: most of what is installed is never imported.
            fixed = ("install", "--no-deps", "--require-hashes", "--no-compile", "--progress-bar=off")
            return self._call(*fixed, *options, "-r", file.name)

    def _call(self, *arguments: str) -> tuple[int, list[str]]:
        environment = {key: value for key, value in os.environ.items() if key not in NOT_FOR_US}
        environment |= {"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
        lines = []
        with open(self.log, "a") as log:
            log.write(f"$ pip {' '.join(arguments)}\n")
            with subprocess.Popen(
                [str(self.python), "-m", "pip", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
                pass_fds=(self.lock_descriptor,),
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    log.write(line)
                    if not NOISE.match(line):
                        lines.append(line.rstrip())
                        self._show(line)
        return process.returncode, lines

    def _show(self, line: str) -> None:
        match = TAKEN.match(line)
        if match is None or not self.expected:
            return
        self._taken = min(self._taken + 1, self.expected)
        now = time.monotonic()
        if now - self._shown_at > SHOWN_EVERY_SECONDS:
            self._shown_at = now
            name = Path(match[1]).name
            name = name.split("-")[0] if name.endswith(".whl") else name
            say(f"{self._taken} of {self.expected} distributions, now {name}")
