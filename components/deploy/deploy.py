"""Put the champion in service: the desired state is written, every replica loads it, and each must answer."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.deploy import canary, replicas, switching
from components.deploy.config import DeployConfig
from components.deploy.server import ModelServer, address
from components.shared import deployments, registry
from components.shared.errors import TuneyardError
from components.shared.manifest import Manifest
from components.shared.modelcard import NAME as CARD_NAME
from components.shared.modelcard import ModelCard
from components.shared.registry import RegisteredVersion
from components.shared.stage import Artifact, Context, Result
from components.shared.store import Store

log = logging.getLogger("tuneyard.deploy")


@dataclass(frozen=True)
class Deployment:
    """A model in service.

    Args:
        name: of the registered model.
        version: of it, in service now.
        digest: of the model's manifest.
        endpoint: where to POST.
        answer: what the model said to the probe.
        changed: False when every replica served this very version already.
        previous_version: in service before; None when there was none.
        load_seconds: the slowest replica took to fetch, verify, load and probe it.
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

    Stops the line when there is no champion, or when it is tried as a canary and fails; raises what
    put_in_service and canary.run raise.
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
    done: dict[str, Any] = {}
    before = context.store.read_json(deployments.document_name(name))
    if config.canary is not None and before is not None and not switching.is_deployed(before, champion):
        card = _verified_card(champion, context.store)
        who = f"pipeline {context.pipeline}, run {context.run}"
        trial = canary.Trial(champion, card, before, config.canary, who)
        outcome = canary.run(trial, context.store, *address(), config.ready_seconds)
        if not outcome.verdict.passed:
            return _taken_back(trial, outcome, context)
        done = {"changed": True, "previous_version": before["version"], "canary": outcome.evidence}
        done |= {"load_seconds": outcome.load_seconds}
    deployment = put_in_service(name, context.store, *address(), config.ready_seconds)
    summary = asdict(deployment) | {"registered_version": version} | done
    _write(context, summary)
    metrics = {"load_seconds": summary["load_seconds"]}
    return Result(kinds={"deployment": "report"}, metrics=metrics, summary=summary)


def _taken_back(trial: canary.Trial, outcome: canary.Outcome, context: Context) -> Result:
    name, stays = trial.champion.name, trial.before["version"]
    # No `version` in it: another submit asks again, and finds the old champion.
    summary = {"name": name, "deployed": False, "canary": outcome.evidence}
    _write(context, summary)
    return Result(
        kinds={"deployment": "report"},
        metrics={"load_seconds": outcome.load_seconds},
        summary=summary,
        stop=f"{name} version {trial.champion.version} failed as a canary, version {stays} stays: "
        f"{outcome.verdict.why}",
        stop_todo=f"tuneyard history {name} has the numbers; tuneyard promote {name} deploys it all the same",
    )


def _write(context: Context, document: dict[str, Any]) -> None:
    folder = context.out / "deployment"
    folder.mkdir(parents=True)
    (folder / "deployment.json").write_text(json.dumps(document, indent=1, ensure_ascii=False))


def put_in_service(name: str, store: Store, url: str, token: str, ready_seconds: float) -> Deployment:
    """Put the champion of a registered model in service on every replica, for all requests, unless it is.

    Args:
        name: of the registered model.
        store: holds the model's files and the desired state.
        url: of the model server.
        token: of its admin routes.
        ready_seconds: how long all of it may take.

    Raises:
        TuneyardError: no champion, files missing, a replica refuses it, is late, or does not answer as this
            version. Then what was desired and served before is so again.
    """
    started = time.monotonic()
    champion = registry.champion(name)
    if champion is None:
        raise TuneyardError(f"{name} has no champion", f"promote a version: tuneyard promote {name}")
    server = ModelServer(url, token, ready_seconds)
    card = _verified_card(champion, store)
    server.wait_until_alive()
    before = store.read_json(deployments.document_name(name))
    wanted = switching.document(champion, card, before)
    deployment = deployments.parse(name, wanted)
    same = (
        before is not None
        and not before.get("canary")
        and switching.is_deployed(before, champion)
        and replicas.agree(server, deployment)
    )
    load_seconds = 0.0
    if same:
        answer = switching.asked([server], deployment, champion)
        log.info("%s: version %s is in service already, and answers", name, champion.version)
    else:
        answer, load_seconds = switching.switch(wanted, before, champion, store, server)
        log.info("%s: version %s in service, loaded in %s s", name, champion.version, load_seconds)
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


def _endpoint(url: str, name: str, task: str) -> str:
    return f"{url}/v1/chat/completions" if task == "causal-lm" else f"{url}/v2/models/{name}/infer"
