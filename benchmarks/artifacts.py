"""A large model through three steps, beside what copies whole folders: boto3, s5cmd, obstore.

Write a model; read it, change one shard of eight, write it; read it. The peers do what a pipeline does that
hands artifacts from step to step as KFP's launcher does: each step copies its whole input down and its whole
output up. Ours is run twice: with the steps on one node (one cache), and on a node each (an empty cache
each). All talk to one SeaweedFS, in a bucket of their own that is deleted afterwards, which gives the disk
back at once. What a step does to its files is not timed, only what it takes until they are stored, and until
they are there. Ours also verifies what it reads; the peers do not. `--gib` sets the size, `--rounds` how
many rounds there are.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import copying
from benchmarks.copying import Copy
from components.shared import s3
from components.shared.manifest import Manifest
from components.shared.store import Store
from pipelines.embedded import platform

_SHARDS = 8
_BLOCK = 2**24
_CHANGED = "model-3.safetensors"


class Clock:
    """Seconds and bytes of one contender, by what was done."""

    def __init__(self) -> None:
        self.seconds = {"up": 0.0, "down": 0.0}
        self.moved = {"up": 0, "down": 0}

    @contextmanager
    def timed(self, way: str) -> Iterator[None]:
        """Add what is inside."""
        started = time.perf_counter()
        yield
        self.seconds[way] += time.perf_counter() - started

    def figures(self, name: str) -> dict[str, Any]:
        """Rows for the report."""
        seconds, moved = sum(self.seconds.values()), sum(self.moved.values())
        rates = {
            f"{name}.{way}_gb_per_second": round(self.moved[way] / self.seconds[way] / 1e9, 3)
            for way in ("up", "down")
            if self.moved[way] > 2**20
        }
        return {f"{name}.seconds": round(seconds, 1), f"{name}.gib_moved": round(moved / 2**30, 2), **rates}


def _write_model(folder: Path, gib: float) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    size = int(gib * 2**30 / _SHARDS)
    for number in range(_SHARDS):
        with (folder / f"model-{number}.safetensors").open("wb") as stream:
            for start in range(0, size, _BLOCK):
                stream.write(os.urandom(min(_BLOCK, size - start)))


def _change(folder: Path) -> None:
    """Rewrite a shard as a stage does, and leave the others as they are."""
    path = folder / _CHANGED
    size = path.stat().st_size
    path.unlink()
    with path.open("wb") as stream:
        for start in range(0, size, _BLOCK):
            stream.write(os.urandom(min(_BLOCK, size - start)))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _peer(model: Path, scratch: Path, up: Copy, down: Copy) -> Clock:
    """Three steps that copy whole folders."""
    clock = Clock()

    def store(folder: Path, prefix: str) -> None:
        with clock.timed("up"):
            up(folder, prefix)
        clock.moved["up"] += _size(folder)

    def fetch(folder: Path, prefix: str) -> None:
        folder.mkdir()
        with clock.timed("down"):
            down(folder, prefix)
        clock.moved["down"] += _size(folder)

    store(model, "step-1")
    fetch(scratch / "two", "step-1")
    _change(scratch / "two")
    store(scratch / "two", "step-2")
    shutil.rmtree(scratch / "two")
    fetch(scratch / "three", "step-2")
    shutil.rmtree(scratch / "three")
    return clock


@contextmanager
def _counted(store: Store, clock: Clock) -> Iterator[None]:
    """Count the bodies that the store's client sends and receives inside."""
    events, lock = store.client.meta.events, threading.Lock()

    def sent(request: Any, **_: Any) -> None:
        body = request.body  # the bytes, or a stream over them
        size = len(body.getbuffer() if isinstance(body, io.BytesIO) else body or b"")
        with lock:
            clock.moved["up"] += size

    def received(parsed: dict[str, Any], **_: Any) -> None:
        with lock:
            clock.moved["down"] += int(parsed.get("ContentLength", 0))

    events.register("before-sign.s3", sent)
    events.register("after-call.s3.GetObject", received)
    yield
    events.unregister("before-sign.s3", sent)
    events.unregister("after-call.s3.GetObject", received)


def _ours(model: Path, scratch: Path, root: str, one_node: bool) -> dict[str, Any]:
    """Three steps through the store; then the hand-over on one node, and the hit, again."""
    name = "ours_on_one_node" if one_node else "ours_on_a_node_each"
    clock, after = Clock(), Clock()
    stores = [Store(root, scratch / f"cache-{0 if one_node else number}") for number in range(3)]
    with _counted(stores[0], clock):
        with clock.timed("up"):
            first = stores[0].put_tree(model, "model", given=True)
        shutil.rmtree(model)
        second = _second_step(stores[1], first, scratch, clock)
        if not one_node:
            shutil.rmtree(stores[0].cache)
        with clock.timed("down"):
            stores[2].get_tree(second, scratch / "three")
    shutil.rmtree(scratch / "three")
    with _counted(stores[2], after):
        with after.timed("down"):
            stores[2].get_tree(second, scratch / "again")
        with after.timed("up"):
            assert stores[2].has_tree(second)
    return clock.figures(name) | {
        f"{name}.same_node_hand_over_seconds": round(after.seconds["down"], 4),
        f"{name}.cache_hit_seconds": round(after.seconds["up"], 4),
        f"{name}.cache_hit_bytes_down_and_up": [after.moved["down"], after.moved["up"]],
    }


def _second_step(store: Store, first: Manifest, scratch: Path, clock: Clock) -> Manifest:
    with clock.timed("down"):
        folder = store.get_tree(first, scratch / "two")
    _change(folder)
    with clock.timed("up"):
        second = store.put_tree(folder, "model", given=True)
    shutil.rmtree(folder)
    return second


def _limits(model: Path) -> dict[str, float]:
    """What no client on this machine can pass: the digest on one core, loopback, a copy on the disk; GB/s."""
    block = os.urandom(2**26)
    started = time.perf_counter()
    for _ in range(8):
        hashlib.sha256(block)
    digest = 8 * len(block) / (time.perf_counter() - started)
    shard = model / _CHANGED
    started = time.perf_counter()
    with (model.parent / "copy").open("wb") as stream:
        stream.write(shard.read_bytes())
        os.fsync(stream.fileno())
    disk = shard.stat().st_size / (time.perf_counter() - started)
    (model.parent / "copy").unlink()
    return {
        "limit.sha256_one_core_gb_per_second": round(digest / 1e9, 2),
        "limit.loopback_gb_per_second": round(_loopback(block) / 1e9, 2),
        "limit.disk_write_synced_gb_per_second": round(disk / 1e9, 2),
    }


def _loopback(block: bytes) -> float:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            with socket.create_connection(server.getsockname()) as client:
                for _ in range(16):
                    client.sendall(block)

        sender = threading.Thread(target=send)
        started = time.perf_counter()
        sender.start()
        connection, _ = server.accept()
        buffer, received = bytearray(2**20), 0
        with connection:
            while count := connection.recv_into(buffer):
                received += count
        sender.join()
    return received / (time.perf_counter() - started)


@contextmanager
def _bucket(name: str) -> Iterator[str]:
    """A bucket of one contender; with it SeaweedFS drops the volumes, so the disk is free for the next."""
    bucket = f"bench-{name}"
    client = s3.client(10)
    client.create_bucket(Bucket=bucket)
    try:
        yield bucket
    finally:
        store = Store(f"s3://{bucket}", Path("unused"))
        for key in store.names(""):
            store.remove(key)
        client.delete_bucket(Bucket=bucket)


def _told(figures: dict[str, Any]) -> dict[str, Any]:
    """The same figures, said as they come: the whole takes most of an hour at 10 GiB."""
    for key, value in figures.items():
        print(f"  {key:50} {value}", file=sys.stderr, flush=True)
    return figures


def _round(model: Path, scratch: Path) -> dict[str, Any]:
    """Each contender once."""
    figures: dict[str, Any] = {}
    peers = {"boto3": copying.boto3, "s5cmd": copying.s5cmd, "obstore": copying.obstore}
    for name, make in peers.items():
        with _bucket(name) as bucket:
            figures |= _told(_peer(model, scratch, *make(bucket)).figures(name))
    for one_node in (True, False):
        with _bucket(f"ours-{int(one_node)}") as bucket:
            given = scratch / "given"
            shutil.copytree(model, given)
            figures |= _told(_ours(given, scratch / bucket, f"s3://{bucket}", one_node))
            shutil.rmtree(scratch / bucket)
    return figures


def run(gib: float, rounds: int) -> dict[str, Any]:
    """Run all contenders in turn, on one SeaweedFS, in rounds; of each its least disturbed round counts."""
    with tempfile.TemporaryDirectory(prefix="tuneyard-bench-") as folder:
        home, scratch = Path(folder) / "home", Path(folder) / "scratch"
        os.environ["TUNEYARD_HOME"] = str(home)
        os.environ.update(platform.environment(platform.up(home)))
        try:
            model = scratch / "model"
            _write_model(model, gib)
            limits = _told(_limits(model))
            each_round = [_round(model, scratch) for _ in range(rounds)]
        finally:
            platform.down(home)
    figures: dict[str, Any] = {"cores": os.cpu_count(), "gib": gib, "rounds": rounds} | limits
    names = [key.removesuffix(".seconds") for key in each_round[0] if key.endswith(".seconds")]
    for name in names:
        best = min(each_round, key=lambda each: float(each[f"{name}.seconds"]))
        figures |= {key: value for key, value in best.items() if key.startswith(f"{name}.")}
        figures[f"{name}.seconds_of_each_round"] = [each[f"{name}.seconds"] for each in each_round]
    for way in ("one_node", "a_node_each"):
        for peer in ("boto3", "s5cmd", "obstore"):
            ratio = figures[f"{peer}.seconds"] / figures[f"ours_on_{way}.seconds"]
            figures[f"ours_on_{way}.times_faster_than_{peer}"] = round(ratio, 2)
    return figures
