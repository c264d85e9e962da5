"""What would fit in memory where a training does not: the same update by other settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from components.train.config import TrainConfig
from components.train.first import First
from pipelines import sizing


def gib(count: float) -> float:
    """Bytes as GiB, to hundredths."""
    return round(count / 2**30, 2)


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """Settings with some of them changed."""
    return TrainConfig.model_validate(config.model_dump() | changes)


def alternatives(config: TrainConfig) -> Iterator[list[tuple[str, TrainConfig]]]:
    """Ways to need less memory, each from the least change to the most, as `--set` spells them."""
    once = config if config.gradient_checkpointing else changed(config, gradient_checkpointing=True)
    yield list(_smaller("", config))
    if once is not config:
        said = "train.gradient_checkpointing=true"
        yield [(said, once), *_smaller(said, once)]
    if config.adapter.frozen and config.precision == "float32":
        said = "train.precision=bfloat16"
        yield [(said, changed(config, precision="bfloat16"))]
    kinds = () if config.adapter.kind == "qlora" else ("qlora",)
    for kind in kinds if config.adapter.frozen else ("lora", *kinds):
        said = f"train.adapter={kind}"
        other = changed(config, adapter={"kind": kind}, learning_rate=None)
        least = changed(other, gradient_checkpointing=True)
        yield [(said, other), *_smaller(said, other), (f"{said} train.gradient_checkpointing=true", least)]


def _smaller(said: str, config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """Half the batch and twice the accumulation, again and again: every update stays what it was."""
    while True:
        changes, words = _halved(config, "train")
        if config.first:
            of_first, more = _halved(config.first, "train.first")
            words += more
            if of_first:
                changes["first"] = config.first.model_copy(update=of_first).model_dump()
        if not changes:
            return
        config = changed(config, **changes)
        yield " ".join([*([said] if said else []), *words]), config


def _halved(config: TrainConfig | First, section: str) -> tuple[dict[str, Any], list[str]]:
    """Half the batch and twice the accumulation, and how `--set` spells it; nothing where it is odd."""
    batch, times = config.per_device_batch_size, config.gradient_accumulation_steps
    if batch % 2:
        return {}, []
    sizes = {"per_device_batch_size": batch // 2, "gradient_accumulation_steps": times * 2}
    return sizes, [f"{section}.{name}={value}" for name, value in sizes.items()]


def fitting(
    config: TrainConfig,
    predict: Callable[[TrainConfig], Any],
    limit_bytes: float,
    peak: Callable[[Any], int],
) -> list[dict[str, Any]]:
    """For each way to need less, the least change of it that fits, by the same dry run."""
    found = []
    for way in alternatives(config):
        for said, settings in way:
            needs = peak(predict(settings))
            if needs <= limit_bytes:
                found.append({"set": said, "peak_gib": gib(needs)})
                break
    return found


def fewer(one: int, at_once: int, limit_gib: float) -> list[dict[str, Any]]:
    """Fewer trials at a time, where some fit."""
    room = min(at_once - 1, int(limit_gib * 2**30 // one))
    return [{"set": f"train.search.parallel={room}", "peak_gib": gib(room * one)}] if room > 0 else []


def in_turn(
    config: TrainConfig,
    predict: Callable[[TrainConfig], Any],
    limit_gib: float,
    peak: Callable[[Any], int],
) -> list[dict[str, Any]]:
    """Ways to need less by other settings; of a search, those that it does not vary, one trial at a time."""
    found = fitting(sizing.heaviest(config), predict, limit_gib * 2**30, peak)
    if not config.search:
        return found
    varied = tuple(f"train.{name}=" for name in config.search.space)
    alone = " train.search.parallel=1" if config.search.parallel > 1 else ""
    return [
        way | {"set": way["set"] + alone} for way in found if not any(name in way["set"] for name in varied)
    ]
