"""What a submit has to do: the keys are walked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.shared.commit import read_commit, stage_key
from components.shared.store import Store
from pipelines.graph import inputs_of
from pipelines.spec import PipelineSpec


@dataclass(frozen=True)
class Planned:
    """A stage of the plan.

    Args:
        stage: its name.
        commit: when it is done already, else None.
        key: when its inputs are known, else None.
    """

    stage: str
    commit: dict[str, Any] | None
    key: str | None = None


def plan(spec: PipelineSpec, store: Store, effects: bool = True) -> list[Planned]:
    """Walk the stages in order. After the first one that must run, the keys of those it feeds are unknown.

    A stage that feeds on nothing that must run may still be done (evaluate does not wait for a new register).
    After a commit that stopped the line nothing is done and nothing is to run: see `stopped`.

    Args:
        spec: the pipeline.
        store: with the commits.
        effects: whether a stage that acts on the world (deploy) is asked if that still holds; from where the
            model server cannot be reached nobody can say, and a run would be started each time.
    """
    digests: dict[tuple[str, str], str] = {}
    planned: list[Planned] = []
    for stage, settings in spec.stages().items():
        sources = inputs_of(stage, spec)
        commit = key = None
        if not stopped(planned) and all(source in digests for source in sources.values()):
            key = stage_key(
                stage, settings, {name: digests[source] for name, source in sources.items()}, store
            )
            commit = read_commit(stage, key, settings, store, effects)
        if commit:
            # manifests/<digest>.json
            digests |= {(stage, name): uri.rsplit("/", 1)[1][:-5] for name, uri in commit["outputs"].items()}
        planned.append(Planned(stage, commit, key))
    return planned


def why_needless(stage: str, before: Mapping[str, Any] | None) -> str:
    """Why a cluster run leaves a stage out after the commit of the stage before it; empty when it does not.

    Only deploy: a version that did not become champion changes nothing in service, so no pod is started for
    it. The graph says the same with a condition on register's output.
    """
    if stage != "deploy" or before is None or before["stop"] or before["summary"]["champion"]:
        return ""
    registered = before["summary"]
    return f"version {registered['version']} is not champion: {registered['why']}"


def stopped(planned: Sequence[Planned]) -> bool:
    """Whether a gate or data check stopped the line at a done stage: what it refused must go no further."""
    return any(each.commit and each.commit["stop"] for each in planned)
