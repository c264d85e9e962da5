"""All replicas of the model server at once: told of a deployment, and waited for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from components.deploy.server import ModelServer, Unreachable
from components.shared.deployments import DeployedVersion, Deployment
from components.shared.errors import TuneyardError

_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Standing:
    """How one replica stands to a deployment.

    Args:
        replica: which.
        away: it cannot be reached: it starts or ends, and comes up with what the store says.
        lag: what it serves instead; empty when it serves what it should.
        refused: why it will not serve it, in its own words; empty when it did not say so.
    """

    replica: ModelServer
    away: bool = False
    lag: str = ""
    refused: str = ""


def bring(server: ModelServer, wanted: Deployment) -> tuple[list[ModelServer], float]:
    """Let every replica look at the store, and wait until each serves what stands there.

    Returns:
        The replicas, and how many seconds the slowest of those that were told took to load.

    Raises:
        TuneyardError: replicas refuse it, or are late; names each.
    """
    told: set[str] = set()
    load_seconds = 0.0
    while True:
        found = server.replicas()
        new = [replica for replica in found if replica.address not in told]
        # One that was not there yet: it follows the store by itself, but this is sooner and says why not.
        for replica, state in zip(new, _each(new, lambda r: _told(r, wanted.name)), strict=True):
            if state is not None:
                told.add(replica.address)
                load_seconds = max(load_seconds, float(state.get("seconds", 0.0)))
        standings = _each(found, lambda r: standing(r, wanted))
        if refused := [each for each in standings if each.refused]:
            raise _refusal(refused, wanted, len(found))
        here = [each.replica for each in standings if not each.away and not each.lag]
        late = [each for each in standings if each.lag]
        if here and not late:
            return here, load_seconds
        if server.is_late:
            raise _lateness(late, wanted, standings, server)
        time.sleep(_LOOK_SECONDS)


def agree(server: ModelServer, wanted: Deployment) -> bool:
    """Whether every replica that can be reached serves this already, and one can."""
    standings = _each(server.replicas(), lambda replica: standing(replica, wanted))
    return not any(s.lag or s.refused for s in standings) and not all(s.away for s in standings)


def withdraw(server: ModelServer, name: str) -> None:
    """Let every replica see that nothing is deployed under a name any more."""
    _each(server.replicas(), lambda replica: _told(replica, name))


def standing(replica: ModelServer, wanted: Deployment) -> Standing:
    """What a replica serves now, against what it should."""
    try:
        state = replica.served().get(wanted.name)
    except Unreachable:
        return Standing(replica, away=True)
    if state is None:
        return Standing(replica, lag="nothing yet")
    if state["refused"]:
        return Standing(replica, lag="nothing new", refused=state["refused"])
    present = [state, state["canary"]]
    if state["ready"] and all(map(_is, present, [wanted, wanted.canary])):
        return Standing(replica)
    shown = f"version {state['version']}" if state["version"] else "nothing yet"
    canary = f" and canary {state['canary']['version']}" if state["canary"] else ""
    return Standing(replica, lag=shown + canary + (f" ({state['reason']})" if state["reason"] else ""))


def _is(present: dict[str, Any] | None, wanted: DeployedVersion | None) -> bool:
    if present is None or wanted is None:
        return present is None and wanted is None
    return (present["version"], present["digest"]) == (str(wanted.version), wanted.digest)


def _told(replica: ModelServer, name: str) -> dict[str, Any] | None:
    try:
        return replica.follow(name) or {}
    except Unreachable:
        return None


def _each(replicas: Sequence[ModelServer], do: Any) -> list[Any]:
    """What comes of every replica, asked at the same time.

    Raises:
        TuneyardError: what went wrong, of all of them.
    """

    def caught(replica: ModelServer) -> Any:
        try:
            return do(replica)
        except TuneyardError as error:
            return error

    with ThreadPoolExecutor(max(1, len(replicas))) as pool:
        found = list(pool.map(caught, replicas))
    wrong = [each for each in found if isinstance(each, TuneyardError)]
    if wrong:
        whats = list(dict.fromkeys(error.what for error in wrong))
        raise TuneyardError("; ".join(whats), wrong[0].todo)
    return found


def _refusal(refused: Sequence[Standing], wanted: Deployment, count: int) -> TuneyardError:
    said = "; ".join(f"{each.replica}: {each.refused}" for each in refused)
    return TuneyardError(
        f"{wanted.name}: {len(refused)} of {count} replicas refuse what is deployed: {said}",
        "promote another version, or submit the pipeline again",
    )


def _lateness(
    late: Sequence[Standing], wanted: Deployment, standings: Sequence[Standing], server: ModelServer
) -> TuneyardError:
    if not late:
        return Unreachable(f"{server}: the model server cannot be reached", "`tuneyard up`")
    canary = f" with canary {wanted.canary.version}" if wanted.canary else ""
    lags = "; ".join(f"{each.replica.address} serves {each.lag}" for each in late)
    return TuneyardError(
        f"{wanted.name}: {len(late)} of {len(standings)} replicas do not serve version {wanted.version}"
        f"{canary} within deploy.ready_seconds ({server.seconds:g}): {lags}",
        "look into the logs of these, raise deploy.ready_seconds, then deploy again",
    )
