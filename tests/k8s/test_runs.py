"""What Kueue, Argo, the network and admission make of a compiled run, held against the manifests."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes.client import ApiClient, V1PodList

from components.train import cluster
from components.train.trainjob import ASKED, Nodes, trainjob
from k8s import pod_security
from k8s.reachability import Endpoint, Port, allowed, selects
from pipelines.placement import USER
from tests.k8s.manifests import one, pods_of
from tests.k8s.test_manifests import KUBERNETES
from tests.k8s.test_network import MATRIX, Network, policies_of
from tests.pipelines.test_compile import compiled, container

ROOT = Path(__file__).resolve().parents[2]
ARGO = yaml.safe_load((ROOT / "k8s" / "argo" / "workflow-controller-configmap.yaml").read_text())
WORKFLOW = {"workflows.argoproj.io/workflow": "w"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[dict, dict]:
    """(IR, executor configs) of a run with everything: slices, a GPU, the exit handler, a storage class."""
    wishes = ("hardware.gpus_per_node=1", "hardware.stages.evaluate.slices=2", "notify={}")
    ir, _, configs = compiled(
        tmp_path_factory.mktemp("run"), *wishes, "hardware.stages.train.scratch_class=fast"
    )
    assert len(configs) == 10
    return ir, configs


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> dict:
    """The TrainJob of a run on two nodes."""
    ir, _, _ = compiled(tmp_path_factory.mktemp("job"), "hardware.nodes=2", "hardware.gpus_per_node=8")
    (asked,) = [pair["value"] for pair in container(ir, "train")["env"] if pair["name"] == ASKED]
    made = trainjob(Nodes.model_validate_json(asked), "job", "key", ("pod", "uid")).to_dict()
    assert made["spec"]["trainer"]["resourcesPerNode"]["requests"]
    return made


# --- Kueue ----------------------------------------------------------------------------------------


def test_kueue_has_a_quota_for_whatever_a_run_asks_for(prod, run, job) -> None:
    """It holds back what asks for a resource that its queue does not cover, the namespace's defaults too."""
    limits = [limit for item in prod if item["kind"] == "LimitRange" for limit in item["spec"]["limits"]]
    asked = {
        name for limit in limits for kind in ("default", "defaultRequest") for name in limit.get(kind, {})
    }
    assert asked >= {"cpu", "memory", "ephemeral-storage"}
    for name in run[0]["deploymentSpec"]["executors"]:
        resources = container(run[0], name.removeprefix("exec-"))["resources"]
        accelerator = resources.pop("accelerator", {})
        asked |= {accelerator["resourceType"]} if accelerator else set()
        # resourceCpuRequest, resourceMemoryLimit ...
        asked |= {re.findall("[A-Z][a-z]+", key)[0].lower() for key in resources if key[:8] == "resource"}
    trainer = job["spec"]["trainer"]["resourcesPerNode"]
    asked |= set(trainer["requests"]) | set(trainer["limits"])
    assert "nvidia.com/gpu" in asked
    (group,) = one(prod, "ClusterQueue", "tuneyard")["spec"]["resourceGroups"]
    assert asked - set(group["coveredResources"]) == set()
    for flavor in group["flavors"]:
        assert [quota["name"] for quota in flavor["resources"]] == group["coveredResources"], flavor["name"]
    for name in asked:
        quotas = [q["nominalQuota"] for f in group["flavors"] for q in f["resources"] if q["name"] == name]
        assert set(quotas) != {"0"}, name


# --- the network ----------------------------------------------------------------------------------


def given_the_key(objects: list[dict], configs: dict, runs: str) -> dict[str, Endpoint]:
    """Every pod that is given the secret of S3, by name."""
    found = {}
    for executor, config in configs.items():
        if "tuneyard-s3" in {secret["secretName"] for secret in config["secretAsEnv"]}:
            labels = config["podMetadata"]["labels"] | WORKFLOW
            found[executor] = Endpoint(executor, "10.244.9.9", runs, labels)
    for item in objects:
        for name, spec, meta in pods_of([item]):
            sources = [source for each in spec["containers"] for source in each.get("envFrom", [])]
            if any(source.get("secretRef", {}).get("name") == "tuneyard-s3" for source in sources):
                found[name] = Endpoint(name, "10.244.9.9", item["metadata"]["namespace"], meta["labels"])
    return found


def test_whoever_is_given_the_key_of_s3_may_reach_it(objects, overlay, run) -> None:
    found = given_the_key(objects, run[1], MATRIX["overlays"][overlay]["runs"])
    assert {"exec-notify", "exec-evaluate-slice", "Deployment tuneyard-mlflow"} <= set(found)
    ends = Network(overlay).endpoints
    target, port = (ends["object-store"], 8333) if "object-store" in ends else (ends["internet"], 443)
    policies = policies_of(objects)
    closed = [name for name, pod in found.items() if not allowed(policies, pod, target, Port(port))]
    assert closed == []


# --- Argo -----------------------------------------------------------------------------------------


def laid_under(default: Any, own: Any) -> Any:
    """What a template ends up with: Argo merges it over the default, object by object."""
    if not isinstance(default, dict) or not isinstance(own, dict):
        return own
    return default | {key: laid_under(default.get(key), value) for key, value in own.items()}


@pytest.fixture
def argo() -> dict:
    return yaml.safe_load(ARGO["data"]["workflowDefaults"])["spec"]


# Of a task with a retry policy: kubeflow/pipelines, argocompiler/container.go, getTaskRetryStrategyFromInput.
OF_KFP = {
    "limit": "{{inputs.parameters.retry-max-count}}",
    "backoff": {"duration": "{{d}}", "factor": "{{f}}", "maxDuration": "{{m}}"},
}


def test_every_pod_is_retried_but_no_dag(argo) -> None:
    strategy = argo["templateDefaults"]["retryStrategy"]
    assert strategy["limit"] == "2"
    assert strategy["retryPolicy"] == "Always"
    assert "lastRetry.message != ''" in strategy["expression"]
    assert "not (lastRetry.message startsWith 'child ')" in strategy["expression"]


def test_how_often_and_when_a_stage_is_tried_again_is_what_its_hardware_says(argo) -> None:
    strategy = argo["templateDefaults"]["retryStrategy"]
    merged = laid_under(strategy, OF_KFP)
    kept = {key: strategy[key] for key in ("retryPolicy", "expression")}
    assert merged == OF_KFP | kept


def test_a_volume_of_a_storage_class_belongs_to_the_group_that_stages_run_as(argo, run) -> None:
    # KFP gives its templates a context of their own, which takes the place of the workflow's.
    assert "securityContext" not in argo
    seccomp = {"seccompProfile": {"type": "RuntimeDefault"}}
    stage = {"allowPrivilegeEscalation": False, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]}}
    for own in (seccomp, {}):
        context = laid_under(argo["templateDefaults"]["securityContext"], own)
        assert context == seccomp | {"fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch"}
        pod = {"securityContext": context, "containers": [{"name": "main", "securityContext": stage}]}
        assert pod_security.faults(pod) == []
        item = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
        assert kubernetes_validate.validate(item, KUBERNETES, strict=True)
    assert run[1]["exec-train"]["genericEphemeralVolume"][0]["mountPath"] == "/work"
    assert {config["securityContext"]["runAsGroup"] for config in run[1].values()} == {str(USER)}


# --- a read-only root -----------------------------------------------------------------------------


@pytest.fixture
def read_only() -> list[dict]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on the PATH: the manifests cannot be rendered")
    folder = ROOT / "k8s" / "components" / "read-only-root"
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def test_the_read_only_root_is_one_that_kubernetes_takes(read_only) -> None:
    for item in read_only:
        assert kubernetes_validate.validate(item, KUBERNETES, strict=True) == KUBERNETES
    policy = one(read_only, "MutatingAdmissionPolicy", "tuneyard-read-only-root")["spec"]
    binding = one(read_only, "MutatingAdmissionPolicyBinding", "tuneyard-read-only-root")["spec"]
    assert binding == {"policyName": "tuneyard-read-only-root"}
    (mutation,) = policy["mutations"]
    expression = mutation["applyConfiguration"]["expression"]
    assert expression.count("{") == expression.count("}") and expression.count("(") == expression.count(")")
    set_to = re.findall(r"(\w+): (?!Object|object)([\w.\"]+)", expression)
    assert set_to == [("name", "c.name"), ("readOnlyRootFilesystem", "true")]


def test_the_read_only_root_is_for_stages_and_what_they_write_is_a_volume(read_only, run) -> None:
    policy = one(read_only, "MutatingAdmissionPolicy", "tuneyard-read-only-root")["spec"]
    where = policy["matchConstraints"]
    spaces = where["namespaceSelector"]["matchExpressions"][0]["values"]
    assert set(spaces) == {overlay["runs"] for overlay in MATRIX["overlays"].values()}
    found = []
    for executor, config in run[1].items():
        assert selects(where["objectSelector"], config["podMetadata"]["labels"] | WORKFLOW), executor
        volumes = [*config.get("emptyDirMounts", []), *config.get("genericEphemeralVolume", [])]
        found.append({volume["mountPath"] for volume in volumes} >= {"/work", "/tmp"})
    assert found and all(found)
    for name in ("driver", "train-node", "mlflow", "serving"):
        assert not selects(where["objectSelector"], MATRIX["pods"][name]["labels"]), name


# --- rights ---------------------------------------------------------------------------------------


class Recorder(ApiClient):
    """A Kubernetes client that writes down what it is asked, as a Role would name it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[tuple[str, str, str]] = set()

    def call_api(self, resource_path, method, path_params=None, query_params=None, *args, **settings) -> Any:
        path = resource_path.format(**dict(path_params)).strip("/").split("/")
        group = path[1] if path[0] == "apis" else ""
        resource, *rest = path[path.index("namespaces") + 2 :]
        verb = {"POST": "create", "DELETE": "delete", "GET": "get" if rest else "list"}[method]
        verb = "watch" if dict(query_params or []).get("watch") else verb
        self.asked.add((group, "/".join([resource, *rest[1:]]), verb))
        return V1PodList(items=[]) if verb == "list" else Answer()


class Answer(dict):
    """An object without anything in it, or a log without lines."""

    def stream(self) -> list[bytes]:
        return []

    def close(self) -> None:
        pass


# Every way in which the stage asks the API.
CALLS = {
    "create": lambda api: api.create({"metadata": {"name": "job"}}),
    "job": lambda api: api.job("job"),
    "delete": lambda api: api.delete("job"),
    "pods": lambda api: api.pods("job"),
    "lines": lambda api: list(api.lines("pod")),
}


def test_the_rights_of_a_training_are_what_it_asks_for(objects) -> None:
    public = {name for name, value in vars(cluster.Cluster).items() if callable(value) and name[0] != "_"}
    assert public == set(CALLS)
    files = (ROOT / "components").rglob("*.py")
    api = re.compile(r"from kubernetes\.client import .*Api\b")
    assert {path.name for path in files if api.search(path.read_text())} == {"cluster.py"}
    recorder = Recorder()
    for call in CALLS.values():
        call(cluster.Cluster(recorder, "runs"))
    rules = one(objects, "Role", "tuneyard-train")["rules"]
    given = {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert given == recorder.asked
