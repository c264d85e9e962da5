"""Replicas do what stands in the store: all of them, those that come later, and not more than they hold."""

from __future__ import annotations

import shutil
import time

import pytest

from components.shared import deployments
from components.shared.errors import StoreError, TuneyardError
from serving import catalogue as catalogue_module
from serving.catalogue import Catalogue
from serving.faults import Fault
from serving.following import Follower
from serving.routing import Choice

TEXT = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["oil prices"]}]}


def version_of(server):
    response = server.client.post("/v2/models/news/infer", json=TEXT)
    return response.headers.get("x-model-version")


def until(reached, seconds=60):
    end = time.monotonic() + seconds
    while not reached() and time.monotonic() < end:
        time.sleep(0.2)
    return bool(reached())


def test_several_replicas_follow_one_deployment_and_a_new_one_comes_up_with_it(start, desire, onnx_folder):
    desire("news", 1, onnx_folder)
    replicas = [start(), start()]
    for replica in replicas:
        replica.wait("/readyz")
    assert [version_of(replica) for replica in replicas] == ["1", "1"]
    assert replicas[1].stop() == 0
    # Nobody is told: the document is all there is.
    desire("news", 2, onnx_folder)
    assert until(lambda: version_of(replicas[0]) == "2", 20)
    late = start()
    late.wait("/readyz")
    assert version_of(late) == "2"
    desire("news", 1, onnx_folder)
    assert until(lambda: [version_of(each) for each in (replicas[0], late)] == ["1", "1"], 20)


@pytest.fixture
def here(store):
    """A catalogue in this process and its follower, whose `look` is called by hand."""
    made = Catalogue(lambda: store)
    yield made, Follower(made, lambda: store)
    made.close()


def state(catalogue):
    (found,) = catalogue.states()
    return found


def with_canary(store, document, beside, **fields):
    canary = {key: beside[key] for key in ("version", "digest", "manifest")}
    canary |= {"weight": 0.2, "until": time.time() + 3600} | fields
    store.write_json("deployments/news.json", {**document, "canary": canary})


@pytest.fixture
def other_folder(onnx_folder, tmp_path):
    """Another model: the same with another card."""
    folder = tmp_path / "other"
    shutil.copytree(onnx_folder, folder)
    card = folder / "tuneyard.json"
    card.write_text(card.read_text().replace('"max_length_tokens": 24', '"max_length_tokens": 23'))
    return folder


def test_what_is_removed_goes_out_of_service(here, store, desire, onnx_folder):
    catalogue, follower = here
    desire("news", 1, onnx_folder)
    follower.look()
    served = catalogue.get("news").stable.served
    assert catalogue.not_ready() == []
    store.remove("deployments/news.json")
    follower.look()
    assert catalogue.states() == []
    with pytest.raises(Fault, match="there is no model 'news' here"):
        catalogue.get("news")
    assert until(lambda: not served.alive)


def test_nothing_is_read_while_nothing_changes(here, store, desire, onnx_folder, monkeypatch):
    catalogue, follower = here
    desire("news", 1, onnx_folder)
    follower.look()
    read = []
    real = deployments.read
    monkeypatch.setattr(deployments, "read", lambda *asked: read.append(asked) or real(*asked))
    for _ in range(3):
        follower.look()
    assert read == []
    desire("news", 2, onnx_folder)
    follower.look()
    assert (len(read), state(catalogue)["version"]) == (1, "2")


def test_what_is_refused_is_said_and_the_old_version_stays(here, store, desire, onnx_folder, tmp_path):
    catalogue, follower = here
    desire("news", 1, onnx_folder)
    follower.look()
    bad = tmp_path / "bad"
    shutil.copytree(onnx_folder, bad)
    (bad / "notes.pkl").write_bytes(b"\x80\x04.")
    desire("news", 2, bad)
    follower.look()
    assert (state(catalogue)["version"], state(catalogue)["ready"]) == ("1", True)
    assert "notes.pkl" in state(catalogue)["refused"]
    assert catalogue.not_ready() == []
    desire("news", 3, onnx_folder)
    follower.look()
    assert (state(catalogue)["version"], state(catalogue)["refused"]) == ("3", "")


def test_a_document_that_does_not_fit_is_refused_with_every_fault(here, store, desire, onnx_folder):
    catalogue, follower = here
    desire("news", 1, onnx_folder)
    follower.look()
    store.write_json("deployments/news.json", {"name": "olds", "version": 0, "digest": "d"})
    follower.look()
    said = state(catalogue)["refused"]
    for fault in ("name is 'olds'", "version: ", "manifest: "):
        assert fault in said
    assert state(catalogue)["version"] == "1"


def test_a_store_that_is_away_changes_nothing(here, store, desire, onnx_folder, monkeypatch):
    catalogue, follower = here
    desire("news", 1, onnx_folder)
    follower.look()

    def away(*_):
        raise StoreError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(deployments, "listed", away)
        follower.look()
        patch.setattr(deployments, "read", away)
        with pytest.raises(StoreError):
            catalogue.follow("news")
    assert (state(catalogue)["version"], state(catalogue)["refused"]) == ("1", "")
    assert catalogue.not_ready() == []


def test_a_dead_worker_is_replaced(here, desire, onnx_folder):
    catalogue, follower = here
    desire("news", 1, onnx_folder)
    follower.look()
    served = catalogue.get("news").stable.served
    served.close()
    assert until(lambda: not served.alive)
    assert catalogue.not_ready() == ["news: its worker has ended"]
    follower.look()
    assert catalogue.not_ready() == []


def test_a_canary_that_passes_takes_over_without_being_loaded_again(
    here, store, desire, onnx_folder, other_folder, monkeypatch
):
    catalogue, follower = here
    two = desire("news", 2, other_folder)
    one = desire("news", 1, onnx_folder)
    opened, alive = [], []
    real = catalogue_module.open_model

    def watched(identity, *rest):
        made, card = real(identity, *rest)
        opened.append(identity.version)
        alive.append(made)
        assert sum(each.alive for each in alive) <= 2
        return made, card

    monkeypatch.setattr(catalogue_module, "open_model", watched)
    follower.look()
    with_canary(store, one, two)
    follower.look()
    assert (state(catalogue)["version"], state(catalogue)["canary"]["version"]) == ("1", "2")
    assert state(catalogue)["canary"]["weight"] == 0.2
    # Another weight loads nothing.
    with_canary(store, one, two, weight=0.4)
    follower.look()
    assert (state(catalogue)["canary"]["weight"], opened) == (0.4, ["1", "2"])
    store.write_json("deployments/news.json", two)
    follower.look()
    assert (state(catalogue)["version"], state(catalogue)["canary"], opened) == ("2", None, ["1", "2"])
    assert until(lambda: [each.alive for each in alive] == [False, True])


def test_a_third_version_finds_room(here, store, desire, onnx_folder, other_folder, monkeypatch):
    catalogue, follower = here
    two = desire("news", 2, other_folder)
    one = desire("news", 1, onnx_folder)
    with_canary(store, one, two)
    follower.look()
    canary = catalogue.get("news").canary.served
    real = catalogue_module.open_model

    def watched(identity, *rest):
        # Told to end before the third is fetched.
        assert until(lambda: not canary.alive, 10)
        return real(identity, *rest)

    monkeypatch.setattr(catalogue_module, "open_model", watched)
    desire("news", 3, other_folder)
    follower.look()
    assert (state(catalogue)["version"], state(catalogue)["canary"]) == ("3", None)


def test_a_canary_that_cannot_be_loaded_leaves_the_stable_version_alone(
    here, store, desire, onnx_folder, tmp_path
):
    catalogue, _ = here
    one = desire("news", 1, onnx_folder)
    with_canary(store, one, one, version=2, digest="f" * 64)
    with pytest.raises(TuneyardError, match="has digest"):
        catalogue.follow("news")
    assert (state(catalogue)["version"], state(catalogue)["canary"]) == ("1", None)
    assert "has digest" in state(catalogue)["refused"]
    assert catalogue.get("news").choose(Choice("any")).identity.version == "1"
