"""The `hardware:` section: what a pipeline asks of a cluster. One machine checks it, and uses its GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from components.shared.settings import Settings
from components.train.sharding.config import Kind, Offload, Sharding

# Names of Kubernetes objects (RFC 1123 subdomain) and keys of labels (with an optional DNS prefix).
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
LabelKey = Annotated[
    str, StringConstraints(pattern=r"^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$")
]
LabelValue = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$")]
EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Stage = Literal["ingest", "validate", "split", "train", "compress", "evaluate", "register", "deploy"]
# First folders of paths that the image, Kubernetes or Kubeflow Pipelines use in a stage's pod.
_TAKEN = (
    "tmp",
    "work",
    "s3",
    "gcs",
    "minio",
    "dev",
    "proc",
    "sys",
    "app",
    "venv",
    "kfp-launcher",
    "var",
    "etc",
)
Cloud = Literal["gke", "eks", "karpenter", "aks"]


class Toleration(Settings):
    """A taint that pods may ignore, as Kubernetes spells it.

    Args:
        key: of the taint; None with operator Exists tolerates every taint.
        operator: Equal compares `value`, Exists does not.
        value: of the taint.
        effect: of the taint; None for every effect.
    """

    key: LabelKey | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("operator Exists takes no value: leave out one of them")
        if self.operator == "Equal" and (self.key is None or self.value is None):
            raise ValueError("operator Equal needs key and value; to ignore the value write operator: Exists")
        return self


class Volume(Settings):
    """A persistent volume claim that is there already, mounted into the pod.

    Args:
        claim: name of the claim, in the namespace of the run.
        path: where it is mounted; below nothing that Tuneyard itself mounts.
        sub_path: folder of the volume to mount instead of its root.
    """

    claim: Name
    path: str = Field(pattern=r"^(/[^/]+)+$")
    sub_path: str = ""

    @model_validator(mode="after")
    def _out_of_the_way(self) -> Self:
        taken = self.path.split("/")[1]
        if taken in _TAKEN:
            raise ValueError(
                f"path {self.path}: /{taken} is used by the pod itself; mount it elsewhere, as /data"
            )
        return self


class StageHardware(Settings):
    """What a stage's pod asks for; None: what the pipeline says for every stage, else the stage's default.

    Args:
        cpus: processor cores requested.
        memory_gib: requested, and the pod's limit: more ends it.
        gpus: whole GPUs of the pod. Of train it is `gpus_per_node`.
        gpu_product: label value of the node (`nvidia.com/gpu.product`, from NVIDIA's feature discovery).
        gpu_resource: extended resource that counts the GPUs; a MIG slice or another maker's has its own.
        shared_memory_gib: size of /dev/shm, which DataLoader workers and NCCL use; counts as memory.
        scratch_gib: size limit of /work, where inputs, outputs and checkpoints are laid.
        scratch_class: storage class of /work; None: the node's own disk (emptyDir). Its volumes belong to
            root, so it wants the cluster set up as k8s/argo has it, which gives them to the pod's group.
        node_selector: labels that a node must have.
        tolerations: taints that are ignored, besides those of GPU nodes and of `spot`.
        spot: run on this provider's spot (pre-emptible) nodes; training goes on from its last checkpoint.
        retries: attempts after a failed one, 0 for none. A stage that stopped the line stops again at once.
        retry_seconds: before each of them.
        timeout_hours: for one attempt.
        queue: Kueue LocalQueue that admits the pod.
        priority: Kueue WorkloadPriorityClass of the pod, which has to be in a queue.
        secrets: Secret -> its key -> environment variable; named here, never written.
        volumes: claims to mount.
        image_pull_secrets: Secrets with the registry's credentials.
        slices: of evaluate alone: how many pods share its models' work, each with all that is said here.
    """

    cpus: float | None = Field(None, gt=0, le=1024)
    memory_gib: float | None = Field(None, gt=0, le=65536)
    gpus: int | None = Field(None, ge=0, le=64)
    gpu_product: LabelValue | None = None
    gpu_resource: LabelKey | None = None
    shared_memory_gib: float | None = Field(None, gt=0, le=4096)
    scratch_gib: float | None = Field(None, gt=0, le=65536)
    scratch_class: Name | None = None
    node_selector: dict[LabelKey, LabelValue] | None = None
    tolerations: tuple[Toleration, ...] | None = None
    spot: Cloud | None = None
    retries: int | None = Field(None, ge=0, le=100)
    retry_seconds: int | None = Field(None, ge=1, le=3600)
    timeout_hours: float | None = Field(None, gt=0, le=2000)
    queue: Name | None = None
    priority: Name | None = None
    secrets: dict[Name, dict[str, EnvName]] | None = None
    volumes: tuple[Volume, ...] | None = None
    image_pull_secrets: tuple[Name, ...] | None = None
    slices: int | None = Field(None, ge=1, le=64)


class HardwareConfig(StageHardware):
    """The `hardware:` section: for every stage, and in `stages` what one of them has otherwise.

    Args:
        nodes: of the training job. More than one node, or GPU: a Kubeflow TrainJob, not the stage's pod.
        gpus_per_node: of train: one in its pod unless it is told otherwise; 0 trains on processors.
        sharding: of the training job: what its GPUs hold in pieces; see train/sharding/config.py.
        offload: of the training job: `cpu` keeps those pieces in the memory of the host.
        stages: stage -> what differs there.
        keep_days: how long Kubernetes keeps the finished workflow and its pods; the run's record stays.
        run_hours: after which the whole run is ended.
        service_account: under which all pods of a run are started (Kubeflow Pipelines has one for a run).
    """

    nodes: int = Field(1, ge=1, le=1024)
    gpus_per_node: int = Field(1, ge=0, le=64)
    sharding: Kind = "none"
    offload: Offload = "none"
    stages: dict[Stage, StageHardware] = Field(default_factory=dict)
    keep_days: float = Field(7, ge=0, le=3650)
    run_hours: float = Field(240, gt=0, le=8760)
    service_account: Name = "tuneyard-runner"

    @model_validator(mode="after")
    def _one_place_for_each(self) -> Self:
        faults = []
        if self.gpus is not None:
            faults.append("gpus would give every stage GPUs: write gpus_per_node, or stages.<stage>.gpus")
        if "train" in self.stages and self.stages["train"].gpus is not None:
            faults.append("stages.train.gpus: write gpus_per_node")
        sliced = [name for name, own in self.stages.items() if own.slices is not None]
        faults += [f"stages.{name}.slices: only evaluate is sliced" for name in sliced if name != "evaluate"]
        if self.slices is not None:
            faults.append("slices: only evaluate is sliced: write stages.evaluate.slices")
        faults += [
            f"{where}priority is {own.priority!r} and no queue is named: a priority is Kueue's, which sees "
            f"the pods of its queues alone; write {where}queue, or leave the priority out"
            for where, own, queued in self._priorities()
            if own.priority and not queued
        ]
        if self.nodes > 1 and not self.gpus_per_node:
            faults.append(f"nodes is {self.nodes} and gpus_per_node 0: say how many GPUs each node has")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _priorities(self) -> Iterator[tuple[str, StageHardware, bool]]:
        """Where a priority may stand, what stands there, and whether any pod that it is for is in a queue."""
        yield "", self, bool(self.queue or any(own.queue for own in self.stages.values()))
        for name, own in self.stages.items():
            yield f"stages.{name}.", own, bool(own.queue or self.queue)

    @property
    def processes(self) -> int:
        """Of the training: one for each GPU."""
        return self.nodes * max(1, self.gpus_per_node)

    def sharded(self) -> Sharding:
        """How the training is cut up."""
        return Sharding(kind=self.sharding, offload=self.offload)

    def of(self, stage: str) -> StageHardware:
        """What one stage asks for: its own, else what every stage has, else its default."""
        own = next((own for name, own in self.stages.items() if name == stage), StageHardware())
        shared = self.model_dump(exclude_none=True, include=set(StageHardware.model_fields) - _OF_ONE_STAGE)
        gpus = self.gpus_per_node if stage == "train" else own.gpus or 0
        needs = _GPU if gpus else _CPU
        asked = {**needs.get(stage, _SMALL), **shared, **own.model_dump(exclude_none=True), "gpus": gpus}
        if stage == "train" and asked.get("spot") and own.retries is None and self.retries is None:
            asked["retries"] = _SPOT_RETRIES
        return StageHardware.model_validate(_DEFAULTS | asked)


# What the sample pipelines were seen to use, with room (docs/figures.md): peak resident memory of train was
# 7.7 GiB with a 270M model. A GPU pod needs the host memory to read the weights before they move.
_SMALL: dict[str, float] = {"cpus": 1, "memory_gib": 3}
_CPU: dict[str, dict[str, float]] = {
    "train": {"cpus": 2, "memory_gib": 10, "scratch_gib": 50, "timeout_hours": 72},
    "compress": {"cpus": 2, "memory_gib": 8, "scratch_gib": 50},
    "evaluate": {"cpus": 2, "memory_gib": 8, "scratch_gib": 50},
}
_GPU: dict[str, dict[str, float]] = {
    stage: {"cpus": 8, "memory_gib": 64, "scratch_gib": 200, "shared_memory_gib": 8, "timeout_hours": 72}
    for stage in ("train", "compress", "evaluate")
}
# Spot nodes live for hours, a training may take days; a retry costs what was done since the last checkpoint.
_SPOT_RETRIES = 20
# What is never said for every stage at once.
_OF_ONE_STAGE = {"gpus", "slices"}
_DEFAULTS = {
    "gpu_resource": "nvidia.com/gpu",
    "scratch_gib": 20,
    "retries": 2,
    "retry_seconds": 30,
    "timeout_hours": 24,
}
