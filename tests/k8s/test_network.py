"""What the NetworkPolicies let through is what k8s/network-matrix.yaml declares: no less, no more."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml

from k8s.reachability import Endpoint, Ends, Port, allowed, ends, selects, together
from tests.k8s.manifests import one, pods_of

MATRIX = yaml.safe_load((Path(__file__).resolve().parents[2] / "k8s" / "network-matrix.yaml").read_text())
# Ports that nothing declared, beside those of the matrix.
OTHER_PORTS = (Port(22), Port(80), Port(443), Port(29500), Port(53, "UDP"), Port(8080, "UDP"))
Connection = tuple[str, str, str, Port]


def stage_labels(name: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/part-of": "tuneyard",
        "app.kubernetes.io/component": name,
        "tuneyard.dev/pipeline": "sft_legal",
        "workflows.argoproj.io/workflow": "w",
    }


class Network:
    """The endpoints and declared flows of one overlay.

    Args:
        overlay: name in the matrix.
    """

    def __init__(self, overlay: str) -> None:
        self.rules = MATRIX["overlays"][overlay]
        absent = set(self.rules["absent"])
        self.ours: list[str] = [n for n in MATRIX["pods"] if n not in absent | set(self.rules["free"])]
        self.endpoints: dict[str, Endpoint] = {}
        pods = MATRIX["pods"] | MATRIX["others"]
        for number, (name, facts) in enumerate((n, f) for n, f in pods.items() if n not in absent):
            labels = stage_labels(facts["stage"]) if "stage" in facts else facts["labels"]
            namespace = facts.get("namespace", "runs").replace("runs", self.rules["runs"])
            self.endpoints[name] = Endpoint(name, f"10.244.0.{number + 2}", namespace, labels)
        # Each of them once more in a namespace of somebody else: labels alone must open nothing.
        for number, (name, pod) in enumerate(list(self.endpoints.items())):
            decoy = f"decoy of {name}"
            self.endpoints[decoy] = Endpoint(decoy, f"10.244.1.{number + 2}", "default", pod.labels)
        # And somebody else in each namespace that is not ours: a namespace alone must open nothing either.
        for number, namespace in enumerate(sorted({f["namespace"] for f in MATRIX["others"].values()})):
            other = f"another pod of {namespace}"
            self.endpoints[other] = Endpoint(other, f"10.244.2.{number + 2}", namespace, {"app": "other"})
        for name, address in MATRIX["addresses"].items():
            self.endpoints[name] = Endpoint(name, address)
        # One endpoint for each of its addresses: the Service's and the nodes'.
        self.api_servers = {
            f"api-server {at}": Port(int(at.split(":")[1])) for at in self.rules["api-server"]
        }
        for name in self.api_servers:
            self.endpoints[name] = Endpoint(name, name.split()[1].split(":")[0])

    def names(self, listed: list[str]) -> list[str]:
        found = [name for entry in listed for name in MATRIX["sets"].get(entry, [entry])]
        unknown = set(found) - set(MATRIX["pods"]) - set(MATRIX["others"]) - set(MATRIX["addresses"])
        assert unknown <= {"api-server"}
        return [name for name in found if name in self.endpoints or name == "api-server"]

    def declared(self) -> set[tuple[str, str, Port]]:
        flows = set()
        for flow in self.rules["flows"]:
            for source in self.names(flow["from"]):
                for target in self.names(flow["to"]):
                    if target == "api-server":
                        flows |= {(source, name, port) for name, port in self.api_servers.items()}
                    else:
                        flows |= {(source, target, port) for port in self.ports(flow["ports"])}
        return flows

    def ports(self, listed: list) -> set[Port]:
        if listed == ["any"]:
            return set(self.all_ports())
        return {Port(int(str(p).split("/")[0]), "UDP" if str(p).endswith("/UDP") else "TCP") for p in listed}

    def all_ports(self) -> set[Port]:
        named = {
            port
            for flow in self.rules["flows"]
            if flow["ports"] != ["any"]
            for port in self.ports(flow["ports"])
        }
        return named | set(OTHER_PORTS) | set(self.api_servers.values())

    def said(self, policy: dict) -> Ends:
        """What one policy says of our pods."""
        return ends(policy, self.pods(), self.endpoints.values(), self.all_ports())

    def pods(self) -> list[Endpoint]:
        return [self.endpoints[name] for name in self.ours]

    def opened(self, said: Iterable[Ends]) -> set[Connection]:
        """Each end of each connection that policies leave open at one of our pods, by itself.

        An end is judged alone: that the other one is closed today is no reason to leave this one open.
        """
        found = together(said, self.pods(), self.endpoints.values(), self.all_ports())
        return {
            (direction, *((name, peer) if direction == "Egress" else (peer, name)), port)
            for (direction, name), opened in found.items()
            for peer, port in opened
        }

    def wanted(self) -> set[Connection]:
        """The declared flows, once for each end of them that is ours."""
        return {
            (direction, source, target, port)
            for source, target, port in self.declared()
            for direction, end in (("Egress", source), ("Ingress", target))
            if end in self.ours
        }


def policies_of(objects: list[dict]) -> list[dict]:
    found = [item for item in objects if item["kind"] == "NetworkPolicy"]
    assert len(found) >= 12
    return found


def test_what_is_open_is_what_is_declared(objects, overlay) -> None:
    network = Network(overlay)
    assert len(network.endpoints) > 40
    opened = network.opened([network.said(policy) for policy in policies_of(objects)])
    assert opened - network.wanted() == set(), "open, but not declared"
    assert network.wanted() - opened == set(), "declared, but closed"


def test_no_policy_can_be_taken_away(objects, overlay) -> None:
    """Each of them does something, and the comparison sees it; a shadowed one, once its shadow is gone."""
    network = Network(overlay)
    said = {policy["metadata"]["name"]: network.said(policy) for policy in policies_of(objects)}
    shadowed = network.rules.get("shadowed", {})
    for name in said:
        without = network.opened([part for other, part in said.items() if other != name])
        if name not in shadowed:
            assert without != network.wanted(), name
            continue
        assert without == network.wanted(), f"{name} is not shadowed"
        rest = [part for other, part in said.items() if other not in (name, shadowed[name])]
        assert network.opened([*rest, said[name]]) != network.opened(rest), name


def widened(policy: dict) -> Iterator[dict]:
    """The policy without one of its bounds, in each way that a hurried person would lose it."""

    def but(change) -> dict:
        copied = copy.deepcopy(policy)
        change(copied["spec"])
        return copied

    for way, side in (("ingress", "from"), ("egress", "to")):
        for index, rule in enumerate(policy["spec"].get(way) or []):
            for field in {side, "ports"} & set(rule):
                yield but(lambda spec, w=way, i=index, f=field: spec[w][i].pop(f))
            for number, peer in enumerate(rule.get(side, [])):
                for field, wide in (("namespaceSelector", {}), ("podSelector", {})):
                    if field in peer:
                        yield but(
                            lambda spec, w=way, i=index, s=side, n=number, f=field, v=wide: spec[w][i][s][
                                n
                            ].update({f: v})
                        )
                if "ipBlock" in peer:
                    yield but(
                        lambda spec, w=way, i=index, s=side, n=number: spec[w][i][s][n].update(
                            ipBlock={"cidr": "0.0.0.0/0"}
                        )
                    )


def test_no_policy_can_be_widened(objects, overlay) -> None:
    network, policies = Network(overlay), policies_of(objects)
    said = {policy["metadata"]["name"]: network.said(policy) for policy in policies}
    tried, unseen = 0, []
    for policy in policies:
        name = policy["metadata"]["name"]
        rest = [part for other, part in said.items() if other != name]
        for wider in widened(policy):
            tried += 1
            if network.opened([*rest, network.said(wider)]) == network.wanted():
                unseen.append((name, wider["spec"]))
    assert tried >= 40
    assert unseen == []


def test_the_pods_of_the_manifests_have_the_labels_of_the_matrix(objects, overlay) -> None:
    known = [facts["labels"] for facts in MATRIX["pods"].values() if facts.get("labels")]
    for name, _, meta in pods_of(objects):
        ours = {k: v for k, v in meta["labels"].items() if "." in k}
        assert ours in known, f"{name}: {ours}"


def test_a_service_finds_the_pods_it_is_meant_for(objects) -> None:
    labels = {name: meta["labels"] for name, _, meta in pods_of(objects)}
    services = [item for item in objects if item["kind"] == "Service"]
    assert len(services) >= 3
    for service in services:
        found = [
            name for name, own in labels.items() if selects({"matchLabels": service["spec"]["selector"]}, own)
        ]
        assert len(found) == 1, f"{service['metadata']['name']}: {found}"


@pytest.mark.parametrize(
    ("selector", "labels", "found"),
    [
        ({}, {}, True),
        ({"matchLabels": {"a": "1"}}, {"a": "1", "b": "2"}, True),
        ({"matchLabels": {"a": "1"}}, {"a": "2"}, False),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, {}, True),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}]}, {}, False),
        ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, {"a": ""}, False),
        ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {"a": ""}, True),
    ],
)
def test_selectors_are_read_as_kubernetes_reads_them(selector, labels, found) -> None:
    assert selects(selector, labels) is found


def test_policies_are_read_as_kubernetes_reads_them() -> None:
    """The examples of the documentation: isolation by direction, rules that add up, both ends needed."""
    a, b = Endpoint("a", "10.0.0.1", "n", {"app": "a"}), Endpoint("b", "10.0.0.2", "m", {"app": "b"})
    web = Endpoint("web", "203.0.113.7")

    def policy(namespace: str, **spec) -> dict:
        return {"metadata": {"namespace": namespace}, "spec": {"podSelector": {}, **spec}}

    assert allowed([], a, b, Port(80))
    deny = policy("m", policyTypes=["Ingress"])
    assert not allowed([deny], a, b, Port(80))
    assert allowed([deny], b, a, Port(80)), "egress of m is not isolated"
    same = policy("m", policyTypes=["Ingress"], ingress=[{"from": [{"podSelector": {}}]}])
    assert not allowed([same], a, b, Port(80)), "a podSelector alone means the policy's own namespace"
    where = {"matchLabels": {"kubernetes.io/metadata.name": "n"}}
    named = policy("m", ingress=[{"from": [{"namespaceSelector": where}], "ports": [{"port": 80}]}])
    assert allowed([deny, named], a, b, Port(80))
    assert not allowed([deny, named], a, b, Port(81))
    assert not allowed([deny, named], a, b, Port(80, "UDP"))
    block = {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}}
    out = policy(
        "n", policyTypes=["Egress"], egress=[{"to": [block], "ports": [{"port": 80, "endPort": 90}]}]
    )
    assert allowed([out], a, web, Port(85))
    assert not allowed([out], a, web, Port(91))
    assert not allowed([out], a, b, Port(85))


def test_serving_is_closed_to_runs_of_elsewhere(prod) -> None:
    network = Network("prod")
    policies = policies_of(prod)
    serving = network.endpoints["serving"]
    asking = {
        name
        for name, end in network.endpoints.items()
        if name != "serving" and allowed(policies, end, serving, Port(8080))
    }
    assert asking == {"deploy", "prometheus", "gateway"}
    assert one(prod, "NetworkPolicy", "default-deny")["spec"]["podSelector"] == {}
