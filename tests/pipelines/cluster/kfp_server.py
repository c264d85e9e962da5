"""An endpoint of Kubeflow Pipelines on loopback: the v2beta1 REST API with its real messages, and a runner.

Each body is read into the class that the project's own generator made of its API description
(kfp-server-api), an unknown field is refused as protojson does, an uploaded IR must be a PipelineSpec with a
KubernetesExecutorConfig for each executor, and what is answered is one of those classes again.
"""

from __future__ import annotations

import contextlib
import email
import json
import socket
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kfp_server_api as api
import uvicorn
import yaml
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from google.protobuf import json_format
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec

from tests.pipelines.cluster.engine import Cluster, Run

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


class Endpoint:
    """The state of the endpoint, and its application."""

    def __init__(self, folder: Path, token: str = "") -> None:
        self.cluster = Cluster(folder)
        self.token = token
        self.experiments: dict[str, Any] = {}
        self.pipelines: dict[str, Any] = {}
        self.versions: dict[str, Any] = {}
        self.packages: dict[str, tuple[dict, dict]] = {}
        self.runs: dict[str, Any] = {}
        self.recurring: dict[str, Any] = {}
        self.going: dict[str, Run] = {}
        self.down = threading.Event()
        self.calls: list[str] = []
        self.app = FastAPI()
        self._routes()

    def _routes(self) -> None:
        app = self.app

        @app.middleware("http")
        async def gate(request: Request, call_next: Any) -> Any:
            self.calls.append(f"{request.method} {request.url.path}")
            if self.down.is_set():
                return JSONResponse({"message": "no healthy upstream"}, 503)
            if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
                return JSONResponse(
                    {"message": "Request header error: there is no user identity header."}, 401
                )
            return await call_next(request)

        @app.exception_handler(HTTPException)
        async def refused(request: Request, error: HTTPException) -> JSONResponse:
            return JSONResponse(error.detail, error.status_code)

        base = "/apis/v2beta1"
        app.post(f"{base}/experiments")(self.create_experiment)
        app.get(f"{base}/experiments")(self.list_experiments)
        app.post(f"{base}/pipelines")(self.create_pipeline)
        app.get(f"{base}/pipelines")(self.list_pipelines)
        app.post(f"{base}/pipelines/upload_version")(self.upload_version)
        app.get(base + "/pipelines/{pipeline}/versions")(self.list_versions)
        app.get(base + "/pipelines/{pipeline}/versions/{version}")(self.get_version)
        app.post(f"{base}/runs")(self.create_run)
        app.get(f"{base}/runs")(self.list_runs)
        app.get(base + "/runs/{run}")(self.get_run)
        app.post(base + "/runs/{run}:terminate")(self.terminate)
        app.post(base + "/runs/{run}:retry")(self.retry)
        app.post(f"{base}/recurringruns")(self.create_recurring)
        app.get(f"{base}/recurringruns")(self.list_recurring)
        app.delete(base + "/recurringruns/{name}")(self.delete_recurring)
        app.get("/apis/v1alpha1/runs/{run}/nodes/{pod}/log")(self.log)

    # --- experiments, pipelines, versions ---------------------------------------------------------

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

    # --- runs -----------------------------------------------------------------------------------------

    async def create_run(self, request: Request) -> JSONResponse:
        return answer(self.begin(read_as("V2beta1Run", await request.json())))

    def begin(self, run: Any) -> Any:
        """Start a run, as a request or the scheduler wants it."""
        reference = run.pipeline_version_reference
        if reference is None or reference.pipeline_version_id not in self.packages:
            raise HTTPException(400, {"message": "run needs a pipeline version"})
        if run.experiment_id not in self.experiments:
            raise HTTPException(404, {"message": "Experiment not found"})
        run.run_id, run.created_at = str(uuid.uuid4()), now()
        self.runs[run.run_id] = run
        self._go(run)
        return run

    def _go(self, run: Any) -> None:
        ir, platform = self.packages[run.pipeline_version_reference.pipeline_version_id]
        parameters = (run.runtime_config.parameters if run.runtime_config else None) or {}
        self.going[run.run_id] = Run(run.run_id, ir, platform, parameters, self.cluster)
        self.going[run.run_id].start()

    def fire(self, name: str, scheduled_at: datetime) -> Any:
        """What the scheduled-workflow controller does when a slot has come."""
        recurring = self.recurring[name]
        parameters = {
            key: value.replace("[[ScheduledTime]]", f"{scheduled_at:%Y%m%d%H%M%S}")
            for key, value in (recurring.runtime_config.parameters or {}).items()
        }
        return self.begin(
            api.V2beta1Run(
                display_name=f"{recurring.display_name} {scheduled_at:%Y%m%d%H%M%S}",
                experiment_id=recurring.experiment_id,
                recurring_run_id=name,
                scheduled_at=scheduled_at,
                pipeline_version_reference=recurring.pipeline_version_reference,
                runtime_config=api.V2beta1RuntimeConfig(parameters=parameters),
                service_account=recurring.service_account,
            )
        )

    def _shown(self, run: Any) -> Any:
        going = self.going[run.run_id]
        run.state = going.state
        run.error = api.GoogleRpcStatus(code=2, message=going.error) if going.error else None
        details = [
            api.V2beta1PipelineTaskDetail(
                run_id=run.run_id, task_id=f"root-{run.run_id}", display_name="root"
            )
        ]
        for task in list(going.tasks):
            driver = api.V2beta1PipelineTaskDetail(
                run_id=run.run_id,
                task_id=f"driver-{task.task_id}",
                display_name=f"{task.name}-driver",
                state="SUCCEEDED",
                pod_name=f"{task.name}-driver-pod",
            )
            below = [api.PipelineTaskDetailChildTask(pod_name=pod) for pod in task.pods]
            details += [
                driver,
                api.V2beta1PipelineTaskDetail(
                    run_id=run.run_id,
                    task_id=task.task_id,
                    display_name=task.name,
                    state=task.state,
                    child_tasks=below,
                ),
            ]
        run.run_details = api.V2beta1RunDetails(task_details=details)
        return run

    def _run(self, run: str) -> Any:
        if run not in self.runs:
            raise HTTPException(404, {"message": f"Run {run} not found"})
        return self.runs[run]

    async def list_runs(self, experiment_id: str | None = None) -> JSONResponse:
        own = [self._shown(r) for r in self.runs.values() if experiment_id in (None, r.experiment_id)]
        return answer(api.V2beta1ListRunsResponse(runs=own[::-1]))

    async def get_run(self, run: str) -> JSONResponse:
        return answer(self._shown(self._run(run)))

    async def terminate(self, run: str) -> JSONResponse:
        self._run(run)
        self.going[run].terminate()
        return JSONResponse({})

    async def retry(self, run: str) -> JSONResponse:
        if self.going[self._run(run).run_id].state != "FAILED":
            raise HTTPException(400, {"message": "Workflow must be Failed/Error to retry"})
        self._go(self.runs[run])
        return JSONResponse({})

    async def log(self, run: str, pod: str) -> PlainTextResponse:
        path = self.cluster.folder / "pods" / pod / "main.log"
        if not path.exists():
            return PlainTextResponse(json.dumps({"error_message": f'pods "{pod}" not found'}), 500)
        return PlainTextResponse(path.read_text(errors="replace"))

    # --- recurring runs -------------------------------------------------------------------------------

    async def create_recurring(self, request: Request) -> JSONResponse:
        made = read_as("V2beta1RecurringRun", await request.json())
        cron = made.trigger.cron_schedule.cron
        if len(cron.split()) != 6:
            raise HTTPException(400, {"message": f"Schedule cron is not a valid cron expression: {cron}"})
        if not 1 <= int(made.max_concurrency) <= 10:
            raise HTTPException(400, {"message": "The max concurrency must be between 1 and 10"})
        made.recurring_run_id, made.created_at, made.status = str(uuid.uuid4()), now(), "ENABLED"
        self.recurring[made.recurring_run_id] = made
        return answer(made)

    async def list_recurring(self) -> JSONResponse:
        found = list(self.recurring.values())
        return answer(api.V2beta1ListRecurringRunsResponse(recurring_runs=found, total_size=len(found)))

    async def delete_recurring(self, name: str) -> JSONResponse:
        if self.recurring.pop(name, None) is None:
            raise HTTPException(404, {"message": f"Job {name} not found"})
        return JSONResponse({})


@contextlib.contextmanager
def serving(endpoint: Endpoint) -> Iterator[str]:
    """The endpoint on a free port of loopback. Yields its URL; stops it, and what it runs, at the end."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(endpoint.app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the endpoint did not start"
        thread.join(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        for run in endpoint.going.values():
            run.terminate()
        server.should_exit = True
        thread.join(10)
