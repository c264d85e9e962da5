"""`python -m k8s.render prod`: the manifests of an overlay, our images by the digests of docker/images.json.

In git the images are called tuneyard/cpu, tuneyard/gpu and tuneyard/serving, which is nobody's repository:
what `kubectl apply -k` would start without this step cannot be pulled, instead of being whatever a tag
points to.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from components.shared.errors import TuneyardError, UsageError
from pipelines.images import lock
from pipelines.images.lock import Image

FOLDER = Path(__file__).resolve().parent
_PREFIX = "tuneyard/"


def overlays() -> list[str]:
    """The names of the overlays."""
    return sorted(path.parent.name for path in FOLDER.glob("overlays/*/kustomization.yaml"))


def render(overlay: str, images: Mapping[str, Image]) -> str:
    """The manifests of an overlay, as YAML.

    Args:
        overlay: a folder of k8s/overlays.
        images: by name, as lock.read gives them. With none, the names stay as they are in git.

    Raises:
        UsageError: there is no such overlay, or no kubectl, or images hold other code than this tree.
        TuneyardError: kustomize refused the manifests, in its own words.
    """
    if overlay not in overlays():
        raise UsageError(f"there is no overlay {overlay!r}", f"take one of {', '.join(overlays())}")
    if shutil.which("kubectl") is None:
        raise UsageError("there is no kubectl on the PATH, so nothing can be rendered", "install kubectl")
    if old := lock.stale(images):
        raise UsageError(
            f"the images {', '.join(old)} hold other code than this tree",
            "build and push them again: make images",
        )
    with tempfile.TemporaryDirectory() as made:
        # Kustomize takes a base by relative path only, and on some machines /tmp is a link.
        folder = Path(made).resolve()
        document = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(FOLDER / "overlays" / overlay, folder)],
            "images": [
                {"name": f"{_PREFIX}{name}", "newName": image.name, "digest": image.digest}
                for name, image in images.items()
            ],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(document))
        done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise TuneyardError(f"kustomize refused overlay {overlay}: {done.stderr.strip()}", "mend k8s/")
    return done.stdout


def main() -> int:
    """Write the manifests to standard output. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m k8s.render", description=__doc__.splitlines()[0])
    parser.add_argument("overlay", choices=overlays())
    asked = parser.parse_args()
    try:
        sys.stdout.write(render(asked.overlay, lock.read()))
    except TuneyardError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
