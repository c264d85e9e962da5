"""The key and the commit of a stage: what decides its output, and the document that says it is done.

A stage's *key* is a digest of its code, its settings and the content of everything it reads; the commit under
that key is written last, so found means done and absent means it never happened. It is written once: of two
that did the same work at the same time, the first is kept. A commit that no longer holds (an output vanished,
an effect was undone) is removed before the work is done again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from components.shared import digest, sources
from components.shared.errors import StageStopped, StoreError, TuneyardError
from components.shared.settings import Settings
from components.shared.store import Store

log = logging.getLogger("tuneyard.stage")


def external_fingerprints(stage: str, config: Settings, store: Store) -> dict[str, str]:
    """Digests of what a stage reads besides its inputs, by URI."""
    repo_type = "dataset" if stage == "ingest" else "model"
    revision = getattr(config, "revision", None) or "main"
    found = {uri: sources.fingerprint(uri, store, repo_type, revision) for uri in config.external_uris()}
    return found | {uri: sources.fingerprint(uri, store, "dataset") for uri in config.external_datasets()}


def stage_key(stage: str, config: Settings, inputs: Mapping[str, str], store: Store) -> str:
    """The key of a stage.

    Args:
        stage: its name.
        config: its resolved settings.
        inputs: input name -> digest of the artifact.
        store: to fingerprint what is outside.
    """
    return digest.of_value(
        {
            "stage": stage,
            "code": digest.of_code(stage),
            "settings": config.model_dump(mode="json"),
            "inputs": dict(inputs),
            "external": external_fingerprints(stage, config, store),
        }
    )


def commit_name(stage: str, key: str) -> str:
    """Name of a stage's commit in the store."""
    return f"stages/{stage}/{key}.json"


def read_commit(
    stage: str, key: str, config: Settings, store: Store, effects: bool = True
) -> dict[str, Any] | None:
    """The commit of a key whose artifacts are all still there and, with `effects`, whose effect lasts."""
    commit = store.read_json(commit_name(stage, key))
    if commit is None:
        return None
    for name, uri in commit["outputs"].items():
        try:
            whole = store.has_tree(store.read_manifest(uri))
        except StoreError:
            raise
        except TuneyardError:
            whole = False
        if not whole:
            log.warning(
                "%s: output %s of key %s is no longer in the store; running again", stage, name, key[:12]
            )
            return None
    return commit if not effects or config.still_true(commit["summary"]) else None


def write_commit(commit: dict[str, Any], store: Store) -> dict[str, Any]:
    """Write a commit where its key has none.

    Returns:
        The commit that stands: this one, or that of whoever did the same work at once and was first.
    """
    name = commit_name(commit["stage"], commit["key"])
    if store.write_json(name, commit, once=True):
        return commit
    return store.read_json(name) or commit


def raise_if_stopped(commit: Mapping[str, Any]) -> None:
    """Stop the line again where a committed stage stopped it before.

    Raises:
        StageStopped: the commit carries a stop.
    """
    if commit["stop"]:
        raise StageStopped(commit["stop"], commit["stop_todo"])
