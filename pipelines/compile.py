"""A pipeline file as KFP IR YAML, which a Kubeflow Pipelines endpoint takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines import graph
from pipelines.spec import load


def compile_pipeline(spec: str, output: Path | None = None, overrides: Sequence[str] = ()) -> Path:
    """Compile one pipeline.

    Args:
        spec: a name in pipelines/ or a path.
        output: where to; None: `build/<name>.yaml` below the working directory.
        overrides: `section.key=value`.

    Returns:
        The file that was written.
    """
    from kfp import compiler

    pipeline = load(spec, overrides)
    path = output or Path("build") / f"{pipeline.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(graph.build(pipeline), str(path))
    return path
