"""A deployment is done when every replica has it: two servers behind one name, as pods have."""

from __future__ import annotations

import socket
import time

import httpx
import pytest

from components.deploy import deploy as stage
from components.deploy import switching
from components.deploy.server import ModelServer
from components.shared.errors import TuneyardError

NAME = "replicas.test"
ADDRESSES = ["127.0.0.1", "127.0.0.2"]


@pytest.fixture
def url(free_port, monkeypatch):
    """A URL whose name has two addresses, as DNS would say."""
    real = socket.getaddrinfo

    def resolved(host, port, *rest, **more):
        if host in (NAME, NAME.encode()):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in ADDRESSES]
        return real(host, port, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    return f"http://{NAME}:{free_port}"


def alive(address, port):
    try:
        return httpx.get(f"http://{address}:{port}/healthz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def until(reached, seconds=120):
    end = time.monotonic() + seconds
    while not reached() and time.monotonic() < end:
        time.sleep(0.2)
    return bool(reached())


def served_at(address, port, token):
    return ModelServer(f"http://{address}:{port}", token, 20).ask("news", "classification").version


def test_all_replicas_have_it_when_it_is_done_and_one_that_was_down_comes_up_with_it(
    mlflow_store, promoted, serve, url, free_port, token
):
    processes = [serve(address, free_port) for address in ADDRESSES]
    assert all(until(lambda a=address: alive(a, free_port)) for address in ADDRESSES)
    promoted(1)
    deployment = stage.put_in_service("news", mlflow_store, url, token, 120)
    assert deployment.changed
    assert [served_at(address, free_port, token) for address in ADDRESSES] == ["1", "1"]
    again = stage.put_in_service("news", mlflow_store, url, token, 120)
    assert not again.changed

    # One that cannot be reached is not waited for.
    processes[1].kill()
    processes[1].wait(10)
    promoted(2)
    assert stage.put_in_service("news", mlflow_store, url, token, 120).version == 2
    serve(ADDRESSES[1], free_port)
    ready = f"http://{ADDRESSES[1]}:{free_port}/readyz"
    assert until(lambda: alive(ADDRESSES[1], free_port) and httpx.get(ready, trust_env=False).is_success)
    assert served_at(ADDRESSES[1], free_port, token) == "2"


def test_who_lags_is_named_and_all_is_as_it_was(
    mlflow_store, promoted, serve, url, free_port, token, monkeypatch
):
    # The one that lags lags on the way back, too.
    monkeypatch.setattr(switching, "_RESTORE_SECONDS", 5)
    serve(ADDRESSES[0], free_port)
    assert until(lambda: alive(ADDRESSES[0], free_port))
    promoted(1)
    stage.put_in_service("news", mlflow_store, url, token, 120)
    # It follows another store, in which nothing is deployed.
    serve(ADDRESSES[1], free_port, TUNEYARD_STORE=f"{mlflow_store.root}-other")
    assert until(lambda: alive(ADDRESSES[1], free_port))
    promoted(2)
    with pytest.raises(TuneyardError) as caught:
        stage.put_in_service("news", mlflow_store, url, token, 15)
    said = caught.value.what
    assert "1 of 2 replicas do not serve version 2 within deploy.ready_seconds (15)" in said
    assert "127.0.0.2 serves nothing yet" in said and "127.0.0.1" not in said
    assert mlflow_store.read_json("deployments/news.json")["version"] == 1
    assert served_at(ADDRESSES[0], free_port, token) == "1"


def test_a_name_without_an_address_is_said(mlflow_store, token, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(TuneyardError, match=r"'nowhere\.test' has no address"):
        ModelServer("http://nowhere.test:8080", token, 1).replicas()
