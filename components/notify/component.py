"""The KFP wrapper of notify, the exit handler: it runs after the stages, however they ended."""

from kfp import dsl


@dsl.component(base_image="tuneyard/cpu:python", install_kfp_package=False)
def notify(config: str, run: str, pipeline: str, slot: str, due: str, stages: str) -> None:
    """Tell a webhook how the run ended."""
    from components.notify.config import NotifyConfig
    from components.notify.notify import main

    named = {"id": run, "pipeline": pipeline, "slot": slot, "due": due}
    main(NotifyConfig.model_validate_json(config), named, stages.split(","))
