"""Registered models as sources: `models:/<name>@champion`, `models:/<name>@candidate`, `models:/<name>/3`.

So a training can begin where another one ended (supervised, then preferences), and a policy can be trained by
the reward model that is in service. The ledger in the store says what a name means now; MLflow is not asked.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from components.shared.errors import TuneyardError
from components.shared.manifest import Manifest
from components.shared.placing import into_place

if TYPE_CHECKING:
    from components.shared.store import Store

SCHEME = "models:/"
_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>champion|candidate)|/(?P<version>\d+))")


def manifest(uri: str, store: Store) -> Manifest:
    """The manifest of the version that a URI means now.

    Raises:
        TuneyardError: it is no such URI, or there is no such version; says which there are.
    """
    from components.shared import ledger

    found = _URI.fullmatch(uri)
    if found is None:
        raise TuneyardError(
            f"{uri!r} names no registered model",
            "write models:/<name>@champion, models:/<name>@candidate or models:/<name>/<version>",
        )
    entries = ledger.read(found["name"], store)
    if found["version"]:
        version: int | None = int(found["version"])
    else:
        version = (ledger.champion if found["alias"] == "champion" else ledger.candidate)(entries)
    entry = ledger.registration(entries, version)
    if entry is None:
        versions = sorted({entry.version for entry in entries if entry.action == "register"})
        raise TuneyardError(
            f"{uri}: there is no such version in {store.root}",
            f"versions of {found['name']} here: {', '.join(map(str, versions)) or 'none'}",
        )
    return store.read_manifest(f"{store.root}/manifests/{entry.digest}.json")


def folder(uri: str, store: Store) -> Path:
    """A local folder with the files of the version that a URI means now.

    Raises:
        TuneyardError: as `manifest`; or the version is no whole model that can be trained on.
    """
    from components.shared.modelcard import ModelCard

    version = manifest(uri, store)
    path = store.cache / "registered" / version.digest
    if not store.has_tree(version):
        raise TuneyardError(f"{uri}: its files are no longer in {store.root}", "name a version that is kept")
    into_place(path, lambda aside: store.get_tree(version, aside))
    layout = ModelCard.read(path).layout
    if layout != "transformers":
        raise TuneyardError(
            f"{uri} is no whole model but has layout {layout!r}",
            "give its pipeline a compress section, which merges an adapter, or name another version",
        )
    return path
