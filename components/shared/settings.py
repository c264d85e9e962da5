"""The base of every settings class: frozen, no unknown keys, and it knows what it reads from outside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

# What may name a registered model: it can stand in MLflow, in an S3 key and in a file name alike.
MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"


class Settings(BaseModel):
    """Settings of a stage. Defaults live here and nowhere else; a pipeline file states differences."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def external_datasets(self) -> list[str]:
        """URIs of data that the stage reads besides its inputs and `external_uris`."""
        return []

    def external_uris(self) -> list[str]:
        """What the stage reads besides its input artifacts; their fingerprints enter its key."""
        return []

    def still_true(self, summary: Mapping[str, Any]) -> bool:
        """Whether what a committed stage did still holds; a stage that acts on the world asks the world."""
        return True
