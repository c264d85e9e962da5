"""Where the sections of a pipeline file meet: what one needs of another, and what cannot be together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from components.evaluate.config import METRICS, OF_TEACHER, metrics_of
from components.register.config import BETTER
from components.shared import examples, tasks
from components.split.config import SplitConfig
from components.train.adapters.config import KINDS as ADAPTERS
from components.train.config import TrainConfig
from components.train.search import space
from components.train.sharding import config as sharding

# Tasks whose models evaluate opens with an adapter beside their base.
_BESIDE = ("causal-lm", "classification", "regression", "token-classification", "multi-task")
# Each compares the compressed model with the tuned one.
_OF_COMPRESSION = ("accuracy_drop_points", "throughput_ratio", "size_ratio")


def misfits(raw: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """(key path, what is wrong) for whatever one section says that does not go with another.

    It looks at the values as the file has them, before anything is filled in or checked: so these faults are
    reported together with those inside the sections, and before hours of training, not after.
    """
    ingest, train = _section(raw, "ingest"), _section(raw, "train")
    if "test_source" in ingest:
        yield ("ingest", "test_source"), "write it as split.test_source, beside the ratios it changes"
    if "domain" in ingest:
        yield ("ingest", "domain"), "write it as train.first.source, beside the phase that learns from it"
    most = SplitConfig.model_fields["max_domain_leaks"].default  # a resolved file says it always
    if not train.get("first") and _section(raw, "split").get("max_domain_leaks", most) != most:
        yield ("split", "max_domain_leaks"), "there is no domain text to look through without train.first"
    if _has(raw, "deploy") and not _has(raw, "register"):
        yield ("deploy",), "needs a register section: only a registered model is put in service"
    trait = tasks.trait(train.get("objective"))
    usual = trait.adapter if trait else "full"
    adapter = train.get("adapter") or usual
    kind = adapter.get("kind", usual) if isinstance(adapter, dict) else adapter
    kind = kind if isinstance(kind, str) else ""
    yield from _beside_its_base(raw, kind, trait)
    yield from _search(train, _section(raw, "hardware"))
    asked = train.get("objective")
    named = asked.get("kind", "") if isinstance(asked, dict) else asked
    yield from sharding.misfits(
        _section(raw, "hardware"), train, named if isinstance(named, str) and trait else "", kind
    )
    if trait is None:
        return
    yield from _not_yet(raw, trait.task)
    yield from _of_media(raw, trait)
    given = ingest.get("format")
    if given in examples.REQUIRED and given not in trait.formats:
        objective = train["objective"]
        name = objective["kind"] if isinstance(objective, dict) else objective
        yield (
            ("ingest", "format"),
            f"objective {name} needs {' or '.join(trait.formats)} data (it is {given!r})",
        )
    yield from _strange_metrics(raw, trait.task, given if given in trait.formats else trait.formats[0])
    yield from _dead_settings(train)
    yield from _one_process(raw)
    yield from _unjudged(_objective(raw), given if given in trait.formats else trait.formats[0])


def _one_process(raw: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Objectives whose answers are written by one process."""
    objective, hardware = _objective(raw), _section(raw, "hardware")
    kind = objective.get("kind", _section(raw, "train").get("objective"))
    if kind not in tasks.ANSWERING and (kind, objective.get("level")) != ("distillation", "sequence"):
        return
    if hardware.get("nodes", 1) != 1 or hardware.get("gpus_per_node", 1) not in (0, 1):
        yield ("hardware",), f"{kind} trains in one process yet: nodes: 1, and gpus_per_node 0 or 1"


def _unjudged(objective: Mapping[str, Any], dataset_type: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Rules over answers that the data does not have, and prompts whose answers nothing would judge."""
    if objective.get("kind") not in ("grpo", "rloo") or dataset_type != "prompt-only":
        return
    rules = objective.get("rewards")
    kinds = [rule.get("kind") for rule in rules if isinstance(rule, dict)] if isinstance(rules, list) else []
    if "answer" in kinds:
        what = "a reward of kind answer compares with the data's own answers"
        yield ("train", "objective", "rewards"), f"{what}; set ingest.format: prompt-completion"
    elif rules and not objective.get("reward_model"):
        what = "evaluate judges answers by a reward_model or by the data's own"
        yield ("train", "objective", "rewards"), f"{what}; name one, or set ingest.format: prompt-completion"


def _search(train: Mapping[str, Any], hardware: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What a search would try and could not, or that would change nothing."""
    if not train.get("search"):
        return
    yield from ((("train", *at), what) for at, what in space.misfits(train))
    dead = set(_dead_settings(train))
    for name, section in space.tried(train):
        for fault in (found for found in _dead_settings(section) if found not in dead):
            dead.add(fault)
            yield ("train", "search", "space", name), fault[1]
    if hardware.get("nodes", 1) != 1 or hardware.get("gpus_per_node", 1) not in (0, 1):
        what = "trials share one pod, which has one GPU at most: nodes: 1, and gpus_per_node 0 or 1"
        yield ("hardware",), f"{what}; or drop train.search"


def _beside_its_base(
    raw: Mapping[str, Any], kind: str, trait: tasks.Trait | None
) -> Iterator[tuple[tuple[str, ...], str]]:
    """What cannot be done with a model whose adapter is, or stays, beside its base."""
    adapter = ADAPTERS.get(kind)
    if adapter is None:
        return
    served = trait is None or trait.task in tasks.SERVED
    merges = adapter.frozen and not adapter.beside
    if _has(raw, "deploy") and served and merges and not _has(raw, "compress"):
        # What the server would need to put an adapter on its base is a training library.
        yield (
            ("deploy",),
            "needs a compress section, which merges the adapter: the model server takes whole models",
        )
    if not adapter.beside:
        return
    merged = ", ".join(name for name, other in ADAPTERS.items() if other.frozen and not other.beside)
    for stage, what in (
        ("compress", "there is nothing to merge or export"),
        ("deploy", "the model server takes whole models"),
    ):
        if _has(raw, stage):
            todo = f"drop this section, or choose an adapter that merges ({merged})"
            yield (stage,), f"adapter {kind} stays beside its base, and {what}; {todo}"
    if trait is not None and trait.task not in _BESIDE:
        what = f"adapter {kind} stays beside its base, and evaluate opens such a {trait.task} model not yet"
        yield ("train", "adapter"), f"{what}; choose {merged} or full"


def _not_yet(raw: Mapping[str, Any], task: tasks.Task) -> Iterator[tuple[tuple[str, ...], str]]:
    """Stages that cannot take a model of this task."""
    if _has(raw, "compress") and task not in tasks.COMPRESSED:
        yield ("compress",), f"there is no smaller form of {task} models; drop this section"
    if _has(raw, "deploy") and task not in tasks.SERVED:
        what = f"the model server does not serve {task} models; drop this section, and register it"
        yield ("deploy",), what


def _of_media(raw: Mapping[str, Any], trait: tasks.Trait) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that mean something to text alone, or to images alone."""
    train = _section(raw, "train")
    if _section(raw, "evaluate").get("positive_label") is not None and trait.task != "image-classification":
        yield ("evaluate", "positive_label"), f"belongs to image-classification (this is {trait.task})"
    if examples.media_field(trait.formats[0]) is None:
        return
    if train.get("retain"):
        yield ("train", "retain"), f"a retention set holds no files yet, as {trait.formats[0]} data does"
    if trait.task != "image-classification":
        return
    for name in ("max_length", "over_length", "max_over_length"):
        usual = TrainConfig.model_fields[name].default
        if train.get(name, usual) != usual:
            yield ("train", name), "an image is never too long: the base's own settings say how it is resized"


def _dead_settings(train: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings of train that its objective would not look at."""
    objective, adapter = (_section(train, name) for name in ("objective", "adapter"))
    kind = objective.get("kind", train.get("objective"))
    if objective.get("loss") == "ipo" and train.get("label_smoothing"):
        yield ("train", "label_smoothing"), "loss ipo has no labels; drop it, or set loss: sigmoid"
    if kind not in tasks.ANSWERING:
        return
    why = f"{kind} computes without dropout, or its ratio of new to old probability would be noise; drop it"
    for at, section in ((("train",), train), (("train", "adapter"), adapter)):
        if section.get("dropout"):
            yield (*at, "dropout"), why
    if train.get("gradient_checkpointing"):
        yield ("train", "gradient_checkpointing"), f"{kind} keeps its activations; drop it"


def _strange_metrics(
    raw: Mapping[str, Any], task: str, dataset_type: str
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Gates and comparisons on metrics that an evaluation of this pipeline will not have."""
    ours = metrics_of(task, dataset_type)
    every = {metric for metrics in METRICS.values() for metric in metrics}
    for metric in map(str, _section(_section(raw, "evaluate"), "gates")):
        if metric in _OF_COMPRESSION and task == "classification" and not _has(raw, "compress"):
            what = "compares the compressed model with the tuned one, and there is no compress section"
            yield ("evaluate", "gates", metric), what
        elif metric == "retention_loss_increase" and not _section(raw, "train").get("retain"):
            yield ("evaluate", "gates", metric), "needs train.retain: what must not be forgotten"
        elif metric in OF_TEACHER and metric in ours and "teacher" not in _objective(raw):
            yield ("evaluate", "gates", metric), "needs an objective with a teacher (distillation)"
        elif metric in every and metric not in ours:
            what = f"no metric of a {task} model on {dataset_type} data; its metrics are {', '.join(ours)}"
            yield ("evaluate", "gates", metric), what
    compared = _section(raw, "register").get("compare_by")
    if isinstance(compared, str) and compared in BETTER and compared not in ours:
        known = ", ".join(name for name in BETTER if name in ours)
        yield ("register", "compare_by"), f"{compared} is no metric of a {task} model; choose from {known}"


def _objective(raw: Mapping[str, Any]) -> dict[str, Any]:
    return _section(_section(raw, "train"), "objective")


def fill_in(raw: dict[str, Any]) -> None:
    """Put what one section says into the others that need it."""
    for optional in ("compress", "register", "deploy", "notify"):
        if optional in raw:
            raw[optional] = (
                {} if raw[optional] in (None, True) else None if raw[optional] is False else raw[optional]
            )
    for section in ("validate", "split", "evaluate", "hardware"):
        if section in raw and raw[section] is None:
            del raw[section]
    ingest, train = _section(raw, "ingest"), _section(raw, "train")
    if not ingest:
        return
    if ingest.get("columns") is None:
        ingest["columns"] = {}
    columns = _section(ingest, "columns")
    trait = tasks.trait(train.get("objective")) or tasks.OBJECTIVES["sft"]
    if "format" not in ingest:
        spoken = {*columns.keys(), *map(str, columns.values())}
        talks = "conversational" in trait.formats and "messages" in spoken
        ingest["format"] = "conversational" if talks else trait.formats[0]
    if trait.stratify_by and isinstance(raw.setdefault("split", {}), dict):
        # A file that says `stratify_by: null` wants none.
        raw["split"].setdefault("stratify_by", trait.stratify_by)
    if trait.group_by and isinstance(raw.setdefault("split", {}), dict):
        raw["split"].setdefault("group_by", trait.group_by)
    if columns:
        ingest["columns"] = _our_names_first(columns, ingest["format"])
    split = _section(raw, "split")
    if isinstance(split.get("test_source"), str):
        # ingest reads it, so it belongs to ingest's key.
        ingest["test_source"] = split["test_source"]
    first = _section(train, "first")
    if isinstance(first.get("source"), str):
        # As with split.test_source: ingest reads it, and split, which has test, looks for test in it.
        named = _section(first, "columns").get("text")
        ingest["domain"] = {"source": first["source"], "columns": {"text": named} if named else {}}
    wanted = [split[k] for k in ("stratify_by", "group_by") if isinstance(split.get(k), str)]
    keep = ingest.get("keep") or []
    if isinstance(keep, list):
        known = [*_fields(ingest["format"]), *keep]
        ingest["keep"] = keep + [column for column in dict.fromkeys(wanted) if column not in known]


def _has(raw: Mapping[str, Any], section: str) -> bool:
    """Whether a stage is there only by its section: `compress:` is, `compress: false` is not."""
    return section in raw and raw[section] is not False


def _section(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The mapping of that name, or an empty one where it is absent or no mapping (a fault found later)."""
    found = raw.get(name)
    return found if isinstance(found, dict) else {}


def _our_names_first(columns: Mapping[str, Any], dataset_type: Any) -> dict[str, Any]:
    """`{field: column}`, also from `{column: field}`, which reads as naturally and means the same.

    It is turned round only where no key and every value is a field, so there is no doubt which was meant.
    """
    known = set(_fields(dataset_type))
    if not known & set(columns) and all(isinstance(v, str) and v in known for v in columns.values()):
        return {field: column for column, field in columns.items()}
    return dict(columns)


def _fields(dataset_type: Any) -> tuple[str, ...]:
    """The fields of a dataset type; none where there is no such type (a fault found later)."""
    known = isinstance(dataset_type, str) and dataset_type in examples.REQUIRED
    return examples.fields(dataset_type) if known else ()
