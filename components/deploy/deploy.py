"""Put the champion in service: the desired state is written, the server loads it, and it must answer."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.deploy.config import DeployConfig
from components.deploy.server import Answer, ModelServer, address
from components.shared import registry
from components.shared.errors import TuneyardError
from components.shared.manifest import Manifest
from components.shared.modelcard import NAME as CARD_NAME
from components.shared.modelcard import ModelCard
from components.shared.registry import RegisteredVersion
from components.shared.stage import Artifact, Context, Result
from components.shared.store import Store

log = logging.getLogger("tuneyard.deploy")

# How long the way back may take once a deployment has failed.
_RESTORE_SECONDS = 60.0


@dataclass(frozen=True)
class Deployment:
    """A model in service.

    Args:
        name: of the registered model.
        version: of it, in service now.
        digest: of the model's manifest.
        endpoint: where to POST.
        answer: what the model said to the probe.
        changed: False when the server served this very version already.
        previous_version: in service before; None when there was none.
        load_seconds: the server took to fetch, verify, load and probe it.
        seconds: all together.
    """

    name: str
    version: int
    digest: str
    endpoint: str
    answer: str
    changed: bool
    previous_version: int | None
    load_seconds: float
    seconds: float


def deploy(config: DeployConfig, inputs: Mapping[str, Artifact], context: Context) -> Result:
    """Put the present champion of the registered name in service, whichever version that is.

    Stops the line when there is no champion; raises what put_in_service raises.
    """
    registration = json.loads((inputs["registration"].path / "registration.json").read_text())
    name, version = registration["name"], registration["version"]
    champion = registry.champion(name)
    if champion is None:
        found = (
            f"{name} has no champion (version {version}: {registration.get('why', '')}), so nothing to serve"
        )
        _write(context, {"name": name, "deployed": False, "why": found})
        stop_todo = f"promote a version: tuneyard promote {name}"
        return Result(kinds={"deployment": "report"}, summary={"name": name}, stop=found, stop_todo=stop_todo)
    if champion.version != version:
        why = registration.get("why", "")
        log.info("%s: version %s is not champion (%s); %s stays", name, version, why, champion.version)
    deployment = put_in_service(name, context.store, *address(), config.ready_seconds)
    summary = asdict(deployment) | {"registered_version": version}
    _write(context, summary)
    metrics = {"load_seconds": deployment.load_seconds}
    return Result(kinds={"deployment": "report"}, metrics=metrics, summary=summary)


def _write(context: Context, document: dict[str, Any]) -> None:
    folder = context.out / "deployment"
    folder.mkdir(parents=True)
    (folder / "deployment.json").write_text(json.dumps(document, indent=1, ensure_ascii=False))


def put_in_service(name: str, store: Store, url: str, token: str, ready_seconds: float) -> Deployment:
    """Put the champion of a registered model in service, unless it is.

    Args:
        name: of the registered model.
        store: holds the model's files and the desired state.
        url: of the model server.
        token: of its admin routes.
        ready_seconds: how long all of it may take.

    Raises:
        TuneyardError: no champion, files missing, the server refuses it, or it does not answer as this
            version. Then what was desired and served before is so again.
    """
    started = time.monotonic()
    champion = registry.champion(name)
    if champion is None:
        raise TuneyardError(f"{name} has no champion", f"promote a version: tuneyard promote {name}")
    server = ModelServer(url, token, ready_seconds)
    card = _verified_card(champion, store)
    server.wait_until_alive()
    before = store.read_json(_document_name(name))
    present = server.served().get(name, {})
    same = present.get("ready") and _same(present, champion) and _same(before or {}, champion)
    load_seconds = 0.0
    if same:
        answer = _checked(server.ask(name, card.task), champion)
        log.info("%s: version %s is in service already, and answers", name, champion.version)
    else:
        answer, load_seconds = _replace(champion, card, before, store, server)
    return Deployment(
        name=name,
        version=champion.version,
        digest=champion.digest,
        endpoint=_endpoint(server.url, name, card.task),
        answer=answer.text,
        changed=not same,
        previous_version=None if same or before is None else before["version"],
        load_seconds=load_seconds,
        seconds=round(time.monotonic() - started, 3),
    )


def _replace(
    champion: RegisteredVersion,
    card: ModelCard,
    before: dict[str, Any] | None,
    store: Store,
    server: ModelServer,
) -> tuple[Answer, float]:
    """Write the desired state, load, ask; undo it where that fails. Returns answer and load seconds."""
    name = champion.name
    store.write_json(_document_name(name), _document(champion, card, before))
    try:
        state = server.load(name)
        answer = _checked(server.ask(name, card.task), champion)
    except BaseException:
        # Ctrl-C too: a version that was never seen to answer must not be loaded at the server's next start.
        _restore(name, before, store, ModelServer(server.url, server.token, _RESTORE_SECONDS))
        raise
    log.info("%s: version %s in service, loaded in %s s", name, champion.version, state["seconds"])
    return answer, float(state["seconds"])


def _restore(name: str, before: dict[str, Any] | None, store: Store, server: ModelServer) -> None:
    if before is None:
        store.remove(_document_name(name))
    else:
        store.write_json(_document_name(name), before)
    try:
        # After a refusal the server has kept the old version, and this changes nothing; after a probe that
        # failed, or a load that took too long, it takes the server back.
        if before is not None:
            server.load(name)
        elif server.served().get(name, {}).get("version"):
            server.unload(name)
    except TuneyardError as error:
        log.error("%s: the version before could not be put back in service: %s", name, error)


def _verified_card(champion: RegisteredVersion, store: Store) -> ModelCard:
    """The model's card, after making sure that each of its files is in the store with its size.

    Raises:
        TuneyardError: the manifest is another one, or files are missing; names them all.
    """
    where = f"{champion.name} version {champion.version}"
    manifest = store.read_manifest(champion.manifest_uri)
    if manifest.digest != champion.digest:
        raise TuneyardError(
            f"{where}: the registry says digest {champion.digest[:12]}, {champion.manifest_uri} has "
            f"{manifest.digest[:12]}",
            "promote another version, or submit the pipeline again",
        )
    missing = [e.path for e in manifest.files if not store.has_tree(Manifest(manifest.kind, (e,)))]
    if missing:
        raise TuneyardError(
            f"{where}: missing or cut in the store: {missing}",
            "promote another version, or submit the pipeline again",
        )
    only_card = Manifest(manifest.kind, tuple(e for e in manifest.files if e.path == CARD_NAME))
    with tempfile.TemporaryDirectory() as scratch:
        return ModelCard.read(store.get_tree(only_card, Path(scratch)))


def _document_name(name: str) -> str:
    return f"deployments/{name}.json"


def _document(champion: RegisteredVersion, card: ModelCard, before: dict[str, Any] | None) -> dict[str, Any]:
    previous = before
    if before is not None and _same(before, champion):
        previous = before.get("previous")
    return {
        "name": champion.name,
        "version": champion.version,
        "digest": champion.digest,
        "manifest": champion.manifest_uri,
        "card": card.model_dump(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        # One step back is kept here; the whole history is the ledger's.
        "previous": {k: v for k, v in previous.items() if k != "previous"} if previous else None,
    }


def _same(state: Mapping[str, Any], champion: RegisteredVersion) -> bool:
    return str(state.get("version")) == str(champion.version) and state.get("digest") == champion.digest


def _checked(answer: Answer, champion: RegisteredVersion) -> Answer:
    if (answer.version, answer.digest) != (str(champion.version), champion.digest):
        raise TuneyardError(
            f"{champion.name}: version {answer.version} ({answer.digest[:12]}) answered instead of version "
            f"{champion.version} ({champion.digest[:12]})",
            "is another deployment of this model under way? wait for it and deploy again",
        )
    return answer


def _endpoint(url: str, name: str, task: str) -> str:
    return f"{url}/v1/chat/completions" if task == "causal-lm" else f"{url}/v2/models/{name}/infer"
