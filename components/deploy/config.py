"""Settings of the deploy stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from components.shared.errors import TuneyardError
from components.shared.settings import Settings

# A server that was started a moment ago may still be loading.
_LOADING_SECONDS = 60.0


class CanaryConfig(Settings):
    """How a new champion is tried on a share of the requests before it gets all.

    Args:
        weight: its share of the requests; a conversation stays with one version.
        requests: it is judged on so many that it answered.
        within_minutes: they must come in this time; else too little is known, and the old version stays.
        max_error_ratio: share of its requests that may fail (5xx).
        max_p99_ratio: its p99 of the seconds to the end of an answer, against that of the version in service
            in the same time.
    """

    weight: float = Field(0.1, gt=0, le=0.5)
    requests: int = Field(500, ge=20)
    within_minutes: float = Field(60, gt=0)
    max_error_ratio: float = Field(0.01, ge=0, lt=1)
    max_p99_ratio: float = Field(1.5, ge=1)


class DeployConfig(Settings):
    """How the champion is put in service.

    Args:
        ready_seconds: how long the replicas of the server may take to load, answer and take over.
        canary: try it on a share of the requests first; None: all at once.
    """

    ready_seconds: int = Field(300, ge=1)
    canary: CanaryConfig | None = None

    def still_true(self, summary: Mapping[str, Any]) -> bool:
        """Whether the model is in service. Which version is not asked: promote and rollback put theirs there.

        Where there was no champion to deploy, one may have been promoted since.
        """
        from components.deploy.server import ModelServer, address

        if "version" not in summary:
            return False
        try:
            return ModelServer(*address(), _LOADING_SECONDS).serves(summary["name"])
        except TuneyardError:
            return False
