"""`make images`: code and locks -> images, their bills of materials, and the lock that pipelines read."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from components.shared import digest
from components.shared.errors import TuneyardError, UsageError
from pipelines.images import builders, context, debootstrap, facts, lock, sbom
from pipelines.images.builders import Builder

log = logging.getLogger("tuneyard.images")

USER = (10001, 10001)
# What an image is made of; a commit that touches none of it leaves every image as it is.
_SOURCES = ("components", "serving", "requirements", "docker")
# What its large layers are made of. Their files have the time of the last commit that touched it, so that new
# code makes a new layer of half a megabyte and no other.
_LARGE = ("requirements", "docker/Dockerfile", "docker/venv.sh")
_NEEDED_GIB = {"cpu": 8, "gpu": 25, "serving": 5}


@dataclass(frozen=True)
class Built:
    """One image that was built.

    Args:
        image: `cpu`, `gpu` or `serving`.
        tag: what it is called in the builder's own store.
        reference: name and digest in the registry; empty when it was not pushed.
        code: digest of the code it holds.
        size_bytes: of its files, not compressed.
        seconds: it took.
        sbom: file with its bill of materials.
    """

    image: str
    tag: str
    reference: str
    code: str
    size_bytes: int
    seconds: float
    sbom: str


def build(
    images: Sequence[str] = lock.NAMES,
    registry: str = "",
    base: str = "",
    builder: str | None = None,
    push: bool = False,
    from_debootstrap: bool = False,
) -> list[Built]:
    """Build images; push and lock them when asked.

    Args:
        images: which; see lock.NAMES.
        registry: where to, such as `registry.example.com/tuneyard`.
        base: reference of the base image; empty: the Dockerfile's own.
        builder: docker, podman or buildah; None: what is installed.
        push: to the registry, and write docker/images.json: what is not pushed no cluster can pull.
        from_debootstrap: make the base from Debian's packages.

    Raises:
        UsageError: the arguments contradict each other, or this machine lacks something; nothing was built.
        TuneyardError: a build or a push failed.
    """
    tool = _check(images, registry, base, builder, push, from_debootstrap)
    revision, epoch = source_state()
    if from_debootstrap:
        base = debootstrap.make(tool, epoch, compilers="gpu" in images)
    done = []
    for image in images:
        done.append(_one(tool, image, registry, base, push, revision, epoch))
    return done


def _check(
    images: Sequence[str],
    registry: str,
    base: str,
    builder: str | None,
    push: bool,
    from_debootstrap: bool,
) -> Builder:
    faults = [
        f"no image is called {name!r} ({', '.join(lock.NAMES)})" for name in images if name not in lock.NAMES
    ]
    if push and not registry:
        faults.append("a push needs to know where to: REGISTRY=registry.example.com/tuneyard")
    if base and from_debootstrap:
        faults.append(f"the base is either {base} or made with debootstrap")
    if "://" in registry or registry.endswith("/"):
        faults.append(f"registry {registry!r} is a host and a path, without a scheme and a slash at its end")
    needed = sum(_NEEDED_GIB[name] for name in images if name in _NEEDED_GIB)
    free = shutil.disk_usage(digest.TREE_ROOT).free / 2**30
    if free < needed:
        faults.append(f"{digest.TREE_ROOT} has {free:.0f} GiB free, and {', '.join(images)} need {needed}")
    if faults:
        raise UsageError("; ".join(faults), "correct these; nothing was built")
    return builders.find(builder)


def source_state() -> tuple[str, int]:
    """The last commit that touched what images are made of, and the time of their files in seconds.

    SOURCE_DATE_EPOCH takes the place of the time, and of git where there is none.

    Raises:
        UsageError: there is neither.
    """
    asked = os.environ.get("SOURCE_DATE_EPOCH", "")
    try:
        revision = _git("log", "-1", "--format=%H", "--", *_SOURCES)
        when = int(_git("log", "-1", "--format=%ct", "--", *_LARGE))
        changed = _git("status", "--porcelain", "--", *_SOURCES)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        if not asked.isdigit():
            raise UsageError(
                f"{digest.TREE_ROOT} is no git checkout, so nothing says what time the images' files have",
                "set SOURCE_DATE_EPOCH to a time in seconds",
            ) from error
        return "", int(asked)
    return revision + ("-changed" if changed else ""), int(asked or when)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(digest.TREE_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _one(tool: Builder, image: str, registry: str, base: str, push: bool, revision: str, epoch: int) -> Built:
    started = time.monotonic()
    log.info("%s: building with %s", image, tool.name)
    folder = context.assemble(image, epoch)
    context.fetch(folder)
    code = lock.code_digest(image)
    tag = f"localhost/tuneyard/{image}:{code[:12]}"
    labels = {
        "org.opencontainers.image.title": f"tuneyard {image}",
        "org.opencontainers.image.revision": revision,
        "dev.tuneyard.code": code,
    }
    builders.build(tool, folder, image, tag, base, epoch, labels)
    inside = facts.ask(tool, image, tag)
    _see(image, tag, inside, code)
    bill = _write_bill(image, inside, folder / "wheels", epoch)
    reference = ""
    if push:
        name = f"{registry}/{image}"
        locked = lock.Image(name, builders.push(tool, tag, name), code)
        lock.write({image: locked})
        reference = locked.reference
    seconds = round(time.monotonic() - started, 1)
    log.info(
        "%s: %s, %.2f GiB, %.0f s",
        image,
        reference or f"{tag} (not pushed)",
        inside.size_bytes / 2**30,
        seconds,
    )
    return Built(image, tag, reference, code, inside.size_bytes, seconds, str(bill))


def _see(image: str, tag: str, inside: facts.Facts, code: str) -> None:
    """Hold what is in an image against what should be.

    Raises:
        TuneyardError: they differ; says each difference.
    """
    faults = []
    if inside.code != code:
        faults.append(f"its code has the digest {inside.code[:12]}, and this tree's is {code[:12]}")
    if inside.user != USER:
        faults.append(f"it runs as {inside.user[0]}:{inside.user[1]} and should as {USER[0]}:{USER[1]}")
    if any(name == "pip" for name, _, _ in inside.python):
        faults.append("pip is in it")
    if faults:
        raise TuneyardError(f"image {tag}: {'; '.join(faults)}", f"build again: make images ONLY={image}")


def _write_bill(image: str, inside: facts.Facts, wheels: Path, epoch: int) -> Path:
    sbom.FOLDER.mkdir(exist_ok=True)
    path = sbom.FOLDER / f"{image}.cdx.json"
    path.write_text(
        json.dumps(sbom.document(image, inside, wheels, epoch), indent=1, ensure_ascii=False) + "\n"
    )
    return path


def as_json(built: Sequence[Built]) -> str:
    """What was built, for `--json`."""
    return json.dumps({"images": [asdict(each) for each in built]}, indent=1)
