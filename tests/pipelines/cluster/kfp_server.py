"""An endpoint of Kubeflow Pipelines on loopback: its v2beta1 REST API, real messages, and a runner."""

from __future__ import annotations

import contextlib
import socket
import threading
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import kfp_server_api as api
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

from tests.pipelines.cluster.engine import Cluster, Run
from tests.pipelines.cluster.kfp_library import Library, answer, now, read_as


class Endpoint(Library):
    """The state of the endpoint, and its application."""

    def __init__(self, folder: Path, token: str = "") -> None:
        super().__init__()
        self.cluster = Cluster(folder)
        self.token = token
        self.runs: dict[str, Any] = {}
        self.recurring: dict[str, Any] = {}
        self.going: dict[str, Run] = {}
        self.down = threading.Event()
        # What KFP 2.17 does not, and may come to do: write the time over [[ScheduledTime]] in parameters.
        self.expands = False
        # What the driver is told of when a run was scheduled: the time itself where it may read the Workflow.
        self.reads_workflows = False
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
        run.run_id, run.created_at = str(uuid.uuid4()), run.created_at or now()
        self.runs[run.run_id] = run
        self._go(run)
        return run

    def _go(self, run: Any) -> None:
        ir, platform = self.packages[run.pipeline_version_reference.pipeline_version_id]
        parameters = (run.runtime_config.parameters if run.runtime_config else None) or {}
        due = run.scheduled_at if self.reads_workflows and run.scheduled_at else run.created_at
        stamp = f"{due:%Y-%m-%dT%H:%M:%SZ}"
        self.going[run.run_id] = Run(run.run_id, ir, platform, parameters, self.cluster, stamp)
        self.going[run.run_id].start()

    def fire(self, name: str, scheduled_at: datetime) -> Any:
        """What the scheduled-workflow controller does some seconds after a slot has come."""
        recurring = self.recurring[name]
        parameters = dict(recurring.runtime_config.parameters or {})
        if self.expands:
            parameters = {
                key: value.replace("[[ScheduledTime]]", f"{scheduled_at:%Y%m%d%H%M%S}")
                for key, value in parameters.items()
            }
        return self.begin(
            api.V2beta1Run(
                display_name=f"{recurring.display_name} {scheduled_at:%Y%m%d%H%M%S}",
                experiment_id=recurring.experiment_id,
                recurring_run_id=name,
                scheduled_at=scheduled_at,
                created_at=scheduled_at + timedelta(seconds=4),
                pipeline_version_reference=recurring.pipeline_version_reference,
                runtime_config=api.V2beta1RuntimeConfig(parameters=parameters),
                service_account=recurring.service_account,
            )
        )

    def _shown(self, run: Any) -> Any:
        going = self.going[run.run_id]
        run.state = going.state
        run.error = api.GoogleRpcStatus(code=2, message=going.error) if going.error else None
        details = []

        def node(name: str, state: str, kind: str = "") -> str:
            """A node of Argo's graph as KFP shows it: pods are named nowhere, children by their node's id."""
            number = uuid.uuid5(uuid.UUID(run.run_id), f"{len(details)}").int % 10**10
            details.append(
                api.V2beta1PipelineTaskDetail(
                    run_id=run.run_id,
                    task_id=f"run-{kind or name}-{number}",
                    display_name=name,
                    state=state,
                    child_tasks=[],
                )
            )
            return f"run-{number}"

        def below(children: list[str]) -> None:
            details[-1].child_tasks = [api.PipelineTaskDetailChildTask(pod_name=each) for each in children]

        node("root", going.state)
        for task in list(going.tasks):
            node(f"{task.name}-driver", "SUCCEEDED", "system-container-driver")
            # With retries the child of a stage is the node of all attempts; the pods are below that one.
            attempts = [node(f"executor({n})", "", "system-container-impl") for n, _ in enumerate(task.pods)]
            executor = node("executor", task.state if task.pods else "SKIPPED", "system-container-impl")
            below(attempts)
            node(task.name, task.state, "system-container-executor")
            below([executor])
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
