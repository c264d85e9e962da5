"""The bill of materials of an image, as CycloneDX 1.6: each Python distribution and each Debian package.

It is made from what is installed, not from what was asked for. The sha256 of a distribution is that of the
file it was installed from; an image holds less of it (no tests, no headers) and its byte code.
https://cyclonedx.org/docs/1.6/json/
"""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.shared import digest
from pipelines.images.facts import Facts

FOLDER = digest.TREE_ROOT / "docker" / "sbom"


def document(image: str, facts: Facts, wheels: Path, epoch: int) -> dict[str, Any]:
    """The bill of an image.

    Args:
        image: its name.
        facts: what is in it.
        wheels: the folder of files that its distributions were installed from.
        epoch: its time, in seconds.
    """
    files = {_of_file(path): path for path in sorted(wheels.iterdir())}
    components = [_distribution(*each, files.get((each[0], each[1]))) for each in facts.python]
    components += [_package(*each) for each in facts.debian]
    when = datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    # The same image always has the same bill, its serial number included.
    serial = uuid.uuid5(uuid.NAMESPACE_OID, digest.of_value([image, facts.code, components]))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {
            "timestamp": when,
            "component": {
                "type": "container",
                "bom-ref": f"tuneyard-{image}",
                "name": f"tuneyard/{image}",
                "version": facts.code[:12],
            },
        },
        "components": components,
    }


def _of_file(path: Path) -> tuple[str, str]:
    """(name, version) of a wheel or a source archive, as its file name says."""
    name, version = (
        path.name.removesuffix(".tar.gz").split("-")[:2]
        if path.suffix == ".whl"
        else (path.name.removesuffix(".tar.gz").rsplit("-", 1))
    )
    return re.sub(r"[-_.]+", "-", name).lower(), version


def _distribution(name: str, version: str, licence: dict[str, Any], file: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "library",
        "bom-ref": f"python:{name}",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{name}@{version.replace('+', '%2B')}",
    }
    if "expression" in licence:
        found["licenses"] = [{"expression": licence["expression"]}]
    elif licence["names"]:
        found["licenses"] = [{"license": {"name": each}} for each in licence["names"]]
    if file is not None:
        found["hashes"] = [{"alg": "SHA-256", "content": digest.of_file(file)}]
    return found


def _package(name: str, version: str, architecture: str) -> dict[str, Any]:
    escaped = version.replace("+", "%2B").replace(":", "%3A").replace("~", "~")
    return {
        "type": "library",
        "bom-ref": f"debian:{name}:{architecture}",
        "name": name,
        "version": version,
        "purl": f"pkg:deb/debian/{name.replace('+', '%2B')}@{escaped}?arch={architecture}",
    }
