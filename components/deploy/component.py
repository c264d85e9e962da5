"""The deploy stage as a KFP component."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Metrics, Output


@dsl.component(base_image="tuneyard/cpu:python", install_kfp_package=False)
def deploy(
    config: str,
    run: str,
    pipeline: str,
    slot: str,
    due: str,
    registration: Input[Dataset],
    deployment: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
) -> None:
    """Put the champion in service and see it answer."""
    from components.deploy.config import DeployConfig
    from components.deploy.deploy import deploy as verb
    from components.shared.stage import execute

    inputs, outputs = {"registration": registration}, {"deployment": deployment}
    execute(verb, DeployConfig, config, (run, pipeline, slot, due), inputs, outputs, page, metrics)
