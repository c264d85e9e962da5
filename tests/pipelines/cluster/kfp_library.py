"""What a run names at the endpoint of these tests: experiments, pipelines and their versions.

Each body is read into the class that the project's own generator made of its API description
(kfp-server-api), an unknown field is refused as protojson does, an uploaded IR must be a PipelineSpec with a
KubernetesExecutorConfig for each executor, and what is answered is one of those classes again.
"""

from __future__ import annotations

import email
import json
import uuid
from datetime import UTC, datetime
from typing import Any

import kfp_server_api as api
import yaml
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from google.protobuf import json_format
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec

CLIENT = api.ApiClient()


def read_as(kind: str, document: Any) -> Any:
    """A body as the class of that name; a field it does not have is refused."""
    known = set(getattr(api, kind).attribute_map.values())
    unknown = set(document) - known
    if unknown:
        raise HTTPException(400, {"message": f"{kind} has no field {sorted(unknown)}"})
    return CLIENT._ApiClient__deserialize(document, kind)


def answer(value: Any) -> JSONResponse:
    return JSONResponse(CLIENT.sanitize_for_serialization(value))


def now() -> datetime:
    return datetime.now(UTC)


class Library:
    """Experiments, pipelines, versions, and the IR of each version."""

    def __init__(self) -> None:
        self.experiments: dict[str, Any] = {}
        self.pipelines: dict[str, Any] = {}
        self.versions: dict[str, Any] = {}
        self.packages: dict[str, tuple[dict, dict]] = {}

    def _named(self, things: dict[str, Any], filter: str | None) -> list[Any]:
        wanted = {p["key"]: p["stringValue"] for p in json.loads(filter)["predicates"]} if filter else {}
        return [t for t in things.values() if all(getattr(t, key) == value for key, value in wanted.items())]

    async def create_experiment(self, request: Request) -> JSONResponse:
        made = read_as("V2beta1Experiment", await request.json())
        if any(e.display_name == made.display_name for e in self.experiments.values()):
            raise HTTPException(409, {"message": "experiment name already exists"})
        made.experiment_id, made.created_at = str(uuid.uuid4()), now()
        self.experiments[made.experiment_id] = made
        return answer(made)

    async def list_experiments(self, filter: str | None = None) -> JSONResponse:
        return answer(api.V2beta1ListExperimentsResponse(experiments=self._named(self.experiments, filter)))

    async def create_pipeline(self, request: Request) -> JSONResponse:
        made = read_as("V2beta1Pipeline", await request.json())
        if any(p.display_name == made.display_name for p in self.pipelines.values()):
            raise HTTPException(409, {"message": "pipeline name already exists"})
        made.pipeline_id, made.created_at = str(uuid.uuid4()), now()
        self.pipelines[made.pipeline_id] = made
        return answer(made)

    async def list_pipelines(self, filter: str | None = None) -> JSONResponse:
        return answer(api.V2beta1ListPipelinesResponse(pipelines=self._named(self.pipelines, filter)))

    async def upload_version(
        self, request: Request, name: str, pipelineid: str, description: str = ""
    ) -> JSONResponse:
        head = f"content-type: {request.headers['content-type']}\r\n\r\n".encode()
        (part,) = email.message_from_bytes(head + await request.body()).get_payload()
        assert part.get_param("name", header="content-disposition") == "uploadfile"
        ir, platform = yaml.safe_load_all(part.get_payload(decode=True))
        json_format.ParseDict(ir, PipelineSpec())
        for config in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
            json_format.ParseDict(config, KubernetesExecutorConfig())
        if pipelineid not in self.pipelines:
            raise HTTPException(404, {"message": f"Pipeline {pipelineid} not found"})
        if any(v.display_name == name and v.pipeline_id == pipelineid for v in self.versions.values()):
            raise HTTPException(409, {"message": f"pipeline version {name} already exists"})
        made = api.V2beta1PipelineVersion(
            pipeline_id=pipelineid,
            pipeline_version_id=str(uuid.uuid4()),
            display_name=name,
            name=name,
            description=description,
            created_at=now(),
        )
        self.versions[made.pipeline_version_id] = made
        self.packages[made.pipeline_version_id] = (ir, platform)
        return answer(made)

    async def list_versions(self, pipeline: str, filter: str | None = None) -> JSONResponse:
        own = [v for v in self._named(self.versions, filter) if v.pipeline_id == pipeline]
        return answer(api.V2beta1ListPipelineVersionsResponse(pipeline_versions=own))

    async def get_version(self, pipeline: str, version: str) -> JSONResponse:
        if version not in self.versions or self.versions[version].pipeline_id != pipeline:
            raise HTTPException(404, {"message": f"PipelineVersion {version} not found"})
        return answer(self.versions[version])
