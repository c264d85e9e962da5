"""The order of the stages and what flows between them; nothing else.

`inputs_of` is the only table of who feeds whom: the KFP pipeline and the planner both read it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

from pipelines import placement
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


def build(
    spec: PipelineSpec, run: str | None = None, done: Mapping[str, Mapping[str, str]] | None = None
) -> Any:
    """The KFP pipeline of a spec.

    Args:
        spec: the pipeline.
        run: id of the run; None: KFP's own, when it runs.
        done: stage -> output -> where its manifest is, for stages that need not run.

    Returns:
        A KFP pipeline: compile it, or call it to run it locally.
    """
    from kfp import dsl

    done = done or {}
    run_facts = json.dumps({"id": run or dsl.PIPELINE_JOB_ID_PLACEHOLDER, "pipeline": spec.name})

    @dsl.pipeline(name=spec.name.replace("_", "-"), description=f"Tuneyard pipeline {spec.name}")
    def pipeline():  # type: ignore[no-untyped-def]  # KFP reads an annotation as an output
        artifacts: dict[tuple[str, str], Any] = {}
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
            task = component(config=settings.model_dump_json(), run=run_facts, **inputs)
            placement.place(task, stage, on_cluster=run is None)
            for output in component.component_spec.outputs:
                artifacts[stage, output] = task.outputs[output]

    return pipeline
