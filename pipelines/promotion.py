"""What a person does to the champion: promote a version, roll back to the one before, see the history."""

from __future__ import annotations

import getpass
import json
import logging
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.shared import ledger, registry
from components.shared.errors import TuneyardError, UsageError
from components.shared.ledger import Change, Entry
from components.shared.store import Store

log = logging.getLogger("tuneyard.promotion")


@dataclass(frozen=True)
class Promotion:
    """What changed.

    Args:
        name: of the registered model.
        version: champion now.
        digest: of its model manifest.
        previous_champion: version before; None when there was none.
        changed: False when it was champion already.
        in_service: whether a server that had the old champion now answers with this one; False when the
            model was never deployed.
    """

    name: str
    version: int
    digest: str
    previous_champion: int | None
    changed: bool
    in_service: bool

    def __str__(self) -> str:
        """One line for a person."""
        now = "is now champion" if self.changed else "was champion already"
        known = self.changed and self.previous_champion
        before = f" (before: version {self.previous_champion})" if known else ""
        served = "in service" if self.in_service else "not deployed yet"
        return f"{self.name} version {self.version} {now}{before}, {served}"


def promote(name: str, version: int | None, who: str, why: str, force: bool = False) -> Promotion:
    """Make a version champion, and put it in service where the model is deployed.

    Args:
        name: of the registered model.
        version: None for the candidate.
        who: '' for the person at the keyboard.
        why: one sentence for the ledger; required with `force`.
        force: also a version whose verdict is not `passed`.

    Raises:
        UsageError: no such version, a failed verdict without force, force without a reason.
        TuneyardError: the model's bytes are gone, MLflow, the ledger or the server refused.
    """
    if force and not why.strip():
        raise UsageError("promote with force needs a reason: it stays in the ledger", "say why")
    store = Store.from_environment()
    ledger.reconcile(name, store)
    wanted = registry.get(name, registry.CANDIDATE if version is None else version)
    verdict = wanted.tags.get("verdict", "absent")
    if verdict != "passed" and not force:
        raise UsageError(
            f"{name} version {wanted.version}: its verdict is {verdict!r}, not 'passed'",
            "promote one that passed, or use force and say why",
        )
    _require_bytes(wanted, store)

    def decide(entries: list[Entry]) -> Change | None:
        if ledger.champion(entries) == wanted.version:
            return None
        known = ledger.registration(entries, wanted.version)
        evidence = dict(known.evidence) if known else _tag_evidence(wanted)
        if verdict != "passed":
            evidence |= {"forced": True, "verdict": verdict}
        return Change(
            "promote",
            wanted.version,
            wanted.digest,
            who or default_who(),
            why or "promoted by hand",
            evidence,
        )

    return _settle(wanted, ledger.change(name, store, decide), store)


def rollback(name: str, who: str, why: str) -> Promotion:
    """Make the champion before the present one champion again; twice goes back twice.

    Args:
        name: of the registered model.
        who: '' for the person at the keyboard.
        why: one sentence for the ledger.

    Raises:
        UsageError: there is no earlier champion with other bytes.
        TuneyardError: its bytes are gone, MLflow, the ledger or the server refused.
    """
    store = Store.from_environment()
    chosen: list[registry.RegisteredVersion] = []

    def decide(entries: list[Entry]) -> Change:
        target = ledger.rollback_target(entries)
        if target is None:
            raise UsageError(
                f"{name} has no earlier champion to go back to (champion: {ledger.champion(entries)})",
                "promote a version instead",
            )
        version = registry.get(name, target.version)
        _require_bytes(version, store)
        chosen.append(version)
        evidence = {**target.evidence, "undone": ledger.champion(entries)}
        return Change(
            "rollback",
            target.version,
            target.digest,
            who or default_who(),
            why or "rolled back by hand",
            evidence,
        )

    entry = ledger.change(name, store, decide)
    return _settle(chosen[-1], entry, store)


def history(name: str) -> list[Entry]:
    """The ledger of a model, oldest entry first.

    Raises:
        UsageError: nothing was ever registered under that name.
        TuneyardError: the ledger is broken; names the first broken entry.
    """
    entries = ledger.verify(name, Store.from_environment())
    if not entries:
        raise UsageError(f"nothing was ever registered as {name!r}", "check the name, or submit its pipeline")
    return entries


def told(entry: Entry) -> str:
    """An entry of the ledger for a person: a line, and a line for each part of its evidence."""
    before = f" (champion before: version {entry.previous_champion})" if entry.previous_champion else ""
    done = f"{entry.action} version {entry.version}{before}"
    first = f"{entry.number}. {entry.at}  {done}, by {entry.who}: {entry.why}"
    parts = (f"   {name}: {json.dumps(part, ensure_ascii=False)}" for name, part in entry.evidence.items())
    return "\n".join([first, *parts])


def default_who() -> str:
    """Who is at the keyboard: git's user, else the login name."""
    try:
        found = [
            subprocess.run(["git", "config", key], capture_output=True, text=True, timeout=5).stdout.strip()
            for key in ("user.name", "user.email")
        ]
    except (OSError, subprocess.SubprocessError):
        found = ["", ""]
    if found[0]:
        return f"{found[0]} <{found[1]}>" if found[1] else found[0]
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id may have no name
        return f"uid {os.getuid()}"


def _require_bytes(version: registry.RegisteredVersion, store: Store) -> None:
    manifest = store.read_manifest(version.manifest_uri)
    if not store.has_tree(manifest):
        raise TuneyardError(
            f"{version.name} version {version.version}: files of {version.manifest_uri} are gone",
            "promote another version, or submit the pipeline again",
        )


def _tag_evidence(version: registry.RegisteredVersion) -> dict[str, Any]:
    """Evidence for a version that somebody registered past the register stage."""
    try:
        judged_on = json.loads(version.tags.get("judged_on", "{}"))
    except ValueError:
        judged_on = {}
    return {"metrics": version.metrics, "judged_on": judged_on, "tags": dict(version.tags)}


def _settle(version: registry.RegisteredVersion, entry: Entry | None, store: Store) -> Promotion:
    name = version.name
    deployment = store.read_json(f"deployments/{name}.json")
    if deployment is not None:
        _put_in_service(version, deployment, store)
    before = entry.previous_champion if entry else version.version
    return Promotion(name, version.version, version.digest, before, entry is not None, deployment is not None)


def _put_in_service(version: registry.RegisteredVersion, deployment: Mapping[str, Any], store: Store) -> None:
    from components.deploy.config import DeployConfig
    from components.deploy.deploy import put_in_service
    from components.deploy.server import address

    try:
        put_in_service(version.name, store, *address(), DeployConfig.model_validate({}).ready_seconds)
    except TuneyardError as error:
        raise TuneyardError(
            f"{version.name} version {version.version} is champion in the ledger, but the server did not "
            f"take it: {error.what}",
            f"{error.todo}; then promote version {version.version} again, which only puts it in service",
        ) from error
