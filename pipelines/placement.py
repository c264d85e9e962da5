"""Where a stage runs: the only file that knows images, GPUs, node pools, secrets and volumes.

It turns the `hardware:` section into what Kubeflow Pipelines takes: the platform spec beside the IR, whose
schema is kubernetes_executor_config.proto of kfp-kubernetes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.train.trainjob import ASKED, TOKEN_PATH, Nodes
from pipelines.hardware import HardwareConfig, StageHardware
from pipelines.images.lock import Image

# What every cluster that follows k8s/ has in the namespace of the runs.
PLATFORM_CONFIG = "tuneyard-platform"
PLATFORM_VARIABLES = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "TUNEYARD_STORE",
    "TUNEYARD_MLFLOW_ARTIFACTS",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "TUNEYARD_SERVING_URL",
)
_S3: dict[str, tuple[str, ...]] = {"tuneyard-s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
_MLFLOW: dict[str, tuple[str, ...]] = {
    "tuneyard-mlflow": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
}
_SERVING: dict[str, tuple[str, ...]] = {"tuneyard-serving": ("TUNEYARD_SERVING_TOKEN",)}
NOTIFY: dict[str, tuple[str, ...]] = {"tuneyard-notify": ("TUNEYARD_NOTIFY_URL",)}
# A secret goes to the stages that use it and to no other.
SECRETS: dict[str, Mapping[str, tuple[str, ...]]] = {
    "train": _S3 | _MLFLOW,
    "evaluate": _S3 | _MLFLOW,
    "register": _S3 | _MLFLOW,
    "deploy": _S3 | _MLFLOW | _SERVING,
    "notify": _S3 | NOTIFY,
}
# What a slice of evaluate is called: its component, its task and its place here.
SLICE = "evaluate-slice"
TRAIN_TOKEN = "tuneyard-train-token"
USER = 10001
# Label (or taint) by which a provider marks its spot nodes; each documents it as the way to ask for them.
_SPOT = {
    "gke": ("cloud.google.com/gke-spot", "true"),
    "eks": ("eks.amazonaws.com/capacityType", "SPOT"),
    "karpenter": ("karpenter.sh/capacity-type", "spot"),
    "aks": ("kubernetes.azure.com/scalesetpriority", "spot"),
}


def place(
    task: Any, stage: str, pipeline: str, hardware: HardwareConfig, images: Mapping[str, Image]
) -> None:
    """Give a task of a cluster run its image, resources, nodes and secrets.

    Args:
        task: a KFP task.
        stage: its stage, or `notify`, or SLICE: a pod like that of evaluate, whose work it shares.
        pipeline: name of the pipeline.
        hardware: of the pipeline.
        images: the locked images.
    """
    asked = hardware.of("evaluate" if stage == SLICE else stage)
    # One process fills one GPU, so two in one node need the same machinery as two nodes.
    elsewhere = stage == "train" and hardware.nodes * hardware.gpus_per_node > 1
    if elsewhere:
        _training_job(task, pipeline, hardware, images)
        asked = _watching(asked, hardware)
    gpus = asked.gpus or 0
    task.set_container_image(images["gpu" if gpus else "cpu"].reference)
    _resources(task, asked, gpus)
    _nodes(task, asked, gpus)
    _environment(task, stage, pipeline, asked)
    _storage(task, asked)
    _policy(task, stage, pipeline, asked)


def _training_job(task: Any, pipeline: str, hardware: HardwareConfig, images: Mapping[str, Image]) -> None:
    """Tell the train stage which nodes it is to ask for, and give it the right to."""
    from kfp import kubernetes

    asked = hardware.of("train")
    gpus = asked.gpus or 0
    secrets = {name: {key: key for key in keys} for name, keys in SECRETS["train"].items()}
    nodes = Nodes(
        image=images["gpu"].reference,
        nodes=hardware.nodes,
        processes=gpus,
        sharding=hardware.sharded(),
        gpus=gpus,
        gpu_resource=asked.gpu_resource or "",
        cpus=_millicores(asked.cpus),
        memory=_mebibytes(asked.memory_gib),
        scratch=_mebibytes(asked.scratch_gib),
        scratch_class=asked.scratch_class,
        shared_memory=_mebibytes(asked.shared_memory_gib) if asked.shared_memory_gib else None,
        node_selector=_labels(asked, gpus),
        tolerations=tuple(_tolerations(asked, gpus)),
        labels=_pod_labels("train", pipeline, asked),
        settings={PLATFORM_CONFIG: PLATFORM_VARIABLES},
        secrets=secrets | {name: dict(keys) for name, keys in (asked.secrets or {}).items()},
        volumes=tuple(volume.model_dump() for volume in asked.volumes or ()),
        image_pull_secrets=asked.image_pull_secrets or (),
        user=USER,
        timeout_seconds=round((asked.timeout_hours or 0) * 3600),
    )
    task.set_env_variable(ASKED, nodes.model_dump_json(exclude_none=True))
    kubernetes.use_secret_as_volume(task, TRAIN_TOKEN, TOKEN_PATH)


def _watching(asked: StageHardware, hardware: HardwareConfig) -> StageHardware:
    """What the stage's own pod needs beside a TrainJob: it watches, and carries the model to its commit.

    It is in no queue, which is for the GPUs; and on a spot node it would take the job with it.
    """
    idle = dict.fromkeys(("spot", "queue", "priority", "shared_memory_gib", "gpu_product"))
    anywhere = {"node_selector": hardware.node_selector, "tolerations": hardware.tolerations}
    return asked.model_copy(update={"gpus": 0, "cpus": 1.0, "memory_gib": 3.0} | idle | anywhere)


def _resources(task: Any, asked: StageHardware, gpus: int) -> None:
    task.set_cpu_request(_millicores(asked.cpus))
    memory = _mebibytes(asked.memory_gib)
    # Request and limit are one number: a pod that may take more than it asked for is the one that is killed
    # when its neighbours do the same.
    task.set_memory_request(memory)
    task.set_memory_limit(memory)
    if gpus:
        task.set_accelerator_type(asked.gpu_resource)
        task.set_accelerator_limit(gpus)


def _millicores(cpus: float | None) -> str:
    return f"{round((cpus or 0) * 1000)}m"


def _mebibytes(gib: float | None) -> str:
    return f"{round((gib or 0) * 1024)}Mi"


def _nodes(task: Any, asked: StageHardware, gpus: int) -> None:
    from kfp import kubernetes

    for label, value in sorted(_labels(asked, gpus).items()):
        kubernetes.add_node_selector(task, label, value)
    for taint in _tolerations(asked, gpus):
        kubernetes.add_toleration(task, **taint)


def _labels(asked: StageHardware, gpus: int) -> dict[str, str]:
    """Labels that a node must have."""
    labels = dict(asked.node_selector or {})
    if gpus and asked.gpu_product:
        labels["nvidia.com/gpu.product"] = asked.gpu_product
    if asked.spot:
        label, value = _SPOT[asked.spot]
        labels[label] = value
    return labels


def _tolerations(asked: StageHardware, gpus: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if asked.spot:
        label, value = _SPOT[asked.spot]
        found.append({"key": label, "operator": "Equal", "value": value, "effect": "NoSchedule"})
    if gpus:
        # The taint that GPU node pools carry so that nothing else fills them.
        found.append({"key": asked.gpu_resource, "operator": "Exists", "effect": "NoSchedule"})
    return found + [taint.model_dump(exclude_none=True) for taint in asked.tolerations or ()]


def _environment(task: Any, stage: str, pipeline: str, asked: StageHardware) -> None:
    from kfp import kubernetes

    kubernetes.use_config_map_as_env(task, PLATFORM_CONFIG, {name: name for name in PLATFORM_VARIABLES})
    for secret, variables in SECRETS.get(stage, _S3).items():
        kubernetes.use_secret_as_env(task, secret, {name: name for name in variables})
    for secret, keys in (asked.secrets or {}).items():
        kubernetes.use_secret_as_env(task, secret, dict(keys))
    task.set_env_variable("TUNEYARD_HOME", "/work")
    task.set_env_variable("HOME", "/work")


def _storage(task: Any, asked: StageHardware) -> None:
    from kfp import kubernetes

    scratch = _mebibytes(asked.scratch_gib)
    if asked.scratch_class:
        kubernetes.add_ephemeral_volume(
            task, "work", "/work", ["ReadWriteOnce"], scratch, storage_class_name=asked.scratch_class
        )
    else:
        kubernetes.empty_dir_mount(task, "work", "/work", size_limit=scratch)
    kubernetes.empty_dir_mount(task, "tmp", "/tmp", size_limit="2Gi")
    if asked.shared_memory_gib:
        # A container's own /dev/shm has 64 MiB, and NCCL and DataLoader workers die of a bus error in it.
        size = _mebibytes(asked.shared_memory_gib)
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=size)
    for volume in asked.volumes or ():
        kubernetes.mount_pvc(task, volume.claim, volume.path, sub_path=volume.sub_path)


def _policy(task: Any, stage: str, pipeline: str, asked: StageHardware) -> None:
    from kfp import kubernetes

    attempt_seconds = round((asked.timeout_hours or 0) * 3600)
    retries = asked.retries or 0
    # Argo counts this from the start of the first attempt, and ends what still runs after it: the hour that
    # is KFP's default would leave a training of a day without any retry (kubeflow/pipelines#14245).
    window = (retries + 1) * (attempt_seconds + (asked.retry_seconds or 0))
    # Said where there are none too: a task without a policy gets the retries that Argo has by default, ours
    # (k8s/argo) or those of KFP's own installation.
    task.set_retry(retries, f"{asked.retry_seconds}s", 1.0, f"{window}s")
    kubernetes.set_timeout(task, attempt_seconds)
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    if asked.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(asked.image_pull_secrets))
    for label, value in _pod_labels(stage, pipeline, asked).items():
        kubernetes.add_pod_label(task, label, value)


def _pod_labels(stage: str, pipeline: str, asked: StageHardware) -> dict[str, str]:
    labels = {
        "app.kubernetes.io/part-of": "tuneyard",
        "app.kubernetes.io/component": "evaluate" if stage == SLICE else stage,
        "tuneyard.dev/pipeline": pipeline,
    }
    if asked.queue:
        labels["kueue.x-k8s.io/queue-name"] = asked.queue
    if asked.priority:
        labels["kueue.x-k8s.io/priority-class"] = asked.priority
    return labels
