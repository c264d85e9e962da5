"""A pipeline file as KFP IR YAML with its platform spec, which a Kubeflow Pipelines endpoint takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from components.shared.errors import UsageError
from pipelines import graph
from pipelines.images import lock
from pipelines.images.lock import Image
from pipelines.spec import PipelineSpec, load


def compile_pipeline(
    spec: str, output: Path | None = None, overrides: Sequence[str] = (), images: Path = lock.PATH
) -> Path:
    """Compile one pipeline.

    Args:
        spec: a name in pipelines/ or a path.
        output: where to; None: `build/<name>.yaml` below the working directory.
        overrides: `section.key=value`.
        images: lock of the images.

    Returns:
        The file that was written.

    Raises:
        SpecError, UsageError: the pipeline file, or the lock of images, is wrong or missing; or the output
            is no .yaml, which KFP takes for another format.
    """
    if output is not None and output.suffix not in (".yaml", ".yml"):
        raise UsageError(
            f"--output {output} does not end in .yaml", "name a .yaml: Kubeflow Pipelines takes that"
        )
    pipeline = load(spec, overrides)
    path = output or Path("build") / f"{pipeline.name}.yaml"
    write(pipeline, lock.read(images), {}, path)
    return path


def write(spec: PipelineSpec, images: Mapping[str, Image], caches: Mapping[str, str], path: Path) -> None:
    """Write the IR of a spec for a cluster.

    Args:
        spec: the pipeline.
        images: the locked images.
        caches: stage -> KFP's cache key, of those whose commit is in the store.
        path: ends in .yaml.
    """
    from kfp import compiler

    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(graph.build(spec, graph.OnACluster(images, caches)), str(path))
