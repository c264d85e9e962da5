"""Which of two versions of a model answers: the one in service, or the canary beside it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from starlette.datastructures import Headers

CONVERSATION = "X-Conversation-Id"
VERSION = "X-Model-Version"


@dataclass(frozen=True)
class Choice:
    """What a request says about who should answer.

    Args:
        conversation: equal for all requests that one version should answer.
        version: that the client asks for by number; empty for whichever.
    """

    conversation: str
    version: str = ""


def choice(headers: Headers, opening: str) -> Choice:
    """The choice of a request.

    Args:
        headers: X-Conversation-Id and X-Model-Version are read.
        opening: how the conversation began. A client sends it again with each turn, so it names the
            conversation where no header does.
    """
    return Choice(headers.get(CONVERSATION) or opening, headers.get(VERSION, ""))


def position(digest: str, conversation: str) -> float:
    """Where a conversation lies in [0, 1): below the canary's weight, the canary answers.

    Replicas need not speak to agree on it. The digest of the canary is in it, so that the next canary is
    tried on other conversations.

    Args:
        digest: of the canary.
        conversation: see Choice.
    """
    seen = hashlib.sha256(f"{digest}\n{conversation}".encode("utf-8", "replace")).digest()
    return int.from_bytes(seen[:8]) / 2**64
