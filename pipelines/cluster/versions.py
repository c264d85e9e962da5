"""What the endpoint knows a pipeline by: its experiment, its name, and a version for each content."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.shared import digest
from components.shared.errors import UsageError
from pipelines.cluster.endpoint import Endpoint, EndpointError

_CONFLICT = 409


@dataclass(frozen=True)
class Content:
    """What an uploaded IR was compiled from; its version's description keeps it for whoever watches a run.

    Args:
        pipeline: its name in our words.
        stages: in order.
        keys: stage -> key, of the stages that KFP's cache answers for.
    """

    pipeline: str
    stages: list[str]
    keys: dict[str, str]


@dataclass(frozen=True)
class Version:
    """An uploaded version of a pipeline.

    Args:
        pipeline_id: KFP's id of the pipeline.
        version_id: KFP's id of the version.
        name: `<git commit>-<digest>`.
    """

    pipeline_id: str
    version_id: str
    name: str

    def reference(self) -> Any:
        """It as the API names it."""
        import kfp_server_api

        return kfp_server_api.V2beta1PipelineVersionReference(
            pipeline_id=self.pipeline_id, pipeline_version_id=self.version_id
        )


def display_name(pipeline: str) -> str:
    """The name of a pipeline at the endpoint, which allows no underscore."""
    return pipeline.replace("_", "-")


def git_commit() -> str:
    """The commit of this tree in 12 digits, `-dirty` behind it when files differ; `no-git` outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(digest.TREE_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "no-git"


def upload(endpoint: Endpoint, content: Content, package: Path) -> Version:
    """Make sure that the endpoint has this very IR as a version of the pipeline.

    Args:
        endpoint: to upload to.
        content: what the package was compiled from.
        package: the compiled YAML.

    Returns:
        The version: the one of that content if the endpoint has it, else a new one.
    """
    name = name_of(package)
    pipeline_id = _pipeline_id(endpoint, display_name(content.pipeline))
    found = _version(endpoint, pipeline_id, name)
    if found is None:
        try:
            arguments = {"name": name, "pipelineid": pipeline_id, "description": json.dumps(asdict(content))}
            found = endpoint.call("PipelineUpload", "upload_pipeline_version", str(package), **arguments)
        except EndpointError as error:
            if error.status != _CONFLICT:
                raise
            # Another submit of the same content was first.
            found = _version(endpoint, pipeline_id, name)
            if found is None:
                raise
    return Version(pipeline_id, found.pipeline_version_id, name)


def name_of(package: Path) -> str:
    """The name of the version with this IR: the commit that made it and twelve digits of its sha256."""
    return f"{git_commit()}-{hashlib.sha256(package.read_bytes()).hexdigest()[:12]}"


def _pipeline_id(endpoint: Endpoint, name: str) -> str:
    """KFP's id of the pipeline of that name, made at need, and empty: its versions are uploaded by name."""
    import kfp_server_api

    present = pipeline_id(endpoint, name)
    if present:
        return present
    scope = {"namespace": endpoint.namespace} if endpoint.namespace else {}
    wanted = kfp_server_api.V2beta1Pipeline(name=name, display_name=name, **scope)
    try:
        made = endpoint.call("Pipeline", "pipeline_service_create_pipeline", wanted)
    except EndpointError as error:
        # Another submit was first.
        found = pipeline_id(endpoint, name) if error.status == _CONFLICT else ""
        if not found:
            raise
        return found
    return str(made.pipeline_id)


def pipeline_id(endpoint: Endpoint, name: str) -> str:
    """KFP's id of the pipeline of that name; '' when there is none."""
    scope = {"namespace": endpoint.namespace} if endpoint.namespace else {}
    named = filter_of("display_name", name)
    found = endpoint.every("Pipeline", "pipeline_service_list_pipelines", "pipelines", filter=named, **scope)
    return str(found[0].pipeline_id) if found else ""


def _version(endpoint: Endpoint, pipeline_id: str, name: str) -> Any:
    method = "pipeline_service_list_pipeline_versions"
    named = filter_of("display_name", name)
    found = endpoint.every("Pipeline", method, "pipeline_versions", pipeline_id, filter=named)
    return found[0] if found else None


def content_of(endpoint: Endpoint, run: Any) -> Content:
    """What a run of the endpoint runs.

    Raises:
        UsageError: not a run of a pipeline that Tuneyard uploaded.
    """
    reference = run.pipeline_version_reference
    try:
        method = "pipeline_service_get_pipeline_version"
        ids = (reference.pipeline_id, reference.pipeline_version_id)
        return Content(**json.loads(endpoint.call("Pipeline", method, *ids).description))
    except (AttributeError, ValueError, TypeError) as error:
        raise UsageError(
            f"run {run.run_id} ({run.display_name}) was not started by Tuneyard",
            "`tuneyard runs` lists those that were",
        ) from error


def experiment(endpoint: Endpoint, pipeline: str) -> str:
    """The id of the pipeline's experiment, made at need."""
    import kfp_server_api

    scope = {"namespace": endpoint.namespace} if endpoint.namespace else {}
    named = filter_of("display_name", pipeline)
    method = "experiment_service_list_experiments"
    found = endpoint.every("Experiment", method, "experiments", filter=named, **scope)
    if found:
        if str(found[0].storage_state) == "ARCHIVED":
            raise UsageError(
                f"the experiment {pipeline} at {endpoint.url} is archived, so it takes no run",
                "restore it on its page in Kubeflow Pipelines",
            )
        return str(found[0].experiment_id)
    wanted = kfp_server_api.V2beta1Experiment(
        display_name=pipeline, description=f"Runs of the pipeline {pipeline}", **scope
    )
    try:
        return str(endpoint.call("Experiment", "experiment_service_create_experiment", wanted).experiment_id)
    except EndpointError as error:
        # Another submit was first.
        found = endpoint.every("Experiment", method, "experiments", filter=named, **scope)
        if error.status != _CONFLICT or not found:
            raise
        return str(found[0].experiment_id)


def filter_of(key: str, value: str) -> str:
    """KFP's filter for one equal value (its v2beta1 Filter message as JSON)."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "stringValue": value}]})
