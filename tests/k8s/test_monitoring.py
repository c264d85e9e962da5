"""Alerts fire when they should and not otherwise; rules and dashboard ask for metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from k8s import render
from serving import app
from serving.catalogue import Catalogue
from serving.telemetry import Telemetry
from tests.k8s.manifests import one, pods_of

CASES = Path(__file__).with_name("alerts.yaml")
K8S = Path(__file__).resolve().parents[2] / "k8s"
# Of Argo's controller: its documentation, "Prometheus Metrics", `total_count`.
ARGO = {"argo_workflows_total_count"}
ARM = {"version": "1", "digest": "d", "task": "causal-lm", "waiting": 0, "in_flight": 0}
ARM |= {"drift": {"prompt_tokens": 0.1}}
STATE = ARM | {"name": "legal", "canary": ARM | {"version": "2", "weight": 0.1}}


def rules_of(objects: list[dict]) -> dict:
    return one(objects, "PrometheusRule", "tuneyard")["spec"]


@pytest.fixture
def promtool() -> str:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip(
            "promtool is not on the PATH: rules are not tried. It is in Debian's prometheus; without root: "
            "apt-get download prometheus && dpkg -x prometheus_*.deb DIR, then PATH=DIR/usr/bin:$PATH"
        )
    return program


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_alerts_fire_when_they_should(prod, promtool, tmp_path) -> None:
    cases = yaml.safe_load(CASES.read_text())
    assert cases["rule_files"] == ["rules.yaml"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules_of(prod)))
    shutil.copy(CASES, tmp_path)
    done = run(promtool, "test", "rules", CASES.name, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tried_both_ways(prod) -> None:
    cases = yaml.safe_load(CASES.read_text())["tests"]
    tried = [case for test in cases for case in test.get("alert_rule_test", [])]
    firing = {case["alertname"] for case in tried if case.get("exp_alerts")}
    silent = {case["alertname"] for case in tried if not case.get("exp_alerts")}
    alerts = {
        rule["alert"] for group in rules_of(prod)["groups"] for rule in group["rules"] if "alert" in rule
    }
    assert len(alerts) >= 9
    assert firing == alerts
    assert silent == alerts


def test_each_alert_says_what_and_what_to_do(prod) -> None:
    alerts = [rule for group in rules_of(prod)["groups"] for rule in group["rules"] if "alert" in rule]
    for rule in alerts:
        assert set(rule["annotations"]) == {"summary", "action"}, rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]


def exported() -> dict[str, set[str]]:
    """The metrics of a model server by name, and the labels of each, as Prometheus reads them."""
    from prometheus_client import generate_latest

    telemetry = Telemetry(lambda: [STATE | {"ready": True}])
    telemetry.requests.labels("legal", "1", "/v1/completions", "200").inc()
    telemetry.seconds.labels("legal", "1", "/v1/completions").observe(1)
    telemetry.tokens.labels("legal", "1").inc()
    telemetry.truncated.labels("legal", "1").inc()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(generate_latest(telemetry.registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def schedule_metrics(objects: list[dict]) -> set[str]:
    """What kube-state-metrics exports with our settings: a metric's name follows its prefix."""
    text = one(objects, "ConfigMap", "tuneyard-kube-state-metrics")["data"]["kube-state-metrics.yaml"]
    (resource,) = yaml.safe_load(text)["spec"]["resources"]
    return {f"{resource['metricNamePrefix']}_{metric['name']}" for metric in resource["metrics"]}


def test_the_charts_values_tell_of_schedules_as_the_manifests_do(prod) -> None:
    text = one(prod, "ConfigMap", "tuneyard-kube-state-metrics")["data"]["kube-state-metrics.yaml"]
    values = yaml.safe_load((K8S / "kube-prometheus-stack.yaml").read_text())["kube-state-metrics"]
    assert values["customResourceState"] == {"enabled": True, "config": yaml.safe_load(text)}
    (resource,) = yaml.safe_load(text)["spec"]["resources"]
    kind = resource["groupVersionKind"]
    (rule,) = values["rbac"]["extraRules"]
    read = {"apiGroups": [kind["group"]], "resources": [f"{kind['kind'].lower()}s"]}
    assert rule == read | {"verbs": ["list", "watch"]}


def dashboard_queries(objects: list[dict]) -> dict[str, str]:
    """Each query of the dashboard by panel."""
    text = one(objects, "ConfigMap", "tuneyard-dashboard")["data"]["tuneyard.json"]
    queries = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in json.loads(text)["panels"]
        for target in panel["targets"]
    }
    assert len(queries) >= 10
    return queries


def rule_queries(objects: list[dict]) -> dict[str, str]:
    return {
        rule.get("alert", rule.get("record")): rule["expr"]
        for group in rules_of(objects)["groups"]
        for rule in group["rules"]
    }


def test_rules_and_dashboard_ask_for_metrics_that_are_exported(prod) -> None:
    recorded = {r["record"] for g in rules_of(prod)["groups"] for r in g["rules"] if "record" in r}
    known = set(exported()) | schedule_metrics(prod) | ARGO | recorded
    queries = rule_queries(prod) | dashboard_queries(prod)
    asked = {
        name: set(re.findall(r"\b(?:tuneyard|argo)[_:][a-z0-9_:]+", query)) for name, query in queries.items()
    }
    assert all(asked.values()), asked
    assert {name: metrics - known for name, metrics in asked.items() if metrics - known} == {}


def test_rules_use_labels_that_the_server_sets(prod) -> None:
    """`pod` and `namespace` come with the scraping, the others from the server."""
    metrics = exported()
    for name, query in rule_queries(prod).items():
        for metric, matchers in re.findall(r"\b(tuneyard_[a-z_]+)\{([^}]*)\}", query):
            if metric in metrics:
                for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers):
                    assert label in metrics[metric], f"{name}: {metric}{{{label}}}"


def test_the_routes_that_rules_count_are_those_that_the_server_counts(prod) -> None:
    """A template of a route, and not an address that a client made up, is what stands in the metrics."""
    client = TestClient(app.create(Catalogue(lambda: None), ""))
    client.post("/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": "?"}]})
    client.post("/v1/completions", json={"model": "m", "prompt": "?"})
    infer = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["?"]}]}
    client.post("/v2/models/m/infer", json=infer)
    for path in ("/healthz", "/readyz", "/v1/models"):
        client.get(path)
    routes = set(re.findall(r'tuneyard_requests_total\{.*?route="([^"]*)"', client.get("/metrics").text))
    query = rule_queries(prod)["tuneyard:requests:rate5m"]
    (pattern,) = re.findall(r'route=~"([^"]*)"', query)
    # Prometheus matches the whole label.
    counted = {route for route in routes if re.fullmatch(pattern, route)}
    assert counted == {"/v1/chat/completions", "/v1/completions", "/v2/models/{name}/infer"}
    assert routes - counted >= {"/healthz", "/readyz", "/v1/models"}
    for other in {**rule_queries(prod), **dashboard_queries(prod)}.values():
        for found in re.findall(r'route=~"([^"]*)"', other):
            assert found in (pattern, "/v2/models/.+/infer")


def test_the_dashboards_queries_are_promql(prod, promtool, tmp_path) -> None:
    queries = dashboard_queries(prod)

    def checked(asked: list[str]) -> subprocess.CompletedProcess:
        rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(asked)]
        (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "p", "rules": rules}]}))
        return run(promtool, "check", "rules", "panels.yaml", cwd=tmp_path)

    done = checked(list(queries.values()))
    assert done.returncode == 0, done.stdout + done.stderr
    assert checked(["sum by (model (tuneyard_in_flight)"]).returncode != 0


@pytest.mark.parametrize("overlay", ["prod", "prod-kserve"])
def test_the_monitor_of_the_server_finds_its_service_and_that_the_pods(overlay) -> None:
    objects = list(yaml.safe_load_all(render.render(overlay, {})))
    monitor = one(objects, "ServiceMonitor", "tuneyard-serving")["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    services = [
        item
        for item in objects
        if item["kind"] == "Service" and wanted <= item["metadata"].get("labels", {}).items()
    ]
    assert [service["metadata"]["name"] for service in services] == ["tuneyard-serving-admin"]
    service = services[0]["spec"]
    assert service["publishNotReadyAddresses"]
    assert {end["port"] for end in monitor["endpoints"]} == {port["name"] for port in service["ports"]}
    selected = [
        pod
        for _, pod, about in pods_of(objects)
        if service["selector"].items() <= about.get("labels", {}).items()
    ]
    assert len(selected) == 1
    ports = {port["containerPort"] for port in selected[0]["containers"][0]["ports"]}
    assert {port.get("targetPort", port["port"]) for port in service["ports"]} <= ports
