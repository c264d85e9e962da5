"""`deployments/<name>.json`: which versions of a registered model should be in service.

The deploy stage writes it, and every replica of the model server follows it. It is all that they know of each
other: a replica that was down, or is new, comes up with what stands here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.shared.errors import TuneyardError
from components.shared.settings import MODEL_NAME
from components.shared.store import Store

FOLDER = "deployments/"


class DeployedVersion(BaseModel):
    """A version that should be in service.

    Args:
        version: as the registry counts.
        digest: hex sha256 of the model's manifest.
        manifest: s3:// URI of that manifest.
    """

    model_config = ConfigDict(frozen=True)
    version: int = Field(ge=1)
    digest: str = Field(min_length=1)
    manifest: str = Field(min_length=1)


class Canary(DeployedVersion):
    """A version that answers a share of the requests while it is judged.

    Args:
        weight: share of the requests, above 0 and below 1.
        until: seconds since 1970. From then on nothing goes to it: whoever judged it is gone.
    """

    weight: float = Field(gt=0, lt=1)
    until: float

    def weight_now(self) -> float:
        """Its share of the requests at this moment."""
        return self.weight if time.time() < self.until else 0.0


class Deployment(DeployedVersion):
    """The whole document.

    Args:
        name: of the registered model.
        card: of the version in service.
        at: when it was written, UTC.
        previous: what was deployed before, without its own `previous`.
        canary: beside the version in service; None most of the time.
    """

    name: str
    card: dict[str, Any] = {}
    at: str = ""
    previous: dict[str, Any] | None = None
    canary: Canary | None = None


def document_name(name: str) -> str:
    """Name of a model's document below the store's root."""
    return f"{FOLDER}{name}.json"


def parse(name: str, document: Mapping[str, Any]) -> Deployment:
    """The document of a model.

    Raises:
        TuneyardError: it does not fit; names every fault.
    """
    faults = [] if document.get("name") == name else [f"name is {document.get('name')!r}"]
    try:
        found = Deployment.model_validate(document)
    except ValidationError as error:
        wrong = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors()]
        faults += [f"{where}: {what}" for where, what in wrong if where != "name"]
    if faults:
        raise TuneyardError(f"{document_name(name)}: {'; '.join(faults)}", "deploy the model again")
    return found


def read(name: str, store: Store) -> Deployment | None:
    """What should be in service under a name; None when nothing should.

    Raises:
        TuneyardError: the document does not fit.
        StoreError: the store does not answer.
    """
    try:
        document = store.read_json(document_name(name))
    except ValueError as error:
        what = f"{document_name(name)} is no JSON ({error})"
        raise TuneyardError(what, "deploy the model again") from error
    return None if document is None else parse(name, document)


def listed(store: Store) -> dict[str, str]:
    """Every deployment's name -> a tag that changes with its document: one request, however many there are.

    Raises:
        StoreError: the store does not answer.
    """
    found = {}
    for item in store.listing(FOLDER):
        match = re.fullmatch(rf"({MODEL_NAME})\.json", item.name.removeprefix(FOLDER))
        if match:
            found[match[1]] = item.etag
    return found
