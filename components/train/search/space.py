"""The settings that a search tries: put into those of train, and checked before anything starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from components.shared import tasks
from components.train.config import TrainConfig
from components.train.search.config import Pruner, Range, SearchConfig, combinations, flat, read_values

Fault = tuple[tuple[str, ...], str]

_JUDGED = "decides which examples trials are judged on"
_EQUAL = "says how long a trial may train, which is the same for all; pruner ends those that fall behind"
_STORED = "changes nothing of the model"
# Settings that must be the same in every trial, and why; with what is below them.
_FIXED: dict[str, str] = {
    "search": "is the search itself",
    "seed": "would choose a lucky order of the examples",
    "base_model": "is what every trial begins with",
    "revision": "is what every trial begins with",
    "objective.kind": "is what trials are compared by",
    "adapter.kind": "decides what later stages can do with the model: write a pipeline for each",
    "epochs": _EQUAL,
    "max_steps": _EQUAL,
    "eval_steps": "says when trials are compared",
    "eval_examples": _JUDGED,
    "over_length": _JUDGED,
    "max_over_length": _JUDGED,
    "retain.source": _JUDGED,
    "retain.judged_examples": _JUDGED,
    "checkpoint_steps": _STORED,
    "keep_checkpoints": _STORED,
    "gradient_checkpointing": _STORED,
}
# Faults that no value would mend.
_OF_THE_NAME = ("extra_forbidden", "missing")
# Of an objective, what moves the weights otherwise and leaves the loss on eval what it was.
_LOSS_KEPT = ("gradients", "rollout_epochs", "minibatches", "clip", "value_clip", "value_weight")


def with_settings(config: TrainConfig, chosen: Mapping[str, Any]) -> TrainConfig:
    """The settings of one trial: no search, and what was chosen in place.

    Raises:
        ValidationError: together they are refused.
    """
    raw = config.model_dump(mode="json") | {"search": None}
    for name, value in chosen.items():
        raw = _put(raw, name, value)
    return TrainConfig.model_validate(raw)


def whole(config: TrainConfig, name: str) -> bool:
    """Whether a setting takes whole numbers alone."""
    return _whole(config.model_dump(mode="json") | {"search": None}, name)


def _whole(raw: Mapping[str, Any], name: str) -> bool:
    types = {fault["type"] for fault in _faults(_put({**raw, "search": None}, name, 1.5)).values()}
    return bool(types & {"int_from_float", "int_type"})


def misfits(train: Mapping[str, Any]) -> Iterator[Fault]:
    """(key path below train, what is wrong) for whatever of a search does not go with the rest of train.

    Looks at values as the pipeline file has them, so that these faults are told with all others.
    """
    search = train.get("search")
    space = search.get("space") if isinstance(search, dict) else None
    if not isinstance(search, dict) or not isinstance(space, dict):
        return
    space = flat(space)
    base = {name: value for name, value in train.items() if name != "search"}
    before = _faults(base)
    if not before:
        base = TrainConfig.model_validate(base).model_dump(mode="json")  # as the trials begin with
    for name, given in space.items():
        values = read_values(given)
        at = ("search", "space", name)
        why = _fixed(name)
        if why:
            yield at, f"{why}; drop it"
            continue
        if isinstance(values, str):
            continue  # told where the section is read
        tried = (values.low, values.high) if isinstance(values, Range) else values
        told = dict.fromkeys(
            what if unknown else f"{_shown(value)}: {what}"
            for value in tried
            for unknown, what in _new(before, _put(base, name, value), name)
        )
        yield from ((at, what) for what in told)
    yield from _length(search, space, train)


def tried(train: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(setting, the section with it at a value) for both ends of ranges and all of lists, one at a time."""
    search = train.get("search")
    space = search.get("space") if isinstance(search, dict) else None
    for name, given in flat(space if isinstance(space, dict) else {}).items():
        values = read_values(given)
        if not isinstance(values, str):
            ends = (values.low, values.high) if isinstance(values, Range) else values
            yield from ((name, _put(train, name, value)) for value in ends)


def _fixed(name: str) -> str:
    """Why a setting must not vary; empty where it may."""
    if name in ("objective", "adapter", "retain", "early_stopping"):
        return f"is a whole section: name a setting of it, as {name}.something"
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        if ".".join(parts[:n]) in _FIXED:
            return _FIXED[".".join(parts[:n])]
    if parts[0] == "objective" and parts[-1] not in _LOSS_KEPT:
        return "changes the loss itself, by which trials are compared"
    return ""


def _put(raw: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy of settings with the one of this name at a value."""
    first, _, rest = name.partition(".")
    if not rest:
        return {**raw, first: value}
    inner = raw.get(first)
    if isinstance(inner, str):
        inner = {"kind": inner}
    if inner is None and first == "adapter":
        usual = tasks.trait(raw.get("objective"))
        inner = {"kind": usual.adapter if usual else "full"}
    return {**raw, first: _put(inner if isinstance(inner, dict) else {}, rest, value)}


def _faults(raw: Mapping[str, Any]) -> dict[tuple[Any, ...], Any]:
    """What is wrong with settings of train, each once."""
    try:
        TrainConfig.model_validate(dict(raw))
    except ValidationError as error:
        return {(fault["loc"], fault["type"], fault["msg"]): fault for fault in error.errors()}
    return {}


def _new(before: Mapping[Any, Any], raw: Mapping[str, Any], name: str) -> list[tuple[bool, str]]:
    """What is wrong with settings that was not before: (whether there is no such setting, in words)."""
    new = [fault for key, fault in _faults(raw).items() if key not in before]
    if new and all(fault["loc"][:1] == (name,) for fault in new):
        new = new[:1]  # of a setting that may be one thing or another, each says that it is not
    return [(fault["type"] in _OF_THE_NAME, _sentence(fault, raw, name)) for fault in new]


def _sentence(fault: Any, raw: Mapping[str, Any], name: str) -> str:
    if fault["type"] == "extra_forbidden":
        known = _known(raw, name)
        near = difflib.get_close_matches(name, known, 1, 0.5)
        return "no such setting of train" + (f"; did you mean {near[0]}?" if near else "")
    message: str = fault["msg"].removeprefix("Value error, ")
    where = [str(part) for part in fault["loc"]]
    # A fault of several settings names them itself.
    own = (
        fault["type"] == "value_error"
        or not where
        or where[-1] == name.rpartition(".")[2]
        or where[0] == name
    )
    return message if own else f"{'.'.join(where)}: {message}"


def _known(raw: Mapping[str, Any], name: str) -> list[str]:
    """Names of settings that a space may have."""
    without = dict(raw)
    first, _, rest = name.partition(".")
    if rest and isinstance(without.get(first), dict):
        without[first] = {k: v for k, v in without[first].items() if k != rest}
    else:
        without.pop(first, None)
    try:
        resolved = TrainConfig.model_validate(without).model_dump(mode="json")
    except ValidationError:
        resolved = dict.fromkeys(TrainConfig.model_fields)
    names = [n for n, v in resolved.items() if not isinstance(v, dict)]
    names += [f"{n}.{m}" for n, v in resolved.items() if isinstance(v, dict) for m in v]
    return [n for n in names if not _fixed(n)]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _length(search: Mapping[str, Any], space: Mapping[str, Any], train: Mapping[str, Any]) -> Iterator[Fault]:
    """More trials than there are combinations, and trials too short to be compared."""
    read = {name: read_values(given) for name, given in space.items()}
    values = {name: found for name, found in read.items() if not isinstance(found, str)}
    trials = search.get("trials", SearchConfig.model_fields["trials"].default)
    every = combinations(values, {name for name in values if _whole(train, name)})
    if len(values) == len(space) and isinstance(trials, int) and trials > every:
        yield ("search", "trials"), f"{trials} trials of a space of {every:.0f} combinations; lower it"
    parallel = search.get("parallel")
    if isinstance(parallel, int) and isinstance(trials, int) and parallel > trials:
        yield ("search", "parallel"), f"{parallel} at a time of {trials} trials; lower it"
    steps = train.get("max_steps")
    pruner = search.get("pruner", {})
    first = pruner.get("min_steps", Pruner().min_steps) if isinstance(pruner, dict) else None
    if isinstance(steps, int) and isinstance(first, int) and first >= steps:
        yield (
            ("search", "pruner"),
            f"min_steps ({first}) is not below train.max_steps ({steps}), so no trial would be ended early: "
            "lower it, or set pruner: null",
        )


def extreme(config: TrainConfig, largest: bool) -> TrainConfig:
    """The settings of a trial that needs the most of all, or makes the most updates of all.

    Args:
        config: with a search.
        largest: every number of the space at its highest; else at its lowest.
    """
    assert config.search
    end = max if largest else min
    chosen: dict[str, Any] = {}
    for name, values in config.search.space.items():
        tried = (values.low, values.high) if isinstance(values, Range) else values
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in tried):
            chosen[name] = end(tried)
    return with_settings(config, chosen)
