"""A training that will not fit in this machine's memory is refused before any stage runs."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.shared.errors import TuneyardError, UsageError
from components.shared.store import Store
from pipelines import advise, sizing
from pipelines.embedded.preflight import available_memory_gib
from pipelines.spec import PipelineSpec

log = logging.getLogger("tuneyard.submit")

_PATIENCE_SECONDS = 300


def refuse_unfit(spec: PipelineSpec, store: Store) -> None:
    """Refuse a training that will not fit in this machine's memory, before any stage runs.

    The dry run happens in a process of its own: its libraries would stay in memory beside the training.

    Raises:
        UsageError: it will not fit; says by how much, and which settings would.
    """
    limit = available_memory_gib()
    with tempfile.TemporaryDirectory(prefix="tuneyard-advise-") as scratch:
        try:
            base = advise.base_of(spec.train, store, Path(scratch))
        except TuneyardError:
            return  # what is wrong with the base, the stage that reads it says
        heaviest, share = sizing.heaviest(spec.train), limit * 2**30 / sizing.at_once(spec.train)
        if sizing.surely_fits(heaviest, base.shape(), base.file_bytes, share):
            return
    log.info("submit: predicting how much memory train will need")
    asked = json.dumps({"spec": spec.resolved(), "available_gib": limit})
    command = [sys.executable, "-m", "pipelines.fits"]
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False
        )
        said = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        log.warning("submit: the memory of train could not be predicted (%s)", type(error).__name__)
        return
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        log.warning("submit: the memory of train could not be predicted: %s", last[0])
        return
    memory = said["memory"]
    if memory["fits"]:
        log.info("submit: train will need %.1f GiB, there are %.1f", memory["train_gib"], memory["limit_gib"])
        return
    raise UsageError(unfit(said), what_would(said))


def unfit(said: Mapping[str, Any]) -> str:
    """One sentence on a training that does not fit."""
    memory = said["memory"]
    return (
        f"train will need {memory['train_gib']} GiB of memory; {memory['limit_is']}: "
        f"{memory['limit_gib']} GiB (nothing has started)"
    )


def what_would(said: Mapping[str, Any]) -> str:
    """The settings that would fit, as `--set` takes them."""
    ways = [f"{way['set']} ({way['peak_gib']} GiB)" for way in said["settings_that_fit"]]
    if ways:
        return f"what would fit: {'; or '.join(ways)}"
    return "no smaller batch, gradient_checkpointing, lora or qlora fits: try a smaller base_model"


def main() -> None:
    """Read a resolved pipeline from standard input; print the advice on it as one line of JSON."""
    asked = json.load(sys.stdin)
    spec = PipelineSpec.model_validate(asked["spec"])
    said = advise.advise(spec, Store.from_environment(), available_gib=asked["available_gib"])
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
