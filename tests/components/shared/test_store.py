"""The store: complete or absent, verified when read, only what is new travels."""

from __future__ import annotations

import json
import random

import pytest
from botocore.exceptions import ClientError

from components.shared import sources, transfer
from components.shared.errors import StoreError, TuneyardError
from components.shared.manifest import FileEntry, Manifest, describe
from components.shared.s3 import is_data_object, split_uri
from components.shared.store import Store


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("一")
    (folder / "sub" / "b.bin").write_bytes(random.Random(0).randbytes(300_000))
    return folder


def another_cache(store, tmp_path):
    return Store(store.root, tmp_path / "other-cache")


def test_a_tree_comes_back_as_it_went(store, tree, tmp_path):
    manifest = store.put_tree(tree, "dataset", {"count": 2})
    again = another_cache(store, tmp_path).read_manifest(store.manifest_uri(manifest))
    assert again == manifest and again.metadata == {"count": 2}
    back = another_cache(store, tmp_path).get_tree(again, tmp_path / "back")
    assert describe(back) == describe(tree)


def test_equal_bytes_have_one_digest_whoever_made_them(store, tree):
    first = store.put_tree(tree, "dataset", {"a": 1}, {"stage": "x"})
    second = store.put_tree(tree, "dataset", {"b": 2}, {"stage": "y"})
    assert first.digest == second.digest
    assert first.digest != store.put_tree(tree, "model").digest


@pytest.mark.parametrize("damage", ["flip", "cut", "swap", "gone"])
def test_damage_in_the_store_is_noticed_when_read_and_the_object_made_anew(store, tree, tmp_path, damage):
    manifest = store.put_tree(tree, "dataset")
    entry = next(e for e in manifest.files if e.path == "sub/b.bin")
    key = store.key(f"objects/{entry.sha256[:2]}/{entry.sha256}")
    body = bytearray((tree / entry.path).read_bytes())
    if damage == "flip":
        body[1234] ^= 1
    elif damage == "cut":
        del body[-1]
    elif damage == "swap":
        body[:2] = body[1::-1]
    if damage == "gone":
        store.client.delete_object(Bucket=store.bucket, Key=key)
    else:
        store.client.put_object(Bucket=store.bucket, Key=key, Body=bytes(body))
    with pytest.raises(TuneyardError, match=r"sub/b\.bin.*\n.*submit again"):
        another_cache(store, tmp_path).get_tree(manifest, tmp_path / "back")
    assert not store.has_tree(manifest)
    kept = store.names("damaged/")
    assert kept == ([] if damage == "gone" else [f"damaged/objects/{entry.sha256[:2]}/{entry.sha256}"])
    store.put_tree(tree, "dataset")
    back = another_cache(store, tmp_path).get_tree(manifest, tmp_path / "back")
    assert describe(back) == describe(tree)


def test_a_damaged_cache_heals(store, tree, tmp_path):
    manifest = store.put_tree(tree, "dataset")
    for path in (store.cache / "objects").rglob("*"):
        if path.is_file():
            path.write_bytes(b"rotten")
    assert describe(store.get_tree(manifest, tmp_path / "back")) == describe(tree)


def test_only_new_files_travel(store, tree, monkeypatch):
    store.put_tree(tree, "dataset")
    (tree / "new.txt").write_text("new")
    sent = []
    original = transfer.upload

    def upload(client, path, remote):
        sent.append(path)
        original(client, path, remote)

    monkeypatch.setattr(transfer, "upload", upload)
    store.put_tree(tree, "dataset")
    assert sent == [tree / "new.txt"]


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "sub/../../evil"])
def test_a_manifest_cannot_write_outside_its_folder(store, tree, tmp_path, path):
    good = store.put_tree(tree, "dataset").files[0]
    hostile = Manifest("dataset", (FileEntry(path, good.size, good.sha256),))
    with pytest.raises(TuneyardError, match="outside its own folder"):
        store.get_tree(hostile, tmp_path / "back")


def test_a_changed_manifest_is_refused(store, tree):
    text = json.loads(store.put_tree(tree, "dataset").to_json())
    text["files"][0]["sha256"] = "0" * 64
    with pytest.raises(TuneyardError, match="manifest says digest"):
        Manifest.from_json(json.dumps(text), "here")


def test_a_document_is_written_once(store):
    assert store.write_json("x.json", {"v": 1}, once=True)
    assert not store.write_json("x.json", {"v": 2}, once=True)
    assert store.read_json("x.json") == {"v": 1} and store.read_json("y.json") is None


def test_a_prefix_is_listed_by_whole_segments_and_without_markers(store, store_env):
    _, prefix = split_uri(store.root)
    for name in ("corpus/a.jsonl", "corpus/_SAMPLE.json", "corpus-2/b.jsonl"):
        store.client.put_object(Bucket="corpora", Key=f"{prefix}/{name}", Body=b"{}")
    found = store.list_prefix(f"s3://corpora/{prefix}/corpus")
    assert [o["key"] for o in found] == [f"{prefix}/corpus/a.jsonl"]
    assert [p.name for p in store.get_prefix(f"s3://corpora/{prefix}/corpus").iterdir()] == ["a.jsonl"]
    with pytest.raises(TuneyardError, match="nothing is there"):
        store.list_prefix(f"s3://corpora/{prefix}/corp")
    with pytest.raises(TuneyardError, match="no bucket"):
        store.list_prefix("s3://no-such-bucket/x")
    assert not is_data_object("a/_x") and not is_data_object("a/") and is_data_object("a/x")


def test_a_fingerprint_follows_bytes_and_nothing_else(store, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("one")
    before = sources.fingerprint(str(corpus), store, "dataset")
    corpus.touch()
    assert sources.fingerprint(str(corpus), store, "dataset") == before
    corpus.write_text("two")
    assert sources.fingerprint(str(corpus), store, "dataset") != before
    with pytest.raises(TuneyardError, match="no file there"):
        sources.fingerprint(str(tmp_path / "*.csv"), store, "dataset")


@pytest.mark.parametrize(
    "ask",
    [
        lambda store, tree, manifest: store.read_json("x.json"),
        lambda store, tree, manifest: store.write_json("x.json", {}, once=True),
        lambda store, tree, manifest: store.remove("x.json"),
        lambda store, tree, manifest: store.names("x"),
        lambda store, tree, manifest: store.put_tree(tree, "dataset"),
        lambda store, tree, manifest: store.read_manifest(store.manifest_uri(manifest)),
        lambda store, tree, manifest: store.get_tree(manifest, tree.parent / "back"),
        lambda store, tree, manifest: store.has_tree(manifest),
        lambda store, tree, manifest: store.get_prefix("s3://corpora/x"),
    ],
)
def test_a_store_that_is_down_is_named_with_what_to_do(store, tree, tmp_path, monkeypatch, ask):
    manifest = Manifest("dataset", describe(tree))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    down = Store(store.root, tmp_path / "empty", attempts=1)
    with pytest.raises(StoreError, match=r"the S3 store at http://127\.0\.0\.1:9 failed") as caught:
        ask(down, tree, manifest)
    assert "tuneyard status" in caught.value.todo and "tuneyard up" in caught.value.todo


@pytest.mark.parametrize(("status", "code"), [(507, "InsufficientStorage"), (500, "InternalError")])
def test_a_store_without_room_says_how_much_there_is(store, tree, monkeypatch, status, code):
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}

    def refuse(**_):
        raise ClientError(answer, "PutObject")

    monkeypatch.setattr(store.client, "put_object", refuse)
    for write in (lambda: store.write_json("x.json", {}), lambda: store.put_tree(tree, "dataset")):
        with pytest.raises(StoreError, match=f"{code}.*PutObject") as caught:
            write()
        assert "free some disk" in caught.value.todo and "bytes are free under" in caught.value.todo
