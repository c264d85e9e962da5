"""What an image is built from: the code that its digest covers, its pins, and the files they name.

The folder of an image is the whole of what a builder sees, so nothing else of the tree can reach an image.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from components.shared import digest
from components.shared.errors import UsageError
from pipelines.images import lock, running

log = logging.getLogger("tuneyard.images")

LOCKS = digest.TREE_ROOT / "requirements" / "images"
PYTHON = "3.11"
# Debian bookworm has glibc 2.36; wheels say the oldest glibc that they run with. pip takes each as it stands.
_GLIBC_NEWEST = 36
_GLIBC_OLDEST = 5
_HASH = re.compile(r"sha256:[0-9a-f]{64}")


def folder_of(image: str) -> Path:
    """Where an image's context lies."""
    return digest.TREE_ROOT / "build" / "images" / image


def assemble(image: str, epoch: int) -> Path:
    """Write the context of an image.

    Args:
        image: `cpu`, `gpu` or `serving`.
        epoch: time that every file is given, in seconds; file times would make each build another image.

    Returns:
        Its folder: app/, lock/ and wheels/, the last as an earlier build left it.

    Raises:
        UsageError: there is no lock for it.
    """
    pins = LOCKS / f"{image}.txt"
    if not pins.is_file():
        raise UsageError(f"{pins}: no such lock, so nothing says what the image holds", "run `make lock`")
    folder = folder_of(image)
    for part in ("app", "lock"):
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir(parents=True)
    (folder / "wheels").mkdir(exist_ok=True)
    for path in lock.code_files(image):
        target = folder / "app" / path.relative_to(digest.TREE_ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    wheels, source = split(pins.read_text())
    (folder / "lock" / "wheels.txt").write_text(wheels)
    (folder / "lock" / "source.txt").write_text(source)
    shutil.copyfile(LOCKS / "build.txt", folder / "lock" / "build.txt")
    shutil.copyfile(digest.TREE_ROOT / "docker" / "venv.sh", folder / "lock" / "venv.sh")
    for path in [*folder.rglob("app/**/*"), *folder.rglob("lock/*"), folder / "app", folder / "lock"]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (epoch, epoch))
    return folder


def split(pins: str) -> tuple[str, str]:
    """A lock's entries: those that come as wheels, and those that are built from their source."""
    header = re.search(r"^# built from source: (.*)$", pins, re.MULTILINE)
    built = set(header[1].split()) if header else set()
    named = [(entry.split("=", 1)[0], entry) for entry in _entries(pins)]
    return (
        "".join(entry for name, entry in named if name not in built),
        "".join(entry for name, entry in named if name in built),
    )


def _entries(pins: str) -> list[str]:
    text = re.sub(r"^#.*\n", "", pins, flags=re.MULTILINE)
    return [entry for entry in re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE) if entry.strip()]


def fetch(folder: Path) -> None:
    """Bring the files that a context's locks name into its wheels/, and remove what they do not name.

    pip does it with this machine's own settings: mirror, proxy, certificates, folders of wheels. What is
    there already is not asked for: for 170 distributions that would take pip a minute and a half.

    Raises:
        TuneyardError: pip failed; with its last lines.
    """
    locks = {name: (folder / "lock" / f"{name}.txt").read_text() for name in ("build", "wheels", "source")}
    allowed = set(_HASH.findall("".join(locks.values())))
    present = {f"sha256:{digest.of_file(path)}": path for path in (folder / "wheels").iterdir()}
    for found in present.keys() - allowed:
        present.pop(found).unlink()
    missing = {
        name: [entry for entry in _entries(text) if not present.keys() & set(_HASH.findall(entry))]
        for name, text in locks.items()
    }
    log.info("fetching %d distributions into %s", sum(map(len, missing.values())), folder / "wheels")
    for name, entries in missing.items():
        if entries:
            _download(entries, folder / "wheels", built=name == "source")


def _download(entries: Sequence[str], wheels: Path, built: bool) -> None:
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--quiet", "--no-deps", "--require-hashes", f"--dest={wheels}"]
    if built:
        # pip reads a source archive's metadata by its build backend, which is installed here.
        command += ["--no-binary=:all:", "--no-build-isolation"]
    else:
        command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"]
        newest_first = range(_GLIBC_NEWEST, _GLIBC_OLDEST - 1, -1)
        command += [f"--platform=manylinux_2_{minor}_x86_64" for minor in newest_first]
        command += ["--platform=manylinux2014_x86_64", "--platform=linux_x86_64"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(entries))
        file.flush()
        running.stream([*command, f"--requirement={file.name}"], _todo)


def _todo(text: str) -> str:
    if running.offline(text):
        return (
            "check the network and try again: what is fetched stays. For a mirror set PIP_INDEX_URL, for a"
            " folder of wheels PIP_FIND_LINKS, behind a proxy HTTPS_PROXY, for a company's certificates"
            " PIP_CERT"
        )
    if "No space left" in text:
        return "free some space (cpu needs 8 GiB, gpu 25 GiB, serving 5 GiB) and try again"
    return (
        "the index serves another file than the lock names, or none: use another mirror, or run `make lock`"
    )
