"""`ensure` against a real S3 server: once, whole, and never over somebody's own data."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from components.shared.errors import TuneyardError
from components.shared.s3 import is_data_object
from pipelines.samples import catalogue, prefix
from pipelines.samples.catalogue import Package
from pipelines.samples.fetch import ensure

CONTENT = {"qa/a.txt": b"alpha", "qa/b.txt": b"beta"}
NAMES = {"qa/a.txt": "a.txt", "qa/b.txt": "sub/b.txt"}


@pytest.fixture
def write_catalogue(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Package], str]:
    """Make a package the one sample of the catalogue; returns the sample's URI."""

    def write(package: Package) -> str:
        uri = f"s3://{store}/legal/tiny/"
        facts = {
            "uri": uri,
            "what": "two words",
            "licence": "none",
            "size": 9,
            "scratch": 9,
            "convert": {"kind": "copy"},
        }
        path = tmp_path / f"catalogue-{package.sha256}.json"
        path.write_text(json.dumps({"samples": [facts | {"packages": [package.model_dump()]}]}))
        monkeypatch.setattr(catalogue, "CATALOGUE", path)
        return uri

    return write


@pytest.fixture
def uri(write_catalogue: Callable[[Package], str], put_wheel: Callable[..., Package]) -> str:
    return write_catalogue(put_wheel("tiny-corpus", CONTENT, NAMES))


def _client() -> Any:
    # Not boto3.client: its default session keeps the credentials of whoever used it first.
    return boto3.session.Session().client("s3")


def _objects(store: str) -> dict[str, bytes]:
    client = _client()
    keys = [o["Key"] for o in client.list_objects_v2(Bucket=store).get("Contents", [])]
    return {key: client.get_object(Bucket=store, Key=key)["Body"].read() for key in keys}


def _data(store: str) -> dict[str, bytes]:
    return {key: body for key, body in _objects(store).items() if is_data_object(key)}


WHOLE = {"legal/tiny/a.txt": b"alpha", "legal/tiny/sub/b.txt": b"beta"}


def test_the_first_time_fetches_and_the_second_does_nothing(
    tmp_path: Path, store: str, uri: str, shelf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert ensure([f"s3://{store}/legal", "./mine.jsonl", "s3://corpora-of-mine/x"], tmp_path) == [uri]
    assert _data(store) == WHOLE
    first = _objects(store)
    marker = json.loads(first["legal/tiny/_SAMPLE.json"])
    assert {name: entry["size"] for name, entry in marker["objects"].items()} == {"a.txt": 5, "sub/b.txt": 4}
    assert marker["packages"][0]["version"] == "1.0"
    # With neither registry nor cache, only doing nothing can succeed.
    for path in [*shelf.iterdir(), *(tmp_path / "downloads").rglob("*.whl")]:
        path.unlink()
    caplog.clear()
    with caplog.at_level(logging.INFO, "tuneyard.samples"):
        assert ensure([uri, uri.rstrip("/")], tmp_path) == []
    assert _objects(store) == first
    assert caplog.text == ""


@pytest.mark.parametrize("uris", [[], ["s3://nowhere/at/all", "google/gemma-3-270m", "data/*.jsonl"]])
def test_other_uris_touch_nothing(tmp_path: Path, uris: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert ensure(uris, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_lost_object_is_put_back_from_the_cache(tmp_path: Path, store: str, uri: str, shelf: Path) -> None:
    ensure([uri], tmp_path)
    _client().delete_object(Bucket=store, Key="legal/tiny/a.txt")
    for path in shelf.iterdir():
        path.unlink()
    assert ensure([uri], tmp_path) == [uri]
    assert _data(store) == WHOLE


def test_an_upload_cut_short_is_not_trusted_and_done_again(
    tmp_path: Path, store: str, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(client: Any, bucket: str, key: str) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prefix, "_stored_sha256", cut)
        with pytest.raises(KeyboardInterrupt):
            ensure([uri], tmp_path)
    assert "legal/tiny/_SAMPLE.json" not in _objects(store)
    assert ensure([uri], tmp_path) == [uri]
    assert _data(store) == WHOLE
    assert set(_objects(store)) == {*WHOLE, "legal/tiny/_SAMPLE.json"}


def test_a_users_own_data_at_the_same_prefix_is_left_alone(
    tmp_path: Path, store: str, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = _client()
    client.create_bucket(Bucket=store)
    client.put_object(Bucket=store, Key="legal/tiny/a.txt", Body=b"mine")
    with caplog.at_level(logging.INFO, "tuneyard.samples"):
        assert ensure([uri], tmp_path) == []
    assert _objects(store) == {"legal/tiny/a.txt": b"mine"}
    assert "is used as it is" in caplog.text


def test_a_new_pin_replaces_the_old_objects(
    tmp_path: Path,
    store: str,
    uri: str,
    put_wheel: Callable[..., Package],
    write_catalogue: Callable[[Package], str],
) -> None:
    ensure([uri], tmp_path)
    write_catalogue(put_wheel("newer-corpus", {"qa/c.txt": b"gamma"}, {"qa/c.txt": "c.txt"}))
    assert ensure([uri], tmp_path) == [uri]
    assert _data(store) == {"legal/tiny/c.txt": b"gamma"}


def test_bytes_that_the_store_damages_are_noticed(
    tmp_path: Path, store: str, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "_stored_sha256", lambda client, bucket, key: "0" * 64)
    with pytest.raises(TuneyardError, match=r"legal/tiny/a\.txt reads back with sha256 0000"):
        ensure([uri], tmp_path)
    assert "legal/tiny/_SAMPLE.json" not in _objects(store)


def test_a_damaged_marker_is_no_marker(tmp_path: Path, store: str, uri: str) -> None:
    ensure([uri], tmp_path)
    _client().put_object(Bucket=store, Key="legal/tiny/_SAMPLE.json", Body=b'{"recipe"')
    assert ensure([uri], tmp_path) == [uri]
    assert json.loads(_objects(store)["legal/tiny/_SAMPLE.json"])["objects"]


def test_a_store_that_is_down_is_named(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(TuneyardError, match=r"S3 store at http://127\.0\.0\.1:9 failed") as caught:
        ensure([uri], tmp_path)
    assert "make status" in caught.value.todo


def test_credentials_that_are_refused_are_named(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(TuneyardError, match="SignatureDoesNotMatch"):
        ensure([uri], tmp_path)
