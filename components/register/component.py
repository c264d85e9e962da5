"""The KFP wrapper of the register stage."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Metrics, Model, Output, OutputPath


@dsl.component(base_image="tuneyard/cpu:python", install_kfp_package=False)
def register(
    config: str,
    run: str,
    pipeline: str,
    slot: str,
    due: str,
    model: Input[Model],
    evaluation: Input[Dataset],
    registration: Output[Dataset],
    champion: OutputPath(str),  # type: ignore[valid-type]  # KFP's own notation
    page: Output[HTML],
    metrics: Output[Metrics],
) -> None:
    """Give the accepted model a version and, when it is not worse, the champion's place."""
    from components.register.config import RegisterConfig
    from components.register.register import register as verb
    from components.shared.stage import execute

    inputs = {"model": model, "evaluation": evaluation}
    outputs = {"registration": registration}
    facts = {"champion": champion}
    execute(verb, RegisterConfig, config, (run, pipeline, slot, due), inputs, outputs, page, metrics, facts)
