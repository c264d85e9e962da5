"""Runs a compiled pipeline as Kubeflow Pipelines does: drivers resolve inputs, launchers start containers.

Taken over from the backend's sources (backend/src/v2/driver and component): a placeholder is resolved only
where it is the whole constant; a container gets the command of the IR with the executor input in place of
`{{$}}`, and of the environment just what the platform spec names; a task's cache answers for its custom key
within one pipeline; retries; conditions; loops; the exit handler runs however the rest ended.

Not taken over: images (the code of this tree runs), S3 for KFP's own artifacts (a folder), the scheduling of
Kubernetes: the rounds of a loop run one after the other, and all of them, also after one that failed. Files
that the image has under /work are in a folder of the pod.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PLACEHOLDERS = re.compile(
    r"^\{\{\$\.(pipeline_job_uuid|pipeline_job_name|pipeline_job_schedule_time_utc)\}\}$"
)
CONDITION = re.compile(r"^inputs\.parameter_values\['([^']+)'\] == '([^']*)'$")


class TaskFailed(Exception):
    """A task of a graph has failed; what depends on it does not run."""


@dataclass
class Task:
    """What the endpoint shows of a task."""

    name: str
    task_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    state: str = "PENDING"
    pods: list[str] = field(default_factory=list)
    message: str = ""


@dataclass
class Cluster:
    """What a namespace has that pods refer to, and KFP's cache."""

    folder: Path
    config_maps: dict[str, dict[str, str]] = field(default_factory=dict)
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    cache: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    # Instead of the container's command: (stage, its parameters, its pod's name) -> exit code.
    instead: Callable[[str, dict, str], int] | None = None


class Run(threading.Thread):
    """One run of one compiled pipeline."""

    def __init__(
        self, run_id: str, ir: dict, platform: dict, parameters: dict, cluster: Cluster, due: str
    ) -> None:
        super().__init__(daemon=True)
        self.due = due
        self.run_id, self.ir, self.parameters, self.cluster = run_id, ir, parameters, cluster
        self.kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        self.state = "PENDING"
        self.error = ""
        self.tasks: list[Task] = []
        self.stopping = threading.Event()
        self._process: subprocess.Popen | None = None

    def terminate(self) -> None:
        """What KFP does on :terminate: no further task starts, pods get SIGTERM."""
        self.stopping.set()
        if self._process is not None:
            self._process.terminate()

    def run(self) -> None:
        self.state = "RUNNING"
        root = self.ir["root"]
        defaults = {
            name: spec.get("defaultValue")
            for name, spec in root.get("inputDefinitions", {}).get("parameters", {}).items()
        }
        try:
            self._dag(root["dag"], defaults | self.parameters, {})
            self.state = "SUCCEEDED"
        except TaskFailed as error:
            self.error = str(error)
            self.state = "CANCELED" if self.stopping.is_set() else "FAILED"
        except Exception as error:  # of this runner; a test must not wait for it
            self.error, self.state = repr(error), "FAILED"
            raise

    def _dag(self, dag: dict, parameters: dict, artifacts: dict) -> None:
        """Run the tasks of a graph in the order of their dependencies; exit tasks last, in any case."""
        outputs: dict[str, dict] = {}
        left = dict(dag["tasks"])
        last = {n: t for n, t in left.items() if "strategy" in t.get("triggerPolicy", {})}
        failed: list[str] = []
        while len(left) > len(last):
            ready = [
                n
                for n, t in left.items()
                if n not in last and not set(t.get("dependentTasks", [])) & set(left)
            ]
            for name in ready:
                task = left.pop(name)
                if failed or self.stopping.is_set():
                    continue
                try:
                    outputs[name] = self._task(task, parameters, artifacts, outputs)
                except TaskFailed as error:
                    failed.append(str(error))
        for task in last.values():
            self._task(task, parameters, artifacts, outputs)
        if failed or self.stopping.is_set():
            raise TaskFailed(failed[0] if failed else "terminated")

    def _task(self, task: dict, parameters: dict, artifacts: dict, outputs: dict) -> dict:
        values = {
            n: self._value(s, parameters, outputs)
            for n, s in task.get("inputs", {}).get("parameters", {}).items()
        }
        files = {
            n: artifacts[s["componentInputArtifact"]]
            if "componentInputArtifact" in s
            else outputs[s["taskOutputArtifact"]["producerTask"]]["artifacts"][
                s["taskOutputArtifact"]["outputArtifactKey"]
            ]
            for n, s in task.get("inputs", {}).get("artifacts", {}).items()
        }
        condition = task.get("triggerPolicy", {}).get("condition")
        if condition:
            name, wanted = CONDITION.match(condition).groups()
            if values[name] != wanted:
                self.tasks.append(Task(task["taskInfo"]["name"], state="SKIPPED"))
                return {}
        component = self.ir["components"][task["componentRef"]["name"]]
        if "parameterIterator" in task:
            return self._loop(task["parameterIterator"], component["dag"], values, files)
        if "dag" in component:
            self._dag(component["dag"], values, files)
            return {}
        return self._container(task, component, values, files)

    def _loop(self, iterator: dict, dag: dict, values: dict, files: dict) -> dict:
        """Run a graph once for each item."""
        failed = []
        for item in json.loads(iterator["items"]["raw"]):
            try:
                self._dag(dag, values | {iterator["itemInput"]: item}, files)
            except TaskFailed as error:
                failed.append(error)
        if failed:
            raise failed[0]
        return {}

    def _value(self, source: dict, parameters: dict, outputs: dict) -> Any:
        if "componentInputParameter" in source:
            return parameters[source["componentInputParameter"]]
        if "taskOutputParameter" in source:
            made = source["taskOutputParameter"]
            return outputs[made["producerTask"]]["parameters"][made["outputParameterKey"]]
        constant = source["runtimeValue"]["constant"]
        match = PLACEHOLDERS.match(constant)
        known = {
            "pipeline_job_uuid": self.run_id,
            "pipeline_job_name": "run",
            "pipeline_job_schedule_time_utc": self.due,
        }
        return known[match[1]] if match else constant

    def _container(self, task: dict, component: dict, values: dict, files: dict) -> dict:
        shown = Task(task["taskInfo"]["name"])
        self.tasks.append(shown)
        label = component["executorLabel"]
        container = self.ir["deploymentSpec"]["executors"][label]["container"]
        caching = task.get("cachingOptions", {})
        key = (self.ir["pipelineInfo"]["name"], caching.get("cacheKey", ""))
        if caching.get("enableCache") and key in self.cluster.cache:
            shown.state = "SUCCEEDED"
            return self.cluster.cache[key]
        attempts = 1 + int(task.get("retryPolicy", {}).get("maxRetryCount", 0))
        shown.state = "RUNNING"
        for attempt in range(attempts):
            pod = f"run-{self.run_id[:8]}-{shown.name}-{attempt}-{uuid.uuid4().hex[:5]}"
            folder = self.cluster.folder / "pods" / pod
            folder.mkdir(parents=True)
            shown.pods.append(pod)
            made = self._launch(folder, component, container, self.kubernetes.get(label, {}), values, files)
            if made is not None:
                shown.state = "SUCCEEDED"
                if caching.get("enableCache"):
                    self.cluster.cache[key] = made
                return made
            if self.stopping.is_set():
                break
        shown.state = "FAILED"
        raise TaskFailed(f"{shown.name} failed after {len(shown.pods)} attempts")

    def environment(self, folder: Path, container: dict, config: dict) -> dict[str, str] | str:
        """Just what the platform spec names; a sentence when something it names is missing."""
        found = {
            "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(folder / "tmp"),
            "KFP_POD_NAME": folder.name,
            "KFP_POD_UID": folder.name,
        }
        for kind, there in (("configMap", self.cluster.config_maps), ("secret", self.cluster.secrets)):
            for source in config.get(f"{kind}AsEnv", []):
                name = source[f"{kind}Name"]
                for pair in source["keyToEnv"]:
                    if pair[f"{kind}Key"] not in there.get(name, {}):
                        return f"CreateContainerConfigError: no {kind} {name} with {pair[f'{kind}Key']}"
                    found[pair["envVar"]] = there[name][pair[f"{kind}Key"]]
        for pair in container.get("env", []):
            found[pair["name"]] = pair["value"].replace("/work", str(folder / "work"))
        return found

    def _launch(
        self, folder: Path, component: dict, container: dict, config: dict, values: dict, files: dict
    ) -> dict | None:
        """Start the container's command as the launcher does. Returns the outputs; None when it failed."""
        for name in ("work", "tmp", "out"):
            (folder / name).mkdir()
        environment = self.environment(folder, container, config)
        log = folder / "main.log"
        if isinstance(environment, str):
            log.write_text(environment + "\n")
            return None
        given = self._executor_input(folder, component, values, files)
        made = {name: each["artifacts"][0] for name, each in given["outputs"]["artifacts"].items()}
        parameters = given["outputs"]["parameters"]
        if self.cluster.instead:
            failed = self.cluster.instead(container["args"][-1], values, folder.name)
            return None if failed else {"artifacts": made, "parameters": dict.fromkeys(parameters, "true")}
        command = [*container["command"], *container.get("args", [])]
        command = [part.replace("{{$}}", json.dumps(given)) for part in command]
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT
            )
            if self._process.wait():
                return None
        said = Path(given["outputs"]["outputFile"])
        written = json.loads(said.read_text()).get("artifacts", {}) if said.exists() else {}
        for name, each in written.items():
            made[name]["metadata"] = each["artifacts"][0].get("metadata", {})
        read = {name: Path(place["outputFile"]).read_text() for name, place in parameters.items()}
        return {"artifacts": made, "parameters": read}

    def _executor_input(self, folder: Path, component: dict, values: dict, files: dict) -> dict:
        definitions = component.get("outputDefinitions", {})
        made = {
            name: {
                "name": name,
                "type": spec["artifactType"],
                "uri": str(folder / "out" / name),
                "metadata": {},
            }
            for name, spec in definitions.get("artifacts", {}).items()
        }
        return {
            "inputs": {
                "parameterValues": values,
                "artifacts": {name: {"artifacts": [each]} for name, each in files.items()},
            },
            "outputs": {
                "artifacts": {name: {"artifacts": [each]} for name, each in made.items()},
                "parameters": {
                    name: {"outputFile": str(folder / "out" / name)}
                    for name in definitions.get("parameters", {})
                },
                "outputFile": str(folder / "executor_output.json"),
            },
        }
