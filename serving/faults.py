"""What the server answers instead of a result, and in which of its two dialects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Fault(Exception):
    """A request that gets an error answer.

    Args:
        status: HTTP status.
        message: what, the value, where, and what to do.
        param: the field at fault, dotted; empty when there is none.
        code: a word that programs can match.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str = "",
        code: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})


class Retired(Exception):
    """The model was replaced while the request was on its way; ask the catalogue for the new one."""


class Stopped(Exception):
    """The server stops before the answer is complete."""


def unauthorized() -> Fault:
    """401 of the admin routes."""
    message = "this route needs `Authorization: Bearer <token>` with the server's TUNEYARD_SERVING_TOKEN"
    return Fault(401, message, code="unauthorized", headers={"WWW-Authenticate": "Bearer"})


def busy(waiting: int) -> Fault:
    """429: the queue of the model is full."""
    return Fault(
        429, f"{waiting} requests wait already; try again", code="queue_full", headers={"Retry-After": "1"}
    )


def of_exception(error: Exception) -> Fault:
    """What a client may know about a failed computation: never a traceback, never a path."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, Stopped):
        return Fault(503, "the server is stopping", code="stopping", headers={"Retry-After": "1"})
    return Fault(
        500, f"the model failed ({type(error).__name__}); the server's log says more", code="internal"
    )


def of_validation(errors: Sequence[Mapping[str, Any]]) -> Fault:
    """400 that names every field at fault.

    Args:
        errors: what pydantic lists: `loc`, `msg`, `input`, `type`.
    """
    parts = []
    for error in errors:
        where = _dotted(error["loc"])
        given = repr(error.get("input"))
        shown = "" if error["type"] in ("missing", "json_invalid") else f" (given: {given[:80]})"
        message = "not supported" if error["type"] == "extra_forbidden" else error["msg"]
        parts.append(f"{where}: {message}{shown}" if where else f"body: {message}{shown}")
    return Fault(400, "; ".join(parts), param=_dotted(errors[0]["loc"]), code="invalid_value")


def _dotted(location: Sequence[Any]) -> str:
    return ".".join(str(part) for part in location if part not in ("body", "query", "path"))


def body(fault: Fault, path: str) -> dict[str, Any]:
    """The error document: `{"error": text}` below /v2 (Open Inference Protocol), OpenAI's elsewhere."""
    if path == "/v2" or path.startswith("/v2/"):
        return {"error": fault.message}
    kind = "invalid_request_error" if fault.status < 500 else "server_error"
    if fault.status == 429:
        kind = "rate_limit_error"
    if fault.status == 401:
        kind = "authentication_error"
    return {
        "error": {
            "message": fault.message,
            "type": kind,
            "param": fault.param or None,
            "code": fault.code or None,
        }
    }
