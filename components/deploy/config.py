"""Settings of the deploy stage."""

from __future__ import annotations

from pydantic import Field

from components.shared.settings import Settings


class DeployConfig(Settings):
    """How the champion is put in service.

    Args:
        ready_seconds: how long the server may take to load, answer and take over.
    """

    ready_seconds: int = Field(300, ge=1)
