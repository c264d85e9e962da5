"""Give the accepted model a version, and the champion's place when it has earned it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from components.register import identity
from components.register.compare import Comparison, Judged, compare, default_metric
from components.register.config import RegisterConfig
from components.register.verdict import Verdict, read_verdict
from components.shared import ledger, registry
from components.shared.errors import TuneyardError
from components.shared.ledger import Change, Entry
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context, Result

log = logging.getLogger("tuneyard.register")


def register(config: RegisterConfig, inputs: Mapping[str, Artifact], context: Context) -> Result:
    """Register `model`, judged by `evaluation`; a new version each time, whatever the bytes.

    A kill in the middle leaves at most a version without a ledger entry, which no alias will ever point at;
    the next attempt adds another.

    Raises:
        StageStopped: the verdict failed.
        TuneyardError: the evaluation is of another model, MLflow or the ledger refused.
    """
    name = registry.check_name(config.name or context.pipeline)
    model, evaluation = inputs["model"], inputs["evaluation"]
    card = ModelCard.read(model.path)
    verdict = read_verdict(model, evaluation, card)
    metric = _known_metric(config.compare_by or default_metric(card.task, verdict.metrics), verdict)
    stages = identity.lineage({"shipped": model.manifest, "evaluation": evaluation.manifest}, context.store)
    made = registry.register_version(
        name,
        context.store.manifest_uri(model.manifest),
        card.mlflow_run,
        _tags(card, verdict, stages, context),
    )
    who = f"pipeline {context.pipeline}, run {context.run}"
    evidence = {
        "metrics": verdict.metrics,
        "judged_on": verdict.judged_on,
        "evaluation": verdict.digest,
        "run": context.run,
        "verdict": "passed",
    }
    entry = Change("register", made.version, made.digest, who, "the verdict passed", evidence)
    ledger.change(name, context.store, lambda entries: _not_there_yet(name, entry, entries))
    comparison, before = _compete(name, metric, replace(entry, action="promote"), context)
    return _result(registry.get(name, made.version), comparison, before, context)


def _compete(name: str, metric: str, entry: Change, context: Context) -> tuple[Comparison, int | None]:
    """Make the new version champion if it is not worse. Returns the comparison and the champion before.

    The decision is taken inside `ledger.change`, on the very entries that the write depends on: a rival that
    was promoted in between is compared with too.
    """
    new = Judged(entry.version, entry.digest, entry.evidence["metrics"], entry.evidence["judged_on"])
    outcome: list[tuple[Comparison, int | None]] = []

    def decide(entries: list[Entry]) -> Change | None:
        present = ledger.champion_entry(entries)
        comparison = compare(metric, new, _judged(present) if present else None)
        outcome.append((comparison, present.version if present else None))
        if not comparison.promote:
            return None
        evidence = {**entry.evidence, "compare": comparison.to_json()}
        return replace(entry, why=comparison.why, evidence=evidence)

    ledger.change(name, context.store, decide)
    return outcome[-1]


def _judged(entry: Entry) -> Judged:
    evidence = entry.evidence
    return Judged(entry.version, entry.digest, evidence.get("metrics", {}), evidence.get("judged_on", {}))


def _not_there_yet(name: str, entry: Change, entries: list[Entry]) -> Change:
    earlier = ledger.registration(entries, entry.version)
    if earlier is not None:
        raise TuneyardError(
            f"MLflow gave {name} the version {entry.version}, which the ledger has since {earlier.at}",
            f"this is not the MLflow database that ledger/{name}/ was written with: restore that one",
        )
    return entry


def _known_metric(metric: str, verdict: Verdict) -> str:
    if metric not in verdict.metrics:
        raise TuneyardError(
            f"register.compare_by is {metric!r}, which the evaluation does not have",
            f"it has: {', '.join(sorted(verdict.metrics))}",
        )
    return metric


def _tags(
    card: ModelCard, verdict: Verdict, stages: Mapping[str, Mapping[str, Any]], context: Context
) -> dict[str, str]:
    return {
        **identity.tags(stages),
        **identity.git_state(),
        "metrics": json.dumps(verdict.metrics),
        "judged_on": json.dumps(verdict.judged_on),
        "verdict": "passed",
        "task": card.task,
        "layout": card.layout,
        "base_model": card.base_model.uri,
        "base_model.fingerprint": card.base_model.fingerprint,
        "pipeline": context.pipeline,
        "run": context.run,
    }


def _result(
    version: registry.RegisteredVersion, comparison: Comparison, before: int | None, context: Context
) -> Result:
    why = comparison.why
    if not comparison.promote:
        why += f"; it stays candidate, a person may promote version {version.version}"
    registration = {
        "name": version.name,
        "version": version.version,
        "aliases": version.aliases,
        "digest": version.digest,
        "manifest": version.manifest_uri,
        "champion": comparison.promote,
        "why": why,
        "previous_champion": before,
        "compare": comparison.to_json(),
    }
    level = logging.WARNING if comparison.comparable is False else logging.INFO
    log.log(
        level, "%s version %d is %s: %s", version.name, version.version, " and ".join(version.aliases), why
    )
    folder = context.out / "registration"
    folder.mkdir(parents=True)
    (folder / "registration.json").write_text(json.dumps(registration, indent=1, ensure_ascii=False))
    return Result(
        kinds={"registration": "report"}, metrics={"version": version.version}, summary=registration
    )
