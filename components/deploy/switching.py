"""Change what is deployed under a name: write it, see every replica answer, or take it back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from components.deploy import replicas
from components.deploy.server import Answer, ModelServer
from components.shared import deployments
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.registry import RegisteredVersion
from components.shared.store import Store

log = logging.getLogger("tuneyard.deploy")

# How long the way back may take once a deployment has failed.
_RESTORE_SECONDS = 60.0


def document(
    champion: RegisteredVersion, card: ModelCard, before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What is written when a version gets all requests.

    Args:
        champion: the version.
        card: of it.
        before: what was written until now.
    """
    previous = before
    if before is not None and is_deployed(before, champion):
        previous = before.get("previous")
    return {
        "name": champion.name,
        "version": champion.version,
        "digest": champion.digest,
        "manifest": champion.manifest_uri,
        "card": card.model_dump(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        # One step back is kept here; the whole history is the ledger's.
        "previous": _without(previous, "previous", "canary") if previous else None,
    }


def with_canary(before: Mapping[str, Any], canary: deployments.Canary) -> dict[str, Any]:
    """What is written when a version gets a share of the requests, beside what is deployed."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return {**before, "canary": canary.model_dump(), "at": at}


def without_canary(before: Mapping[str, Any]) -> dict[str, Any]:
    """What is deployed, alone."""
    return _without(before, "canary")


def is_deployed(state: Mapping[str, Any], version: RegisteredVersion) -> bool:
    """Whether a document, or a server's state, names this very version as the one in service."""
    return str(state.get("version")) == str(version.version) and state.get("digest") == version.digest


def switch(
    wanted: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    answers_as: RegisteredVersion,
    store: Store,
    server: ModelServer,
) -> tuple[Answer, float]:
    """Write what should be in service, and see every replica load it and answer; undo it where that fails.

    Args:
        wanted: the document.
        before: what stands there now; None for nothing.
        answers_as: the version whose answer is asked for.
        store: holds the document.
        server: whose replicas follow it.

    Returns:
        An answer, and how many seconds the slowest replica took to load.

    Raises:
        TuneyardError: a replica refuses it, is late, or answers as another version.
    """
    name = answers_as.name
    deployment = deployments.parse(name, wanted)
    store.write_json(deployments.document_name(name), dict(wanted))
    try:
        here, seconds = replicas.bring(server, deployment)
        return asked(here, deployment, answers_as), seconds
    except BaseException:
        # Ctrl-C too: a version that was never seen to answer must not be loaded at a server's next start.
        restore(name, before, store, server)
        raise


def asked(
    here: list[ModelServer], deployment: deployments.Deployment, answers_as: RegisteredVersion
) -> Answer:
    """What the replicas answer a client; the first one's words.

    Raises:
        TuneyardError: one answers as another version.
    """
    version = str(answers_as.version) if deployment.canary else ""
    task = str(deployment.card["task"])
    answers = [_checked(each.ask(answers_as.name, task, version), answers_as) for each in here]
    return answers[0]


def restore(name: str, before: Mapping[str, Any] | None, store: Store, server: ModelServer) -> None:
    """Write what stood there before, and let the replicas see it. What goes wrong is logged."""
    again = ModelServer(server.url, server.token, _RESTORE_SECONDS)
    if before is None:
        store.remove(deployments.document_name(name))
    else:
        store.write_json(deployments.document_name(name), dict(before))
    try:
        if before is None:
            replicas.withdraw(again, name)
        else:
            replicas.bring(again, deployments.parse(name, before))
    except TuneyardError as error:
        log.error("%s: what was deployed before is not in service everywhere yet: %s", name, error)


def _without(document: Mapping[str, Any], *fields: str) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in fields}


def _checked(answer: Answer, expected: RegisteredVersion) -> Answer:
    if (answer.version, answer.digest) != (str(expected.version), expected.digest):
        raise TuneyardError(
            f"{expected.name}: version {answer.version} ({answer.digest[:12]}) answered instead of version "
            f"{expected.version} ({expected.digest[:12]})",
            "is another deployment of this model under way? wait for it and deploy again",
        )
    return answer
