"""The stage's side of a training of several nodes, against an API that refuses what a real one refuses."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import yaml

from components.shared import jsonl, stage
from components.shared.errors import StageStopped, TuneyardError
from components.train import cluster as api
from components.train import job, trainjob
from components.train.config import TrainConfig
from components.train.train import train
from k8s import pod_security
from pipelines import compile as compiling
from pipelines.images import lock
from pipelines.spec import load
from tests.components.train.kube_cluster import Cluster, pod_template, refusals
from tests.components.train.kube_server import serving
from tests.components.train.test_worker import rows, settings_for
from tests.pipelines.test_compile import IMAGES

OVERRIDES = (
    "hardware.nodes=2",
    "hardware.gpus_per_node=1",
    "hardware.queue=tuneyard-train",
    "hardware.priority=high",
    "hardware.spot=gke",
    "hardware.gpu_product=NVIDIA-H100-80GB-HBM3",
    "hardware.secrets={hub: {token: HF_TOKEN}}",
    "hardware.volumes=[{claim: bases, path: /data, sub_path: llm}]",
    "hardware.image_pull_secrets=[registry]",
    "hardware.stages.train.node_selector={pool: gpu}",
    "hardware.stages.train.tolerations=[{key: team, value: legal}]",
    "hardware.stages.train.shared_memory_gib=16",
    "hardware.stages.train.scratch_gib=300",
    "hardware.stages.train.memory_gib=200",
    "hardware.stages.train.timeout_hours=9",
)


@functools.cache  # a compile takes a second, and most tests here want the same one
def compiled(*overrides):
    """(container, executor config) of train, as Kubeflow Pipelines gets them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ir.yaml"
        compiling.write(load("sft_legal", overrides), lock.read(IMAGES), {}, path)
        ir, platform = yaml.safe_load_all(path.read_text())
    configs = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return ir["deploymentSpec"]["executors"]["exec-train"]["container"], configs["exec-train"]


def asked_of(*overrides):
    """What the stage's pod is told of its nodes."""
    container, _ = compiled(*(overrides or OVERRIDES))
    (text,) = [v["value"] for v in container["env"] if v["name"] == trainjob.ASKED]
    return trainjob.Nodes.model_validate_json(text)


def body_of(asked, key="f" * 64):
    return trainjob.trainjob(asked, trainjob.name_of("sft_legal", key), key, ("pod", "uid")).to_dict()


# --- what is sent ---------------------------------------------------------------------------------


def test_the_nodes_have_what_the_stages_own_pod_would_have(tmp_path):
    cluster = Cluster(tmp_path)
    body = body_of(asked_of())
    assert refusals(body, cluster.runtimes) == []
    labels, spec = pod_template(body, cluster.runtimes["TrainingRuntime", "tuneyard-torch"])
    (container,) = spec["containers"]
    assert container["image"] == f"registry.example/tuneyard/gpu@sha256:{'2' * 64}"
    memory = {"memory": "204800Mi", "nvidia.com/gpu": "1"}
    assert container["resources"] == {"limits": memory, "requests": {"cpu": "8000m", **memory}}
    selected = {"pool": "gpu", "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert spec["nodeSelector"] == selected | {"cloud.google.com/gke-spot": "true"}
    assert [taint["key"] for taint in spec["tolerations"]] == [
        "cloud.google.com/gke-spot",
        "nvidia.com/gpu",
        "team",
    ]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16384Mi"}
    assert volumes["work"]["emptyDir"] == {"sizeLimit": "307200Mi"}
    assert volumes["claim-0"]["persistentVolumeClaim"] == {"claimName": "bases"}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/data"] == {"name": "claim-0", "mountPath": "/data", "subPath": "llm"}
    assert {"/work", "/tmp", "/dev/shm"} < set(mounts)
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert body["spec"]["activeDeadlineSeconds"] == 9 * 3600
    assert (body["spec"]["trainer"]["numNodes"], body["spec"]["trainer"]["numProcPerNode"]) == (2, 1)
    assert (
        body["metadata"]["ownerReferences"][0] | {"uid": "uid", "kind": "Pod"}
        == (body["metadata"]["ownerReferences"][0])
    )
    queued = {name: value for name, value in body["metadata"]["labels"].items() if "kueue" in name}
    assert set(queued.values()) == {"tuneyard-train", "high"}
    assert labels["tuneyard.dev/pipeline"] == "sft_legal" and labels["tuneyard.dev/role"] == "train-node"
    assert not [name for name in labels if "kueue" in name]
    assert pod_security.faults(spec) == [] and spec["automountServiceAccountToken"] is False


def test_work_is_of_the_scratch_class_where_there_is_one(tmp_path):
    asked = asked_of(*OVERRIDES[:2], "hardware.stages.train.scratch_class=fast")
    _, spec = pod_template(body_of(asked), next(iter(Cluster(tmp_path).runtimes.values())))
    (mount,) = [m for m in spec["containers"][0]["volumeMounts"] if m["mountPath"] == "/work"]
    (volume,) = [v for v in spec["volumes"] if v["name"] == mount["name"]]
    assert mount["name"] == "work"
    assert set(volume) == {"name", "ephemeral"} and pod_security.faults(spec) == []


def test_secrets_are_referred_to_and_never_written():
    variables = {v["name"]: v for v in body_of(asked_of())["spec"]["trainer"]["env"]}
    assert variables["AWS_SECRET_ACCESS_KEY"]["valueFrom"] == {
        "secretKeyRef": {"name": "tuneyard-s3", "key": "AWS_SECRET_ACCESS_KEY"}
    }
    assert variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}
    assert variables["TUNEYARD_STORE"]["valueFrom"]["configMapKeyRef"]["name"] == "tuneyard-platform"
    assert "TUNEYARD_SERVING_TOKEN" not in variables and trainjob.ASKED not in variables


def test_the_stages_own_pod_watches_and_takes_no_place_of_a_gpu():
    container, config = compiled(*OVERRIDES)
    assert container["image"].startswith("registry.example/tuneyard/cpu@")
    assert (
        container["resources"]["resourceCpuRequest"] == "1000m"
        and "accelerator" not in container["resources"]
    )
    assert "nodeSelector" not in config and "tolerations" not in config
    assert not [name for name in config["podMetadata"]["labels"] if "kueue" in name]
    assert config["secretAsVolume"][0]["mountPath"] == trainjob.TOKEN_PATH


@pytest.mark.parametrize("pipeline", ["sft_legal", "a" * 90, "Q&A.v2-"])
def test_the_jobs_name_is_that_of_every_attempt_and_fits_in_dns(tmp_path, pipeline):
    name = trainjob.name_of(pipeline, "0123456789abcdef" * 4)
    assert name == trainjob.name_of(pipeline, "0123456789abcdef" * 4) and name.endswith("-0123456789ab")
    asked = asked_of(*OVERRIDES[:2])
    body = trainjob.trainjob(asked, name, "k", ("pod", "uid")).to_dict()
    assert refusals(body, Cluster(tmp_path).runtimes) == []


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda body: body["spec"].update(runtimeref={}), "misspelt"),
        (lambda body: body["spec"]["trainer"].update(numNodes="2"), "numNodes"),
        (
            lambda body: body["spec"]["trainer"]["env"].append({"name": "PET_NNODES", "value": "1"}),
            "reserved",
        ),
        (lambda body: body["spec"]["runtimeRef"].update(name="torch"), "unsupported runtime"),
        (lambda body: body["metadata"].update(name="a" * 60), "too long"),
        (lambda body: body["metadata"]["labels"].update(a="b c"), "label value"),
    ],
)
def test_the_api_of_these_tests_refuses_what_a_real_one_does(tmp_path, spoil, says):
    body = body_of(asked_of(*OVERRIDES[:2]))
    spoil(body)
    assert says in "; ".join(refusals(body, Cluster(tmp_path).runtimes))


# --- how it goes ----------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_causal, store, tmp_path, monkeypatch, caplog):
    """`run(program)`: the train stage with two nodes, each running a program instead of the training."""
    caplog.set_level(logging.INFO, "tuneyard")
    cluster = Cluster(
        tmp_path / "pods", {n: v for n, v in os.environ.items() if n.startswith(("AWS", "TUNE"))}
    )
    monkeypatch.setattr(job, "_POLL_SECONDS", 0.2)
    monkeypatch.setattr(api, "_AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(api.connect, "__defaults__", (tmp_path / "token",))
    monkeypatch.setenv("KFP_POD_NAME", "train-pod")
    monkeypatch.setenv("KFP_POD_UID", "0b2c")
    monkeypatch.setenv(trainjob.ASKED, asked_of(*OVERRIDES[:2]).model_dump_json())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    manifests = {}
    for side, found in (("train", rows(40)), ("eval", rows(4))):
        (tmp_path / side).mkdir()
        jsonl.write(tmp_path / side / "examples.jsonl", found)
        manifests[side] = store.put_tree(tmp_path / side, "dataset")
    settings = settings_for(tiny_causal, max_steps=8, checkpoint_steps=3)

    def do(program=None, config=settings):
        cluster.program = program
        named = {"id": "run", "pipeline": "tiny", "slot": ""}
        return stage.perform(train, config, named, manifests)

    with serving(cluster, tmp_path / "token") as port:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(port))
        do.cluster, do.store, do.settings, do.manifests = cluster, store, settings, manifests
        yield do


def leaving(tmp_path, seconds=0.0, code=0):
    """A program that says a line, waits, leaves a result as a training does, and exits."""
    program = f"""
import os, sys, time
from pathlib import Path
from components.shared.store import Store
print("\u23f3 train  1/2 steps", os.environ["PET_NODE_RANK"], file=sys.stderr, flush=True)
time.sleep({seconds})
if {code}: sys.exit({code})
if os.environ["PET_NODE_RANK"] == "0":
    store, out = Store.from_environment(), Path(os.environ["TUNEYARD_HOME"]) / "out"
    for name in ("model", "ledger"):
        (out / name).mkdir(parents=True)
        (out / name / "it").write_text("bytes")
    (out / "page.html").write_text("<p>page</p>")
    found = dict(kinds=dict(model="model", ledger="report"), metadata={{}}, metrics={{"eval_loss": 1.0}},
                 summary={{}}, stop="", stop_todo="", manifest=store.put_tree(out, "training").to_json())
    store.write_json("work/train/" + os.environ["TUNEYARD_TRAIN_KEY"] + "/result.json", found)
"""
    return [sys.executable, "-c", program]


def test_two_nodes_train_as_one_machine_does(run, tiny_causal, monkeypatch, tmp_path, capfd):
    commit = run()
    assert len(run.cluster.bodies) == 1 and run.cluster.deleted == []
    said = capfd.readouterr().err
    assert re.search(r"\u23f3 train  8/8 steps", said) and "Traceback" not in said
    assert run.store.read_json(f"work/train/{commit['key']}/order.json")["pipeline"] == "tiny"
    assert not [n for n in run.store.names(f"work/train/{commit['key']}/") if "step-" in n]
    # Nothing about machines is in the key: here or there, it is the same work.
    monkeypatch.delenv(trainjob.ASKED)
    assert run()["outputs"] == commit["outputs"]
    run.store.remove(f"stages/train/{commit['key']}.json")
    alone = run()
    assert alone["key"] == commit["key"] and len(run.cluster.bodies) == 1
    for name in ("train_loss", "eval_loss", "base_eval_loss"):
        assert alone["metrics"][name] == pytest.approx(commit["metrics"][name], abs=1e-5)
    assert alone["summary"]["examples"] == commit["summary"]["examples"]


def test_a_retried_stage_finds_the_job_and_a_failed_one_is_replaced(run, tmp_path, caplog, monkeypatch):
    with pytest.raises(TuneyardError, match=r"TrainJob tuneyard-tiny-[0-9a-f]{12} failed: JobsFailed"):
        run(leaving(tmp_path, code=5))
    first = threading.Thread(target=lambda: run(leaving(tmp_path, seconds=12)))
    first.start()
    while len(run.cluster.bodies) < 2:
        time.sleep(0.05)
    assert run.cluster.deleted == [run.cluster.bodies[0]["metadata"]["name"]]
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path / "another-pod"))  # whose disk is its own
    commit = run(leaving(tmp_path))
    first.join()
    assert len(run.cluster.bodies) == 2 and commit["metrics"] == {"eval_loss": 1.0}
    assert "is there already; following it" in caplog.text


def test_what_rank_0_says_is_in_the_stages_log_once(run, tmp_path, capfd):
    run(leaving(tmp_path, seconds=1))
    assert capfd.readouterr().err.count("\u23f3 train  1/2 steps 0\n") == 1


def test_ctrl_c_ends_the_job(run, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt  # which SIGTERM is in a stage, see execute()

    monkeypatch.setattr(job, "_tell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(leaving(tmp_path, seconds=60))
    assert len(run.cluster.deleted) == 1 and run.cluster.nodes == {}


def test_a_job_that_went_with_a_lost_pod_is_made_again(run, tmp_path, caplog):
    def lose():
        while not run.cluster.bodies:
            time.sleep(0.05)
        time.sleep(0.5)
        run.cluster.delete(run.cluster.bodies[0]["metadata"]["name"])

    loser = threading.Thread(target=lose)
    loser.start()
    commit = run(leaving(tmp_path, seconds=2))
    loser.join()
    assert len(run.cluster.bodies) == 2 and commit["metrics"] == {"eval_loss": 1.0}
    assert "was deleted; making it again" in caplog.text


def test_what_the_training_found_wrong_stops_the_line_and_ends_the_job(run, tiny_causal):
    config = settings_for(tiny_causal, max_steps=8, max_length=8, over_length="error")
    with pytest.raises(StageStopped, match=r"longer than train\.max_length"):
        run(config=config)
    assert len(run.cluster.deleted) == 1


def test_an_api_that_is_away_for_a_while_does_not_end_a_training(run, tmp_path, caplog):
    run.cluster.broken = 4
    assert run(leaving(tmp_path, seconds=1))["metrics"] == {"eval_loss": 1.0}
    assert "the Kubernetes API does not answer" in caplog.text


def test_refusals_say_what_to_do(run, tmp_path, monkeypatch):
    run.cluster.forbidden = True
    with pytest.raises(TuneyardError, match=r"(?s)403: trainjobs is forbidden.*k8s/base/runs/train.yaml"):
        run(leaving(tmp_path))
    run.cluster.forbidden, run.cluster.runtimes = False, {}
    with pytest.raises(TuneyardError, match="422: unsupported runtime"):
        run(leaving(tmp_path))
    (tmp_path / "token" / "token").unlink()
    with pytest.raises(TuneyardError, match=r"here is no .*token/token"):
        run(leaving(tmp_path))
    monkeypatch.delenv("KFP_POD_UID")
    with pytest.raises(TuneyardError, match="belong to nobody"):
        run(leaving(tmp_path))


def test_more_processes_than_examples_of_an_update_are_refused(run, tiny_causal):
    config = settings_for(tiny_causal, per_device_batch_size=1, gradient_accumulation_steps=1)
    with pytest.raises(TuneyardError, match=r"an update has 1 examples .* and the job 2 processes"):
        run(config=config)
    assert run.cluster.bodies == []


def test_the_settings_of_the_order_are_those_of_the_stage(run, tmp_path):
    commit = run(leaving(tmp_path))
    order = run.store.read_json(f"work/train/{commit['key']}/order.json")
    assert TrainConfig.model_validate(json.loads(json.dumps(order["config"]))) == run.settings
