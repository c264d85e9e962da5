"""Which model an answer came from."""

from __future__ import annotations

import re
from dataclasses import dataclass

from components.shared.settings import MODEL_NAME
from serving.faults import Fault


@dataclass(frozen=True)
class Identity:
    """A registered version.

    Args:
        name: of the registered model.
        version: as the registry counts.
        digest: hex sha256 of the model's manifest.
    """

    name: str
    version: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} version {self.version} ({self.digest[:12]})"

    @property
    def headers(self) -> dict[str, str]:
        """Response headers of every answer."""
        return {"X-Model-Version": self.version, "X-Model-Digest": self.digest}


def checked_name(name: str) -> str:
    """The name, when it may stand in an object key.

    Raises:
        Fault: 400, it may not.
    """
    if not re.fullmatch(MODEL_NAME, name):
        raise Fault(400, f"{name[:80]!r} is no model name (letters, digits, . _ -)", "name", "invalid_value")
    return name
