"""Wheels from the package registry, verified against their pins and kept by digest under the home.

pip does the fetching, so that mirrors, proxies and credentials are configured where they always are. Wheels
are only unzipped, never installed: no code of theirs runs.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from components.shared import digest
from components.shared.errors import TuneyardError
from pipelines.samples.catalogue import Package, Sample

log = logging.getLogger("tuneyard.samples")

_MIB = 2**20
_SCRATCH_PREFIX = ".scratch-"
_PIP_LINES_SHOWN = 6


def _cached_at(package: Package, home: Path) -> Path:
    return home / "downloads" / package.sha256 / package.file


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold the downloads of a home alone, and clear what a killed predecessor left half done."""
    downloads = home / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    with (downloads / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process fetches samples into %s; waiting for it", downloads)
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Scratch folders are made under this lock alone, so whoever made these is dead.
        for stale in downloads.glob(f"{_SCRATCH_PREFIX}*"):
            shutil.rmtree(stale)
        yield


@contextmanager
def scratch(home: Path) -> Iterator[Path]:
    """A folder on the home's disk that is gone afterwards. Needs `locked`."""
    with tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=home / "downloads") as folder:
        yield Path(folder)


def require_room(samples: Sequence[Sample], home: Path) -> None:
    """Refuse to start when the disk of the home cannot hold what fetching will write.

    Counted are wheels not yet cached, the largest scratch need, and the stored objects: the embedded store
    keeps them on the same disk.

    Raises:
        TuneyardError: too little is free; the message has both numbers.
    """
    packages = {package.sha256: package for sample in samples for package in sample.packages}
    wheels = sum(package.size for package in packages.values() if not _cached_at(package, home).exists())
    needed = wheels + max(sample.scratch for sample in samples) + sum(sample.size for sample in samples)
    free = shutil.disk_usage(home).free
    if free < needed:
        names = ", ".join(sample.uri for sample in samples)
        raise TuneyardError(
            f"fetching {names} needs {-(-needed // _MIB)} MiB of disk and {home} has {free // _MIB} MiB free",
            "free some space, or put the home on another disk",
        )


def wheel(package: Package, home: Path) -> Path:
    """The verified wheel, from the cache or else from the registry. Needs `locked`.

    Raises:
        TuneyardError: pip cannot get it, or what it got is not the file that was pinned.
    """
    cached = _cached_at(package, home)
    if cached.exists():
        if digest.of_file(cached) == package.sha256:
            return cached
        log.warning("%s was damaged on disk; fetching it again", cached)
        cached.unlink()
    log.info("fetching %s %s (%.1f MiB)", package.name, package.version, package.size / _MIB)
    with scratch(home) as folder:
        fetched = _pip_download(package, home, folder)
        found = digest.of_file(fetched)
        if found != package.sha256:
            raise TuneyardError(
                f"{package.name} {package.version}: {package.file} has sha256 {found}, "
                f"expected {package.sha256}",
                "the package was changed after it was pinned and is not used; "
                f"put a file with the expected sha256 at {cached} and submit again",
            )
        cached.parent.mkdir(exist_ok=True)
        os.replace(fetched, cached)
    return cached


def _pip_download(package: Package, home: Path, folder: Path) -> Path:
    target = folder / "wheels"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--progress-bar=off", f"--dest={target}"]
    done = subprocess.run(
        [*command, *options, f"{package.name}=={package.version}"],
        # pip unpacks into TMPDIR first: keep that on the disk whose room was checked.
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    fetched = target / package.file
    if done.returncode == 0 and fetched.exists():
        return fetched
    lines = "\n".join(f"    {line}" for line in done.stdout.strip().splitlines()[-_PIP_LINES_SHOWN:])
    raise TuneyardError(
        f"pip did not deliver {package.name} {package.version} as {package.file} (sha256 {package.sha256}); "
        f"it ended with code {done.returncode} and said\n{lines}",
        "check that this machine reaches a package registry (`pip config list` shows which); without one, "
        f"or if it no longer has this version, put a file with this sha256 at {_cached_at(package, home)}",
    )
