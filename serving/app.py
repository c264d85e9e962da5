"""The application: routes, and what happens around every request."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import admin_api, faults, inference_api, openai_api
from serving.catalogue import Catalogue
from serving.faults import Fault
from serving.following import Follower

MAX_BODY_BYTES = 1 << 20


def create(catalogue: Catalogue, token: str, follower: Follower | None = None) -> FastAPI:
    """The server's application.

    Args:
        catalogue: the models; closed with the application.
        token: of the admin routes; empty: they are closed to everybody.
        follower: started and stopped with the application; without one nothing is loaded.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if follower is not None:
            follower.start()
        yield
        if follower is not None:
            follower.stop()
        catalogue.close()

    # No pages that load scripts from elsewhere, and a body is JSON whatever its Content-Type says.
    app = FastAPI(
        title="Tuneyard", docs_url=None, redoc_url=None, lifespan=lifespan, strict_content_type=False
    )
    app.include_router(admin_api.router(catalogue, token))
    app.include_router(openai_api.router(catalogue))
    app.include_router(inference_api.router(catalogue))
    app.add_exception_handler(Fault, _answer)
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    app.add_exception_handler(Exception, _answer)
    app.add_middleware(BodyLimit)
    app.add_middleware(Observed, catalogue=catalogue)
    return app


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        fault = faults.of_validation(error.errors())
    elif isinstance(error, HTTPException):
        what = f"{request.method} {request.url.path}: {error.detail}"
        fault = Fault(error.status_code, what, code="no_such_route", headers=error.headers)
    else:
        fault = faults.of_exception(error)
    return JSONResponse(faults.body(fault, request.url.path), fault.status, headers=fault.headers)


class BodyLimit:
    """Refuses bodies over MAX_BODY_BYTES, whether they state their length or not."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body whole, then hand it on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        body = b""
        more = not _states_too_much(scope)
        while more and len(body) <= MAX_BODY_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES or _states_too_much(scope):
            fault = Fault(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
            response = JSONResponse(faults.body(fault, scope["path"]), 413, headers={"Connection": "close"})
            return await response(scope, receive, send)
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        return await self._app(scope, replay, send)


def _states_too_much(scope: Scope) -> bool:
    stated = dict(scope["headers"]).get(b"content-length", b"0")
    return not stated.isdigit() or int(stated) > MAX_BODY_BYTES


class Observed:
    """Counts every request and its seconds, by model, route and status."""

    def __init__(self, app: ASGIApp, catalogue: Catalogue) -> None:
        self._app, self._telemetry = app, catalogue.telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve it and count it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = time.monotonic()
        # Stays so when the client goes away before the response begins.
        status = openai_api.CLIENT_GONE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            self._count(scope, status, time.monotonic() - started)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        # Names come from the model that answered and routes from the table, never from the client: a label
        # of its own for each made-up name would grow without bound.
        state = scope.get("state", {})
        identity: Any = state.get("served")
        name, version = (identity.name, identity.version) if identity else ("", "")
        # An answer that broke off in the middle had said 200.
        status = state.get("failed") or status
        route = getattr(scope.get("route"), "path", "")
        self._telemetry.requests.labels(name, version, route, str(status)).inc()
        self._telemetry.seconds.labels(name, version, route).observe(seconds)
