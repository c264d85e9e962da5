"""A Kubeflow Pipelines endpoint: which one, who we are there, and its faults by name.

The generated client (kfp-server-api) and not `kfp.Client`: that one prints to standard output, where --json
has one object, and keeps settings of its own in the home folder.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from components.shared import cron
from components.shared.errors import TuneyardError, UsageError

URL_VARIABLE = "TUNEYARD_KFP_ENDPOINT"
NAMESPACE_VARIABLE = "TUNEYARD_KFP_NAMESPACE"
TOKEN_VARIABLE = "TUNEYARD_KFP_TOKEN"
CA_VARIABLE = "TUNEYARD_KFP_CA"
ZONE_VARIABLE = "TUNEYARD_KFP_TIMEZONE"
# (to connect, to read) in seconds.
_TIMEOUT = (10, 60)
_PAGE = 100
# Overloaded, being replaced, or a gateway whose server is.
_PASSING = (429, 500, 502, 503, 504)


class EndpointError(TuneyardError):
    """The endpoint refused, or could not be reached.

    Args:
        what: which call, and what came back.
        todo: what the reader can do about it.
        lost: whether the same call may go through later: no connection, or a server that is overloaded or
            being replaced.
        status: HTTP status; 0 when there was no answer.
    """

    def __init__(self, what: str, todo: str, lost: bool, status: int) -> None:
        self.lost = lost
        self.status = status
        super().__init__(what, todo)


@dataclass(frozen=True)
class Endpoint:
    """Where Kubeflow Pipelines answers.

    Args:
        url: of its API server, or of the gateway in front of it with its `/pipeline` prefix.
        namespace: of the runs in a multi-user installation; '' in a standalone one.
        token: bearer token; '' where the way there needs none (a port-forward).
        ca: file with the certificate authority of the URL; '' for those of the system.
        zone: IANA name of the time zone in which its scheduler reads cron expressions: the API does not say.
    """

    url: str
    namespace: str = ""
    token: str = ""
    ca: str = ""
    zone: str = "UTC"

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, namespace={self.namespace!r})"

    @cached_property
    def _client(self) -> Any:
        import kfp_server_api

        settings = kfp_server_api.Configuration(host=self.url)
        settings.retries = False  # the callers here know which call may be repeated
        if self.ca:
            settings.ssl_ca_cert = self.ca
        if self.token:
            settings.api_key["authorization"] = self.token
            settings.api_key_prefix["authorization"] = "Bearer"
        return kfp_server_api.ApiClient(settings)

    def call(self, service: str, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the generated client.

        Args:
            service: its class without `ServiceApi`: Run, Experiment, Pipeline, PipelineUpload, RecurringRun.
            method: name of the method.
            *args: of the method.
            **kwargs: of the method.

        Raises:
            EndpointError: it refused, or could not be reached.
        """
        import kfp_server_api

        api = getattr(kfp_server_api, f"{service}ServiceApi")(self._client)
        with self._faults_named(method.replace("_", " ")):
            return getattr(api, method)(*args, **kwargs, _request_timeout=_TIMEOUT)

    def every(self, service: str, method: str, field: str, *args: Any, **kwargs: Any) -> list[Any]:
        """All pages of a list method, as one list of what its answers have in `field`."""
        found: list[Any] = []
        token = ""
        while True:
            answer = self.call(service, method, *args, page_token=token, page_size=_PAGE, **kwargs)
            found += getattr(answer, field) or []
            token = answer.next_page_token or ""
            if not token:
                return found

    @contextlib.contextmanager
    def _faults_named(self, doing: str) -> Iterator[None]:
        import urllib3
        from kfp_server_api import ApiException

        where = f"{doing}: Kubeflow Pipelines at {self.url}"
        try:
            yield
        except ApiException as error:
            status = int(error.status or 0)
            what = f"{where} answered {status}: {_message(error)}"
            raise EndpointError(
                what, _TODO.get(status, ""), status in (429, 500, 502, 503, 504), status
            ) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            todo = f"is {URL_VARIABLE} right, and is its port-forward or gateway up?"
            raise EndpointError(f"{where} does not answer ({error})", todo, True, 0) from error


_TODO = {
    401: f"set {TOKEN_VARIABLE} to a token that is still valid",
    403: f"whoever {TOKEN_VARIABLE} belongs to may not do this in that namespace ({NAMESPACE_VARIABLE})",
}


def _message(error: Any) -> str:
    """The server's sentence; its JSON also has a stack trace of Go."""
    try:
        body = json.loads(error.body)
        return str(body.get("message") or body.get("error_message") or body.get("error") or error.reason)
    except (ValueError, TypeError, AttributeError):
        return str(error.body or error.reason)[:300]


def configured() -> Endpoint | None:
    """The endpoint that the environment names; None where it names none.

    Raises:
        UsageError: what it names is no URL, or no time zone.
    """
    url = os.environ.get(URL_VARIABLE, "").strip().rstrip("/")
    if not url:
        return None
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{URL_VARIABLE} is {url!r}", "write it with http:// or https://")
    read = os.environ.get
    zone = read(ZONE_VARIABLE, "").strip() or "UTC"
    try:
        cron.zone_of(zone)
    except TuneyardError as error:
        todo = "write it as in Europe/Berlin: what KFP's scheduler has as CRON_SCHEDULE_TIMEZONE"
        raise UsageError(f"{ZONE_VARIABLE} is {zone!r}, which is no time zone", todo) from error
    return Endpoint(url, read(NAMESPACE_VARIABLE, ""), read(TOKEN_VARIABLE, ""), read(CA_VARIABLE, ""), zone)


def require() -> Endpoint:
    """The configured endpoint.

    Raises:
        UsageError: none is configured.
    """
    endpoint = configured()
    if endpoint is None:
        raise UsageError(
            "no cluster is configured",
            f"set {URL_VARIABLE} to the address of Kubeflow Pipelines (docs/kubernetes.md)",
        )
    return endpoint
