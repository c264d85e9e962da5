"""A run of a compiled pipeline whose tasks are containers of the images, and whose artifacts are in S3.

The engine of tests/pipelines/cluster resolves inputs, conditions and environments as KFP does. Here is what
its launcher does in the pod: the inputs are downloaded to /s3/<bucket>/..., the executor input takes the
place of `{{$}}`, the task's command runs, and what it leaves at the outputs' paths is uploaded
(kubeflow/pipelines: backend/src/v2/component/launcher_v2.go). The volumes are those of the compiled platform
spec and KFP's own /s3 (backend/src/v2/compiler/argocompiler/container.go), and nothing else can be written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.containers.container import Container
from tests.pipelines.cluster.engine import Cluster, Run

OUTPUT_FILE = "/tmp/kfp_outputs/output_metadata.json"
# The engine runs the code of this tree and sets these for it; a container has its image's.
OF_THIS_MACHINE = ("PATH", "PYTHONPATH", "TMPDIR")


class PodRun(Run):
    """One run.

    Args:
        ir: the compiled pipeline and its platform spec.
        cluster: config maps and secrets.
        s3: a boto3 client.
        root: the pipeline root, s3://...
        contain: makes a container: `contain(image, arguments, environment, volumes)`.
    """

    def __init__(
        self, ir: list[dict], cluster: Cluster, s3: Any, root: str, contain: Callable[..., Container]
    ) -> None:
        run = "11111111-2222-3333-4444-555555555555"
        super().__init__(run, ir[0], ir[1], {}, cluster, due="2026-11-23T03:00:00Z")
        self.s3, self.root, self.contain = s3, root, contain
        self.outputs: dict[str, dict[str, dict]] = {}
        self.seconds: dict[str, float] = {}
        self.logs: dict[str, str] = {}

    def _launch(
        self, folder: Path, component: dict, container: dict, config: dict, values: dict, files: dict
    ) -> dict | None:
        name = component["executorLabel"].removeprefix("exec-")
        found = self.environment(folder, {}, config)
        assert isinstance(found, dict), found
        found = {n: value for n, value in found.items() if n not in OF_THIS_MACHINE}
        found |= {pair["name"]: pair["value"] for pair in container.get("env", [])}
        given = self._input(name, component, values, files)
        arguments = [*container["command"], *container.get("args", [])]
        arguments = [part.replace("{{$}}", json.dumps(given)) for part in arguments]
        image = container["image"].rsplit("/", 1)[-1].split("@")[0]
        volumes = ["s3", *(mount["mountPath"].lstrip("/") for mount in config["emptyDirMounts"])]
        pod = self.contain(image, arguments, found, volumes)
        self._download(given, pod)
        started = time.monotonic()
        code = pod.run()
        self.seconds[name] = time.monotonic() - started
        self.logs[name] = pod.said()
        return self._publish(name, given, pod) if code == 0 else None

    def _input(self, name: str, component: dict, values: dict, files: dict) -> dict:
        definitions = component.get("outputDefinitions", {})
        made = {
            key: {
                "name": key,
                "type": said["artifactType"],
                "uri": f"{self.root}/{self.ir['pipelineInfo']['name']}/{self.run_id}/{name}/{key}",
                "metadata": {},
            }
            for key, said in definitions.get("artifacts", {}).items()
        }
        parameters = {
            key: {"outputFile": f"/tmp/kfp/outputs/{key}"} for key in definitions.get("parameters", {})
        }
        return {
            "inputs": {
                "parameterValues": values,
                "artifacts": {key: {"artifacts": [each]} for key, each in files.items()},
            },
            "outputs": {
                "artifacts": {key: {"artifacts": [each]} for key, each in made.items()},
                "parameters": parameters,
                "outputFile": OUTPUT_FILE,
            },
        }

    def _download(self, given: dict, pod: Container) -> None:
        for value in given["inputs"]["artifacts"].values():
            path = pod.outside(_path(value["artifacts"][0]["uri"]))
            path.parent.mkdir(parents=True, exist_ok=True)
            self.s3.download_file(*_place(value["artifacts"][0]["uri"]), str(path))
        for value in given["outputs"]["artifacts"].values():
            pod.outside(_path(value["artifacts"][0]["uri"])).parent.mkdir(parents=True, exist_ok=True)
        written = [each["outputFile"] for each in given["outputs"]["parameters"].values()]
        for path in [given["outputs"]["outputFile"], *written]:
            pod.outside(path).parent.mkdir(parents=True, exist_ok=True)
        # The launcher is the pod's user, this process is not.
        for path in [*pod.outside("/s3").rglob("*"), *pod.outside("/tmp").rglob("*")]:
            path.chmod(0o777 if path.is_dir() else 0o644)

    def _publish(self, name: str, given: dict, pod: Container) -> dict:
        said = json.loads(pod.outside(given["outputs"]["outputFile"]).read_text())
        made = {}
        for key, value in given["outputs"]["artifacts"].items():
            artifact = value["artifacts"][0]
            path = pod.outside(_path(artifact["uri"]))
            if path.is_file():  # KFP's Metrics are the metadata alone
                self.s3.upload_file(str(path), *_place(artifact["uri"]))
            told = said.get("artifacts", {}).get(key, {}).get("artifacts", [{}])[0]
            made[key] = artifact | {"metadata": told.get("metadata", {})}
        self.outputs[name] = made
        files = {key: each["outputFile"] for key, each in given["outputs"]["parameters"].items()}
        return {
            "artifacts": made,
            "parameters": {key: pod.outside(path).read_text() for key, path in files.items()},
        }


def _place(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _path(uri: str) -> str:
    return "/s3/" + uri.removeprefix("s3://")
