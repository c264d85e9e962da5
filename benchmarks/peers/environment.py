"""An environment of its own for a peer that wants other versions than ours, made once from a pinned list.

It lies in `peers/` of $TUNEYARD_HOME, or of `.tuneyard` in the checkout, under a name that holds the digest
of the list, so that a list that changed makes another one. pip does the downloads, as at set-up: its own
configuration counts (mirror, certificates, folders of wheels). It is made aside, then renamed: complete or
absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEEDED_GIB = 3  # 1.1 in the end, and the downloads
TIMEOUT_SECONDS = 900
# These would send the files elsewhere or ask for more than the list.
NOT_FOR_US = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_CONSTRAINT")


class NotMadeError(Exception):
    """The environment cannot be made here; the message says why."""


@dataclass(frozen=True)
class Environment:
    """A peer's environment.

    Args:
        python: its interpreter.
        made: what is told of it: seconds to make, MiB, and the version of each distribution.
    """

    python: Path
    made: dict[str, Any]

    def run(self, module: str, *arguments: str, log: Path) -> None:
        """Run a module of ours in it, from the checkout's root; all it prints goes to `log`.

        Raises:
            RuntimeError: it failed; with its last lines.
        """
        root = Path(__file__).resolve().parents[2]
        # Where no bytecode is written, every process would compile PyTorch's modules again.
        named = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
        # Nothing is fetched or reported, and its caches go where they are thrown away.
        named |= {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(log.parent / "caches"),
        }
        with log.open("w") as file:
            answer = subprocess.run(
                [str(self.python), "-m", module, *arguments], stdout=file, stderr=file, cwd=root, env=named
            )
        if answer.returncode:
            raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{last_lines(log.read_text())}")


def last_lines(text: str, count: int = 12) -> str:
    """The end of what a process said."""
    return "\n".join(text.strip().splitlines()[-count:])


def ensure(pins: Path, home: Path) -> Environment:
    """The environment that the list `pins` describes, made if it is not there yet.

    Args:
        pins: pip requirements with hashes.
        home: folder for what this checkout keeps.

    Raises:
        NotMadeError: no room, no network, or no file for this Python and machine.
    """
    lines = [line for line in pins.read_text().splitlines() if not line.startswith("#")]
    digest = hashlib.sha256("\n".join([sys.version, *lines]).encode()).hexdigest()
    folder = home / "peers" / f"{pins.stem}-{digest[:12]}"
    record = folder / "made.json"
    if not record.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free / 2**30
        if free < NEEDED_GIB:
            raise NotMadeError(f"{folder.parent} has {free:.1f} GiB free, {NEEDED_GIB} are needed")
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as aside:
            _make(pins, Path(aside, "environment"))
            Path(aside, "environment").replace(folder)
    return Environment(folder / "bin" / "python", json.loads(record.read_text()))


def _make(pins: Path, folder: Path) -> None:
    print(f"  making an environment for {pins.stem} ...", file=sys.stderr, flush=True)
    started = time.perf_counter()
    _call(sys.executable, "-m", "venv", "--without-pip", str(folder))
    python = str(folder / "bin" / "python")
    # Two tries: pip's five would take minutes to say that there is no network.
    fixed = ("--no-deps", "--require-hashes", "--only-binary=:all:", "--no-compile", "--progress-bar=off")
    # Bytecode is left to the first run: most of what is installed is never imported.
    _call(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--retries", "2", *fixed),
        *("--disable-pip-version-check", "-r", str(pins)),
    )
    told = {
        "seconds_to_make": round(time.perf_counter() - started),
        "mib": round(sum(f.lstat().st_size for f in folder.rglob("*")) / 2**20),
        "versions": {
            name_and_version[0].lower(): name_and_version[1]
            for info in sorted(folder.glob("lib/python*/site-packages/*.dist-info"))
            for name_and_version in [info.name.removesuffix(".dist-info").split("-")]
        },
    }
    (folder / "made.json").write_text(json.dumps(told, indent=1))


def _call(*command: str) -> None:
    named = {key: value for key, value in os.environ.items() if key not in NOT_FOR_US}
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=named, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise NotMadeError(f"{' '.join(command[1:4])} took over {TIMEOUT_SECONDS} s") from error
    if answer.returncode:
        said = answer.stderr + answer.stdout
        faults = [line for line in said.splitlines() if line.startswith("ERROR: ")]
        unreachable = "pip cannot reach its index: " if "Retrying (" in said else ""
        raise NotMadeError(unreachable + (" ".join(faults[-2:]) or last_lines(said, 3)))
