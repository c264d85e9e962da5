"""The KFP wrapper of train."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Metrics, Model, Output


@dsl.component(base_image="tuneyard/cpu:python", install_kfp_package=False)
def train(
    config: str,
    run: str,
    pipeline: str,
    slot: str,
    due: str,
    train: Input[Dataset],
    eval: Input[Dataset],
    model: Output[Model],
    ledger: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
) -> None:
    """Fit the model on train, watching eval."""
    from components.shared.stage import execute
    from components.train.config import TrainConfig
    from components.train.train import train as verb

    inputs, outputs = {"train": train, "eval": eval}, {"model": model, "ledger": ledger}
    execute(verb, TrainConfig, config, (run, pipeline, slot, due), inputs, outputs, page, metrics)
