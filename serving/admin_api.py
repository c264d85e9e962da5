"""Look at the store now, for whoever has the token; health for everybody."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict

from components.shared.deployments import document_name
from components.shared.errors import StoreError, TuneyardError
from serving import faults
from serving.catalogue import Catalogue
from serving.faults import Fault

log = logging.getLogger("tuneyard.serving")


class DeployRequest(BaseModel):
    """POST /admin/deploy: do now what the store says of this model, instead of in a few seconds."""

    model_config = ConfigDict(extra="forbid")
    name: str


def bearer(token: str) -> Callable[[Request], None]:
    """A check of the Authorization header. Without a token configured nobody passes.

    Args:
        token: what must be presented.
    """

    def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.encode(), token.encode())
        if not token or scheme.lower() != "bearer" or not same:
            raise faults.unauthorized()

    return check


def router(catalogue: Catalogue, token: str) -> APIRouter:
    """The routes."""
    routes = APIRouter()
    guarded = [Depends(bearer(token))]

    @routes.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """The process lives."""
        return {"status": "alive"}

    @routes.get("/readyz")
    async def readyz() -> Response:
        """Every model that should be in service has been verified and has answered."""
        reasons = catalogue.not_ready()
        document = {"status": "not ready" if reasons else "ready", "reasons": reasons}
        return JSONResponse(document, 503 if reasons else 200)

    @routes.get("/metrics")
    def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(catalogue.telemetry.registry), media_type=CONTENT_TYPE_LATEST)

    @routes.post("/admin/deploy", dependencies=guarded)
    async def deploy(asked: DeployRequest) -> dict[str, Any]:
        """Load, verify, probe and swap. What was served before stays on any failure."""
        name = asked.name
        try:
            state = await asyncio.wrap_future(catalogue.follow_soon(name))
        except StoreError as error:
            raise Fault(503, str(error), "name", "store_away", {"Retry-After": "2"}) from error
        except TuneyardError as error:
            log.warning("%s is not put in service: %s", name, error)
            raise Fault(422, str(error), "name", "not_servable") from error
        if state is None:
            raise Fault(404, f"{document_name(name)} does not exist in the store", "name", "no_deployment")
        return state

    return routes
