"""Checkpoints that are complete or absent, and hold everything a resume needs; no pickle in them.

A checkpoint is a folder `step-N`: trainable weights, optimizer moments and random state as safetensors, the
rest as JSON. It is written aside, synced and renamed, so that a folder of that name is a whole one. A
training of several nodes also keeps it in the store, where `state.json` with the files' digests comes last.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.shared import digest, s3, transfer
from components.shared.store import Store
from components.shared.transfer import Remote

log = logging.getLogger("tuneyard.train")


def trainable(model: Any) -> dict[str, Any]:
    """The weights that move in this run, now or later, by name; see adapters/unfreezing.py."""
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad or getattr(weight, "waits", False)
    }


def copy_weights(model: Any) -> dict[str, Any]:
    """A copy of the weights that move, on the CPU."""
    return {name: weight.detach().to("cpu", copy=True) for name, weight in trainable(model).items()}


def restore_weights(model: Any, weights: Mapping[str, Any]) -> None:
    """Put copied weights back."""
    import torch

    with torch.no_grad():
        for name, weight in trainable(model).items():
            weight.copy_(weights[name])


def random_state() -> dict[str, Any]:
    """What the next random numbers depend on, by device."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def save(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Any]], state: Any, keep: int) -> Path:
    """Write the checkpoint of a step and delete the oldest beyond `keep`. Returns its folder.

    Args:
        folder: of all checkpoints of this run.
        step: optimizer updates done.
        tensors: of each file: `weights` that move, the optimizer's `moments`, `random` state, and `best`, the
            weights of the best evaluation so far, which may be empty.
        state: JSON value: history, best loss, patience used.
        keep: how many checkpoints stay.
    """
    from safetensors.torch import save_file

    aside = folder / f".step-{step}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, named in tensors.items():
        if named:
            save_file(dict(named), aside / f"{name}.safetensors")
    files = {path.name: digest.of_file(path) for path in sorted(aside.iterdir())}
    (aside / "state.json").write_text(json.dumps({"step": step, "state": state, "files": files}))
    for path in aside.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    path = folder / f"step-{step}"
    _place(aside, path)
    for old in _steps(folder)[keep:]:
        shutil.rmtree(old)
    return path


def _place(aside: Path, path: Path) -> None:
    """Give a folder its name, from which moment it counts; what had the name (damaged, or cut off) goes."""
    before = path.with_name(f".{path.name}-before")
    shutil.rmtree(before, ignore_errors=True)
    if path.exists():
        os.replace(path, before)
    os.replace(aside, path)
    entry = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(entry)  # the new name itself, should the power fail
    finally:
        os.close(entry)
    shutil.rmtree(before, ignore_errors=True)


def _steps(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("step-*") if p.name[5:].isdigit()] if folder.exists() else []
    return sorted(found, key=lambda p: -int(p.name[5:]))


def newest(folder: Path, after: int = 0) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state, or None. A damaged one is named and passed over.

    Args:
        folder: of checkpoints.
        after: those of later steps alone: where a second phase begins.
    """
    for path in (path for path in _steps(folder) if int(path.name[5:]) > after):
        try:
            state = json.loads((path / "state.json").read_text())
            bad = [name for name, sha in state["files"].items() if digest.of_file(path / name) != sha]
        except (OSError, ValueError, KeyError) as error:
            bad = [f"state.json ({error})"]
        if not bad:
            return path, state
        log.warning("checkpoint %s is damaged (%s); trying the one before it", path, ", ".join(bad))
    return None


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a checkpoint as `save` was given them; none of a file that it does not have."""
    from safetensors.torch import load_file

    names = ("weights", "moments", "random", "best")
    files = {name: path / f"{name}.safetensors" for name in names}
    return {name: dict(load_file(file)) if file.exists() else {} for name, file in files.items()}


def restore_random(states: Mapping[str, Any]) -> None:
    """Put a `random_state` back."""
    import torch

    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


@s3.faults_named("storing a checkpoint")
def upload(store: Store, prefix: str, path: Path, keep: int) -> None:
    """Copy a checkpoint to the store, its state last, and delete the oldest there beyond `keep`.

    Args:
        store: where to.
        prefix: name in the store under which this training keeps its checkpoints.
        path: folder of the checkpoint.
        keep: how many stay.
    """
    files = json.loads((path / "state.json").read_text())["files"]
    for name, sha256 in {**files, "state.json": digest.of_file(path / "state.json")}.items():
        key = store.key(f"{prefix}/{path.name}/{name}")
        transfer.upload(
            store.client, path / name, Remote(store.bucket, key, (path / name).stat().st_size, sha256)
        )
    for step in uploaded(store, prefix)[keep:]:
        forget(store, f"{prefix}/step-{step}")


def forget(store: Store, prefix: str) -> None:
    """Delete what is below a name: first what says that it is whole."""
    for name in sorted(store.names(f"{prefix}/"), key=lambda name: not name.endswith("/state.json")):
        store.remove(name)


def uploaded(store: Store, prefix: str) -> list[int]:
    """Steps whose checkpoint in the store has its state, the newest first."""
    ends = [name.split("/")[-2:] for name in store.names(f"{prefix}/")]
    return sorted((int(step[5:]) for step, file in ends if file == "state.json"), reverse=True)


@s3.faults_named("fetching a checkpoint")
def fetch(store: Store, prefix: str, step: int, folder: Path) -> bool:
    """Copy the checkpoint of a step from the store into a folder of checkpoints.

    Returns:
        Whether it arrived whole; if not, the folder is without it.
    """
    aside, path = folder / f".step-{step}", folder / f"step-{step}"
    for old in (aside, path):  # what is here may be damaged, and must not stay if this does not arrive
        shutil.rmtree(old, ignore_errors=True)
    aside.mkdir(parents=True)
    sizes = {
        listed.name.rsplit("/", 1)[-1]: listed.size for listed in store.listing(f"{prefix}/{path.name}/")
    }

    def get(name: str, sha256: str) -> None:
        remote = Remote(store.bucket, store.key(f"{prefix}/{path.name}/{name}"), sizes[name], sha256)
        with (aside / name).open("a+b") as stream:
            transfer.receive(store.client, remote, stream)

    try:
        get("state.json", "")
        for name, sha256 in json.loads((aside / "state.json").read_text())["files"].items():
            get(name, sha256)
    except (transfer.NotTheseBytes, ValueError, KeyError) as error:
        log.warning("the checkpoint of step %d in the store is damaged (%s)", step, error)
        shutil.rmtree(aside)
        return False
    _place(aside, path)
    return True
