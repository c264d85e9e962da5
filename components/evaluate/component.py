"""KFP component of the evaluate stage."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Metrics, Model, Output


@dsl.component(base_image="tuneyard/cpu:python", install_kfp_package=False)
def evaluate(
    config: str,
    run: str,
    pipeline: str,
    slot: str,
    due: str,
    test: Input[Dataset],
    train: Input[Dataset],
    model: Input[Model],
    evaluation: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
    compressed: Input[Model] = None,
) -> None:
    """Judge the model that will ship against its base on test, and hold it against the gates."""
    from components.evaluate.config import EvaluateConfig
    from components.evaluate.evaluate import evaluate as verb
    from components.shared.stage import execute

    inputs = {"test": test, "train": train, "model": model, "compressed": compressed}
    outputs = {"evaluation": evaluation}
    execute(verb, EvaluateConfig, config, (run, pipeline, slot, due), inputs, outputs, page, metrics)
