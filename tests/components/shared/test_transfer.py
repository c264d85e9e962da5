"""Large files: checked on the way, gone on with where they were cut off, in little memory."""

from __future__ import annotations

import hashlib
import random
import tracemalloc

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, IncompleteReadError

from components.shared import digest, transfer
from components.shared.errors import StoreError, TuneyardError
from components.shared.store import Store
from components.shared.transfer import Remote, part_bytes, receive, upload

PART = 5 * 2**20  # the least that S3 takes
PARTS = 6


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(transfer, "PART_BYTES", PART)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(random.Random(1).randbytes(PART * (PARTS - 1) + 777))
    return path


@pytest.fixture
def remote(store, file):
    return Remote(store.bucket, store.key("big"), file.stat().st_size, digest.of_file(file))


@pytest.fixture
def calls(store, monkeypatch):
    """What was asked of the store, by operation; `fail_after[op] = n` cuts the line after n of them."""

    class Calls(dict):
        def __init__(self):
            super().__init__(upload_part=[], get_object=[])
            self.fail_after = {}

    seen = Calls()
    for name in seen:
        original = getattr(store.client, name)

        def ask(_name=name, _original=original, **arguments):
            if len(seen[_name]) >= seen.fail_after.get(_name, 1000):
                raise EndpointConnectionError(endpoint_url="http://cut")
            seen[_name].append(arguments.get("PartNumber") or arguments["Range"])
            return _original(**arguments)

        monkeypatch.setattr(store.client, name, ask)
    return seen


def fetched(store, remote, path):
    with path.open("a+b") as stream:
        receive(store.client, remote, stream)
    return digest.of_file(path)


def uploads(store, remote):
    found = store.client.list_multipart_uploads(Bucket=remote.bucket, Prefix=remote.key)
    return found.get("Uploads", [])


def cut_off(store, remote, file, calls, after):
    calls.fail_after["upload_part"] = after
    with pytest.raises(EndpointConnectionError):
        upload(store.client, file, remote)
    del calls.fail_after["upload_part"]
    had = set(calls["upload_part"])
    calls["upload_part"].clear()
    return had


def test_an_upload_that_was_cut_off_sends_only_the_parts_that_are_missing(
    store, remote, file, calls, tmp_path
):
    had = cut_off(store, remote, file, calls, after=4)
    upload(store.client, file, remote)
    assert len(had) == 4 and {*calls["upload_part"]} == {*range(1, PARTS + 1)} - had
    assert uploads(store, remote) == []
    assert fetched(store, remote, tmp_path / "back") == remote.sha256


@pytest.mark.parametrize("sent_twice", [False, True])
def test_a_part_with_other_bytes_is_sent_again(store, remote, file, calls, tmp_path, sent_twice):
    body = file.read_bytes()
    begun = {"Bucket": remote.bucket, "Key": remote.key, "UploadId": transfer._begin(store.client, remote)}
    bodies = {1: [body[:PART]], 2: [random.Random(2).randbytes(PART)], 3: [body[2 * PART : 2 * PART + 5]]}
    if sent_twice:
        bodies[2].insert(0, body[PART : 2 * PART])
    for number, sent in bodies.items():
        for each in sent:
            store.client.upload_part(**begun, PartNumber=number, Body=each, ChecksumAlgorithm="SHA256")
    calls["upload_part"].clear()
    upload(store.client, file, remote)
    assert sorted(calls["upload_part"]) == ([3, 4, 5, 6] if sent_twice else [2, 3, 4, 5, 6])
    assert fetched(store, remote, tmp_path / "back") == remote.sha256


def test_an_upload_that_another_program_began_is_not_gone_on_with(store, remote, file, tmp_path):
    store.client.create_multipart_upload(Bucket=remote.bucket, Key=remote.key, ChecksumAlgorithm="CRC32")
    upload(store.client, file, remote)
    assert fetched(store, remote, tmp_path / "back") == remote.sha256


def test_an_upload_that_a_rival_finishes_is_done(store, remote, file, calls, tmp_path, monkeypatch):
    had = cut_off(store, remote, file, calls, after=4)
    original, rivals = transfer._begun, []

    def begun_then_finished(client, wanted):
        found = original(client, wanted)
        if not rivals:
            rivals.append(found)
            upload(client, file, wanted)
        return found

    monkeypatch.setattr(transfer, "_begun", begun_then_finished)
    upload(store.client, file, remote)
    missing = PARTS - len(had)
    assert missing < len(calls["upload_part"]) <= 2 * missing  # the rival's, and ours, which were refused
    assert fetched(store, remote, tmp_path / "back") == remote.sha256


def test_an_upload_that_was_aborted_meanwhile_begins_anew(store, remote, file, calls, tmp_path):
    cut_off(store, remote, file, calls, after=4)
    (begun,) = uploads(store, remote)
    begun_before = transfer._begun
    abort = {"Bucket": remote.bucket, "Key": remote.key, "UploadId": begun["UploadId"]}

    def begun_then_aborted(client, wanted):
        found = begun_before(client, wanted)
        client.abort_multipart_upload(**abort)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "_begun", begun_then_aborted)
        upload(store.client, file, remote)
    assert fetched(store, remote, tmp_path / "back") == remote.sha256


@pytest.mark.parametrize("size", ["one part", "many parts"])
def test_bytes_that_change_on_the_way_are_refused(store, remote, file, monkeypatch, size):
    if size == "one part":
        file.write_bytes(b"a" * 1000)
        remote = Remote(remote.bucket, remote.key, 1000, digest.of_file(file))
    operation = "put_object" if size == "one part" else "upload_part"
    original = getattr(store.client, operation)

    def flip(**arguments):
        body = bytearray(arguments["Body"])
        body[100] ^= 1
        return original(**arguments | {"Body": bytes(body)})

    monkeypatch.setattr(store.client, operation, flip)
    with pytest.raises(ClientError, match="BadDigest"):
        upload(store.client, file, remote)
    assert store.names("big") == []


def test_a_download_that_was_cut_off_goes_on_from_what_is_on_disk(store, remote, file, calls, tmp_path):
    upload(store.client, file, remote)
    calls.fail_after["get_object"] = 4
    back = tmp_path / "back"
    with pytest.raises(EndpointConnectionError), pytest.MonkeyPatch.context() as quick:
        quick.setattr(transfer, "_ATTEMPTS", 1)
        fetched(store, remote, back)
    assert back.stat().st_size == 4 * PART
    del calls.fail_after["get_object"]
    calls["get_object"].clear()
    assert fetched(store, remote, back) == remote.sha256
    assert sorted(calls["get_object"]) == sorted(
        [f"bytes={4 * PART}-{5 * PART - 1}", f"bytes={5 * PART}-{remote.size - 1}"]
    )


def test_what_a_crash_left_damaged_is_fetched_from_its_start(store, remote, file, tmp_path):
    upload(store.client, file, remote)
    back = tmp_path / "back"
    for left in (bytes(2 * PART), bytes(remote.size), bytes(remote.size + 1)):
        back.write_bytes(left)
        assert fetched(store, remote, back) == remote.sha256


def test_an_answer_that_breaks_off_is_asked_for_again(store, remote, file, tmp_path, monkeypatch):
    upload(store.client, file, remote)
    original, broken = store.client.get_object, []

    def get(**arguments):
        answer = original(**arguments)
        if len(broken) < 3:
            broken.append(arguments["Range"])

            def read():
                raise IncompleteReadError(actual_bytes=1, expected_bytes=PART)

            monkeypatch.setattr(answer["Body"], "read", read)
        return answer

    monkeypatch.setattr(store.client, "get_object", get)
    assert fetched(store, remote, tmp_path / "back") == remote.sha256 and len(broken) == 3


def test_an_object_that_is_changed_while_it_is_read_is_named(store, remote, file, tmp_path):
    upload(store.client, file, remote)
    changed = Remote(remote.bucket, remote.key, remote.size, etag="0123456789abcdef")
    with pytest.raises(TuneyardError, match=r"big was changed while it was read"):
        fetched(store, changed, tmp_path / "back")


def test_memory_does_not_grow_with_the_file(store, tmp_path, monkeypatch):
    """Three parts are in flight and one is written or was just read; urllib3 holds pieces of one more."""
    monkeypatch.setattr(transfer, "PART_BYTES", 2**23)
    path = tmp_path / "big"
    hasher = hashlib.sha256()
    with path.open("wb") as stream:
        for seed in range(24):
            block = random.Random(seed).randbytes(2**23)
            stream.write(block)
            hasher.update(block)
    remote = Remote(store.bucket, store.key("big"), path.stat().st_size, hasher.hexdigest())
    for move in (upload, lambda client, _, wanted: fetched(store, wanted, tmp_path / "back")):
        tracemalloc.start()
        move(store.client, path, remote)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert remote.size == 192 * 2**20 and peak < 64 * 2**20


@pytest.mark.parametrize("size", [0, 1, 2**24, 2**24 + 1, 5 * 2**30, 5 * 2**30 + 1, 2**40, 5 * 2**40])
def test_a_file_of_any_size_that_s3_takes_is_cut_into_parts_that_s3_takes(monkeypatch, size):
    monkeypatch.setattr(transfer, "PART_BYTES", 2**24)
    length = part_bytes(size)
    assert -(-size // length) <= 10_000 and 5 * 2**20 <= length <= 5 * 2**30


def test_a_prefix_whose_copy_was_cut_off_goes_on(store, file, calls, monkeypatch):
    uri = f"{store.root}/base"
    for name in ("a", "b"):
        store.client.upload_file(str(file), store.bucket, store.key(f"base/{name}"))
    with monkeypatch.context() as quick:
        quick.setattr(transfer, "_ATTEMPTS", 1)
        calls.fail_after["get_object"] = 9
        with pytest.raises(StoreError):
            store.get_prefix(uri)
    del calls.fail_after["get_object"]
    calls["get_object"].clear()
    folder = Store(store.root, store.cache).get_prefix(uri)
    assert 3 <= len(calls["get_object"]) <= 5  # of 12 ranges nine were had, two of them out of order at most
    assert {p.name: digest.of_file(p) for p in folder.iterdir()} == dict.fromkeys("ab", digest.of_file(file))
