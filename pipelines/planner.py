"""What a submit has to do: the keys are walked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from components.shared.commit import read_commit, stage_key
from components.shared.store import Store
from pipelines.graph import inputs_of
from pipelines.spec import PipelineSpec


@dataclass(frozen=True)
class Planned:
    """A stage of the plan: its commit when it is done already, else None."""

    stage: str
    commit: dict[str, Any] | None


def plan(spec: PipelineSpec, store: Store) -> list[Planned]:
    """Walk the stages in order. After the first one that must run, the keys of those it feeds are unknown.

    A stage that feeds on nothing that must run may still be done (evaluate does not wait for a new register).
    After a commit that stopped the line nothing is done and nothing is to run: see `stopped`.
    """
    digests: dict[tuple[str, str], str] = {}
    planned: list[Planned] = []
    for stage, settings in spec.stages().items():
        sources = inputs_of(stage, spec)
        commit = None
        if not stopped(planned) and all(source in digests for source in sources.values()):
            key = stage_key(
                stage, settings, {name: digests[source] for name, source in sources.items()}, store
            )
            commit = read_commit(stage, key, settings, store)
        if commit:
            # manifests/<digest>.json
            digests |= {(stage, name): uri.rsplit("/", 1)[1][:-5] for name, uri in commit["outputs"].items()}
        planned.append(Planned(stage, commit))
    return planned


def stopped(planned: Sequence[Planned]) -> bool:
    """Whether a gate or data check stopped the line at a done stage: what it refused must go no further."""
    return any(each.commit and each.commit["stop"] for each in planned)
