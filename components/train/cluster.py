"""The Kubernetes API as a train stage needs it: TrainJobs, their pods and what these say.

The Kubeflow SDK makes jobs under names of its own, without an owner, and follows them in ways of its own; so
its typed models are used with the plain client.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from components.shared.errors import TuneyardError
from components.train.trainjob import NODE, TOKEN_PATH

log = logging.getLogger("tuneyard.train")

_TIMEOUT = (10, 60)
# An API server that is upgraded or moved is away for minutes; a training that took days must outlast it.
_OUTAGE_SECONDS = 900.0
_AGAIN_SECONDS = 5.0

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Cluster:
    """One namespace of a cluster.

    Args:
        api: a kubernetes.client.ApiClient.
        namespace: of the stage's pod.
    """

    api: Any
    namespace: str

    def create(self, body: Mapping[str, Any]) -> bool:
        """Make a TrainJob; False when there is one of that name."""

        def make() -> bool:
            from kubernetes.client import ApiException

            try:
                self._jobs("create", body=dict(body))
            except ApiException as error:
                if error.status == 409:
                    return False
                raise
            return True

        return self._asked("making the TrainJob", make)

    def job(self, name: str) -> dict[str, Any] | None:
        """A TrainJob as the API has it, or None."""
        return self._asked(
            "reading the TrainJob", lambda: _unless_absent(lambda: dict(self._jobs("get", name=name)))
        )

    def delete(self, name: str) -> None:
        """End a TrainJob. Its name is free when its pods are gone."""
        self._asked(
            "ending the TrainJob",
            lambda: _unless_absent(lambda: self._jobs("delete", name=name, propagation_policy="Foreground")),
        )

    def pods(self, name: str) -> list[Any]:
        """The pods of a TrainJob's nodes, the youngest last."""

        def get() -> list[Any]:
            from kubeflow.trainer.constants import constants
            from kubernetes.client import CoreV1Api

            labels = f"{constants.JOBSET_NAME_LABEL}={name},{constants.JOBSET_RJOB_NAME_LABEL}={NODE}"
            found = CoreV1Api(self.api).list_namespaced_pod(
                self.namespace, label_selector=labels, _request_timeout=_TIMEOUT
            )
            return sorted(found.items, key=lambda pod: pod.metadata.creation_timestamp)

        return self._asked("listing the TrainJob's pods", get)

    def lines(self, pod: str) -> Iterator[tuple[str, str]]:
        """(time, line) of what a pod says from its start, as it says it; ends when its container does."""
        from kubernetes.client import CoreV1Api

        answer = CoreV1Api(self.api).read_namespaced_pod_log(
            pod,
            self.namespace,
            container=NODE,
            follow=True,
            timestamps=True,
            _preload_content=False,
            _request_timeout=(10, None),
        )
        rest = b""
        try:
            for piece in answer.stream():
                *whole, rest = (rest + piece).split(b"\n")
                for line in whole:
                    when, _, text = line.decode("utf-8", errors="replace").partition(" ")
                    yield when, text
        finally:
            answer.close()

    def _jobs(self, verb: str, **what: Any) -> Any:
        """Ask the API of TrainJobs, by the names that the SDK has for it."""
        from kubeflow.trainer.constants import constants
        from kubernetes.client import CustomObjectsApi

        method = getattr(CustomObjectsApi(self.api), f"{verb}_namespaced_custom_object")
        return method(
            constants.GROUP,
            constants.VERSION,
            self.namespace,
            constants.TRAINJOB_PLURAL,
            _request_timeout=_TIMEOUT,
            **what,
        )

    def _asked(self, doing: str, ask: Callable[[], Answer]) -> Answer:
        """Ask, and again while the API is away.

        Raises:
            TuneyardError: it refuses, or stays away.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        until = time.monotonic() + _OUTAGE_SECONDS
        while True:
            try:
                return ask()
            except ApiException as error:
                if error.status and error.status < 500 and error.status != 429:
                    raise _refused(doing, self.namespace, error) from error
                fault: Exception = error
            except HTTPError as error:
                fault = error
            if time.monotonic() > until:
                raise TuneyardError(
                    f"{doing}: the Kubernetes API at {self.api.configuration.host} is away ({fault})",
                    "the job goes on by itself; retry the run and it will be found again",
                ) from fault
            log.warning("train: %s: the Kubernetes API does not answer (%s); asking again", doing, fault)
            time.sleep(_AGAIN_SECONDS)


def _unless_absent(ask: Callable[[], Answer]) -> Answer | None:
    from kubernetes.client import ApiException

    try:
        return ask()
    except ApiException as error:
        if error.status != 404:
            raise
    return None


def _refused(doing: str, namespace: str, error: Any) -> TuneyardError:
    said = error.reason
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        said = json.loads(error.body).get("message") or said
    todo = {
        401: "the token in Secret tuneyard-train-token is not valid: apply k8s/ again",
        403: "give account tuneyard-train the rights of k8s/base/runs/train.yaml",
        404: "install Kubeflow Trainer 2.3 (k8s/README.md), which brings the kind TrainJob",
    }.get(error.status, "correct what it names in the pipeline file's hardware: section, then submit again")
    return TuneyardError(f"{doing} in namespace {namespace}: Kubernetes says {error.status}: {said}", todo)


def connect(token: Path = Path(TOKEN_PATH)) -> Cluster:
    """The cluster that this pod runs in, with the rights of the mounted token.

    Raises:
        TuneyardError: this is no pod of a cluster, or the token is not mounted.
    """
    from kubernetes.client import ApiClient, Configuration

    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
    missing = [str(token / name) for name in ("token", "ca.crt", "namespace") if not (token / name).exists()]
    if not host or not port:
        missing.insert(0, "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT")
    if missing:
        raise TuneyardError(
            f"a training of several nodes needs the Kubernetes API, and here is no {', '.join(missing)}",
            "start it with submit --target kfp on a cluster that follows k8s/",
        )
    settings = Configuration(host=f"https://{f'[{host}]' if ':' in str(host) else host}:{port}")
    settings.ssl_ca_cert = str(token / "ca.crt")
    settings.api_key = {"authorization": f"Bearer {(token / 'token').read_text().strip()}"}
    return Cluster(ApiClient(settings), (token / "namespace").read_text().strip())
