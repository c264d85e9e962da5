"""What KFP's driver and launcher do around a stage, from the compiled pipeline itself.

The driver resolves inputs and names outputs below the pipeline root; the launcher downloads the inputs to
/s3/<bucket>/..., puts the executor input in place of `{{$}}`, runs the task's command, and uploads what it
finds at the outputs' paths (kubeflow/pipelines: backend/src/v2/component/launcher_v2.go).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.containers.container import Container

OUTPUT_FILE = "/tmp/kfp_outputs/output_metadata.json"


class Launcher:
    """Runs the tasks of a compiled pipeline in containers.

    Args:
        ir: the compiled pipeline, one document.
        s3: a boto3 client.
        root: the pipeline root, s3://...
        run: id of the run.
        container: makes a container of an image: `container(name, arguments)`.
    """

    def __init__(
        self, ir: dict, s3: Any, root: str, run: str, container: Callable[[str, list[str]], Container]
    ) -> None:
        self.ir, self.s3, self.root, self.id, self.container = ir, s3, root, run, container
        self.outputs: dict[str, dict[str, dict]] = {}
        self.seconds: dict[str, float] = {}

    def tasks(self) -> Iterator[tuple[str, dict]]:
        """The tasks of the pipeline, those that others wait for first."""
        waiting = dict(self.ir["root"]["dag"]["tasks"])
        while waiting:
            ready = [
                name
                for name, task in waiting.items()
                if not set(task.get("dependentTasks", [])) & set(waiting)
            ]
            assert ready, f"these wait for each other: {sorted(waiting)}"
            for name in ready:
                yield name, waiting.pop(name)

    def run(self, name: str, task: dict) -> None:
        """Run one task; fails with its log."""
        component = self.ir["components"][task["componentRef"]["name"]]
        executor = self.ir["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        given = self._input(name, task, component)
        arguments = [
            each.replace("{{$}}", json.dumps(given)) for each in executor["command"] + executor["args"]
        ]
        container = self.container(name, arguments)
        for artifact in self._artifacts(given["inputs"]):
            path = self._local(container, artifact)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.s3.download_file(*_place(artifact["uri"]), str(path))
        for artifact in self._artifacts(given["outputs"]):
            self._local(container, artifact).parent.mkdir(parents=True, exist_ok=True)
        for folder in (container.folder / "s3").rglob("*"):
            folder.chmod(0o777 if folder.is_dir() else 0o644)
        started = time.monotonic()
        code = container.run()
        self.seconds[name] = time.monotonic() - started
        assert code == 0, f"{name} ended with {code}\n{container.said()[-6000:]}"
        self.outputs[name] = self._publish(given, container)

    def _input(self, name: str, task: dict, component: dict) -> dict:
        parameters = {
            key: value["runtimeValue"]["constant"].replace("{{$.pipeline_job_uuid}}", self.id)
            for key, value in task["inputs"]["parameters"].items()
        }
        sources = task["inputs"].get("artifacts", {})
        inputs = {}
        for key, source in sources.items():
            told = source["taskOutputArtifact"]
            inputs[key] = {"artifacts": [self.outputs[told["producerTask"]][told["outputArtifactKey"]]]}
        outputs = {
            key: {
                "artifacts": [
                    {
                        "name": key,
                        "type": said["artifactType"],
                        "uri": f"{self.root}/{self.ir['pipelineInfo']['name']}/{self.id}/{name}/{key}",
                        "metadata": {},
                    }
                ]
            }
            for key, said in component["outputDefinitions"]["artifacts"].items()
        }
        return {
            "inputs": {"parameterValues": parameters, "artifacts": inputs},
            "outputs": {"artifacts": outputs, "outputFile": OUTPUT_FILE},
        }

    def _publish(self, given: dict, container: Container) -> dict[str, dict]:
        said = json.loads((container.folder / OUTPUT_FILE.lstrip("/")).read_text())
        published = {}
        for key, value in given["outputs"]["artifacts"].items():
            artifact = value["artifacts"][0]
            path = self._local(container, artifact)
            if path.is_file():  # KFP's Metrics are the metadata alone
                self.s3.upload_file(str(path), *_place(artifact["uri"]))
            told = said.get("artifacts", {}).get(key, {}).get("artifacts", [{}])[0]
            published[key] = artifact | {"metadata": told.get("metadata", {})}
        return published

    @staticmethod
    def _artifacts(side: dict) -> Iterator[dict]:
        for value in side["artifacts"].values():
            yield from value["artifacts"]

    @staticmethod
    def _local(container: Container, artifact: dict) -> Path:
        return container.folder / "s3" / artifact["uri"].removeprefix("s3://")


def _place(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key
