"""The KFP wrapper of compress."""

from kfp import dsl
from kfp.dsl import HTML, Input, Metrics, Model, Output


@dsl.component(base_image="tuneyard/cpu:python", install_kfp_package=False)
def compress(
    config: str,
    run: str,
    pipeline: str,
    slot: str,
    due: str,
    model: Input[Model],
    compressed: Output[Model],
    page: Output[HTML],
    metrics: Output[Metrics],
) -> None:
    """Make the model that ships, and prove that it answers as the tuned one does."""
    from components.compress.compress import compress as verb
    from components.compress.config import CompressConfig
    from components.shared.stage import execute

    inputs, outputs = {"model": model}, {"compressed": compressed}
    execute(verb, CompressConfig, config, (run, pipeline, slot, due), inputs, outputs, page, metrics)
