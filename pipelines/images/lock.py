"""docker/images.json: which images a compiled pipeline names, by digest, and which code each of them holds.

`make images` writes it. A tag can be moved under a pipeline that was compiled last year; a digest cannot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from components.shared import digest
from components.shared.errors import UsageError

SCHEMA = "tuneyard/images/1"
PATH = digest.TREE_ROOT / "docker" / "images.json"
# `cpu` runs every stage, `gpu` those that ask for GPUs, `serving` the model server.
NAMES = ("cpu", "gpu", "serving")
_REMAKE = "build and push them: make images REGISTRY=registry.example.com/tuneyard"


@dataclass(frozen=True)
class Image:
    """A built image.

    Args:
        name: repository it was pushed to, without tag or digest.
        digest: `sha256:...` of its manifest.
        code: digest of the code it holds (`code_digest`).
    """

    name: str
    digest: str
    code: str

    @property
    def reference(self) -> str:
        """What a pod asks for."""
        return f"{self.name}@{self.digest}"


def code_folders(image: str) -> tuple[str, ...]:
    """The folders of this tree that go into an image."""
    # deploy's key is over the server's code too, so the stages' images hold that as well.
    return ("serving", "components/shared") if image == "serving" else ("components", "serving")


def code_digest(image: str) -> str:
    """Hex sha256 over the code that this tree would put into an image.

    Args:
        image: `cpu`, `gpu` or `serving`.
    """
    return digest.of_folders(*code_folders(image))


def code_files(image: str) -> list[Path]:
    """The files that `code_digest` covers, and so all of this tree that goes into an image."""
    return digest.source_files(*code_folders(image))


def read(path: Path | None = None) -> dict[str, Image]:
    """The locked images.

    Args:
        path: of the lock; None: docker/images.json.

    Raises:
        UsageError: there is no such file, or it has faults; lists them all.
    """
    path = path or PATH
    if not path.is_file():
        raise UsageError(f"{path}: no images are locked, so no pod can be told what to run", _REMAKE)
    try:
        raw = json.loads(path.read_text())
        images = {name: Image(**facts) for name, facts in raw["images"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path}: not a lock of images ({type(error).__name__}: {error})", _REMAKE
        ) from error
    faults = [f"schema {raw.get('schema')!r} is not {SCHEMA}"] if raw.get("schema") != SCHEMA else []
    faults += [f"no image {name}" for name in NAMES if name not in images]
    faults += [
        f"{name}: digest {image.digest!r} is not sha256:<64 hex digits>"
        for name, image in images.items()
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", image.digest)
    ]
    if faults:
        raise UsageError(f"{path}: {'; '.join(faults)}", _REMAKE)
    return images


def write(images: Mapping[str, Image], path: Path = PATH) -> None:
    """Lock these images; those of the file that are not among them stay."""
    kept = json.loads(path.read_text())["images"] if path.is_file() else {}
    merged = dict(sorted((kept | {name: asdict(image) for name, image in images.items()}).items()))
    path.write_text(json.dumps({"schema": SCHEMA, "images": merged}, indent=2) + "\n")


def stale(images: Mapping[str, Image]) -> list[str]:
    """The images that hold other code than this tree: their wrappers and their stages would not fit."""
    return [name for name, image in images.items() if image.code != code_digest(name)]
