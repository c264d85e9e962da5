"""Every pod passes the `restricted` level, and a pod that does not is caught."""

from __future__ import annotations

import copy

import pytest

from k8s import pod_security
from tests.k8s.manifests import one, pods_of


def test_every_pod_of_every_overlay_passes(objects) -> None:
    pods = list(pods_of(objects))
    assert len(pods) >= 5
    refused = {name: pod_security.faults(spec, meta.get("annotations")) for name, spec, meta in pods}
    assert {name: found for name, found in refused.items() if found} == {}


def test_beyond_restricted_the_root_is_read_only_and_no_pod_has_a_token(objects) -> None:
    """Neither is part of the level. A run's pods are KFP's to make: the runner's token is theirs."""
    for name, spec, _ in pods_of(objects):
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
            assert not any(mount["mountPath"] == "/" for mount in container["volumeMounts"])


def test_the_namespace_asks_for_the_level_that_is_checked(objects) -> None:
    labels = one(objects, "Namespace", "tuneyard")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert labels["pod-security.kubernetes.io/enforce-version"] == "v1.34"


def container(spec: dict) -> dict:
    return spec["containers"][0]


def context(spec: dict) -> dict:
    return container(spec)["securityContext"]


def init_container(spec: dict) -> None:
    spec["initContainers"] = [{"name": "init", "image": "x", "command": ["sh"]}]


def volume(kind: str, value: dict):
    return lambda spec: spec["volumes"].append({"name": "planted", kind: value})


# Each breaks one control of the Pod Security Standards in the server's own manifest, and only that.
VIOLATIONS = {
    "hostNetwork": lambda spec: spec.update(hostNetwork=True),
    "hostPID": lambda spec: spec.update(hostPID=True),
    "hostIPC": lambda spec: spec.update(hostIPC=True),
    "hostPort": lambda spec: container(spec)["ports"][0].update(hostPort=8080),
    "hostPath": volume("hostPath", {"path": "/var/run"}),
    "nfs": volume("nfs", {"server": "files", "path": "/"}),
    "iscsi": volume("iscsi", {"targetPortal": "10.0.0.1:3260"}),
    "gitRepo": volume("gitRepo", {"repository": "git"}),
    "privileged": lambda spec: context(spec).update(privileged=True),
    "escalation allowed": lambda spec: context(spec).update(allowPrivilegeEscalation=True),
    "escalation unsaid": lambda spec: context(spec).pop("allowPrivilegeEscalation"),
    "capabilities kept": lambda spec: context(spec).pop("capabilities"),
    "capabilities dropped by name": lambda spec: context(spec)["capabilities"].update(drop=["NET_RAW"]),
    "capability added": lambda spec: context(spec)["capabilities"].update(add=["NET_ADMIN"]),
    "capability among others": lambda spec: context(spec)["capabilities"].update(
        add=["NET_BIND_SERVICE", "SYS_PTRACE"]
    ),
    "root by the pod": lambda spec: spec["securityContext"].update(runAsUser=0),
    "root by the container": lambda spec: context(spec).update(runAsUser=0),
    "root not forbidden": lambda spec: spec["securityContext"].pop("runAsNonRoot"),
    "root allowed by the container": lambda spec: context(spec).update(runAsNonRoot=False),
    "no seccomp": lambda spec: spec["securityContext"].pop("seccompProfile"),
    "seccomp off in the pod": lambda spec: spec["securityContext"].update(
        seccompProfile={"type": "Unconfined"}
    ),
    "seccomp off in the container": lambda spec: context(spec).update(seccompProfile={"type": "Unconfined"}),
    "AppArmor off": lambda spec: context(spec).update(appArmorProfile={"type": "Unconfined"}),
    "AppArmor off in the pod": lambda spec: spec["securityContext"].update(
        appArmorProfile={"type": "Unconfined"}
    ),
    "SELinux type": lambda spec: spec["securityContext"].update(seLinuxOptions={"type": "spc_t"}),
    "SELinux user": lambda spec: context(spec).update(seLinuxOptions={"user": "system_u"}),
    "SELinux role": lambda spec: context(spec).update(seLinuxOptions={"role": "system_r"}),
    "/proc unmasked": lambda spec: context(spec).update(procMount="Unmasked"),
    "unsafe sysctl": lambda spec: spec["securityContext"].update(
        sysctls=[{"name": "kernel.msgmax", "value": "1"}]
    ),
    "Windows host process": lambda spec: context(spec).update(windowsOptions={"hostProcess": True}),
    "an init container forgotten": init_container,
    "a second container forgotten": lambda spec: spec["containers"].append({"name": "side", "image": "x"}),
    "a debugging container": lambda spec: spec.update(ephemeralContainers=[{"name": "debug", "image": "x"}]),
    "a probe of another host": lambda spec: container(spec)["livenessProbe"]["httpGet"].update(
        host="10.0.0.1"
    ),
    "a hook to another host": lambda spec: container(spec).update(
        lifecycle={"postStart": {"httpGet": {"host": "10.0.0.1", "port": 80}}}
    ),
}


def test_there_are_at_least_30_violations() -> None:
    assert len(VIOLATIONS) >= 30


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_a_planted_violation_is_caught(prod, violation) -> None:
    _, spec, _ = next(pod for pod in pods_of(prod) if pod[0] == "Deployment tuneyard-serving")
    assert pod_security.faults(spec) == []
    broken = copy.deepcopy(spec)
    VIOLATIONS[violation](broken)
    assert broken != spec
    assert pod_security.faults(broken) != []


def test_apparmor_off_by_annotation_is_caught(prod) -> None:
    name = "container.apparmor.security.beta.kubernetes.io/server"
    _, spec, _ = next(pods_of(prod))
    assert pod_security.faults(spec, {name: "runtime/default"}) == []
    assert pod_security.faults(spec, {name: "unconfined"}) == [f"annotation {name} is unconfined"]


def test_all_faults_are_told_at_once(prod) -> None:
    _, spec, _ = next(pods_of(prod))
    for name in ("hostNetwork", "privileged", "hostPath"):
        VIOLATIONS[name](spec)
    found = pod_security.faults(spec)
    assert len(found) == 3
    assert any("hostPath" in fault for fault in found)
