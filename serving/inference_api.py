"""The Open Inference Protocol, version 2, over REST: metadata of all models, inference by classifiers."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from serving import faults, routing
from serving.arms import Arms
from serving.catalogue import Catalogue
from serving.causal import CausalModel
from serving.classifier import MAX_TEXTS, Classifier, TextJob, Verdicts
from serving.faults import Fault


class Tensor(BaseModel):
    """An input tensor."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: list[Any]


class RequestedOutput(BaseModel):
    """An output that the client wants."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferRequest(BaseModel):
    """POST /v2/models/{name}/infer."""

    id: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: list[Tensor]
    outputs: list[RequestedOutput] | None = None


def texts_of(asked: InferRequest) -> list[str]:
    """The texts to classify.

    Raises:
        Fault: 400, not one BYTES tensor `text` of shape [n]; says everything that is wrong.
    """
    if len(asked.inputs) != 1:
        raise Fault(400, f"inputs: one tensor `text` is needed, {len(asked.inputs)} were given", "inputs")
    tensor = asked.inputs[0]
    wrong = []
    if tensor.name != "text":
        wrong.append(f"name is {tensor.name[:80]!r}, must be 'text'")
    if tensor.datatype != "BYTES":
        wrong.append(f"datatype is {tensor.datatype[:80]!r}, must be 'BYTES'")
    count = len(tensor.data)
    if tensor.shape != [count]:
        wrong.append(f"shape is {tensor.shape[:8]}, must be [{count}] as data has {count} elements")
    if not 1 <= count <= MAX_TEXTS:
        wrong.append(f"{count} texts, must be 1 to {MAX_TEXTS}")
    strange = [i for i, text in enumerate(tensor.data) if not isinstance(text, str)]
    if strange:
        wrong.append(f"data: elements {strange[:8]} are no strings")
    if wrong:
        raise Fault(400, "inputs.0: " + "; ".join(wrong), "inputs.0")
    return list(tensor.data)


async def classify(
    catalogue: Catalogue, request: Request, name: str, texts: list[str]
) -> tuple[Classifier, Verdicts]:
    """Let the model that is in service now classify.

    Raises:
        Fault: no such model, or too many requests wait.
        Exception: what the model failed with.
    """
    loop = asyncio.get_running_loop()
    while True:
        served = catalogue.classifier(name, routing.choice(request.headers, json.dumps(texts)))
        request.state.served = served.identity
        future: asyncio.Future[Verdicts] = loop.create_future()

        def emit(verdicts: Verdicts, future: asyncio.Future[Verdicts] = future) -> None:
            loop.call_soon_threadsafe(_settle, future, verdicts)

        job = TextJob(texts, emit)
        try:
            served.submit(job)
        except faults.Retired:
            continue
        try:
            verdicts = await future
        finally:
            served.cancel(job)
        if verdicts.error is not None:
            raise verdicts.error
        served.inputs.observe(verdicts.tokens, verdicts.labels)
        return served, verdicts


def _settle(future: asyncio.Future[Verdicts], verdicts: Verdicts) -> None:
    # Done already when the client went away meanwhile.
    if not future.done():
        future.set_result(verdicts)


def outputs(asked: InferRequest, labels: list[str], verdicts: Verdicts) -> list[dict[str, Any]]:
    """The output tensors that were asked for, all by default.

    Raises:
        Fault: 400, an output that does not exist.
    """
    count = len(verdicts.labels)
    tensors: dict[str, dict[str, Any]] = {
        "label": {"datatype": "BYTES", "shape": [count], "data": list(verdicts.labels)},
        "probabilities": {
            "datatype": "FP32",
            "shape": [count, len(labels)],
            "data": [value for row in verdicts.probabilities for value in row],
            "parameters": {"labels": labels},
        },
    }
    wanted = [output.name for output in asked.outputs] if asked.outputs else list(tensors)
    return [{"name": name, **tensors[name]} for name in wanted]


def check_outputs(asked: InferRequest) -> None:
    """Refuse unknown outputs before anything is computed.

    Raises:
        Fault: 400.
    """
    unknown = [
        output.name[:80] for output in asked.outputs or [] if output.name not in ("label", "probabilities")
    ]
    if unknown:
        raise Fault(400, f"outputs: {unknown} do not exist; there are 'label' and 'probabilities'", "outputs")


def metadata(arms: Arms) -> dict[str, Any]:
    """What a model takes and gives; of a canary only its number is told."""
    served, card = arms.stable.served, arms.stable.card
    identity = served.identity
    common = {"version": identity.version, "digest": identity.digest, "task": served.task}
    document: dict[str, Any] = {
        "name": identity.name,
        "versions": [entry.identity.version for entry in arms.entries],
        "inputs": [],
        "outputs": [],
    }
    if isinstance(served, CausalModel):
        parameters = {**common, "max_context_tokens": served.context_tokens}
        return {**document, "platform": "pytorch", "parameters": parameters}
    return {
        **document,
        "platform": served.platform,
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(card.labels)]},
        ],
        "parameters": {**common, "labels": card.labels, "max_length_tokens": card.max_length_tokens},
    }


def router(catalogue: Catalogue) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v2")

    @routes.get("")
    def server() -> dict[str, Any]:
        """Name and version of the server."""
        return {"name": "tuneyard", "version": _version(), "extensions": []}

    @routes.get("/health/live")
    def live() -> dict[str, Any]:
        """The process lives."""
        return {"live": True}

    @routes.get("/health/ready")
    def ready() -> Response:
        """Every model that should be in service is."""
        reasons = catalogue.not_ready()
        return JSONResponse({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    @routes.get("/models/{name}")
    def model(name: str) -> dict[str, Any]:
        """What a model takes and gives."""
        return metadata(catalogue.get(name))

    @routes.get("/models/{name}/ready")
    def model_ready(name: str) -> Response:
        """The model answers."""
        alive = catalogue.get(name).stable.served.alive
        return JSONResponse({"name": name, "ready": alive}, 200 if alive else 503)

    @routes.post("/models/{name}/infer")
    async def infer(name: str, request: Request, asked: InferRequest) -> Response:
        """Classify texts."""
        texts = texts_of(asked)
        check_outputs(asked)
        served, verdicts = await classify(catalogue, request, name, texts)
        identity = served.identity
        catalogue.telemetry.truncated.labels(name, identity.version).inc(verdicts.truncated)
        document = {
            "model_name": name,
            "model_version": identity.version,
            "id": asked.id or uuid.uuid4().hex,
            "parameters": {"truncated": verdicts.truncated, "digest": identity.digest},
            "outputs": outputs(asked, served.card.labels, verdicts),
        }
        return JSONResponse(document, headers=identity.headers)

    return routes


def _version() -> str:
    try:
        return importlib.metadata.version("tuneyard")
    except importlib.metadata.PackageNotFoundError:
        # Run from a checkout that is not installed.
        return "unknown"
