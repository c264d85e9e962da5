"""Settings of the deploy stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from components.shared.errors import TuneyardError
from components.shared.settings import Settings

# A server that was started a moment ago may still be loading.
_LOADING_SECONDS = 60.0


class DeployConfig(Settings):
    """How the champion is put in service.

    Args:
        ready_seconds: how long the server may take to load, answer and take over.
    """

    ready_seconds: int = Field(300, ge=1)

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
