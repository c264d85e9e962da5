"""A pipeline whose stages will not fit in the memory they have is refused before any of them runs."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shared.errors import TuneyardError, UsageError
from components.shared.store import Store
from components.train.config import TrainConfig
from pipelines import advise, bases, sizing
from pipelines.embedded.preflight import available_memory_gib
from pipelines.spec import PipelineSpec

log = logging.getLogger("tuneyard.submit")

_PATIENCE_SECONDS = 300
# What evaluate reads at once, padding too (components/evaluate/sitting.py).
_JUDGED_TOKENS = 4096


def refuse_unfit(spec: PipelineSpec, store: Store, target: str = "local") -> None:
    """Refuse a pipeline of which train, evaluate or compress will not fit in memory.

    The dry run happens in a process of its own: its libraries would stay in memory beside the training.

    Args:
        spec: the pipeline.
        store: for base and corpus.
        target: `local` for this machine's memory; `kfp` for what the pods ask for, where train has no GPU:
            which one a pod would get, and so its memory, is not known here.

    Raises:
        UsageError: it will not fit; says by how much, and which settings would.
    """
    limit = available_memory_gib()
    if target == "kfp":
        pods = {stage: spec.hardware.of(stage) for stage in ("train", "evaluate", "compress")}
        if pods["train"].gpus:
            return
        limit = min(pod.memory_gib or limit for stage, pod in pods.items() if stage in spec.stages())
    with tempfile.TemporaryDirectory(prefix="tuneyard-advise-") as scratch:
        try:
            base = bases.base_of(spec.train, store, Path(scratch))
        except TuneyardError:
            return  # what is wrong with the base, the stage that reads it says
        heaviest, share = _widest(spec), limit * 2**30 / sizing.at_once(spec.train)
        if sizing.surely_fits(heaviest, base.shape(), base.file_bytes, share):
            return
    log.info("submit: predicting how much memory its stages will need")
    asked = json.dumps({"spec": spec.resolved(), "available_gib": limit, "target": target})
    command = [sys.executable, "-m", "pipelines.fits"]
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False
        )
        said = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        log.warning("submit: the memory of its stages could not be predicted (%s)", type(error).__name__)
        return
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        log.warning("submit: the memory of its stages could not be predicted: %s", last[0])
        return
    memory = said["memory"]
    if refused(said):
        raise UsageError(unfit(said), what_would(said))
    if not memory["fits"]:
        log.warning("submit: %s; %s", unfit(said), "; ".join(memory["unpredicted"]))
    log.info("submit: train will need %.1f GiB, there are %.1f", memory["train_gib"], memory["limit_gib"])


def _widest(spec: PipelineSpec) -> TrainConfig:
    """The training with a batch as large as any that evaluate makes: whatever bounds it bounds evaluate."""
    heaviest = sizing.heaviest(spec.train)
    judged = max(spec.evaluate.per_device_batch_size, -(-_JUDGED_TOKENS // heaviest.max_length))
    size = max(heaviest.per_device_batch_size, judged)
    return heaviest.model_copy(update={"per_device_batch_size": size})


def refused(said: Mapping[str, Any]) -> bool:
    """Whether a stage surely needs more than it has: what nobody can know before refuses nothing."""
    memory = said["memory"]
    return bool(said["stages_that_do_not_fit"] or (not memory["fits"] and not memory["unpredicted"]))


def unfit(said: Mapping[str, Any]) -> str:
    """One sentence on what does not fit."""
    memory = said["memory"]
    found = [] if memory["fits"] else [("train", memory["train_gib"], memory["limit_gib"])]
    found += [
        (each["stage"], each["needs_gib"], each["limit_gib"]) for each in said["stages_that_do_not_fit"]
    ]
    listed = "; ".join(
        f"{stage} will need {needs} GiB of memory, it has {has}" for stage, needs, has in found
    )
    return f"{listed} ({memory['limit_is']}; nothing has started)"


def what_would(said: Mapping[str, Any]) -> str:
    """The settings that would fit, as `--set` takes them, stage by stage."""
    found = []
    if not said["memory"]["fits"]:
        ways = _listed(said["settings_that_fit"])
        found.append(
            ways or "no smaller batch, gradient_checkpointing, lora or qlora fits: try a smaller base_model"
        )
    for each in said["stages_that_do_not_fit"]:
        ways = _listed(each["settings_that_fit"])
        drop = " or drop `compress:`" if each["stage"] == "compress" else ""
        found.append(ways or f"no setting of {each['stage']} fits: try a smaller base_model{drop}")
    return "; ".join(found)


def _listed(ways: Sequence[Mapping[str, Any]]) -> str:
    listed = [f"{way['set']} ({way['peak_gib']} GiB)" for way in ways]
    return f"what would fit: {'; or '.join(listed)}" if listed else ""


def main() -> None:
    """Read a resolved pipeline from standard input; print the advice on it as one line of JSON."""
    asked = json.load(sys.stdin)
    spec = PipelineSpec.model_validate(asked["spec"])
    store, limit = Store.from_environment(), asked["available_gib"]
    said = advise.advise(spec, store, target=asked["target"], available_gib=limit)
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
