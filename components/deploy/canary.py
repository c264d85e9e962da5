"""Try a new champion on a share of the requests; then it gets all of them, or is taken back."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.deploy import switching
from components.deploy.config import CanaryConfig
from components.deploy.server import Answer, ModelServer, Unreachable
from components.deploy.verdict import Meter, Verdict, judge
from components.shared import deployments, ledger
from components.shared.errors import TuneyardError
from components.shared.ledger import Change, Entry
from components.shared.modelcard import ModelCard
from components.shared.registry import RegisteredVersion
from components.shared.store import Store

log = logging.getLogger("tuneyard.deploy")

_LOOK_SECONDS = 2.0
_TELL_SECONDS = 60.0
# For a look at the replicas of a server that is busy.
_ASK_SECONDS = 20.0
# Replicas send a canary nothing any more when its judge should long be done.
_SPARE_SECONDS = 300.0


@dataclass(frozen=True)
class Trial:
    """A canary and what is beside it.

    Args:
        champion: the version on trial, champion already in the ledger.
        card: of it.
        before: the document of what is in service.
        settings: share, bounds, time.
        who: runs the trial, for the ledger.
    """

    champion: RegisteredVersion
    card: ModelCard
    before: Mapping[str, Any]
    settings: CanaryConfig
    who: str


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Args:
        verdict: who answers now, and why.
        evidence: the numbers.
        answer: of the canary, before it was tried.
        load_seconds: the slowest replica took to load it.
    """

    verdict: Verdict
    evidence: dict[str, Any]
    answer: Answer
    load_seconds: float


def run(trial: Trial, store: Store, url: str, token: str, ready_seconds: float) -> Outcome:
    """Put the canary beside what is in service, watch both, and settle it: in service first, then the ledger.

    Raises:
        TuneyardError: a replica refuses the canary or is late, or somebody else deployed meanwhile. What was
            in service gets all requests again, unless the somebody wanted otherwise.
    """
    champion, asked = trial.champion, trial.settings
    name, before = champion.name, switching.without_canary(trial.before)
    canary = deployments.Canary(
        version=champion.version,
        digest=champion.digest,
        manifest=champion.manifest_uri,
        weight=asked.weight,
        until=time.time() + ready_seconds + 60 * asked.within_minutes + _SPARE_SECONDS,
    )
    document = switching.with_canary(before, canary)
    server = ModelServer(url, token, ready_seconds)
    server.wait_until_alive()
    answer, seconds = switching.switch(document, before, champion, store, server)
    log.info("%s: version %d answers %.0f %% of the requests", name, champion.version, 100 * asked.weight)
    meter = Meter(name)
    try:
        verdict = _watch(trial, meter, document, store, server)
    except BaseException:
        if _stands(document, name, store):
            switching.restore(name, before, store, server)
        raise
    _settle(trial, before, verdict, store, ModelServer(url, token, ready_seconds))
    evidence = _evidence(trial, meter, verdict)
    ledger.change(name, store, lambda entries: _change(trial, verdict, evidence, entries))
    log.info("%s: canary version %d: %s", name, champion.version, verdict.why)
    return Outcome(verdict, evidence, answer, seconds)


def _watch(
    trial: Trial, meter: Meter, document: Mapping[str, Any], store: Store, server: ModelServer
) -> Verdict:
    name, asked = trial.champion.name, trial.settings
    end = time.monotonic() + 60 * asked.within_minutes
    told = time.monotonic()
    while True:
        over = time.monotonic() >= end
        _read(meter, ModelServer(server.url, server.token, _ASK_SECONDS))
        canary, stable = meter.tally(trial.champion.version), meter.tally(int(trial.before["version"]))
        verdict = judge(canary, stable, asked, over)
        if verdict is not None:
            return verdict
        if not _stands(document, name, store):
            raise TuneyardError(
                f"{name}: somebody deployed while version {trial.champion.version} was tried "
                f"({canary.requests} of {asked.requests} requests), so it is not judged",
                "see `tuneyard history`; submit again to try it once more",
            )
        if time.monotonic() - told > _TELL_SECONDS:
            log.info("%s: canary has %d of %d requests", name, canary.requests, asked.requests)
            told = time.monotonic()
        time.sleep(max(0.0, min(_LOOK_SECONDS, end - time.monotonic())))


def _read(meter: Meter, server: ModelServer) -> None:
    """Read every replica. One that starts, ends or is too busy is read the next time."""
    with contextlib.suppress(Unreachable):
        for replica in server.replicas():
            try:
                meter.read(replica.address, replica.metrics())
            except TuneyardError as error:
                log.info("%s", error.what)


def _stands(document: Mapping[str, Any], name: str, store: Store) -> bool:
    """Whether the store still says what this trial wrote."""
    return (store.read_json(deployments.document_name(name)) or {}).get("canary") == document["canary"]


def _settle(
    trial: Trial, before: Mapping[str, Any], verdict: Verdict, store: Store, server: ModelServer
) -> None:
    if verdict.passed:
        wanted = switching.document(trial.champion, trial.card, before)
        switching.switch(wanted, before, trial.champion, store, server)
    else:
        switching.restore(trial.champion.name, before, store, server)


def _evidence(trial: Trial, meter: Meter, verdict: Verdict) -> dict[str, Any]:
    version, beside = trial.champion.version, int(trial.before["version"])
    return {
        "passed": verdict.passed,
        "why": verdict.why,
        "settings": trial.settings.model_dump(mode="json"),
        "canary": {"version": version, **meter.tally(version).facts()},
        "stable": {"version": beside, **meter.tally(beside).facts()},
    }


def _change(
    trial: Trial, verdict: Verdict, evidence: dict[str, Any], entries: Sequence[Entry]
) -> Change | None:
    """Champion once more with what the canary showed, or back to what was beside it.

    None when the champion is another one by now: somebody decided since.
    """
    entry = ledger.champion_entry(entries)
    if entry is None or entry.version != trial.champion.version:
        return None
    if verdict.passed:
        why = f"the canary passed: {verdict.why}"
        return Change(
            "promote", entry.version, entry.digest, trial.who, why, {**entry.evidence, "canary": evidence}
        )
    back = ledger.registration(entries, int(trial.before["version"]))
    known = dict(back.evidence) if back else {}
    return Change(
        "rollback",
        int(trial.before["version"]),
        str(trial.before["digest"]),
        trial.who,
        f"the canary failed: {verdict.why}",
        {**known, "canary": evidence, "undone": entry.version},
    )
