"""What is really in an image: asked of the image itself, by its own Python."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pipelines.images import builders, lock
from pipelines.images.builders import Builder

# Runs inside, where nothing of pipelines/ is.
_PROGRAM = """
import importlib.metadata, json, os, subprocess, sys
from components.shared import digest

def licence(about):
    if about["License-Expression"]:
        return {"expression": about["License-Expression"]}
    lines = about.get_all("Classifier") or []
    return {"names": [line.split(" :: ")[-1] for line in lines if line.startswith("License ::")]}

form = "${Package} ${Version} ${Architecture}\\n"
debian = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True).stdout
size, seen = 0, set()
for folder, folders, files in os.walk("/"):
    if folder == "/":
        folders[:] = [name for name in folders if name not in ("proc", "sys", "dev")]
    for name in files:
        status = os.lstat(os.path.join(folder, name))
        if status.st_ino not in seen or status.st_nlink == 1:
            seen.add(status.st_ino)
            size += status.st_size
found = sorted(
    [dist.name.lower().replace("_", "-").replace(".", "-"), dist.version, licence(dist.metadata)]
    for dist in importlib.metadata.distributions()
)
print(json.dumps({
    "code": digest.of_folders(*sys.argv[1:]),
    "user": [os.getuid(), os.getgid()],
    "python": found,
    "debian": [line.split() for line in debian.splitlines()],
    "size_bytes": size,
}))
"""


@dataclass(frozen=True)
class Facts:
    """What is in an image.

    Args:
        code: digest of the code it holds.
        user: ids of the user and the group that it runs as.
        python: name, version and licence of each Python distribution.
        debian: name, version and architecture of each Debian package.
        size_bytes: of all its files, not compressed.
    """

    code: str
    user: tuple[int, int]
    python: list[tuple[str, str, dict[str, Any]]]
    debian: list[tuple[str, str, str]]
    size_bytes: int


def ask(builder: Builder, image: str, tag: str) -> Facts:
    """The facts of an image.

    Raises:
        TuneyardError: it does not run.
    """
    command = ["python3", "-c", _PROGRAM, *lock.code_folders(image)]
    found = json.loads(builders.run(builder, tag, command))
    return Facts(
        code=found["code"],
        user=tuple(found["user"]),
        python=[tuple(each) for each in found["python"]],
        debian=[tuple(each) for each in found["debian"]],
        size_bytes=found["size_bytes"],
    )
