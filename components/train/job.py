"""A training of several nodes, seen from the stage's pod: make the TrainJob, follow it, take what it leaves.

Its pods run worker.py. Both sides know of each other only through documents in the store, under
`work/train/<key>/`: `order.json` says what to train, `step-N/` are checkpoints, `failed.json` why it will not
work, `result.json`, written last, what came out.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from components.shared import digest
from components.shared.errors import EXIT_STOPPED, StageStopped, TuneyardError
from components.shared.manifest import Manifest
from components.shared.stage import Artifact, Context, Result
from components.shared.store import Store
from components.train import checkpoint, cluster, keeping
from components.train.cluster import Cluster
from components.train.config import TrainConfig
from components.train.sharding.config import WHOLE, Sharding
from components.train.trainjob import Nodes, name_of, trainjob

log = logging.getLogger("tuneyard.train")

_POLL_SECONDS = 5.0
# How long the last lines of a job that has ended may take.
_LAST_LINES_SECONDS = 10.0
# A job that somebody deletes is made again this often: a lost stage pod takes the job it owned with it.
_VANISHED = 3
DOCUMENTS = ("failed.json", "result.json")


def train_as_job(
    asked: Nodes, config: TrainConfig, inputs: Mapping[str, Artifact], context: Context
) -> Result:
    """Have the nodes of a TrainJob do the stage's work.

    Args:
        asked: its nodes.
        config: settings of the stage.
        inputs: of the stage.
        context: of the stage.

    Returns:
        What `train_here` would have; its files are in `context.out`.

    Raises:
        StageStopped: what the training found in the data stopped the line.
        TuneyardError: it failed, or there are more processes than examples in an update.
    """
    raise_if_idle(asked.nodes, asked.processes, config)
    owner = os.environ.get("KFP_POD_NAME", ""), os.environ.get("KFP_POD_UID", "")
    if not all(owner):
        raise TuneyardError(
            "KFP_POD_NAME and KFP_POD_UID are not set, so the TrainJob would belong to nobody and never end",
            "start it through Kubeflow Pipelines, which sets them",
        )
    name = name_of(context.pipeline, context.key)
    body = trainjob(asked, name, context.key, owner).to_dict()
    api = cluster.connect()
    order(config, inputs, context, asked.sharding)
    try:
        _begin(api, name, body, context)
        _follow(api, name, body, context)
    except KeyboardInterrupt:
        log.info("train: interrupted; ending TrainJob %s", name)
        api.delete(name)
        raise
    return collect(context)


def raise_if_idle(nodes: int, on_each: int, config: TrainConfig) -> None:
    """Refuse processes that would have nothing to do; what an update is must not change with the machines."""
    processes = nodes * on_each
    update = config.per_device_batch_size * config.gradient_accumulation_steps
    if update < processes:
        raise TuneyardError(
            f"an update has {update} examples (train.per_device_batch_size {config.per_device_batch_size} x "
            f"gradient_accumulation_steps {config.gradient_accumulation_steps}) and the job {processes} "
            f"processes (hardware.nodes {nodes} x gpus_per_node {on_each})",
            f"ask for {update} GPUs at most, or raise gradient_accumulation_steps",
        )


def order(
    config: TrainConfig, inputs: Mapping[str, Artifact], context: Context, sharding: Sharding = WHOLE
) -> None:
    """Write down what the workers are to do.

    Args:
        config: settings of the stage.
        inputs: of the stage.
        context: of the stage.
        sharding: what lies in pieces among them.
    """
    said = {
        "run": context.run,
        "pipeline": context.pipeline,
        "config": config.model_dump(mode="json"),
        "sharding": sharding.model_dump(mode="json"),
        "inputs": {name: artifact.manifest.to_json() for name, artifact in inputs.items()},
        "code": digest.of_code("train"),
    }
    context.store.write_json(f"{keeping.folder(context.key)}/order.json", said)


def _ended(job: Mapping[str, Any]) -> tuple[str, str]:
    """(Complete, Failed or '', why) of a TrainJob."""
    for condition in job.get("status", {}).get("conditions", ()):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return condition["type"], f"{condition.get('reason', '')}: {condition.get('message', '')}"
    return "", ""


def _left_something(context: Context) -> bool:
    """Whether the result of a job that is complete is there, and whole."""
    name = f"{keeping.folder(context.key)}/result.json"
    found = context.store.read_json(name)
    return found is not None and context.store.has_tree(Manifest.from_json(found["manifest"], name))


def _begin(api: Cluster, name: str, body: Mapping[str, Any], context: Context) -> None:
    """Find the job of this key, or make it; one that failed is replaced and goes on from its checkpoint."""
    told = False
    while True:
        job = api.job(name)
        if job is None:
            for document in DOCUMENTS:
                context.store.remove(f"{keeping.folder(context.key)}/{document}")
            if api.create(body):
                log.info("train: TrainJob %s of %d nodes made", name, body["spec"]["trainer"]["numNodes"])
                return
            continue  # another attempt was faster
        going = job["metadata"].get("deletionTimestamp")
        ended, why = _ended(job)
        if ended == "Complete" and not _left_something(context):
            ended, why = "Failed", "what it left is no longer in the store"
        if not going and ended != "Failed":
            log.info("train: TrainJob %s is there already%s", name, ", done" if ended else "; following it")
            return
        if not told:
            log.info(
                "train: TrainJob %s %s; waiting for its end",
                name,
                f"failed ({why})" if ended else "is ending",
            )
            told = True
        if not going:
            api.delete(name)
        time.sleep(_POLL_SECONDS)


def _follow(api: Cluster, name: str, body: Mapping[str, Any], context: Context) -> None:
    """Show what rank 0 says until the job has ended.

    Raises:
        TuneyardError: it failed, or is deleted again and again.
    """
    stop = threading.Event()
    lines = threading.Thread(target=_show_lines, args=(api, name, stop), daemon=True)
    lines.start()
    seen, vanished = "", 0
    try:
        while True:
            job = api.job(name)
            if job is None:
                vanished += 1
                if vanished > _VANISHED:
                    raise TuneyardError(
                        f"TrainJob {name} was deleted {vanished} times", "find out who deletes it, then retry"
                    )
                log.warning("train: TrainJob %s was deleted; making it again", name)
                _begin(api, name, body, context)
                continue
            _raise_if_failed(api, name, context)
            ended, why = _ended(job)
            if ended == "Failed":
                raise TuneyardError(
                    f"TrainJob {name} failed: {why}",
                    "what its first process said last stands above; a retry goes on from its last checkpoint",
                )
            if ended:
                return
            seen = _tell(seen, _state(job, api.pods(name)))
            time.sleep(_POLL_SECONDS)
    finally:
        stop.set()
        lines.join(_LAST_LINES_SECONDS)


def _raise_if_failed(api: Cluster, name: str, context: Context) -> None:
    """Raise what the training found wrong for good, and end the job, which would only find it again."""
    error = failure(context)
    if error is not None:
        api.delete(name)
        raise error


def failure(context: Context) -> TuneyardError | None:
    """What the workers found wrong for good."""
    failed = context.store.read_json(f"{keeping.folder(context.key)}/failed.json")
    if failed is None:
        return None
    kind = StageStopped if failed["exit_code"] == EXIT_STOPPED else TuneyardError
    return kind(failed["what"], failed["todo"])


def _tell(seen: str, state: str) -> str:
    if state != seen:
        log.info("train: %s", state)
    return state


def _state(job: Mapping[str, Any], pods: list[Any]) -> str:
    """What a job does, in words: how many pods have which phase, and what one that does not run waits for."""
    if job["spec"].get("suspend"):
        return "the job waits for its queue to admit it"
    phases: dict[str, int] = {}
    waits = set()
    for pod in pods:
        phases[pod.status.phase] = phases.get(pod.status.phase, 0) + 1
        for condition in pod.status.conditions or ():
            if condition.type == "PodScheduled" and condition.status == "False":
                waits.add(condition.message or condition.reason or "not scheduled")
        for container in pod.status.container_statuses or ():
            waiting = container.state.waiting if container.state else None
            if waiting and waiting.reason != "ContainerCreating":
                waits.add(f"{waiting.reason}: {waiting.message or ''}".rstrip(": "))
    counted = ", ".join(f"{count} {phase}" for phase, count in sorted(phases.items())) or "none yet"
    return f"pods: {counted}" + (f" ({'; '.join(sorted(waits))})" if waits else "")


def _show_lines(api: Cluster, name: str, stop: threading.Event) -> None:
    """Write what the pod of rank 0 says to standard error, progress and all, across restarts of it."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    last, again = "", True
    while again:
        again = not stop.is_set()  # once more after the end, for the last lines
        try:
            for pod in api.pods(name):
                index = (pod.metadata.labels or {}).get("batch.kubernetes.io/job-completion-index")
                if index != "0" or pod.status.phase == "Pending":
                    continue
                for when, line in api.lines(pod.metadata.name):
                    if when > last:
                        sys.stderr.write(line + "\n")
                        sys.stderr.flush()
                        last = when
        except (ApiException, HTTPError, TuneyardError) as error:
            # The job does not depend on who listens to it.
            log.warning("train: its log cannot be read at the moment (%s)", error)
        if again:
            stop.wait(_POLL_SECONDS / 5)


def collect(context: Context) -> Result:
    """Lay what the job left into `context.out`. Its checkpoints are of no more use."""
    store: Store = context.store
    found = store.read_json(f"{keeping.folder(context.key)}/result.json")
    if found is None:
        raise TuneyardError(
            f"the TrainJob of key {context.key[:12]} is complete and left no result.json in "
            f"{store.root}/{keeping.folder(context.key)}",
            "its pods wrote to another TUNEYARD_STORE: see ConfigMap tuneyard-platform; delete it and retry",
        )
    manifest = Manifest.from_json(found.pop("manifest"), f"{keeping.folder(context.key)}/result.json")
    store.get_tree(manifest, context.out)
    for step in checkpoint.uploaded(store, keeping.folder(context.key)):
        checkpoint.forget(store, f"{keeping.folder(context.key)}/step-{step}")
    return Result(**found, page=context.out / "page.html")
