"""The manifests are what Kubernetes 1.34 accepts, give nobody more than they need, and fit the code."""

from __future__ import annotations

import json
import re

import kubernetes_validate
import pytest
import yaml
from starlette.testclient import TestClient

from k8s import render
from k8s.reachability import selects
from pipelines.images import lock
from serving import app
from serving.__main__ import DRAIN_SECONDS
from serving.catalogue import _STOP_SECONDS, Catalogue
from tests.k8s.manifests import one, pods_of

KUBERNETES = "1.34"
# Kinds that Kubernetes itself does not know; tests/k8s/test_custom_resources.py has to do with these.
CUSTOM = {
    *("ClusterQueue", "ExternalSecret", "Gateway", "HTTPRoute", "InferenceService", "LocalQueue"),
    *("PodMonitor", "Profile", "PrometheusRule", "ResourceFlavor", "ServiceMonitor", "TrainingRuntime"),
}
CLUSTER_WIDE = {"Namespace", "Profile", "ClusterQueue", "ResourceFlavor"}


def test_each_core_object_is_valid(objects) -> None:
    core = [item for item in objects if item["kind"] not in CUSTOM]
    assert len(core) > 30
    for item in core:
        assert kubernetes_validate.validate(item, KUBERNETES, strict=True) == KUBERNETES


def test_each_pod_of_a_custom_kind_is_a_valid_pod(prod) -> None:
    for overlay in ("prod", "prod-kserve"):
        objects = list(yaml.safe_load_all(render.render(overlay, {})))
        for name, spec, _ in pods_of(objects):
            own = ("labels", "minReplicas", "maxReplicas", "scaleMetric", "scaleTarget")
            pod = {key: value for key, value in spec.items() if key not in own}
            item = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
            assert kubernetes_validate.validate(item, KUBERNETES, strict=True), name


def test_an_invalid_object_is_caught(prod) -> None:
    broken = one(prod, "Deployment", "tuneyard-serving")
    broken["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_no_two_objects_have_one_name_and_each_is_in_a_namespace(objects) -> None:
    names = [(i["kind"], i["metadata"].get("namespace"), i["metadata"]["name"]) for i in objects]
    assert len(names) == len(set(names))
    for item in objects:
        assert ("namespace" in item["metadata"]) == (item["kind"] not in CLUSTER_WIDE), item["metadata"]


# --- rights -------------------------------------------------------------------------------------

# Who may do what: (API group, resource, verb), with the names where they are limited. Nothing else.
RIGHTS = {
    "tuneyard-runner": {
        ("argoproj.io", "workflowtaskresults", "create", ""),
        ("argoproj.io", "workflowtaskresults", "patch", ""),
        ("", "configmaps", "get", "kfp-launcher"),
        ("", "secrets", "get", "mlpipeline-minio-artifact"),
    },
    "tuneyard-train": {
        *(("trainer.kubeflow.org", "trainjobs", verb, "") for verb in ("create", "get", "delete")),
        ("", "pods", "list", ""),
        ("", "pods/log", "get", ""),
    },
}


def test_rights_are_those_listed_here(objects) -> None:
    assert [
        i["metadata"]["name"] for i in objects if i["kind"].startswith("Cluster") and "Role" in i["kind"]
    ] == []
    roles = {item["metadata"]["name"]: item for item in objects if item["kind"] == "Role"}
    given: dict[str, set] = {}
    for binding in (item for item in objects if item["kind"] == "RoleBinding"):
        assert binding["roleRef"]["kind"] == "Role"
        for subject in binding["subjects"]:
            assert (subject["kind"], subject["namespace"]) == (
                "ServiceAccount",
                binding["metadata"]["namespace"],
            )
            rights = given.setdefault(subject["name"], set())
            for rule in roles[binding["roleRef"]["name"]]["rules"]:
                rights |= {
                    (group, resource, verb, name)
                    for group in rule["apiGroups"]
                    for resource in rule["resources"]
                    for verb in rule["verbs"]
                    for name in rule.get("resourceNames", [""])
                }
    assert given == RIGHTS
    assert "*" not in json.dumps([role["rules"] for role in roles.values()])


def test_only_the_runner_has_its_token_mounted_by_itself(objects) -> None:
    accounts = [item for item in objects if item["kind"] == "ServiceAccount"]
    assert len(accounts) >= 4
    mounting = [a["metadata"]["name"] for a in accounts if a.get("automountServiceAccountToken") is not False]
    assert mounting == ["tuneyard-runner"]
    known = {account["metadata"]["name"] for account in accounts}
    for name, spec, _ in pods_of(objects):
        # The nodes of a TrainJob need no account: they have no token.
        assert spec.get("serviceAccountName") in known or name.startswith("TrainingRuntime"), name


# --- secrets ------------------------------------------------------------------------------------

SECRETS = {
    "tuneyard-s3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    "tuneyard-mlflow": {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"},
    "tuneyard-mlflow-server": {
        *("MLFLOW_AUTH_ADMIN_USERNAME", "MLFLOW_AUTH_ADMIN_PASSWORD"),
        *("MLFLOW_FLASK_SERVER_SECRET_KEY", "PGPASSWORD"),
    },
    "tuneyard-serving": {"TUNEYARD_SERVING_TOKEN"},
    "tuneyard-notify": {"TUNEYARD_NOTIFY_URL"},
}


def test_no_manifest_holds_a_secret(objects) -> None:
    secrets = [item for item in objects if item["kind"] == "Secret"]
    assert [item["metadata"]["name"] for item in secrets] == ["tuneyard-train-token"]
    assert not {"data", "stringData"} & set(secrets[0])
    named = set().union(*SECRETS.values())
    for name, spec, _ in pods_of(objects):
        for container in spec["containers"]:
            plain = {entry["name"] for entry in container.get("env", []) if "value" in entry}
            assert plain & named == set(), name
    for item in objects:
        if item["kind"] == "ConfigMap":
            assert set(item["data"]) & named == set()


def test_external_secrets_make_what_is_referred_to(prod) -> None:
    made = {
        item["metadata"]["name"]: {entry["secretKey"] for entry in item["spec"]["data"]}
        for item in prod
        if item["kind"] == "ExternalSecret"
    }
    assert made == SECRETS


def test_every_secret_and_configmap_that_a_pod_names_is_there(objects) -> None:
    config = {item["metadata"]["name"]: set(item["data"]) for item in objects if item["kind"] == "ConfigMap"}
    known = SECRETS | {"tuneyard-object-store": {"s3.json"}}
    for name, spec, _ in pods_of(objects):
        for container in spec["containers"]:
            for source in container.get("envFrom", []):
                reference = source.get("configMapRef", source.get("secretRef"))["name"]
                assert reference in (config if "configMapRef" in source else known), name
            for entry in container.get("env", []):
                for kind, held in (("configMapKeyRef", config), ("secretKeyRef", known)):
                    reference = entry.get("valueFrom", {}).get(kind)
                    assert reference is None or reference["key"] in held[reference["name"]], name
        for volume in spec["volumes"]:
            assert "configMap" not in volume or volume["configMap"]["name"] in config, name
            assert "secret" not in volume or volume["secret"]["secretName"] in known, name


# --- the platform's addresses ---------------------------------------------------------------------


def test_the_platform_names_services_that_are_there(objects, overlay) -> None:
    services = {
        (item["metadata"]["namespace"], item["metadata"]["name"]): {p["port"] for p in item["spec"]["ports"]}
        for item in objects
        if item["kind"] == "Service"
    }
    platforms = [item for item in objects if item["metadata"]["name"] == "tuneyard-platform"]
    assert len(platforms) == (2 if overlay == "local" else 1)
    for platform in platforms:
        data = platform["data"]
        assert set(data) == {
            *("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "TUNEYARD_STORE"),
            *("TUNEYARD_MLFLOW_ARTIFACTS", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"),
            "TUNEYARD_SERVING_URL",
        }
        urls = re.findall(r"http://([a-z-]+)\.([a-z-]+)\.svc:(\d+)", " ".join(data.values()))
        assert len(urls) == (4 if overlay == "local" else 3)
        for name, namespace, port in urls:
            assert int(port) in services[namespace, name]


def test_mlflow_may_be_asked_by_every_name_that_is_used(objects) -> None:
    platform = next(item for item in objects if item["metadata"]["name"] == "tuneyard-platform")["data"]
    container = one(objects, "Deployment", "tuneyard-mlflow")["spec"]["template"]["spec"]["containers"][0]
    hosts = next(e["value"] for e in container["env"] if e["name"] == "MLFLOW_SERVER_ALLOWED_HOSTS").split(
        ","
    )
    job = one(objects, "Job", "tuneyard-mlflow-user")["spec"]["template"]["spec"]["containers"][0]
    for url in (platform["MLFLOW_TRACKING_URI"], job["env"][0]["value"]):
        assert url.removeprefix("http://") in hosts
    assert "*" not in "".join(hosts)


# --- the model server -----------------------------------------------------------------------------


def server_of(objects: list[dict]) -> dict:
    return next(
        spec
        for name, spec, _ in pods_of(objects)
        if name in ("Deployment tuneyard-serving", "InferenceService tuneyard")
    )


def test_a_pod_has_time_to_finish_what_it_answers(objects) -> None:
    spec = server_of(objects)
    looks_away = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert looks_away >= 5
    assert spec["terminationGracePeriodSeconds"] >= looks_away + DRAIN_SECONDS + _STOP_SECONDS + 5


def test_probes_ask_routes_that_the_server_has(objects) -> None:
    client = TestClient(app.create(Catalogue(lambda: None), ""))
    container = server_of(objects)["containers"][0]
    asked = {probe: container[probe]["httpGet"]["path"] for probe in container if probe.endswith("Probe")}
    assert asked == {"startupProbe": "/healthz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}
    # Nothing is in service here: the server lives, and is not ready.
    assert {path: client.get(path).status_code for path in asked.values()} == {
        "/healthz": 200,
        "/readyz": 503,
    }
    assert container["ports"][0]["containerPort"] == int(
        container["args"][container["args"].index("--port") + 1]
    )


def test_the_first_deployment_reaches_a_server_that_is_not_ready(objects) -> None:
    """Without a model /readyz is 503, and a Service gives no such pod to the deploy stage by itself."""
    service = one(objects, "Service", "tuneyard-serving-admin")
    assert service["spec"]["publishNotReadyAddresses"] is True


def test_the_deploy_stage_sees_every_pod_of_the_server(objects) -> None:
    """A headless Service's name has the address of each pod, and all pods of the server are behind it."""
    service = one(objects, "Service", "tuneyard-serving-admin")["spec"]
    assert service["clusterIP"] == "None"
    pods = [metadata.get("labels", {}) for _, _, metadata in pods_of(objects)]
    servers = [labels for labels in pods if labels.get("app.kubernetes.io/component") == "serving"]
    assert servers
    for labels in servers:
        assert service["selector"].items() <= labels.items()
    # With no cluster address in between, the port is that of the pod.
    port = server_of(objects)["containers"][0]["ports"][0]["containerPort"]
    assert [each["port"] for each in service["ports"]] == [port]


def test_several_pods_serve_in_production(objects, overlay) -> None:
    if overlay == "prod-kserve":
        scaler = one(objects, "InferenceService", "tuneyard")["spec"]["predictor"]
    else:
        scaler = one(objects, "HorizontalPodAutoscaler", "tuneyard-serving")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == ((1, 1) if overlay == "local" else (2, 6))


def test_only_models_can_be_asked_from_outside(prod) -> None:
    rule = one(prod, "HTTPRoute", "tuneyard")["spec"]["rules"][0]
    (reference,) = rule["backendRefs"]
    ports = {p["port"] for p in one(prod, "Service", reference["name"])["spec"]["ports"]}
    assert (reference["name"], reference["port"] in ports) == ("tuneyard-serving", True)
    # The admin routes and the metrics have no way in from outside.
    assert {match["path"]["value"] for match in rule["matches"]} == {"/v1", "/v2"}


def test_kserve_runs_the_same_pod(prod) -> None:
    kserve = list(yaml.safe_load_all(render.render("prod-kserve", {})))
    predictor = one(kserve, "InferenceService", "tuneyard")["spec"]["predictor"]
    own = ("labels", "minReplicas", "maxReplicas", "scaleMetric", "scaleTarget")
    pod = {key: value for key, value in predictor.items() if key not in own}
    # KServe looks for its container by this name.
    assert pod["containers"][0].pop("name") == "kserve-container"
    stable = one(prod, "Deployment", "tuneyard-serving")["spec"]["template"]["spec"]
    assert stable["containers"][0].pop("name") == "server"
    assert pod == stable


def test_the_scaler_and_the_budget_are_about_the_server(prod) -> None:
    deployment = one(prod, "Deployment", "tuneyard-serving")
    assert "replicas" not in deployment["spec"], "the scaler's count would be undone by each apply"
    scaler = one(prod, "HorizontalPodAutoscaler", "tuneyard-serving")["spec"]
    assert scaler["scaleTargetRef"]["name"] == "tuneyard-serving"
    assert 2 <= scaler["minReplicas"] < scaler["maxReplicas"]
    budget = one(prod, "PodDisruptionBudget", "tuneyard-serving")["spec"]
    assert budget["selector"] == deployment["spec"]["selector"]


def test_the_budget_is_for_the_servers_pods_and_lets_one_go(objects, overlay) -> None:
    """KServe gives its pods the labels of the predictor, and makes no budget itself."""
    budgets = [item["spec"] for item in objects if item["kind"] == "PodDisruptionBudget"]
    assert budgets == [
        {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": {"app.kubernetes.io/component": "serving"}},
        }
    ]
    labels = {name: meta["labels"] for name, _, meta in pods_of(objects)}
    found = [name for name, own in labels.items() if selects(budgets[0]["selector"], own)]
    assert found == [
        "InferenceService tuneyard" if overlay == "prod-kserve" else "Deployment tuneyard-serving"
    ]


def test_every_container_asks_for_memory_and_is_held_to_it(objects) -> None:
    for name, spec, _ in pods_of(objects):
        if not name.startswith("TrainingRuntime"):  # the TrainJob says how much
            for container in spec["containers"]:
                resources = container["resources"]
                assert {"cpu", "memory", "ephemeral-storage"} <= set(resources["requests"]), name
                assert "memory" in resources["limits"], name


# --- images ---------------------------------------------------------------------------------------


def locked() -> dict[str, lock.Image]:
    return {
        name: lock.Image(f"registry.example.com/{name}", f"sha256:{number:064x}", lock.code_digest(name))
        for number, name in enumerate(lock.NAMES, 1)
    }


def images_of(objects: list[dict]) -> set[str]:
    return {container["image"] for _, spec, _ in pods_of(objects) for container in spec["containers"]}


def test_render_names_our_images_by_digest(overlay) -> None:
    images = locked()
    found = images_of(list(yaml.safe_load_all(render.render(overlay, images))))
    ours = {image.reference for image in images.values()}
    assert {image for image in found if "@" in image} == ours
    others = {"local": {"chrislusf/seaweedfs:4.48", "postgres:17"}}.get(overlay, {"postgres:17"})
    assert found - ours == others


def test_render_refuses_images_that_hold_other_code(overlay) -> None:
    images = locked()
    images["serving"] = lock.Image("registry.example.com/serving", images["serving"].digest, "0" * 64)
    with pytest.raises(render.UsageError, match="serving hold other code"):
        render.render(overlay, images)


def test_render_says_what_is_wrong(monkeypatch) -> None:
    with pytest.raises(render.UsageError, match=r"no overlay 'moon'[\s\S]*local, prod, prod-kserve"):
        render.render("moon", {})
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(render.UsageError, match="no kubectl"):
        render.render("local", {})
