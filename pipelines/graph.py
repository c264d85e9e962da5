"""The order of the stages and what flows between them; nothing else.

`inputs_of` is the only table of who feeds whom: the KFP pipeline and the planner both read it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from components.evaluate.slices.keeping import ASKED
from components.evaluate.slices.share import Share
from pipelines import placement
from pipelines.images.lock import Image
from pipelines.spec import PipelineSpec


def inputs_of(stage: str, spec: PipelineSpec) -> dict[str, tuple[str, str]]:
    """Input name -> (stage, output) that feeds it."""
    shipped = ("compress", "compressed") if spec.compress else ("train", "model")
    table: dict[str, dict[str, tuple[str, str]]] = {
        "ingest": {},
        "validate": {"examples": ("ingest", "examples"), "quarantine": ("ingest", "quarantine")},
        "split": {"examples": ("ingest", "examples"), "report": ("validate", "report")},
        "train": {"train": ("split", "train"), "eval": ("split", "eval")},
        "compress": {"model": ("train", "model")},
        "evaluate": {"test": ("split", "test"), "train": ("split", "train"), "model": ("train", "model")}
        | ({"compressed": ("compress", "compressed")} if spec.compress else {}),
        "register": {"model": shipped, "evaluation": ("evaluate", "evaluation")},
        "deploy": {"registration": ("register", "registration")},
    }
    return table[stage]


@dataclass(frozen=True)
class OnThisMachine:
    """A run of KFP's local runner.

    Args:
        run: its id.
        done: stage -> output -> file with its manifest, for stages that need not run.
    """

    run: str
    done: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class OnACluster:
    """Runs of a Kubeflow Pipelines endpoint; KFP names each when it starts.

    Args:
        images: the locked images.
        caches: stage -> cache key, for stages whose commit is in the store: KFP's cache answers for them. The
            others must run, so KFP's cache is off: its own key knows neither our code nor the bytes behind a
            URI. A stage looks for its commit itself, so what is done is never done again.
    """

    images: Mapping[str, Image]
    caches: Mapping[str, str] = field(default_factory=dict)


def build(spec: PipelineSpec, where: OnThisMachine | OnACluster) -> Any:
    """The KFP pipeline of a spec.

    Returns:
        A KFP pipeline: compile it, or call it to run it on this machine.
    """
    from kfp import dsl

    slices = _slices(spec, where)

    def pipeline(slot=""):  # type: ignore[no-untyped-def]
        with _notifying(spec, where, slot):
            _stages(spec, where, slot, slices)

    # KFP reads types, and this module's annotations are text.
    pipeline.__annotations__["slot"] = str
    config = dsl.PipelineConfig(
        ttl_seconds_after_finished=round(spec.hardware.keep_days * 86400),
        active_deadline_seconds=round(spec.hardware.run_hours * 3600),
    )
    return dsl.pipeline(
        pipeline,
        name=spec.name.replace("_", "-"),
        description=f"Tuneyard pipeline {spec.name}",
        pipeline_config=config if isinstance(where, OnACluster) else None,
    )


def _stages(spec: PipelineSpec, where: OnThisMachine | OnACluster, slot: Any, slices: Any) -> None:
    from kfp import dsl

    done = where.done if isinstance(where, OnThisMachine) else {}
    artifacts: dict[tuple[str, str], Any] = {}
    champion: Any = None
    for stage, settings in spec.stages().items():
        if stage in done:
            for output, uri in done[stage].items():
                wanted = any(
                    (stage, output) in inputs_of(s, spec).values() for s in spec.stages() if s not in done
                )
                if wanted:
                    kind = dsl.Model if output in ("model", "compressed") else dsl.Dataset
                    artifacts[stage, output] = dsl.importer(artifact_uri=uri, artifact_class=kind).output
            continue
        component = getattr(importlib.import_module(f"components.{stage}.component"), stage)
        inputs = {name: artifacts[source] for name, source in inputs_of(stage, spec).items()}
        with _when_champion(champion, where):
            task = component(config=settings.model_dump_json(), **_names(spec, where), slot=slot, **inputs)
            _place(task, stage, spec, where)
        if stage == "evaluate" and slices is not None:
            before = slices(slot=slot, **inputs).set_display_name(f"{placement.SLICE}s")
            task.after(before.set_caching_options(False))
            task.set_env_variable(ASKED, str(spec.hardware.of(stage).slices))
        for output in component.component_spec.outputs:
            artifacts[stage, output] = task.outputs[output]
        champion = task.outputs["champion"] if stage == "register" else None


def _slices(spec: PipelineSpec, where: OnThisMachine | OnACluster) -> Any:
    """The component before evaluate that does its work in slices, a pod each; None where evaluate is alone.

    A pipeline of its own around the loop, since KFP lets no task wait for a loop, only for a task, and made
    first, since it lets none be made inside another. KFP's cache is off: one task of the IR has one custom
    key, which the first slice would fill for all others.
    """
    of = spec.hardware.of("evaluate").slices or 1
    if isinstance(where, OnThisMachine) or "evaluate" in where.caches or of == 1:
        return None
    from kfp import dsl

    from components.evaluate.slices.component import evaluate_slice

    inputs = inputs_of("evaluate", spec)
    kinds = {"slot": str} | {
        name: dsl.Input[dsl.Model if name in ("model", "compressed") else dsl.Dataset] for name in inputs
    }

    def slices(*values):  # type: ignore[no-untyped-def]
        given = dict(zip(kinds, values, strict=True)) | _names(spec, where)
        with dsl.ParallelFor([str(Share(number, of)) for number in range(1, of + 1)], name="slices") as share:
            task = evaluate_slice(config=spec.evaluate.model_dump_json(), share=share, **given)
            _place(task, placement.SLICE, spec, where)

    # KFP reads the inputs of a pipeline from its signature, and which there are depends on the spec.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=type_) for name, type_ in kinds.items()]
    slices.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return dsl.pipeline(slices, name=f"{placement.SLICE}s")


def _when_champion(champion: Any, where: OnThisMachine | OnACluster) -> AbstractContextManager[Any]:
    """Around deploy: a version that is not champion changes nothing in service, so no pod is started for it.

    On this machine deploy costs a second and makes sure that the champion is served. (KFP's local runner
    cannot read an output of a task in a condition, and then skips what depends on it without a word.)
    """
    from kfp import dsl

    if champion is None or isinstance(where, OnThisMachine):
        return nullcontext()
    return dsl.If(champion == "true", name="champion")


def _names(spec: PipelineSpec, where: OnThisMachine | OnACluster) -> dict[str, str]:
    """`run`, `pipeline` and `due` of a task. KFP resolves a placeholder only where it is the whole value."""
    from kfp import dsl

    if isinstance(where, OnThisMachine):
        return {"run": where.run, "pipeline": spec.name, "due": ""}
    due = dsl.PIPELINE_JOB_SCHEDULE_TIME_UTC_PLACEHOLDER
    return {"run": dsl.PIPELINE_JOB_ID_PLACEHOLDER, "pipeline": spec.name, "due": due}


def _place(task: Any, stage: str, spec: PipelineSpec, where: OnThisMachine | OnACluster) -> None:
    task.set_display_name(stage)
    task.set_caching_options(False)
    if isinstance(where, OnACluster):
        if stage in where.caches:
            task.set_caching_options(True, cache_key=where.caches[stage])
        placement.place(task, stage, spec.name, spec.hardware, where.images)


def _notifying(
    spec: PipelineSpec, where: OnThisMachine | OnACluster, slot: Any
) -> AbstractContextManager[Any]:
    """Around the stages: tell somebody how the run ended. On this machine submit does it."""
    if spec.notify is None or isinstance(where, OnThisMachine):
        return nullcontext()
    from kfp import dsl

    from components.notify.component import notify

    # KFP's cache answers without a pod, so those stages leave no record of this run.
    due = ",".join(stage for stage in spec.stages() if stage not in where.caches)
    task = notify(config=spec.notify.model_dump_json(), **_names(spec, where), slot=slot, stages=due)
    _place(task, "notify", spec, where)
    return dsl.ExitHandler(task, name="stages")
