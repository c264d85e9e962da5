"""The validate stage as a KFP component."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Metrics, Output


@dsl.component(base_image="tuneyard/cpu:python", install_kfp_package=False)
def validate(
    config: str,
    run: str,
    pipeline: str,
    slot: str,
    due: str,
    examples: Input[Dataset],
    quarantine: Input[Dataset],
    report: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
) -> None:
    """Hold the examples against expectations and stop the line where one fails."""
    from components.shared.stage import execute
    from components.validate.config import ValidateConfig
    from components.validate.validate import validate as verb

    inputs = {"examples": examples, "quarantine": quarantine}
    outputs = {"report": report}
    execute(verb, ValidateConfig, config, (run, pipeline, slot, due), inputs, outputs, page, metrics)
