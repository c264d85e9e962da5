"""KFP component of a slice of the evaluate stage."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model


@dsl.component(base_image="tuneyard/cpu:python", install_kfp_package=False)
def evaluate_slice(
    config: str,
    run: str,
    pipeline: str,
    slot: str,
    due: str,
    share: str,
    test: Input[Dataset],
    train: Input[Dataset],
    model: Input[Model],
    compressed: Input[Model] = None,
) -> None:
    """Do a share of an evaluation's batches, for the evaluate stage to join."""
    from components.evaluate.slices.slice import main

    inputs = {"test": test, "train": train, "model": model, "compressed": compressed}
    main(config, {"id": run, "pipeline": pipeline, "slot": slot, "due": due}, share, inputs)
