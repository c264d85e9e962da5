"""Who a model is: the digests, code and settings that made it, for the tags of its version."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.shared.digest import TREE_ROOT
from components.shared.errors import StoreError, TuneyardError
from components.shared.manifest import Manifest
from components.shared.store import Store

log = logging.getLogger("tuneyard.register")

_GIT_SECONDS = 10


def lineage(manifests: Mapping[str, Manifest], store: Store) -> dict[str, dict[str, Any]]:
    """What made these artifacts, and what made what they were made from, back to the corpus.

    Args:
        manifests: input name -> manifest.
        store: has the manifests of earlier stages.

    Returns:
        Stage -> {key, code, settings, inputs, outputs}, where inputs and outputs are name -> digest.
    """
    stages: dict[str, dict[str, Any]] = {}
    waiting = [(name, manifest) for name, manifest in manifests.items()]
    seen: set[str] = set()
    while waiting:
        name, manifest = waiting.pop()
        made_by = manifest.made_by
        if not made_by:
            continue
        facts = {key: made_by[key] for key in ("key", "code", "settings", "inputs")}
        stages.setdefault(made_by["stage"], facts | {"outputs": {}})["outputs"][name] = manifest.digest
        for earlier, digest in made_by["inputs"].items():
            if digest not in seen:
                seen.add(digest)
                found = _manifest(digest, store)
                if found is not None:
                    waiting.append((earlier, found))
    return stages


def git_state(root: Path = TREE_ROOT) -> dict[str, str]:
    """`git.commit` and `git.dirty` of the checkout that runs; empty outside one, as in an image."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return {}  # we are unpacked inside somebody else's repository
        return {
            "git.commit": git("rev-parse", "HEAD"),
            "git.dirty": str(bool(git("status", "--porcelain"))).lower(),
        }
    except (OSError, subprocess.SubprocessError) as error:
        log.info("no git commit to record (%s); the code digests say which code it was", type(error).__name__)
        return {}


def tags(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """`digest.<artifact>` and `code.<stage>` for each artifact and stage of a lineage, and the corpus."""
    found: dict[str, str] = {}
    for stage, facts in sorted(stages.items()):
        found[f"code.{stage}"] = facts["code"]
        found |= {f"digest.{name}": digest for name, digest in sorted(facts["inputs"].items())}
        found |= {f"digest.{name}": digest for name, digest in sorted(facts["outputs"].items())}
    source = stages.get("ingest", {}).get("settings", {}).get("source")
    return found | ({"source": str(source)} if source else {})


def _manifest(digest: str, store: Store) -> Manifest | None:
    """An earlier stage's manifest; None when it was cleaned away (its digest is on record all the same)."""
    try:
        return store.read_manifest(f"{store.root}/manifests/{digest}.json")
    except StoreError:
        raise
    except TuneyardError as error:
        log.warning("lineage ends at %s: %s", digest[:12], error.what)
        return None
