"""Submit to a cluster: plan from the store, upload a version, create the run, watch it to its end."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.shared import digest
from components.shared.commit import commit_name
from components.shared.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, UsageError
from components.shared.store import Store
from pipelines import compile as compiling
from pipelines import fits, planner
from pipelines.cluster import listing, versions
from pipelines.cluster.endpoint import Endpoint
from pipelines.cluster.watching import follow, states_of
from pipelines.embedded.services import home_dir
from pipelines.images import lock
from pipelines.report import Report, gather
from pipelines.samples import fetch
from pipelines.spec import PipelineSpec, load
from pipelines.submit import told
from pipelines.watch import Watcher

log = logging.getLogger("tuneyard.submit")


def run_cluster(
    name: str, endpoint: Endpoint, overrides: Sequence[str] = (), screen: Any = sys.stderr
) -> Report:
    """Run a pipeline on a cluster.

    Args:
        name: a name in pipelines/ or the path of a YAML file.
        endpoint: Kubeflow Pipelines.
        overrides: `section.key=value`.
        screen: where to show progress; None for nowhere.

    Returns:
        How it went, as `run_local` has it; `run_id` is KFP's.

    Raises:
        SpecError, UsageError: the pipeline file, the lock of images or the command is wrong, or a stage will
            not fit in the memory of its pod; nothing has started.
    """
    spec = load(name, overrides)
    images = checked_images()
    started = time.monotonic()
    report = Report("", spec.name)
    store = store_or_none()
    with told(report):
        planned = _plan(spec, store)
        done = {p.stage: p.commit for p in planned if p.commit}
        for stage in done:
            log.info("\u2713 %s  unchanged, done before", stage)
        if store and _settled(planned):
            gather(report, list(spec.stages()), done, store, _serving_url())
        else:
            keys = {p.stage: p.key for p in planned if p.commit and p.key}
            # Not the stage's key alone: KFP must not answer with outputs that were remade since.
            caches = {stage: digest.of_value([key, done[stage]["outputs"]]) for stage, key in keys.items()}
            content = versions.Content(spec.name, list(spec.stages()), keys)
            if store and "train" not in keys:
                fits.refuse_unfit(spec, store, "kfp")
            report.run_id = start(spec, endpoint, images, content, caches)
            log.info("run %s; from anywhere: tuneyard runs attach %s", report.run_id, report.run_id)
            watch(report, content, endpoint, store, screen)
    report.seconds = round(time.monotonic() - started, 1)
    return report


def checked_images() -> dict[str, lock.Image]:
    """The locked images, if they hold the code of this tree.

    Raises:
        UsageError: they do not: stages and wrappers would be of two minds.
    """
    images = lock.read()
    stale = lock.stale(images)
    if stale:
        raise UsageError(
            f"{lock.PATH}: {', '.join(stale)}: built from other code than this tree's",
            "build and push them again (make images REGISTRY=... PUSH=1), or check out the code they hold",
        )
    return images


def store_or_none() -> Store | None:
    """The cluster's artifact store, if this machine's environment names it (TUNEYARD_STORE and AWS_*)."""
    if os.environ.get("TUNEYARD_STORE"):
        return Store.from_environment()
    log.warning(
        "TUNEYARD_STORE is not set: without the cluster's store nothing can be planned here, so every stage "
        "starts a pod to look whether it is done; no log is shown, and the report has what KFP knows"
    )
    return None


def _serving_url() -> str:
    return os.environ.get("TUNEYARD_SERVING_URL", "")


def _plan(spec: PipelineSpec, store: Store | None) -> list[planner.Planned]:
    if store is None:
        return [planner.Planned(stage, None) for stage in spec.stages()]
    fetch.ensure([*spec.ingest.external_uris(), *spec.train.external_uris()], home_dir())
    return planner.plan(spec, store, effects=bool(_serving_url()))


def _settled(planned: Sequence[planner.Planned]) -> bool:
    """Whether no run is needed: all is done, or what is left is not to be done."""
    befores: list[planner.Planned | None] = [None, *planned]
    left = [
        each
        for each, before in zip(planned, befores, strict=False)
        if not each.commit and not planner.why_needless(each.stage, before.commit if before else None)
    ]
    return not left or planner.stopped(planned)


def start(
    spec: PipelineSpec,
    endpoint: Endpoint,
    images: Mapping[str, lock.Image],
    content: versions.Content,
    caches: Mapping[str, str],
) -> str:
    """Upload the pipeline's version and create a run of it. Returns the run's id.

    Creating is not repeated when its answer is lost: there may be a run, and two would do the same work.
    """
    import kfp_server_api

    with compiled(spec, images, caches) as package:
        version = versions.upload(endpoint, content, package)
    experiment = versions.experiment(endpoint, spec.name)
    wanted = kfp_server_api.V2beta1Run(
        display_name=f"{spec.name} {version.name}",
        experiment_id=experiment,
        pipeline_version_reference=version.reference(),
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters={}),
        service_account=spec.hardware.service_account,
    )
    run = endpoint.call("Run", "run_service_create_run", wanted)
    return str(run.run_id)


@contextlib.contextmanager
def compiled(
    spec: PipelineSpec, images: Mapping[str, lock.Image], caches: Mapping[str, str]
) -> Iterator[Path]:
    """The IR of a pipeline, as a file while the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / f"{spec.name}.yaml"
        compiling.write(spec, images, caches, package)
        yield package


def attach(run_id: str, endpoint: Endpoint, screen: Any = sys.stderr) -> Report:
    """Watch a run that somebody else started, or that this machine lost sight of.

    Raises:
        EndpointError: there is no such run.
        UsageError: it is not a run of Tuneyard's.
    """
    run = endpoint.call("Run", "run_service_get_run", run_id)
    content = versions.content_of(endpoint, run)
    report = Report(run_id, content.pipeline)
    with told(report):
        watch(report, content, endpoint, store_or_none(), screen)
    return report


def watch(
    report: Report, content: versions.Content, endpoint: Endpoint, store: Store | None, screen: Any
) -> None:
    """Follow the run of a report to its end and fill the report in; keep it in the store if there is one.

    Ctrl-C leaves the run alone.
    """
    report.log = str(home_dir() / "runs" / report.run_id / "log.txt")
    watcher = Watcher(Path(report.log), screen)
    try:
        run = follow(endpoint, report.run_id, content.stages, watcher, store)
    except KeyboardInterrupt:
        todo = f"tuneyard runs attach {report.run_id}, or tuneyard runs terminate {report.run_id}"
        what = f"no longer watching run {report.run_id}, which goes on"
        report.end({"what": what, "todo": todo, "exit_code": EXIT_INTERRUPTED})
        return
    finally:
        watcher.close()
    _conclude(report, content, run, store)


def _conclude(report: Report, content: versions.Content, run: Any, store: Store | None) -> None:
    state = str(run.state)
    if state == "CANCELED":
        todo = "submit again to go on from the last finished stage"
        report.end({"what": f"run {run.run_id} was terminated", "todo": todo, "exit_code": EXIT_INTERRUPTED})
    if store is not None:
        commits = {stage: store.read_json(commit_name(stage, key)) for stage, key in content.keys.items()}
        done = {stage: commit for stage, commit in commits.items() if commit}
        gather(report, content.stages, done, store, _serving_url())
    else:
        for stage, own in states_of(run, content.stages).items():
            status = listing.STATUS.get(own, "not run")
            row = {"name": stage, "status": status, "seconds": 0.0, "cached": False, "key": None}
            row["outputs"] = {}
            report.stages.append(row)
    if state == "FAILED" and report.exit_code == EXIT_DONE:
        why = run.error.message if run.error and run.error.message else "no stage says why"
        todo = f"see {report.log}, and the run's page in Kubeflow Pipelines (its driver, its pods' events)"
        report.end({"what": f"run {run.run_id} failed: {why}", "todo": todo, "exit_code": EXIT_FAILED})
    if run.created_at and run.finished_at and run.finished_at.year > 1970:  # KFP's zero
        report.started = run.created_at.isoformat(timespec="seconds")
        report.seconds = round((run.finished_at - run.created_at).total_seconds(), 1)
    if store is not None:
        store.write_json(f"runs/{report.run_id}/run.json", asdict(report))
