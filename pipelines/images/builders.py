"""docker, podman or buildah: one way to build, push, run and import for all three."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from components.shared.errors import TuneyardError, UsageError
from pipelines.images import running

NAMES = ("docker", "podman", "buildah")


@dataclass(frozen=True)
class Builder:
    """A program that builds images.

    Args:
        name: one of NAMES.
        program: its path.
    """

    name: str
    program: str


def find(name: str | None = None) -> Builder:
    """The builder of this name, or the first one that is installed; docker only if its daemon answers.

    Raises:
        UsageError: it is none of ours, or not installed.
    """
    if name and name not in NAMES:
        raise UsageError(f"builder {name!r} is none of {', '.join(NAMES)}", "name one of these, or none")
    found = [
        Builder(each, program) for each in ((name,) if name else NAMES) if (program := shutil.which(each))
    ]
    if len(found) > 1 and found[0].name == "docker" and not _served(found[0]):
        del found[0]
    if found:
        return found[0]
    raise UsageError(
        f"no {name or 'docker, podman or buildah'} on the PATH, and images need one of them",
        "install one; on Debian and Ubuntu `apt-get install buildah runc` is enough, as root and without a"
        " service",
    )


def _served(docker: Builder) -> bool:
    """Whether docker's daemon answers; its client is often there without one."""
    asked = [docker.program, "version", "--format", "{{.Server.Version}}"]
    try:
        return not subprocess.run(asked, capture_output=True, timeout=20, check=False).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


def build(
    builder: Builder, folder: Path, target: str, tag: str, base: str, epoch: int, labels: Mapping[str, str]
) -> None:
    """Build one target of docker/Dockerfile.

    Args:
        builder: with what.
        folder: the context.
        target: of the Dockerfile.
        tag: what to call it in the builder's own store.
        base: reference of the base image; empty: the Dockerfile's own.
        epoch: the time of everything in it, in seconds.
        labels: of the image.

    Raises:
        TuneyardError: it failed; with its last lines.
    """
    from components.shared import digest

    command = [builder.program, "build", "--file", str(digest.TREE_ROOT / "docker" / "Dockerfile")]
    command += ["--target", target, "--tag", tag]
    command += [f"--build-arg=BASE={base}"] if base else []
    command.append(f"--build-arg=SOURCE_DATE_EPOCH={epoch}")
    command += [f"--label={name}={value}" for name, value in labels.items()]
    environment = {}
    if builder.name == "docker":
        # BuildKit takes SOURCE_DATE_EPOCH for the image's own time; it leaves those of files that RUN wrote.
        command.append("--progress=plain")
        environment = {"DOCKER_BUILDKIT": "1"}
    else:
        # No network of the container's own: rootless and in nested machines there often is none to be had.
        command += [f"--timestamp={epoch}", "--layers", "--network=host"]
    running.stream([*command, str(folder)], lambda text: _todo(builder, base, text), environment)


def _todo(builder: Builder, base: str, text: str) -> str:
    if running.offline(text):
        return (
            f"the base image {base or 'of docker/Dockerfile'} or Debian's packages cannot be fetched: name a"
            " base that this machine reaches (BASE=registry.example.com/debian:bookworm-slim; one with Python"
            " 3.11 needs no packages), or make one from Debian's mirror (DEBOOTSTRAP=1)"
        )
    if builder.name == "docker" and "buildx component is missing" in text:
        return "install Docker's buildx (docker-buildx-plugin), or name another builder: BUILDER=buildah"
    if builder.name == "docker" and "daemon" in text:
        return "start the Docker service, or name another builder: BUILDER=buildah"
    if "cgroup" in text or "crun" in text:
        return "try another runtime (BUILDAH_RUNTIME=runc) or none at all (BUILDAH_ISOLATION=chroot)"
    return "the lines above say what failed; what was done so far is kept"


def push(builder: Builder, tag: str, name: str) -> str:
    """Push an image.

    Args:
        builder: with what.
        tag: what it is called here.
        name: what it is called in the registry, without a tag.

    Returns:
        The digest of its manifest there.

    Raises:
        TuneyardError: the registry did not take it.
    """

    def todo(text: str) -> str:
        if running.offline(text):
            return f"is {name.split('/')[0]} right, and does this machine reach it?"
        return f"log in first: {builder.name} login {name.split('/')[0]}"

    remote = f"{name}:{tag.rsplit(':', 1)[1]}"
    if builder.name == "docker":
        running.stream([builder.program, "tag", tag, remote], todo)
        running.stream([builder.program, "push", remote], todo)
        form = "--format={{json .RepoDigests}}"
        answer = running.stream([builder.program, "image", "inspect", form, remote], todo, collect=True)
        found = [each.split("@")[1] for each in json.loads(answer) if each.startswith(f"{name}@")]
        if len(found) != 1:
            raise TuneyardError(
                f"docker names {len(found)} digests of {remote} after its push: {answer.strip()}"
            )
        return str(found[0])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "digest")
        running.stream([builder.program, "push", f"--digestfile={file}", tag, f"docker://{remote}"], todo)
        return file.read_text().strip()


def run(builder: Builder, tag: str, command: list[str]) -> str:
    """What a command inside an image says on standard output.

    Raises:
        TuneyardError: it failed.
    """

    def todo(text: str) -> str:
        return f"the image {tag} is broken, or {builder.name} cannot run containers here"

    if builder.name != "buildah":
        start = [builder.program, "run", "--rm", "--network=none", "--entrypoint=", tag]
        return running.stream([*start, *command], todo, collect=True)
    container = running.stream([builder.program, "from", "--pull-never", tag], todo, collect=True).strip()
    try:
        return running.stream([builder.program, "run", container, "--", *command], todo, collect=True)
    finally:
        running.stream([builder.program, "rm", container], todo, collect=True)


def import_root(builder: Builder, archive: Path, tag: str, epoch: int) -> None:
    """Make an image of one layer from the tar archive of a root file system."""

    def todo(text: str) -> str:
        return f"{builder.name} could not take {archive} as an image"

    if builder.name != "buildah":
        running.stream([builder.program, "import", str(archive), tag], todo)
        return
    container = running.stream([builder.program, "from", "scratch"], todo, collect=True).strip()
    running.stream([builder.program, "add", "--quiet", container, str(archive), "/"], todo)
    running.stream([builder.program, "commit", "--rm", f"--timestamp={epoch}", container, tag], todo)
