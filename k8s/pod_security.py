"""The `restricted` level of the Kubernetes Pod Security Standards, checked without a cluster.

Controls, fields and allowed values are those of the documentation, "Pod Security Standards", baseline and
restricted, as of Kubernetes 1.34. A pod is for Linux unless `spec.os.name` says otherwise, and then none of
ours is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Spec = Mapping[str, Any]

_KINDS = ("initContainers", "containers", "ephemeralContainers")
_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim"),
    *("projected", "secret"),
}
_SYSCTLS = {
    *("kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start"),
    *("net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports"),
    *("net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl"),
    *("net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"),
}
_SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
_SECCOMP = ("RuntimeDefault", "Localhost")
_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def faults(spec: Spec, annotations: Mapping[str, str] | None = None) -> list[str]:
    """Why the `restricted` level refuses a pod; empty when it does not.

    Args:
        spec: PodSpec, as in `spec.template.spec` of a Deployment.
        annotations: of the pod; AppArmor was once set there.
    """
    found = [*_pod_faults(spec), *_volume_faults(spec), *_annotation_faults(annotations or {})]
    pod = spec.get("securityContext") or {}
    found += _identity_faults("securityContext", pod)
    for where, container in _containers(spec):
        own = container.get("securityContext") or {}
        found += _identity_faults(f"{where}.securityContext", own)
        found += _container_faults(where, container, own)
        found += _inherited_faults(where, pod, own)
    return found


def _containers(spec: Spec) -> Iterator[tuple[str, Spec]]:
    for kind in _KINDS:
        for container in spec.get(kind) or []:
            yield f"{kind}[{container.get('name', '?')}]", container


def _pod_faults(spec: Spec) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield f"{field} is true"
    pod = spec.get("securityContext") or {}
    for sysctl in pod.get("sysctls") or []:
        if sysctl["name"] not in _SYSCTLS:
            yield f"securityContext.sysctls: {sysctl['name']} is not one of the safe ones"


def _volume_faults(spec: Spec) -> Iterator[str]:
    for volume in spec.get("volumes") or []:
        for kind in set(volume) - {"name"} - _VOLUMES:
            yield f"volumes[{volume['name']}] is a {kind}; allowed: {', '.join(sorted(_VOLUMES))}"


def _annotation_faults(annotations: Mapping[str, str]) -> Iterator[str]:
    for name, value in annotations.items():
        if name.startswith("container.apparmor.security.beta.kubernetes.io/") and not (
            value in ("", "runtime/default") or value.startswith("localhost/")
        ):
            yield f"annotation {name} is {value}"


def _identity_faults(where: str, context: Spec) -> Iterator[str]:
    """Of the fields that a pod and a container both have: a wrong one is refused wherever it stands."""
    if context.get("runAsUser") == 0:
        yield f"{where}.runAsUser is 0"
    selinux = context.get("seLinuxOptions") or {}
    if selinux.get("type", "") not in _SELINUX_TYPES:
        yield f"{where}.seLinuxOptions.type is {selinux['type']}"
    for field in ("user", "role"):
        if selinux.get(field):
            yield f"{where}.seLinuxOptions.{field} is set"
    apparmor = (context.get("appArmorProfile") or {}).get("type", "RuntimeDefault")
    if apparmor not in _SECCOMP:
        yield f"{where}.appArmorProfile.type is {apparmor}"
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield f"{where}.windowsOptions.hostProcess is true"


def _inherited_faults(where: str, pod: Spec, own: Spec) -> Iterator[str]:
    """Of the fields that a container may leave to its pod: what counts is what it ends up with."""
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield f"{where}: runAsNonRoot is not true, here or in the pod"
    seccomp = (own.get("seccompProfile") or pod.get("seccompProfile") or {}).get("type")
    if seccomp not in _SECCOMP:
        yield f"{where}: seccompProfile.type is {seccomp}; allowed: {', '.join(_SECCOMP)}"


def _container_faults(where: str, container: Spec, own: Spec) -> Iterator[str]:
    if own.get("privileged"):
        yield f"{where}: privileged is true"
    if own.get("allowPrivilegeEscalation") is not False:
        yield f"{where}: allowPrivilegeEscalation is not false"
    if own.get("procMount", "Default") != "Default":
        yield f"{where}: procMount is {own['procMount']}"
    capabilities = own.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        yield f"{where}: capabilities.drop lacks ALL"
    for added in set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        yield f"{where}: capability {added} is added"
    for port in container.get("ports") or []:
        if port.get("hostPort"):
            yield f"{where}: hostPort {port['hostPort']}"
    # Since 1.34: the kubelet would connect wherever the pod tells it to.
    hooks = container.get("lifecycle") or {}
    handlers = {name: container[name] for name in _PROBES if container.get(name)}
    handlers |= {f"lifecycle.{name}": hooks[name] for name in ("postStart", "preStop") if hooks.get(name)}
    for name, handler in handlers.items():
        for kind in ("httpGet", "tcpSocket"):
            if (handler.get(kind) or {}).get("host"):
                yield f"{where}.{name}.{kind}.host is {handler[kind]['host']}"
