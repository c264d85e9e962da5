"""Registered models in MLflow: versions and the aliases that point at them.

A version's source is the s3:// URI of the model's manifest; MLflow never reads the bytes. Aliases are a view
for people and for the server: which version *should* carry one is decided by the ledger (ledger.py), because
MLflow's alias calls are last-writer-wins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from components.shared.errors import TuneyardError
from components.shared.mlflow_database import attempt, client
from components.shared.settings import MODEL_NAME

CANDIDATE = "candidate"
CHAMPION = "champion"

_WITNESS = "ledger_head"
_PAGE = 1000


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model.

    Args:
        name: of the registered model.
        version: counts from 1.
        manifest_uri: s3:// URI of the model's manifest.
        digest: of that manifest.
        aliases: that point at this version, sorted.
        metrics: of the system that ships, on the test set.
        tags: everything else that was recorded (digests, code, run, verdict).
    """

    name: str
    version: int
    manifest_uri: str
    digest: str
    aliases: list[str]
    metrics: dict[str, float]
    tags: dict[str, str]


def check_name(name: str) -> str:
    """The name, if it can be one in MLflow, in an S3 key and in a file name alike.

    Raises:
        TuneyardError: it cannot.
    """
    if not re.fullmatch(MODEL_NAME, name):
        raise TuneyardError(
            f"{name!r} cannot name a registered model",
            "use up to 100 letters, digits, `_`, `-` and `.`, no spaces",
        )
    return name


def register_version(name: str, manifest_uri: str, run_id: str, tags: Mapping[str, str]) -> RegisteredVersion:
    """Add a version, always a new one; the registered model is made at need.

    Args:
        name: of the registered model.
        manifest_uri: s3:// URI of the model's manifest.
        run_id: of the MLflow run that trained it; '' for none.
        tags: `metrics` among them as a JSON object.

    Raises:
        TuneyardError: MLflow refused.
    """
    from mlflow.exceptions import MlflowException

    mlflow = client()

    def make_model() -> None:
        try:
            mlflow.create_registered_model(check_name(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def make_version() -> Any:
        return mlflow.create_model_version(
            name, manifest_uri, run_id=run_id or None, tags=dict(tags), await_creation_for=0
        )

    attempt(f"making registered model {name}", make_model)
    # MLflow takes max(version) + 1 and gives up after three collisions; `attempt` then tries again.
    made = attempt(f"adding a version to {name}", make_version)
    return _version(made, {})


def champion(name: str) -> RegisteredVersion | None:
    """The version in service, or None."""
    version = aliases(name).get(CHAMPION)
    return None if version is None else get(name, version)


def get(name: str, version: int | str) -> RegisteredVersion:
    """A version by number or alias.

    Raises:
        TuneyardError: there is no such version; the message lists what there is.
    """
    from mlflow.exceptions import MlflowException

    pointed = aliases(name)
    number = pointed.get(version) if isinstance(version, str) else version

    def find() -> Any:
        try:
            return mlflow.get_model_version(name, str(number))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    mlflow = client()
    found = attempt(f"reading {name} {version}", find) if number is not None else None
    if found is None:
        there = [v.version for v in versions(name)]
        raise TuneyardError(
            f"registered model {name!r} has no version or alias {version!r}; "
            f"it has versions {there} and aliases {pointed}",
            "name one of these, or submit the pipeline to register one",
        )
    return _version(found, pointed)


def versions(name: str) -> list[RegisteredVersion]:
    """All versions, oldest first; none when the model is unknown."""
    mlflow = client()
    pointed = aliases(name)
    search = partial(mlflow.search_model_versions, f"name='{check_name(name)}'", max_results=_PAGE)
    found: list[Any] = []
    token = None
    while True:
        page = attempt(f"listing {name}", partial(search, page_token=token))
        found += page
        token = page.token
        if not token:
            return sorted((_version(raw, pointed) for raw in found), key=lambda v: v.version)


def aliases(name: str) -> dict[str, int]:
    """Alias -> version; empty when the model is unknown."""
    model = _model(name)
    return {} if model is None else {alias: int(version) for alias, version in model.aliases.items()}


def set_alias(name: str, alias: str, version: int) -> None:
    """Point an alias at a version, in one step: there is no moment without it.

    Raises:
        TuneyardError: there is no such version.
    """
    mlflow = client()
    attempt(
        f"pointing {alias} of {name} at version {version}",
        lambda: mlflow.set_registered_model_alias(name, alias, str(version)),
    )


def delete_alias(name: str, alias: str) -> None:
    """Remove an alias; one that is not there is no error."""
    mlflow = client()
    attempt(f"removing alias {alias} of {name}", lambda: mlflow.delete_registered_model_alias(name, alias))


def witness(name: str) -> str:
    """The head of the ledger as MLflow last saw it, `<number>:<hash>`, or ''."""
    model = _model(name)
    return "" if model is None else str(model.tags.get(_WITNESS, ""))


def set_witness(name: str, head: str) -> None:
    """Remember the ledger's head outside the store, so that a ledger that lost its end is noticed."""
    mlflow = client()
    attempt(
        f"noting the ledger's head of {name}", lambda: mlflow.set_registered_model_tag(name, _WITNESS, head)
    )


def _model(name: str) -> Any:
    from mlflow.exceptions import MlflowException

    mlflow = client()

    def find() -> Any:
        try:
            return mlflow.get_registered_model(check_name(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    return attempt(f"reading registered model {name}", find)


def _version(raw: Any, pointed: Mapping[str, int]) -> RegisteredVersion:
    number = int(raw.version)
    return RegisteredVersion(
        name=raw.name,
        version=number,
        manifest_uri=raw.source,
        digest=PurePosixPath(raw.source).stem,
        aliases=sorted(alias for alias, version in pointed.items() if version == number),
        metrics=_metrics(raw.tags.get("metrics", "{}")),
        tags=dict(raw.tags),
    )


def _metrics(text: str) -> dict[str, float]:
    """The metrics tag; a version that someone added by hand may carry anything there."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
