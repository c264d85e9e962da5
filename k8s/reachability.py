"""Who can reach whom, computed from NetworkPolicies as Kubernetes documents them ("Network Policies").

Policies add up. A pod that no policy of a direction selects is open in that direction; else a connection
needs one rule of one such policy, at both of its ends. What is outside the cluster is an address and obeys
no policy.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Object = Mapping[str, Any]
Direction = Literal["Ingress", "Egress"]
DIRECTIONS: tuple[Direction, ...] = ("Ingress", "Egress")


@dataclass(frozen=True)
class Endpoint:
    """A pod, or an address outside the cluster.

    Args:
        name: for people.
        address: its IP.
        namespace: of a pod; empty for an address outside.
        labels: of a pod.
    """

    name: str
    address: str
    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Port:
    """A port of the receiving end, and TCP or UDP."""

    number: int
    protocol: str = "TCP"


# (direction, name of a pod) -> the names of those at the other end, and the ports.
Ends = Mapping[tuple[Direction, str], frozenset[tuple[str, Port]]]


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a LabelSelector matches; an empty one matches everything."""
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for rule in selector.get("matchExpressions") or []:
        present, value = rule["key"] in labels, labels.get(rule["key"])
        # Kubernetes: NotIn matches what has no such label too.
        held = {
            "Exists": present,
            "DoesNotExist": not present,
            "In": present and value in rule.get("values", []),
            "NotIn": not present or value not in rule.get("values", []),
        }[rule["operator"]]
        if not held:
            return False
    return True


def ends(
    policy: Object, subjects: Iterable[Endpoint], peers: Iterable[Endpoint], ports: Iterable[Port]
) -> Ends:
    """What one policy says of the pods that it selects; those it does not select are not in the answer."""
    spec, held, numbers = policy["spec"], list(peers), list(ports)
    bound = [
        pod
        for pod in subjects
        if pod.namespace == policy["metadata"]["namespace"]
        and selects(spec.get("podSelector") or {}, pod.labels)
    ]
    found: dict[tuple[Direction, str], frozenset[tuple[str, Port]]] = {}
    for direction in _types(spec):
        side = "from" if direction == "Ingress" else "to"
        opened = frozenset(
            (peer.name, port)
            for rule in spec.get(direction.lower()) or []
            for peer in held
            if _peer_matches(policy, rule.get(side), peer)
            for port in numbers
            if _port_matches(rule.get("ports"), port)
        )
        found |= {(direction, pod.name): opened for pod in bound}
    return found


def together(
    parts: Iterable[Ends], subjects: Iterable[Endpoint], peers: Iterable[Endpoint], ports: Iterable[Port]
) -> Ends:
    """What all policies say of each subject: the sum of what they open, or everything where none binds it."""
    everything = frozenset((peer.name, port) for peer in peers for port in ports)
    held = list(parts)
    found = {}
    for subject in subjects:
        for direction in DIRECTIONS:
            mine = [part[direction, subject.name] for part in held if (direction, subject.name) in part]
            found[direction, subject.name] = frozenset().union(*mine) if mine else everything
    return found


def allowed(policies: Iterable[Object], source: Endpoint, target: Endpoint, port: Port) -> bool:
    """Whether `source` may open a connection to `port` of `target`: both ends must let it."""
    pods, both = [end for end in (source, target) if end.namespace], [source, target]
    found = together([ends(policy, pods, both, [port]) for policy in policies], pods, both, [port])
    out = found.get(("Egress", source.name), {(target.name, port)})
    into = found.get(("Ingress", target.name), {(source.name, port)})
    return (target.name, port) in out and (source.name, port) in into


def _types(spec: Object) -> list[Direction]:
    if spec.get("policyTypes"):
        return list(spec["policyTypes"])
    return ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]


def _port_matches(ports: list[Object] | None, port: Port) -> bool:
    if not ports:
        return True
    return any(
        rule.get("protocol", "TCP") == port.protocol
        and ("port" not in rule or rule["port"] <= port.number <= rule.get("endPort", rule["port"]))
        for rule in ports
    )


def _peer_matches(policy: Object, peers: list[Object] | None, peer: Endpoint) -> bool:
    # Absent or empty: from or to anywhere.
    return not peers or any(_one_peer_matches(policy, rule, peer) for rule in peers)


def _one_peer_matches(policy: Object, rule: Object, peer: Endpoint) -> bool:
    if "ipBlock" in rule:
        # Network plugins differ on whether a block covers pods; the safe answer is the one that lets more in.
        address = ipaddress.ip_address(peer.address)
        block = rule["ipBlock"]
        return address in ipaddress.ip_network(block["cidr"]) and not any(
            address in ipaddress.ip_network(hole) for hole in block.get("except") or []
        )
    if not peer.namespace:
        return False
    if "namespaceSelector" in rule:
        # The one label that the API server keeps right by itself.
        names = {"kubernetes.io/metadata.name": peer.namespace}
        if not selects(rule["namespaceSelector"] or {}, names):
            return False
    elif peer.namespace != policy["metadata"]["namespace"]:
        return False
    return selects(rule.get("podSelector") or {}, peer.labels)
