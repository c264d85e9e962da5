"""What a training of several nodes asks of Kubeflow Trainer v2, as its own typed models.

The runtime (k8s/base/runs/runtime.yaml) says what is the same for every training: a restricted pod without a
token, and what it writes besides its work. The TrainJob says the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from components.shared.settings import Settings
from components.train.sharding.config import WHOLE, Sharding

if TYPE_CHECKING:
    from kubeflow_trainer_api import models

RUNTIME = "tuneyard-torch"
# Environment variable of the stage's pod with a `Nodes` as JSON: train there, not here.
ASKED = "TUNEYARD_TRAIN_JOB"
# Where the stage's pod has the token of the account `tuneyard-train`.
TOKEN_PATH = "/var/run/secrets/tuneyard/train"
# Environment variable of a node's pod: key of the training it belongs to.
KEY = "TUNEYARD_TRAIN_KEY"
_MANAGER = "tuneyard.dev/train"
# Names that Trainer and JobSet give: the job and the container of a node, the port that Trainer opens.
NODE = "node"
_PORT = 29500
# Times that torchrun starts all processes again before the job counts as failed; then the stage is retried.
_RESTARTS = 10
# torchrun 2.13 keeps one store for all its attempts, where Gloo then finds the addresses of processes that
# are gone and waits for them. With this each attempt has a store of its own.
RESTARTABLE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# How long the nodes that are there wait for one that is being replaced: a spot pool needs minutes.
_JOIN_SECONDS = 1800


class Nodes(Settings):
    """The nodes of a training job, with every name and number already decided.

    Args:
        image: by digest.
        nodes: pods.
        processes: on each, one for each GPU.
        sharding: what lies in pieces among the processes.
        gpus: of each pod.
        gpu_resource: extended resource that counts them.
        cpus: cores requested by each pod.
        memory: requested by each pod, and its limit, as a Kubernetes quantity.
        scratch: size limit of /work.
        scratch_class: storage class of /work; None: the node's own disk.
        shared_memory: size of /dev/shm; None leaves the runtime's.
        node_selector: labels that a node must have.
        tolerations: as Kubernetes spells them.
        labels: of the job and its pods.
        settings: ConfigMap -> its keys that are environment variables.
        secrets: Secret -> its key -> environment variable.
        volumes: claim, path and sub_path of each.
        image_pull_secrets: Secrets.
        user: that the processes run as.
        timeout_seconds: for the whole job.
    """

    image: str
    nodes: int
    processes: int
    sharding: Sharding = WHOLE
    gpus: int
    gpu_resource: str
    cpus: str
    memory: str
    scratch: str
    scratch_class: str | None = None
    shared_memory: str | None = None
    node_selector: dict[str, str]
    tolerations: tuple[dict[str, str], ...]
    labels: dict[str, str]
    settings: dict[str, tuple[str, ...]]
    secrets: dict[str, dict[str, str]]
    volumes: tuple[dict[str, str], ...]
    image_pull_secrets: tuple[str, ...]
    user: int
    timeout_seconds: int


def name_of(pipeline: str, key: str) -> str:
    """Name of the job of a stage's key: the same for every attempt, so that a second one finds the first's.

    The longest name of a pod, `<job>-node-0-<index>-<5 letters>`, must fit in a DNS label of 63 characters.
    """
    words = "".join(c if c.isalnum() else "-" for c in pipeline.lower())[:22].strip("-")
    return f"tuneyard-{words}-{key[:12]}"


def trainjob(asked: Nodes, name: str, key: str, owner: tuple[str, str]) -> models.TrainerV1alpha1TrainJob:
    """The TrainJob.

    Args:
        asked: its nodes.
        name: `name_of`.
        key: of the stage.
        owner: name and uid of the stage's pod; the job goes when that pod goes.
    """
    from kubeflow_trainer_api import models

    pod, uid = owner
    metadata = models.IoK8sApimachineryPkgApisMetaV1ObjectMeta(
        name=name,
        labels=asked.labels,
        ownerReferences=[
            models.IoK8sApimachineryPkgApisMetaV1OwnerReference(
                apiVersion="v1", kind="Pod", name=pod, uid=uid
            )
        ],
    )
    spec = models.TrainerV1alpha1TrainJobSpec(
        activeDeadlineSeconds=asked.timeout_seconds,
        runtimeRef=models.TrainerV1alpha1RuntimeRef(
            apiGroup="trainer.kubeflow.org", kind="TrainingRuntime", name=RUNTIME
        ),
        trainer=models.TrainerV1alpha1Trainer(
            image=asked.image,
            command=["python", "-m", "torch.distributed.run", "--module", "components.train.worker"],
            numNodes=asked.nodes,
            numProcPerNode=asked.processes,
            resourcesPerNode=_resources(asked),
            env=_environment(asked, name, key),
        ),
        runtimePatches=[_patch(asked)],
    )
    return models.TrainerV1alpha1TrainJob(
        apiVersion="trainer.kubeflow.org/v1alpha1", kind="TrainJob", metadata=metadata, spec=spec
    )


def _resources(asked: Nodes) -> Any:
    from kubeflow_trainer_api import models

    quantity = models.IoK8sApimachineryPkgApiResourceQuantity
    limits = {"memory": quantity(asked.memory)}
    if asked.gpus:
        limits[asked.gpu_resource] = quantity(str(asked.gpus))
    requests = {"cpu": quantity(asked.cpus), **limits}
    return models.IoK8sApiCoreV1ResourceRequirements(limits=limits, requests=requests)


def _environment(asked: Nodes, name: str, key: str) -> list[Any]:
    """Variables of each node: ours, the platform's, the secrets' by reference, and torchrun's rendezvous.

    Trainer sets PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK and the master's address for a rendezvous that
    is made once. The c10d one lets a node that was replaced come back while the others wait. Pods are ranked
    by host name, so rank 0 is in the pod of index 0, whose log the stage shows.
    """
    from kubeflow_trainer_api import models

    plain = {
        KEY: key,
        "TUNEYARD_HOME": "/work",
        "HOME": "/work",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"{name}-{NODE}-0-0.{name}:{_PORT}",
        "PET_RDZV_ID": name,
        "PET_RDZV_CONF": f"join_timeout={_JOIN_SECONDS}",
        "PET_MAX_RESTARTS": str(_RESTARTS),
        **RESTARTABLE,
    }
    variables = [models.IoK8sApiCoreV1EnvVar(name=n, value=v) for n, v in plain.items()]
    for config, keys in asked.settings.items():
        for each in keys:
            selected = models.IoK8sApiCoreV1ConfigMapKeySelector(name=config, key=each)
            source = models.IoK8sApiCoreV1EnvVarSource(configMapKeyRef=selected)
            variables.append(models.IoK8sApiCoreV1EnvVar(name=each, valueFrom=source))
    for secret, names in asked.secrets.items():
        for each, variable in names.items():
            source = models.IoK8sApiCoreV1EnvVarSource(
                secretKeyRef=models.IoK8sApiCoreV1SecretKeySelector(name=secret, key=each)
            )
            variables.append(models.IoK8sApiCoreV1EnvVar(name=variable, valueFrom=source))
    return variables


def _storage(asked: Nodes) -> tuple[list[Any], list[Any]]:
    """(volumes, mounts), named as in a stage's own pod.

    /work is made here and not by the runtime: a merge goes by a volume's name, and would leave it two kinds.
    """
    from kubeflow_trainer_api import models

    quantity = models.IoK8sApimachineryPkgApiResourceQuantity
    empty, volume, mount = (
        models.IoK8sApiCoreV1EmptyDirVolumeSource,
        models.IoK8sApiCoreV1Volume,
        models.IoK8sApiCoreV1VolumeMount,
    )
    volumes, mounts = [], [mount(name="work", mountPath="/work")]
    if asked.scratch_class:
        claim = models.IoK8sApiCoreV1PersistentVolumeClaimSpec(
            accessModes=["ReadWriteOnce"],
            storageClassName=asked.scratch_class,
            resources=models.IoK8sApiCoreV1VolumeResourceRequirements(
                requests={"storage": quantity(asked.scratch)}
            ),
        )
        template = models.IoK8sApiCoreV1PersistentVolumeClaimTemplate(spec=claim)
        source = models.IoK8sApiCoreV1EphemeralVolumeSource(volumeClaimTemplate=template)
        volumes.append(volume(name="work", ephemeral=source))
    else:
        volumes.append(volume(name="work", emptyDir=empty(sizeLimit=quantity(asked.scratch))))
    if asked.shared_memory:
        shared = empty(medium="Memory", sizeLimit=quantity(asked.shared_memory))
        volumes.append(volume(name="shm", emptyDir=shared))
    for number, claimed in enumerate(asked.volumes):
        claim_source = models.IoK8sApiCoreV1PersistentVolumeClaimVolumeSource(claimName=claimed["claim"])
        volumes.append(volume(name=f"claim-{number}", persistentVolumeClaim=claim_source))
        mounts.append(
            mount(name=f"claim-{number}", mountPath=claimed["path"], subPath=claimed.get("sub_path") or None)
        )
    return volumes, mounts


def _patch(asked: Nodes) -> Any:
    """What the pods have beyond the runtime's. Their security stands here too, whatever the runtime says."""
    from kubeflow_trainer_api import models

    volumes, mounts = _storage(asked)
    locked = models.IoK8sApiCoreV1SecurityContext(
        allowPrivilegeEscalation=False,
        readOnlyRootFilesystem=True,
        capabilities=models.IoK8sApiCoreV1Capabilities(drop=["ALL"]),
    )
    user = models.IoK8sApiCoreV1PodSecurityContext(
        runAsNonRoot=True,
        runAsUser=asked.user,
        runAsGroup=asked.user,
        fsGroup=asked.user,
        seccompProfile=models.IoK8sApiCoreV1SeccompProfile(type="RuntimeDefault"),
    )
    pod = models.TrainerV1alpha1PodSpecPatch(
        containers=[
            models.TrainerV1alpha1ContainerPatch(name=NODE, securityContext=locked, volumeMounts=mounts)
        ],
        securityContext=user,
        nodeSelector=asked.node_selector or None,
        tolerations=[models.IoK8sApiCoreV1Toleration(**t) for t in asked.tolerations] or None,
        imagePullSecrets=[models.IoK8sApiCoreV1LocalObjectReference(name=n) for n in asked.image_pull_secrets]
        or None,
        volumes=volumes,
    )
    # Kueue counts the job, not its pods.
    labels = {name: value for name, value in asked.labels.items() if not name.startswith("kueue.")}
    template = models.TrainerV1alpha1PodTemplatePatch(
        metadata=models.IoK8sApimachineryPkgApisMetaV1ObjectMeta(labels=labels), spec=pod
    )
    job = models.TrainerV1alpha1JobTemplatePatch(spec=models.TrainerV1alpha1JobSpecPatch(template=template))
    jobs = models.TrainerV1alpha1JobSetSpecPatch(
        replicatedJobs=[models.TrainerV1alpha1ReplicatedJobPatch(name=NODE, template=job)]
    )
    return models.TrainerV1alpha1RuntimePatch(
        manager=_MANAGER,
        trainingRuntimeSpec=models.TrainerV1alpha1TrainingRuntimeSpecPatch(
            template=models.TrainerV1alpha1JobSetTemplatePatch(spec=jobs)
        ),
    )
