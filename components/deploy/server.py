"""The model server as the deploy stage sees it: what it serves, look at the store, answer me."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import Any

import httpx

from components.shared.errors import TuneyardError

_POLL_SECONDS = 0.5
_QUESTION = "1 + 1 = ?"


class Unreachable(TuneyardError):
    """Nobody listens there: not yet, or not any more."""


@dataclass(frozen=True)
class Answer:
    """What a served model said, and under which version and digest."""

    text: str
    version: str
    digest: str


def address() -> tuple[str, str]:
    """URL and token of the model server that the environment names; '' where it names none."""
    return os.environ.get("TUNEYARD_SERVING_URL", ""), os.environ.get("TUNEYARD_SERVING_TOKEN", "")


class ModelServer:
    """A client of the model server, or of one of its replicas.

    Args:
        url: http:// URL of the server.
        token: of its admin routes.
        seconds: how long everything asked through this client may take together.
        address: of one replica; empty: whichever the URL leads to.
    """

    def __init__(self, url: str, token: str, seconds: float, address: str = "") -> None:
        missing = [n for n, v in (("TUNEYARD_SERVING_URL", url), ("TUNEYARD_SERVING_TOKEN", token)) if not v]
        if missing:
            raise TuneyardError(
                f"{' and '.join(missing)} not set", "start through `tuneyard`, which sets them"
            )
        self.url = url.rstrip("/")
        self.token, self.seconds, self.address = token, seconds, address
        self._until = time.monotonic() + seconds

    def replicas(self) -> list[ModelServer]:
        """A client for each address that the server's name has now: on a cluster, for each pod.

        Raises:
            Unreachable: the name has none.
        """
        parts = httpx.URL(self.url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        try:
            found = socket.getaddrinfo(parts.host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise Unreachable(
                f"{self.url}: {parts.host!r} has no address ({error})", "`tuneyard up`"
            ) from error
        clients = [
            ModelServer(self.url, self.token, self.seconds, address)
            for address in sorted({str(each[4][0]) for each in found})
        ]
        for client in clients:
            client._until = self._until
        return clients

    @property
    def left(self) -> float:
        """Seconds that are left of those that this client was given; half a second at least."""
        return max(_POLL_SECONDS, self._until - time.monotonic())

    @property
    def is_late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() + _POLL_SECONDS > self._until

    def wait_until_alive(self) -> None:
        """Wait for a server that is still starting.

        Raises:
            TuneyardError: it does not answer in time.
        """
        while True:
            try:
                if self._call("GET", "/healthz").status_code == 200:
                    return
            except TuneyardError:
                if time.monotonic() + _POLL_SECONDS > self._until:
                    raise
            time.sleep(_POLL_SECONDS)

    def served(self) -> dict[str, dict[str, Any]]:
        """Models by name: version, digest, ready, reason, task."""
        return {model["id"]: model for model in self._done("GET", "/v1/models").json()["data"]}

    def serves(self, name: str) -> bool:
        """Whether a model is in service, after waiting for one that is on its way."""
        while True:
            state = self.served().get(name)
            if state is not None and state["reason"] != "loading":
                return bool(state["ready"])
            reasons = self._call("GET", "/readyz").json()["reasons"]
            nothing_more_to_come = reasons in ([], ["no model deployed"])
            if (state is None and nothing_more_to_come) or time.monotonic() + _POLL_SECONDS > self._until:
                return False
            time.sleep(_POLL_SECONDS)

    def follow(self, name: str) -> dict[str, Any] | None:
        """Let it do now what the store says of a model; the old version stays until the new one answers.

        Returns:
            The model's state; None when the store says nothing of it, and it is out of service.

        Raises:
            TuneyardError: the server refused the version, in its own words, or it took too long.
        """
        response = self._settled("POST", "/admin/deploy", json={"name": name})
        if response.status_code == 404 and "no_deployment" in response.text:
            return None
        state: dict[str, Any] = self._successful("POST", "/admin/deploy", response).json()
        return state

    def metrics(self) -> str:
        """What it tells Prometheus."""
        return self._done("GET", "/metrics").text

    def ask(self, name: str, task: str, version: str = "") -> Answer:
        """Let the model answer a question, as any client would.

        Args:
            name: of the model.
            task: of its card.
            version: that should answer; empty: whichever does.

        Raises:
            TuneyardError: it does not.
        """
        wanted = {"X-Model-Version": version} if version else {}
        if task == "causal-lm":
            message = {"role": "user", "content": _QUESTION}
            body = {"model": name, "messages": [message], "max_tokens": 16, "temperature": 0}
            response = self._done("POST", "/v1/chat/completions", json=body, headers=wanted)
            text = response.json()["choices"][0]["message"]["content"]
        else:
            tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [_QUESTION]}
            path = f"/v2/models/{name}/infer"
            response = self._done("POST", path, json={"inputs": [tensor]}, headers=wanted)
            text = response.json()["outputs"][0]["data"][0]
        return Answer(text, response.headers["x-model-version"], response.headers["x-model-digest"])

    def _done(self, method: str, path: str, json: Any = None, headers: Any = None) -> httpx.Response:
        """The response of a request that must succeed; waits while the server is busy."""
        return self._successful(method, path, self._settled(method, path, json, headers))

    def _settled(self, method: str, path: str, json: Any = None, headers: Any = None) -> httpx.Response:
        response = self._call(method, path, json, headers)
        while response.status_code in (429, 503) and time.monotonic() + _POLL_SECONDS < self._until:
            time.sleep(_POLL_SECONDS)
            response = self._call(method, path, json, headers)
        return response

    def _successful(self, method: str, path: str, response: httpx.Response) -> httpx.Response:
        if response.is_success:
            return response
        todo = (
            "see `tuneyard status`"
            if response.status_code != 401
            else "use the token the server was started with"
        )
        raise TuneyardError(f"{method} {self}{path}: {response.status_code}, {_said(response)}", todo)

    def __str__(self) -> str:
        """Its URL, and which replica."""
        return f"{self.url} ({self.address})" if self.address and self.address not in self.url else self.url

    def _call(self, method: str, path: str, json: Any = None, headers: Any = None) -> httpx.Response:
        url = httpx.URL(self.url + path)
        told = {"Host": url.netloc.decode(), **(headers or {})}
        if path.startswith("/admin/"):
            told["Authorization"] = f"Bearer {self.token}"
        # One of several addresses is asked by its number, but its certificate has the name.
        extensions = {"sni_hostname": url.host} if url.scheme == "https" else {}
        if self.address:
            url = url.copy_with(host=self.address)
        try:
            # No proxy of the environment: the token is for the server alone.
            with httpx.Client(trust_env=False, timeout=self.left) as client:
                return client.request(method, url, json=json, headers=told, extensions=extensions)
        except httpx.TimeoutException as error:
            raise TuneyardError(
                f"{method} {self}{path}: no answer within deploy.ready_seconds ({self.seconds:g})",
                "raise deploy.ready_seconds, or look into the server's log",
            ) from error
        except httpx.TransportError as error:
            raise Unreachable(
                f"{method} {self}{path}: the model server cannot be reached ({error})", "`tuneyard up`"
            ) from error


def _said(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return response.text[:300]
    return str(error["message"] if isinstance(error, dict) else error)
