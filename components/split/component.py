"""The KFP wrapper of split."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Metrics, Output


@dsl.component(base_image="tuneyard/cpu:python", install_kfp_package=False)
def split(
    config: str,
    run: str,
    pipeline: str,
    slot: str,
    due: str,
    examples: Input[Dataset],
    report: Input[Dataset],
    train: Output[Dataset],
    eval: Output[Dataset],
    test: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
) -> None:
    """Divide the examples into train, eval and test; the validation report only has to exist."""
    from components.shared.stage import execute
    from components.split.config import SplitConfig
    from components.split.split import split as verb

    outputs = {"train": train, "eval": eval, "test": test}
    inputs = {"examples": examples, "report": report}
    execute(verb, SplitConfig, config, (run, pipeline, slot, due), inputs, outputs, page, metrics)
