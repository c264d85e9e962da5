"""Two runs side by side: what differed in what went in, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.shared.commit import commit_name
from components.shared.errors import UsageError
from components.shared.store import Store


def compare(first: str, second: str, store: Store) -> dict[str, Any]:
    """What two runs of one store did differently.

    Args:
        first: id of a run.
        second: id of another.
        store: holds both.

    Returns:
        `settings`, `inputs` and `metrics`, each `name -> [first, second]`, the first two only where they
        differ (None: the run had none); `code`: the stages whose code differed; `seconds` of each stage.

    Raises:
        UsageError: one of them is not in the store.
    """
    sides = [_facts(run, store) for run in (first, second)]
    return {
        "runs": [first, second],
        "settings": _differences(*(side["settings"] for side in sides)),
        "inputs": _differences(*(side["inputs"] for side in sides)),
        "code": sorted(_differences(*(side["code"] for side in sides))),
        "metrics": _pairs(*(side["metrics"] for side in sides)),
        "seconds": _pairs(*(side["seconds"] for side in sides)),
    }


def _facts(run: str, store: Store) -> dict[str, dict[str, Any]]:
    """Settings, inputs, code, metrics and seconds of a run's stages, from their records and commits."""
    found: dict[str, dict[str, Any]] = {
        "settings": {},
        "inputs": {},
        "code": {},
        "metrics": {},
        "seconds": {},
    }
    for stage, commit in _commits(run, store).items():
        made_by = commit["made_by"]
        found["settings"] |= _flat(stage, made_by["settings"])
        found["inputs"] |= {f"{stage}.{name}": digest for name, digest in made_by["inputs"].items()}
        found["code"][stage] = made_by["code"]
        found["seconds"][stage] = commit["seconds"]
        if stage == "evaluate":
            found["metrics"] = _flat("", commit["summary"]["metrics"])
    return found


def _commits(run: str, store: Store) -> dict[str, dict[str, Any]]:
    """Stage -> commit: of the stages that the run did, and of those it found done."""
    report = store.read_json(f"runs/{run}/run.json") or {"stages": []}
    keys = {row["name"]: row["key"] for row in report["stages"] if row["key"]}
    # Of a run that nobody watched to its end there are the records of its stages alone.
    for name in store.names(f"runs/{run}/"):
        record = store.read_json(name) or {}
        if "key" in record:
            keys[record["stage"]] = record["key"]
    if not keys:
        raise UsageError(f"there is no run {run} in {store.root}", "`tuneyard runs` lists them")
    commits = {stage: store.read_json(commit_name(stage, key)) for stage, key in keys.items()}
    return {stage: commit for stage, commit in commits.items() if commit}


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, below in value.items():
        found |= _flat(f"{prefix}.{name}" if prefix else name, below)
    return found


def _pairs(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [first.get(name), second.get(name)] for name in sorted({*first, *second})}


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: pair for name, pair in _pairs(first, second).items() if pair[0] != pair[1]}
