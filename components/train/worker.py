"""What each process of a training of several nodes runs; torchrun starts it, and again after a fault.

All processes compute, the first one writes: checkpoints and the result to the store, curves to MLflow.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from dataclasses import asdict
from functools import partial

from components.shared import digest
from components.shared.errors import EXIT_FAILED, EXIT_INTERRUPTED, StoreError, TuneyardError
from components.shared.manifest import Manifest
from components.shared.stage import Artifact, Context, Result, work_folder
from components.shared.store import Store
from components.train import keeping, ranks
from components.train.config import TrainConfig
from components.train.ranks import Ranks
from components.train.sharding.config import Sharding
from components.train.train import train_here
from components.train.trainjob import KEY

log = logging.getLogger("tuneyard.train")


def work(key: str, ours: Ranks, store: Store) -> None:
    """Do this process's part of the training of a key.

    Args:
        key: of the stage.
        ours: the processes.
        store: with the order in it.

    Raises:
        StageStopped: as `train_here`.
        TuneyardError: as `train_here`; there is no such order, or it is one of other code.
    """
    order = store.read_json(f"{keeping.folder(key)}/order.json")
    if order is None:
        raise TuneyardError(
            f"there is no {keeping.folder(key)}/order.json in {store.root}",
            "the stage that made this job writes to another store: see ConfigMap tuneyard-platform",
        )
    if order["code"] != digest.of_code("train"):
        raise TuneyardError(
            f"the stage has code {order['code'][:12]} and this image {digest.of_code('train')[:12]}",
            "build both images from one tree: make images",
        )
    config = TrainConfig.model_validate(order["config"])
    # Processes of one node share the store's cache, and nothing else.
    home = work_folder("train", key) / f"rank-{ours.rank}"
    shutil.rmtree(home, ignore_errors=True)
    context = Context(order["run"], order["pipeline"], "train", key, store, home / "out", home)
    context.out.mkdir(parents=True)
    manifests = {n: Manifest.from_json(text, f"input {n}") for n, text in order["inputs"].items()}
    inputs = {n: Artifact(m, store.get_tree(m, home / "inputs" / n)) for n, m in manifests.items()}
    keeping.resume(context, ours)
    saved = partial(keeping.keep, context=context, checkpoints=config.keep_checkpoints)
    sharding = Sharding.model_validate(order["sharding"])
    result = train_here(config, inputs, context, ours, saved, sharding=sharding)
    if ours.writes:
        _hand_over(result, context)


def _hand_over(result: Result, context: Context) -> None:
    """Leave what came out for the stage's pod, which commits it."""
    manifest = context.store.put_tree(context.out, "training")
    found = {name: value for name, value in asdict(result).items() if name != "page"}
    found["manifest"] = manifest.to_json()
    context.store.write_json(f"{keeping.folder(context.key)}/result.json", found)


def _failed(error: TuneyardError, key: str, store: Store) -> None:
    """Tell the stage what no further attempt would change."""
    store.impatient().write_json(f"{keeping.folder(key)}/failed.json", error.facts())


def main() -> int:
    """Train; returns the exit status, which is not 0 where torchrun should start all processes again."""
    key = os.environ[KEY]
    ours = ranks.join()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("tuneyard").setLevel(logging.INFO if ours.writes else logging.WARNING)
    # What is told to one process all learn between two updates; see fit.py.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        store = Store.from_environment()
        work(key, ours, store)
    except StoreError as error:
        log.error("train, process %d: %s", ours.rank, error)
        return EXIT_FAILED
    except TuneyardError as error:
        log.error("train, process %d: %s", ours.rank, error)
        _failed(error, key, store)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    ranks.part(ours)
    return 0


if __name__ == "__main__":
    sys.exit(main())
