"""A base image from Debian's own packages, for a machine that reaches a package mirror but no registry."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from components.shared.errors import UsageError
from pipelines.images import builders, running
from pipelines.images.builders import Builder

log = logging.getLogger("tuneyard.images")

SUITE = "bookworm"
TAG = "localhost/tuneyard/base"
# Python and what the gpu target adds, so that a build on this base asks no package mirror.
_PACKAGES = ("ca-certificates", "python3")
_COMPILERS = ("gcc", "libc6-dev", "libpython3.11-dev")
# What no program reads, the mirror's name, and what a second debootstrap writes differently.
_LEFT_OUT = (
    "dev",
    "etc/apt/sources.list",
    "etc/hostname",
    "etc/machine-id",
    "etc/resolv.conf",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "var/cache/apt",
    "var/cache/debconf/config.dat-old",
    "var/cache/debconf/templates.dat-old",
    "var/cache/ldconfig",
    "var/lib/apt/lists",
    "var/lib/dpkg/status-old",
    "var/log",
)


def make(builder: Builder, epoch: int, compilers: bool) -> str:
    """Make the base image.

    Args:
        builder: that keeps it.
        epoch: the time of everything in it, in seconds.
        compilers: with those that the gpu image needs.

    Returns:
        Its reference.

    Raises:
        UsageError: debootstrap is not installed, we are not root, or apt names no mirror of the suite.
        TuneyardError: it failed.
    """
    faults = []
    program = shutil.which("debootstrap", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if program is None:
        faults.append("debootstrap is not installed (apt-get install debootstrap)")
    if os.geteuid() != 0:
        faults.append("debootstrap needs root (it makes device files and changes its root folder)")
    if program is None or faults:
        raise UsageError(
            "; ".join(faults), "or name a base image: BASE=registry.example.com/debian:bookworm-slim"
        )
    packages = ",".join([*_PACKAGES, *(_COMPILERS if compilers else ())])
    tag = f"{TAG}:{SUITE}{'-compilers' if compilers else ''}"
    with tempfile.TemporaryDirectory(prefix="tuneyard-base-") as folder:
        root = Path(folder, "root")
        log.info("making %s with debootstrap", tag)
        command = [program, "--variant=minbase", f"--include={packages}", SUITE, str(root), mirror()]
        running.stream(
            command, lambda text: "see the lines above; is the mirror of apt's settings reachable?"
        )
        archive = Path(folder, "base.tar")
        pack(root, archive, epoch)
        builders.import_root(builder, archive, tag, epoch)
    return tag


def mirror() -> str:
    """Where this machine's apt gets the suite from.

    Raises:
        UsageError: apt names no such place.
    """
    form = "$(REPO_URI) $(CODENAME) $(COMPONENT)"
    try:
        command = ["apt-get", "indextargets", "--format", form, "Created-By: Packages"]
        answer = subprocess.run(command, capture_output=True, text=True).stdout
    except FileNotFoundError:
        answer = ""
    for line in answer.splitlines():
        words = line.split()
        if words[1:] == [SUITE, "main"]:
            return words[0]
    raise UsageError(
        f"apt's settings here name no mirror of Debian {SUITE}",
        "add one to /etc/apt/sources.list.d and run apt-get update, or name a base image with BASE=...",
    )


def pack(root: Path, archive: Path, epoch: int) -> None:
    """Write a root file system as a tar archive, in a fixed order and with fixed times."""

    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = entry.name.removeprefix("./")
        if name != "." and any(name == out or name.startswith(f"{out}/") for out in _LEFT_OUT):
            return None
        if name.startswith(("usr/", "var/")) and name.endswith(".pyc"):
            return None  # they hold the times of their sources
        entry.mtime = epoch
        return entry

    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as file:
        file.add(root, ".", filter=kept)  # tarfile goes through a folder by name
