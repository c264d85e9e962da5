"""The compiled pipelines: what is checked in is what the tree compiles; each wish for hardware is in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec

from components.evaluate.slices.keeping import ASKED
from components.shared.errors import SpecError, UsageError
from pipelines import compile as compiling
from pipelines.hardware import HardwareConfig
from pipelines.images import lock
from pipelines.spec import FOLDER, load

GOLDENS = Path(__file__).parent / "goldens"
IMAGES = GOLDENS / "images.json"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_checked_in_is_what_the_tree_compiles(tmp_path, name):
    assert len(NAMES) >= 2
    written = compiling.compile_pipeline(name, tmp_path / f"{name}.yaml", images=IMAGES)
    assert written.read_text() == (GOLDENS / f"{name}.yaml").read_text(), (
        f"after a change that is meant: tuneyard compile {name} --images {IMAGES} "
        f"--output {GOLDENS / name}.yaml, and read the difference"
    )


def test_compiling_is_the_same_in_another_process_and_imports_nothing_heavy(tmp_path):
    program = (
        "import sys\nfrom pipelines.cli import main\n"
        "sys.argv = ['tuneyard', 'compile', 'sft_legal', '--images', sys.argv[1], '--output', sys.argv[2]]\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = set(sys.modules) & {'torch', 'transformers', 'mlflow', 'great_expectations'}\n"
        "    assert not heavy, heavy\n"
    )
    output = tmp_path / "ir.yaml"
    command = [sys.executable, "-c", program, str(IMAGES), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert output.read_text() == (GOLDENS / "sft_legal.yaml").read_text()


def compiled(tmp_path, *overrides, keys=None, name="sft_legal"):
    """(IR, executor configs) of a pipeline, both read as the messages that they are."""
    path = tmp_path / "ir.yaml"
    compiling.write(load(name, overrides), lock.read(IMAGES), keys or {}, path)
    ir, platform = yaml.safe_load_all(path.read_text())
    json_format.ParseDict(ir, PipelineSpec())
    configs = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for config in configs.values():
        json_format.ParseDict(config, KubernetesExecutorConfig())
    return ir, platform, configs


def container(ir, stage):
    return ir["deploymentSpec"]["executors"][f"exec-{stage}"]["container"]


def tasks(ir):
    """Every task of every graph, by display name."""
    dags = [ir["root"]["dag"], *(c["dag"] for c in ir["components"].values() if "dag" in c)]
    return {task["taskInfo"]["name"]: task for dag in dags for task in dag["tasks"].values()}


def test_train_takes_one_gpu_where_nothing_is_said_and_no_other_stage_does():
    asked = {stage: HardwareConfig().of(stage).gpus for stage in load("sft_legal").stages()}
    assert asked.pop("train") == 1 and set(asked.values()) == {0}
    assert HardwareConfig().processes == 1  # in its own pod, not a job beside it
    assert load("sft_legal").hardware.of("train").gpus == 0


def test_every_image_is_named_by_digest(tmp_path):
    ir, _, _ = compiled(tmp_path, "hardware.gpus_per_node=1")
    images = {stage: container(ir, stage)["image"] for stage in load("sft_legal").stages()}
    assert images.pop("train") == f"registry.example/tuneyard/gpu@sha256:{'2' * 64}"
    assert set(images.values()) == {f"registry.example/tuneyard/cpu@sha256:{'1' * 64}"}


@pytest.mark.parametrize(
    ("overrides", "where", "wanted"),
    [
        (["train.cpus=6"], "resourceCpuRequest", "6000m"),
        (["train.memory_gib=12.5"], "resourceMemoryLimit", "12800Mi"),
        (["train.memory_gib=12.5"], "resourceMemoryRequest", "12800Mi"),
    ],
)
def test_resources(tmp_path, overrides, where, wanted):
    ir, _, _ = compiled(tmp_path, *(f"hardware.stages.{each}" for each in overrides))
    assert container(ir, "train")["resources"][where] == wanted
    assert container(ir, "ingest")["resources"][where] != wanted


def test_gpus_are_for_train_alone_with_their_count_type_taint_and_shared_memory(tmp_path):
    ir, _, configs = compiled(
        tmp_path, "hardware.gpus_per_node=1", "hardware.gpu_product=NVIDIA-H100-80GB-HBM3"
    )
    asked = container(ir, "train")["resources"]["accelerator"]
    assert (asked["resourceType"], asked["resourceCount"]) == ("nvidia.com/gpu", "1")
    assert configs["exec-train"]["nodeSelector"]["labels"] == {
        "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"
    }
    taint = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert taint in configs["exec-train"]["tolerations"]
    shared = [mount for mount in configs["exec-train"]["emptyDirMounts"] if mount["mountPath"] == "/dev/shm"]
    assert shared == [
        {"volumeName": "shm", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "8192Mi"}
    ]
    for stage in ("ingest", "evaluate", "register"):
        assert "accelerator" not in container(ir, stage)["resources"]
        assert "nodeSelector" not in configs[f"exec-{stage}"]
    slice_of_one = compiled(
        tmp_path, "hardware.gpus_per_node=1", "hardware.gpu_resource=nvidia.com/mig-3g.40gb"
    )
    assert (
        container(slice_of_one[0], "train")["resources"]["accelerator"]["resourceType"]
        == "nvidia.com/mig-3g.40gb"
    )


# (override of hardware, where in an executor's config, what must be there)
WISHES: list[tuple[str, tuple, str]] = [
    ("node_selector={pool: big}", ("nodeSelector", "labels", "pool"), "big"),
    ("tolerations=[{key: a, value: b, effect: NoExecute}]", ("tolerations", 0, "key"), "a"),
    ("spot=gke", ("nodeSelector", "labels", "cloud.google.com/gke-spot"), "true"),
    ("spot=karpenter", ("tolerations", 0, "key"), "karpenter.sh/capacity-type"),
    ("timeout_hours=1.5", ("activeDeadlineSeconds",), "5400"),
    ("queue=team-a", ("podMetadata", "labels", "kueue.x-k8s.io/queue-name"), "team-a"),
    ("priority=high", ("podMetadata", "labels", "kueue.x-k8s.io/priority-class"), "high"),
    ("secrets={hub: {token: HF_TOKEN}}", ("secretAsEnv", -1, "secretName"), "hub"),
    ("secrets={hub: {token: HF_TOKEN}}", ("secretAsEnv", -1, "keyToEnv", 0, "envVar"), "HF_TOKEN"),
    ("volumes=[{claim: corpora, path: /data}]", ("pvcMount", 0, "mountPath"), "/data"),
    ("image_pull_secrets=[registry]", ("imagePullSecret", 0, "secretName"), "registry"),
    ("scratch_gib=7", ("emptyDirMounts", 0, "sizeLimit"), "7168Mi"),
    ("scratch_class=fast", ("genericEphemeralVolume", 0, "storageClassName"), "fast"),
    ("shared_memory_gib=2", ("emptyDirMounts", -1, "sizeLimit"), "2048Mi"),
]


def at(config, path):
    for step in path:
        config = config[step]
    return config


# A compilation takes a second, so those that do not contradict each other share one.
APART = {"spot=gke": 1, "scratch_class=fast": 1, "spot=karpenter": 2}


@pytest.fixture(scope="module")
def wished(tmp_path_factory):
    """(prefix of the override, number of the compilation) -> executor configs."""
    found = {}
    for prefix in ("hardware.", "hardware.stages.evaluate."):
        for group in range(3):
            wishes = [f"{prefix}{wish}" for wish, _, _ in WISHES if APART.get(wish, 0) == group]
            found[prefix, group] = compiled(tmp_path_factory.mktemp("wished"), *wishes)[2]
    return found


@pytest.mark.parametrize(("wish", "where", "wanted"), WISHES)
def test_a_wish_for_every_stage_reaches_every_pod(wished, wish, where, wanted):
    configs = wished["hardware.", APART.get(wish, 0)]
    stages = load("sft_legal").stages()
    assert {stage: at(configs[f"exec-{stage}"], where) for stage in stages} == dict.fromkeys(stages, wanted)


@pytest.mark.parametrize(("wish", "where", "wanted"), WISHES)
def test_a_wish_for_one_stage_reaches_its_pod_alone(wished, wish, where, wanted):
    configs = wished["hardware.stages.evaluate.", APART.get(wish, 0)]
    assert at(configs["exec-evaluate"], where) == wanted
    try:
        elsewhere = at(configs["exec-split"], where)
    except (KeyError, IndexError):
        elsewhere = None
    assert elsewhere != wanted


def test_a_retry_has_the_time_of_an_attempt_and_training_on_spot_nodes_has_more_of_them(tmp_path):
    found = tasks(compiled(tmp_path)[0])
    # Argo counts the window from the first attempt's start: three attempts of 72 hours and their waits.
    assert found["train"]["retryPolicy"] == {
        "maxRetryCount": 2,
        "backoffDuration": "30s",
        "backoffFactor": 1.0,
        "backoffMaxDuration": f"{3 * (72 * 3600 + 30)}s",
    }
    spot = tasks(compiled(tmp_path, "hardware.spot=aks")[0])
    assert (spot["train"]["retryPolicy"]["maxRetryCount"], spot["split"]["retryPolicy"]["maxRetryCount"]) == (
        20,
        2,
    )
    chosen = compiled(tmp_path, "hardware.spot=aks", "hardware.retries=1")[0]
    assert tasks(chosen)["train"]["retryPolicy"]["maxRetryCount"] == 1


def test_no_retries_are_said_and_not_left_to_what_the_cluster_has_by_default(tmp_path):
    ir = compiled(tmp_path, "hardware.retries=0")[0]
    policy = tasks(ir)["train"]["retryPolicy"]
    # The message leaves a zero out, and KFP's backend reads it as the limit 0.
    assert policy == {
        "backoffDuration": "30s",
        "backoffFactor": 1.0,
        "backoffMaxDuration": f"{72 * 3600 + 30}s",
    }
    read = json_format.ParseDict(ir, PipelineSpec()).root.dag.tasks["train"]
    assert read.HasField("retry_policy") and read.retry_policy.max_retry_count == 0


def test_a_secret_reaches_the_stages_that_use_it_and_no_other(tmp_path):
    _, _, configs = compiled(tmp_path, "notify={}")
    named = {
        executor.removeprefix("exec-"): {secret["secretName"] for secret in config["secretAsEnv"]}
        for executor, config in configs.items()
    }
    users = {
        secret: {s for s, names in named.items() if secret in names}
        for secret in set().union(*named.values())
    }
    everybody = set(load("sft_legal").stages()) | {"notify"}
    assert users == {
        "tuneyard-s3": everybody,
        "tuneyard-mlflow": {"train", "evaluate", "register", "deploy"},
        "tuneyard-serving": {"deploy"},
        "tuneyard-notify": {"notify"},
    }
    assert all(
        "value" not in pair for c in configs.values() for s in c["secretAsEnv"] for pair in s["keyToEnv"]
    )


def test_every_pod_is_labelled_and_runs_as_nobody(tmp_path):
    _, _, configs = compiled(tmp_path)
    for executor, config in configs.items():
        assert config["securityContext"] == {
            "runAsUser": "10001",
            "runAsGroup": "10001",
            "runAsNonRoot": True,
        }
        assert config["podMetadata"]["labels"] == {
            "app.kubernetes.io/part-of": "tuneyard",
            "app.kubernetes.io/component": executor.removeprefix("exec-"),
            "tuneyard.dev/pipeline": "sft_legal",
        }


def test_the_workflow_is_kept_and_ended_as_long_as_the_file_says(tmp_path):
    _, platform, _ = compiled(tmp_path, "hardware.keep_days=2", "hardware.run_hours=5")
    config = platform["platforms"]["kubernetes"]["pipelineConfig"]
    assert config == {"resourceTtlOnCompletion": 172800, "activeDeadlineSeconds": "18000"} or "172800" in str(
        config
    )
    assert "18000" in str(config)


def test_what_kfp_is_to_fill_in_is_the_whole_value_so_that_it_does(tmp_path):
    for task in tasks(compiled(tmp_path)[0]).values():
        values = task.get("inputs", {}).get("parameters", {}).values()
        constants = [v["runtimeValue"]["constant"] for v in values if "runtimeValue" in v]
        whole = {"{{$.pipeline_job_uuid}}", "{{$.pipeline_job_schedule_time_utc}}"}
        assert [c for c in constants if "{{$." in c and c not in whole] == []


def test_kfp_caches_under_our_key_what_is_committed_and_nothing_else(tmp_path):
    ir, _, _ = compiled(tmp_path, keys={"ingest": "a" * 64})
    options = {
        name: task.get("cachingOptions")
        for name, task in tasks(ir).items()
        if name in load("sft_legal").stages()
    }
    assert options.pop("ingest") == {"enableCache": True, "cacheKey": "a" * 64}
    assert set(map(str, options.values())) == {"{}"}


def test_deploy_waits_for_the_verdict_and_the_exit_handler_for_nothing(tmp_path):
    ir, _, _ = compiled(tmp_path, "notify={}")
    found = tasks(ir)
    assert found["champion"]["triggerPolicy"]["condition"].endswith("register-champion'] == 'true'")
    assert list(ir["components"][found["champion"]["componentRef"]["name"]]["dag"]["tasks"]) == ["deploy"]
    assert found["notify"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert "notify" not in tasks(compiled(tmp_path)[0])


SLICED = ("hardware.stages.evaluate.slices=3", "hardware.stages.evaluate.gpus=1", "notify={}")


def test_slices_are_a_loop_before_evaluate_each_placed_as_evaluate_is(tmp_path):
    ir, _, configs = compiled(tmp_path, *SLICED, "hardware.stages.evaluate.spot=gke")
    found = tasks(ir)
    assert json.loads(found["slices"]["parameterIterator"]["items"]["raw"]) == ["1 of 3", "2 of 3", "3 of 3"]
    item = found["slices"]["parameterIterator"]["itemInput"]
    given = found["evaluate-slice"]["inputs"]
    assert given["parameters"]["share"] == {"componentInputParameter": item}
    assert "evaluate-slices" in found["evaluate"]["dependentTasks"]
    of_evaluate = found["evaluate"]["inputs"]
    assert (
        set(given["artifacts"]) == set(of_evaluate["artifacts"]) == {"test", "train", "model", "compressed"}
    )
    assert given["parameters"]["config"] == of_evaluate["parameters"]["config"]
    own, stage = container(ir, "evaluate-slice"), container(ir, "evaluate")
    assert (own["image"], own["resources"]) == (stage["image"], stage["resources"])
    assert own["resources"]["accelerator"]["resourceCount"] == "1"
    config, of_stage = configs["exec-evaluate-slice"], configs["exec-evaluate"]
    # The joining stage alone writes to MLflow.
    assert {secret["secretName"] for secret in config.pop("secretAsEnv")} == {"tuneyard-s3"}
    del of_stage["secretAsEnv"]
    assert config == of_stage
    assert found["evaluate-slice"]["retryPolicy"] == found["evaluate"]["retryPolicy"]
    asked = [pair["value"] for pair in stage["env"] if pair["name"] == ASKED]
    assert asked == ["3"] and ASKED not in str(own["env"])


def test_slices_are_never_answered_for_by_kfps_cache_nor_begun_where_evaluate_is_done(tmp_path):
    found = tasks(compiled(tmp_path, *SLICED, keys={"train": "a" * 64})[0])
    assert found["evaluate-slice"]["cachingOptions"] == {}
    assert found["evaluate-slices"]["cachingOptions"] == {}
    ir, _, configs = compiled(tmp_path, *SLICED, keys={"evaluate": "a" * 64})
    assert "evaluate-slice" not in tasks(ir) and "exec-evaluate-slice" not in configs
    assert ASKED not in str(container(ir, "evaluate"))


def test_one_slice_is_evaluate_alone_and_a_classifier_without_compression_has_slices_too(tmp_path):
    one, _, _ = compiled(tmp_path, "hardware.stages.evaluate.slices=1")
    assert one == compiled(tmp_path)[0]
    plain = compiled(
        tmp_path,
        "hardware.stages.evaluate.slices=2",
        "compress=false",
        "evaluate.gates={}",
        name="classify_finance",
    )[0]
    assert set(tasks(plain)["evaluate-slice"]["inputs"]["artifacts"]) == {"test", "train", "model"}


@pytest.mark.parametrize("nodes", [1, 2])
def test_several_gpus_are_left_to_the_training_job(tmp_path, nodes):
    ir, _, configs = compiled(tmp_path, f"hardware.nodes={nodes}", "hardware.gpus_per_node=8")
    assert "accelerator" not in container(ir, "train")["resources"]
    mounts = {executor: config.get("secretAsVolume", []) for executor, config in configs.items()}
    assert [m["secretName"] for m in mounts.pop("exec-train")] == ["tuneyard-train-token"]
    assert not any(mounts.values())


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("hardware.gpus=1", "write gpus_per_node"),
        ("hardware.stages.train.gpus=1", "write gpus_per_node"),
        ("hardware.slices=2", "write stages.evaluate.slices"),
        ("hardware.stages.train.slices=2", "only evaluate is sliced"),
        ("hardware.stages.evaluate.slices=65", "hardware.stages.evaluate.slices"),
        ("hardware.nodes=2", "say how many GPUs each node has"),
        ("hardware.stages.trian.cpus=1", "hardware.stages.trian"),
        ("hardware.volumes=[{claim: a, path: /tmp/x}]", "mount it elsewhere"),
        ("hardware.tolerations=[{key: a, operator: Exists, value: b}]", "takes no value"),
        ("hardware.secrets={Hub: {token: HF_TOKEN}}", "hardware.secrets"),
        ("hardware.spot=ec2", "hardware.spot"),
        ("hardware.priority=high", "write queue"),
        ("hardware.stages.train.priority=high", "write stages.train.queue"),
        ("hardware.stages={train: {priority: high}, split: {queue: a}}", "stages.train.priority is 'high'"),
        ("hardware.memory=2Gi", "did you mean memory_gib?"),
    ],
)
def test_a_wrong_wish_is_refused_with_its_place(override, says):
    with pytest.raises(SpecError) as refused:
        load("sft_legal", [override])
    assert says in str(refused.value)


def test_an_output_that_kubeflow_would_not_take_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"five\.ir does not end in \.yaml\n.*name a \.yaml"):
        compiling.compile_pipeline("sft_legal", tmp_path / "five.ir", images=IMAGES)


def test_a_lock_of_images_with_faults_is_refused_whole(tmp_path):
    path = tmp_path / "images.json"
    with pytest.raises(UsageError, match="make images"):
        lock.read(path)
    path.write_text(IMAGES.read_text().replace("sha256:1111", "sha256:zzzz").replace("images/1", "images/9"))
    with pytest.raises(UsageError) as refused:
        lock.read(path)
    assert "images/9" in str(refused.value) and "cpu: digest" in str(refused.value)
    images = lock.read(IMAGES)
    assert lock.stale(images) == list(images)
    fresh = {name: lock.Image(i.name, i.digest, lock.code_digest(name)) for name, i in images.items()}
    lock.write(fresh, path.with_name("fresh.json"))
    assert lock.stale(lock.read(path.with_name("fresh.json"))) == []
