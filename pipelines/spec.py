"""PipelineSpec: what a pipeline file may say. Every fault of a file is reported at once, with its line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import Field, ValidationError

from components.compress.config import CompressConfig
from components.deploy.config import DeployConfig
from components.evaluate.config import EvaluateConfig
from components.ingest.config import IngestConfig
from components.notify.config import NotifyConfig
from components.register.config import RegisterConfig
from components.shared.errors import SpecError, UsageError
from components.shared.settings import Settings
from components.split.config import SplitConfig
from components.train.config import TrainConfig
from components.validate.config import ValidateConfig
from pipelines import sections
from pipelines.hardware import HardwareConfig
from pipelines.schedule import ScheduleConfig

FOLDER = Path(__file__).resolve().parent
_BY_KIND = ("objective", "adapter")


class PipelineSpec(Settings):
    """One pipeline. `compress`, `register` and `deploy` are stages only when their section is there.

    Args:
        name: of the pipeline, its MLflow experiment and, unless register says otherwise, its model.
        notify: who is told how a run ended; nobody without the section.
        hardware: what the stages ask of a cluster.
        schedule: when a cluster starts it by itself.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")
    ingest: IngestConfig
    validation: ValidateConfig = Field(default_factory=ValidateConfig, alias="validate")
    split: SplitConfig = SplitConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    compress: CompressConfig | None = None
    register_: RegisterConfig | None = Field(None, alias="register")
    deploy: DeployConfig | None = None
    notify: NotifyConfig | None = None
    hardware: HardwareConfig = HardwareConfig()
    schedule: ScheduleConfig | None = None

    def stages(self) -> dict[str, Settings]:
        """Stage name -> settings, for the stages this pipeline has, in order."""
        every: dict[str, Settings | None] = {
            "ingest": self.ingest,
            "validate": self.validation,
            "split": self.split,
            "train": self.train,
            "compress": self.compress,
            "evaluate": self.evaluate,
            "register": self.register_,
            "deploy": self.deploy,
        }
        return {name: settings for name, settings in every.items() if settings is not None}

    def resolved(self) -> dict[str, Any]:
        """Every setting with its default filled in, as a pipeline file spells it: `load` reads it back."""
        dumped = self.model_dump(mode="json", by_alias=True, exclude={"ingest": {"test_source", "domain"}})
        return {name: section for name, section in dumped.items() if section is not None}


def names() -> list[str]:
    """The pipelines that ship in pipelines/."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(spec: str) -> Path:
    """The file of a pipeline: a name in pipelines/, or a path.

    Raises:
        UsageError: there is none.
    """
    for path in (FOLDER / f"{spec}.yaml", Path(spec)):
        if path.is_file():
            return path
    near = difflib.get_close_matches(spec, names(), 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(
        f"no pipeline {spec!r}", f"{hint}there are {', '.join(names())}; or give the path of a YAML file"
    )


def load(spec: str, overrides: Sequence[str] = ()) -> PipelineSpec:
    """Read, override and check a pipeline file.

    Args:
        spec: a name in pipelines/ or a path.
        overrides: `section.key=value`, the value as YAML.

    Raises:
        UsageError: there is no such file.
        SpecError: the file or an override has faults; lists them all.
    """
    path = find(spec)
    raw, lines, faults = _parse(path)
    faults += _override(raw, overrides)
    if not isinstance(raw, dict):
        raise SpecError(
            str(path), ["line 1: a pipeline file is a mapping of sections (name, ingest, train, ...)"]
        )
    faults += [f"line {_line(at, lines)}: {'.'.join(at)}: {what}" for at, what in sections.misfits(raw)]
    sections.fill_in(raw)
    try:
        pipeline = PipelineSpec.model_validate(raw)
    except ValidationError as error:
        faults += [_sentence(fault, lines) for fault in error.errors()]
    if faults:
        raise SpecError(str(path), faults)
    return pipeline


def _parse(path: Path) -> tuple[Any, dict[tuple[str, ...], int], list[str]]:
    """(plain values, key path -> line, faults) of a YAML file."""
    lines: dict[tuple[str, ...], int] = {}
    faults: list[str] = []
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8-sig", errors="replace"))
    except yaml.YAMLError as error:
        raise SpecError(str(path), [f"line 1: not YAML: {str(error).splitlines()[0]}"]) from error

    def build(node: yaml.Node, at: tuple[str, ...], depth: int) -> Any:
        lines[at] = node.start_mark.line + 1
        if depth > 20:
            faults.append(f"line {lines[at]}: nested more than 20 deep")
            return None
        if isinstance(node, yaml.MappingNode):
            found: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(loader.construct_object(key_node, deep=True))
                if key in found:
                    faults.append(
                        f"line {key_node.start_mark.line + 1}: {'.'.join((*at, key))} stands twice; keep one"
                    )
                found[key] = build(value_node, (*at, key), depth + 1)
                lines[(*at, key)] = key_node.start_mark.line + 1
            return found
        if isinstance(node, yaml.SequenceNode):
            return [build(item, (*at, str(i)), depth + 1) for i, item in enumerate(node.value)]
        return loader.construct_object(node, deep=True)

    try:
        node = loader.get_single_node()
        return (build(node, (), 0) if node is not None else None), lines, faults
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise SpecError(str(path), [f"line {line}: not YAML: {problem}"]) from error
    finally:
        loader.dispose()


def _override(raw: Any, overrides: Sequence[str]) -> list[str]:
    """Put `section.key=value` into the raw values; null goes back to the default. Returns faults."""
    faults = []
    for override in overrides:
        name, equals, value = override.partition("=")
        keys = name.strip().split(".")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        if not equals or not all(keys):
            faults.append(f"--set {override}: write section.key=value")
            continue
        into = raw
        for key in keys[:-1]:
            if isinstance(into, dict) and into.get(key) is None:
                into[key] = {}
            into = into.get(key) if isinstance(into, dict) else None
        if isinstance(into, dict) and parsed is None:
            into.pop(keys[-1], None)
        elif isinstance(into, dict):
            into[keys[-1]] = parsed
            # Either says how long to train; the one on the command line takes the other's place.
            into.pop({"train.max_steps": "epochs", "train.epochs": "max_steps"}.get(name.strip(), ""), None)
        else:
            faults.append(f"--set {override}: {'.'.join(keys[:-1])} is no section")
    return faults


def _sentence(fault: Any, lines: Mapping[tuple[str, ...], int]) -> str:
    """One pydantic error as `line N: section.key: what (value); did you mean ...`."""
    at = tuple(str(part) for part in fault["loc"])
    # The kind of an objective or adapter is part of pydantic's path and not of the file's.
    shown = tuple(part for i, part in enumerate(at) if not (i and at[i - 1] in _BY_KIND))
    line = _line(shown, lines)
    where = ".".join(shown) or "the file"
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(shown[-1], _siblings(at[:-1]), 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_siblings(at[:-1]))}"
        return f"line {line}: {where}: no such setting{hint}"
    if fault["type"] == "union_tag_invalid":
        wrong, known = fault["ctx"]["tag"], fault["ctx"]["expected_tags"].replace("'", "").split(", ")
        near = difflib.get_close_matches(wrong, known, 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"line {line}: {where}: there is no {wrong!r}; {hint}there are {', '.join(sorted(known))}"
    message = fault["msg"].removeprefix("Value error, ")
    value = fault.get("input")
    seen = (
        f" (it is {value!r})"
        if fault["type"] not in ("missing", "value_error") and not isinstance(value, dict)
        else ""
    )
    return f"line {line}: {where}: {message}{seen}"


def _line(at: tuple[str, ...], lines: Mapping[tuple[str, ...], int]) -> int:
    """The line of a key, or of the nearest section around it that the file has."""
    return next((lines[at[:n]] for n in range(len(at), -1, -1) if at[:n] in lines), 1)


def _siblings(section: tuple[str, ...]) -> list[str]:
    """Names that a section may have, by pydantic's path to it."""
    options: list[Any] = [PipelineSpec]
    parts = iter(section)
    for part in parts:
        if len(options) > 1:  # an objective or adapter; this part is its kind
            options = [o for o in options if part in get_args(o.model_fields["kind"].annotation)]
            continue
        fields = {f.alias or n: f.annotation for o in options for n, f in o.model_fields.items()}
        found = fields.get(part)
        if get_origin(found) is dict:
            next(parts, None)  # whatever the file calls it
        options = [o for o in get_args(found) or (found,) if isinstance(o, type) and issubclass(o, Settings)]
    return sorted({f.alias or n for o in options for n, f in o.model_fields.items()})
