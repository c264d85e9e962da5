"""What is behind the Kubernetes API of these tests: TrainJobs judged as a real API does, and run here.

What a TrainJob's schema allows is read from kubeflow_trainer_api, generated from Trainer's own; what its
webhooks refuse stands in kubeflow/trainer, pkg/runtime/framework/plugins/{torch,jobset}. Names of cluster DNS
become 127.0.0.1, paths of the pod a folder.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from copy import deepcopy
from pathlib import Path

import yaml
from kubeflow_trainer_api import models

ROOT = Path(__file__).resolve().parents[3]
RESERVED = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
# Lists that a strategic merge goes through by a key, from the patchMergeKey tags of k8s.io/api/core/v1.
MERGE_KEYS = {"containers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath"}


def merged(base, patch, key=""):
    """The strategic merge of a patch into a base, as far as pods of ours need it."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {name: merged(base.get(name), value, name) for name, value in patch.items()}
    if isinstance(base, list) and key in MERGE_KEYS:
        by = MERGE_KEYS[key]
        found = {item[by]: item for item in base}
        for item in patch:
            found[item[by]] = merged(found.get(item[by]), item)
        return list(found.values())
    return patch


def refusals(body, runtimes):
    """Why a real API would not take this TrainJob."""
    found = []
    try:
        known = models.TrainerV1alpha1TrainJob.from_dict(body).to_dict()
        if known != body:
            found.append("unknown or misspelt fields")
    except ValueError as error:
        return [str(error)]
    if (body["apiVersion"], body["kind"]) != ("trainer.kubeflow.org/v1alpha1", "TrainJob"):
        found.append("not a TrainJob of v1alpha1")
    name = body["metadata"]["name"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(f"{name}-node-0-1023-abcde") > 63:
        found.append(f"{name} is no RFC 1035 label, or too long for its pods")
    for value in (body["metadata"].get("labels") or {}).values():
        if not re.fullmatch(r"([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?", value):
            found.append(f"label value {value!r}")
    spec = body["spec"]
    runtime = runtimes.get((spec["runtimeRef"]["kind"], spec["runtimeRef"]["name"]))
    if runtime is None:
        return [*found, f"unsupported runtime: {spec['runtimeRef']}"]
    names = [variable["name"] for variable in spec["trainer"]["env"]]
    if len(names) > 128 or len(names) != len(set(names)):
        found.append("env: more than 128, or one twice")
    if RESERVED & set(names):
        found.append(f"must not have reserved envs: {RESERVED & set(names)}")
    jobs = {
        job["name"]: [c["name"] for c in job["template"]["spec"]["template"]["spec"]["containers"]]
        for job in runtime["spec"]["template"]["spec"]["replicatedJobs"]
    }
    for patch in spec.get("runtimePatches", []):
        for job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            for container in job["template"]["spec"]["template"]["spec"].get("containers", []):
                if container["name"] not in jobs.get(job["name"], []):
                    found.append(f"must not have container that does not exist: {container['name']}")
                if container.get("env"):
                    found.append("must not have envs for the node container")
    return found


def pod_template(body, runtime):
    """(labels, pod spec) of a node, as Trainer and JobSet make it."""
    template = deepcopy(
        runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    )
    for patch in body["spec"]["runtimePatches"]:
        job = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
        template = merged(template, job["template"]["spec"]["template"])
    (container,) = template["spec"]["containers"]
    trainer = body["spec"]["trainer"]
    container |= {"image": trainer["image"], "command": trainer["command"]}
    container["resources"] = trainer["resourcesPerNode"]
    container["env"] = merged(container.get("env", []), trainer["env"], "env")
    return template["metadata"]["labels"], template["spec"]


class Node:
    """A pod: a process of this machine, and what it said, line by line."""

    def __init__(self, name, index, command, environment):
        self.name, self.index, self.created = name, index, time.time()
        self.lines = []
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self):
        for line in self.process.stdout:
            now = datetime.datetime.now(datetime.UTC)
            self.lines.append(f"{now:%Y-%m-%dT%H:%M:%S.%f}{len(self.lines):03d}Z {line}")

    @property
    def phase(self):
        code = self.process.poll()
        return "Running" if code is None or self.listener.is_alive() else "Failed" if code else "Succeeded"

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()

    def described(self, job):
        stamp = datetime.datetime.fromtimestamp(self.created, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        labels = {
            "jobset.sigs.k8s.io/jobset-name": job,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(self.index),
        }
        metadata = {"name": self.name, "creationTimestamp": stamp, "labels": labels}
        return {
            "metadata": metadata,
            "spec": {"containers": [{"name": "node"}]},
            "status": {"phase": self.phase},
        }


class Cluster:
    """The state behind the API.

    Args:
        folder: where pods have their files.
        values: what ConfigMaps and Secrets hold: variable -> value.
        program: runs instead of a TrainJob's own command; None runs that.
    """

    def __init__(self, folder, values=None, program=None):
        self.folder, self.values, self.program = folder, values or {}, program
        runtime = yaml.safe_load((ROOT / "k8s/base/runs/runtime.yaml").read_text())
        self.runtimes = {(runtime["kind"], runtime["metadata"]["name"]): runtime}
        self.jobs, self.nodes, self.bodies, self.deleted = {}, {}, [], []
        self.broken = 0
        self.forbidden = False
        self.token = uuid.uuid4().hex
        # How many times a job that is deleted is still found, as its pods take their leave.
        self.lingers = 2

    def create(self, body):
        name = body["metadata"]["name"]
        self.bodies.append(body)
        body["metadata"] |= {"uid": uuid.uuid4().hex, "namespace": "tuneyard-runs"}
        self.jobs[name] = body
        _, spec = pod_template(body, next(iter(self.runtimes.values())))
        (container,) = spec["containers"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        count = body["spec"]["trainer"]["numNodes"]
        self.nodes[name] = [self._start(name, i, count, container, body, port) for i in range(count)]

    def _start(self, name, index, count, container, body, port):
        environment = {n: v for n, v in os.environ.items() if n in ("PATH", "LANG")}
        for variable in container["env"]:
            environment[variable["name"]] = variable.get("value") or self.values.get(variable["name"], "")
        environment |= {
            "PET_NNODES": str(count),
            "PET_NPROC_PER_NODE": str(body["spec"]["trainer"]["numProcPerNode"]),
            "PET_NODE_RANK": str(index),
            "PET_LOCAL_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        home = self.folder / f"{name}-{index}-{uuid.uuid4().hex[:5]}"
        environment |= {n: v.replace("/work", str(home)) for n, v in environment.items() if v == "/work"}
        host = f"{name}-node-0-0.{name}:29500"
        assert environment["PET_RDZV_ENDPOINT"] == host
        environment = {n: v.replace(host, f"127.0.0.1:{port}") for n, v in environment.items() if v}
        command = self.program or container["command"]
        command = [sys.executable if word == "python" else word for word in command]
        return Node(f"{name}-node-0-{index}-{uuid.uuid4().hex[:5]}", index, command, environment)

    def seen(self, name):
        """A job with its status as of now."""
        body = self.jobs[name]
        if "deletionTimestamp" in body["metadata"]:
            body["lingers"] = body.get("lingers", self.lingers) - 1
            if body["lingers"] < 0:
                del self.jobs[name]
                return None
        phases = {node.phase for node in self.nodes.get(name, [])}
        kind = "Failed" if "Failed" in phases else "Complete" if phases == {"Succeeded"} else ""
        if kind:
            condition = {
                "type": kind,
                "status": "True",
                "reason": f"Jobs{kind}",
                "message": "as its pods ended",
            }
            body["status"] = {"conditions": [condition]}
        return {k: v for k, v in body.items() if k != "lingers"}

    def delete(self, name):
        self.deleted.append(name)
        for node in self.nodes.pop(name, []):
            node.kill()
        self.jobs[name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"

    def stop(self):
        for name in list(self.nodes):
            for node in self.nodes.pop(name):
                node.kill()
