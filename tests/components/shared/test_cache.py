"""The cache of a node: verified once, never trusted after a write, and a hand-over is a link."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading

import pytest

from components.shared import cache, digest, objects, transfer
from components.shared.errors import TuneyardError
from components.shared.manifest import describe
from components.shared.store import Store

BIG = 3 * 2**20


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(BIG))
    return folder


@pytest.fixture
def fetches(monkeypatch):
    """Keys that were fetched from the store."""
    keys = []
    original = objects.fetch

    def fetch(client, entry, *rest):
        keys.append(entry.path)
        original(client, entry, *rest)

    monkeypatch.setattr(objects, "fetch", fetch)
    return keys


def cached(store, manifest, path="model.safetensors"):
    entry = next(e for e in manifest.files if e.path == path)
    return cache.path_of(store.cache, entry.sha256)


def test_what_a_stage_gives_becomes_the_cached_file_without_a_copy(store, tree, tmp_path, fetches):
    inode = (tree / "model.safetensors").stat().st_ino
    expected = describe(tree)
    manifest = store.put_tree(tree, "model", given=True)
    assert cached(store, manifest).stat().st_ino == inode
    shutil.rmtree(tree)
    back = store.get_tree(manifest, tmp_path / "back")
    assert (back / "model.safetensors").stat().st_ino == inode
    assert describe(back) == expected and fetches == []


def test_what_was_verified_is_not_hashed_at_the_next_hand_over(store, tree, tmp_path, monkeypatch, fetches):
    hashed = []
    original = digest.of_file

    def of_file(path):
        hashed.append(path)
        return original(path)

    monkeypatch.setattr(digest, "of_file", of_file)
    given = store.put_tree(tree, "model", given=True)
    assert sorted(path.name for path in hashed) == ["config.json", "model.safetensors"]
    hashed.clear()
    store.get_tree(given, tmp_path / "one")
    assert hashed == [] and fetches == []
    other = Store(store.root, tmp_path / "other-cache")
    other.get_tree(given, tmp_path / "two")
    assert len(fetches) == 2
    hashed.clear()
    back = other.get_tree(given, tmp_path / "three")
    assert hashed == [] and len(fetches) == 2
    assert describe(back) == given.files


@pytest.mark.parametrize("how", ["write", "mapped", "replaced", "copied over", "cut"])
def test_a_cached_file_that_somebody_wrote_to_is_fetched_again(store, tree, tmp_path, fetches, how):
    expected = describe(tree)
    manifest = store.put_tree(tree, "model", given=True)
    used = store.get_tree(manifest, tmp_path / "used") / "model.safetensors"
    whole = used.read_bytes()
    used.chmod(0o644)
    if how == "write":
        with used.open("r+b") as stream:
            stream.write(b"x")
    if how == "mapped":
        import mmap

        with used.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as view:
            view[:1] = b"x" if whole[:1] != b"x" else b"y"
            view.flush()
    if how == "cut":
        os.truncate(used, BIG - 1)
    if how in ("replaced", "copied over"):
        path = cached(store, manifest)
        aside = path.with_name("aside")
        aside.write_bytes(b"x" * BIG)
        shutil.copystat(path, aside)
        if how == "replaced":
            os.replace(aside, path)
        else:
            path.write_bytes(aside.read_bytes())
    back = store.get_tree(manifest, tmp_path / "back")
    assert describe(back) == expected
    assert fetches == ["model.safetensors"]


def test_after_a_crash_a_file_under_its_old_time_is_not_trusted(store, tree, tmp_path, fetches, monkeypatch):
    manifest = store.put_tree(tree, "model", given=True)
    path = cached(store, manifest)
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(bytes(BIG))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    monkeypatch.setattr(cache, "_boot", lambda: "another")
    store.get_tree(manifest, tmp_path / "back")
    assert fetches == ["model.safetensors"]


def test_a_file_that_is_written_to_while_it_is_stored_is_refused(store, tree, monkeypatch):
    original = transfer.upload

    def upload(client, path, remote):
        original(client, path, remote)
        if path.name == "model.safetensors":
            path.chmod(0o644)
            with path.open("r+b") as stream:
                stream.write(b"late")

    monkeypatch.setattr(transfer, "upload", upload)
    with pytest.raises(TuneyardError, match=r"model\.safetensors was written to while it was stored"):
        store.put_tree(tree, "model", given=True)
    assert store.names("manifests/") == []


def test_a_file_with_another_name_is_copied_and_not_taken(store, tree, tmp_path):
    os.link(tree / "model.safetensors", tmp_path / "kept-by-somebody")
    manifest = store.put_tree(tree, "model", given=True)
    assert not cached(store, manifest).samefile(tmp_path / "kept-by-somebody")


def test_a_folder_that_is_not_given_stays_as_it_is(store, tree):
    before = [(p.name, p.stat().st_mode, p.stat().st_mtime_ns, p.stat().st_nlink) for p in tree.iterdir()]
    store.put_tree(tree, "model")
    after = [(p.name, p.stat().st_mode, p.stat().st_mtime_ns, p.stat().st_nlink) for p in tree.iterdir()]
    assert before == after


def test_small_files_are_copies_to_edit_and_weights_are_read_only(store, tree, tmp_path):
    manifest = store.put_tree(tree, "model", given=True)
    back = store.get_tree(manifest, tmp_path / "back")
    assert not (back / "config.json").samefile(cached(store, manifest, "config.json"))
    assert (back / "config.json").stat().st_mode & 0o200
    assert not (back / "model.safetensors").stat().st_mode & 0o222


def test_several_who_want_one_object_fetch_it_once(store, tree, tmp_path, fetches):
    manifest = store.put_tree(tree, "model")
    other = Store(store.root, tmp_path / "other-cache")
    threads = [
        threading.Thread(target=other.get_tree, args=(manifest, tmp_path / f"back-{n}")) for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fetches) == ["config.json", "model.safetensors"]
    assert all(describe(tmp_path / f"back-{n}") == manifest.files for n in range(6))
    assert not list((tmp_path / "other-cache").rglob("*.partial"))


def test_a_killed_fetch_leaves_what_it_has_and_no_lock(store, tree, tmp_path, fetches):
    manifest = store.put_tree(tree, "model")
    entry = next(e for e in manifest.files if e.path == "model.safetensors")
    other = Store(store.root, tmp_path / "other-cache")
    partial = cache.path_of(other.cache, entry.sha256).with_name(f".{entry.sha256}.partial")
    code = (
        "import os, sys; from pathlib import Path; from components.shared import cache\n"
        "with cache.alone(Path(sys.argv[1])) as stream:\n"
        "    stream.write(Path(sys.argv[2]).read_bytes()[:2000000]); stream.flush(); os._exit(9)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(partial), str(tree / "model.safetensors")], check=False
    )
    assert killed.returncode == 9 and partial.stat().st_size == 2_000_000
    ranges = []
    original = store.client.get_object
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            other.client, "get_object", lambda **a: (ranges.append(a.get("Range")), original(**a))[1]
        )
        other.get_tree(manifest, tmp_path / "back")
    assert f"bytes=2000000-{BIG - 1}" in ranges and describe(tmp_path / "back") == manifest.files
