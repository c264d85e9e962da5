"""A slice of the evaluate stage: what its pod does, and where it is left for the stage itself."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from components.evaluate.config import EvaluateConfig
from components.evaluate.evaluate import read_tests, task_of
from components.evaluate.slices import keeping
from components.evaluate.slices.share import Share
from components.shared import logparts
from components.shared.commit import read_commit, stage_key
from components.shared.errors import TuneyardError
from components.shared.manifest import Manifest
from components.shared.recording import recorded, work_folder
from components.shared.stage import Context, lay_inputs, read_manifests, settle_in
from components.shared.store import Store

log = logging.getLogger("tuneyard.evaluate")
_STAGE = "evaluate"


def perform(
    config: EvaluateConfig, run: Mapping[str, str], share: Share, inputs: Mapping[str, Manifest]
) -> None:
    """Do a share of an evaluation unless the evaluation is committed, or this share is kept already.

    The key is that of the stage, which knows nothing of slices: how many there are decides where something is
    computed, never what.

    Args:
        config: of the stage.
        run: as the stage has it.
        share: which slice this is.
        inputs: of the stage.

    Raises:
        StageStopped: another run has the slot.
        TuneyardError: whatever the stage would find wrong.
    """
    store = Store.from_environment()
    with recorded(run, f"{_STAGE}-{share.name}", store) as ending:
        key = stage_key(_STAGE, config, {name: manifest.digest for name, manifest in inputs.items()}, store)
        work = work_folder(_STAGE, key) / share.name
        context = Context(run["id"], run["pipeline"], _STAGE, key, store, work / "out", work)
        kept, why = keeping.fetch(share, context)
        if kept is not None or read_commit(_STAGE, key, config, store):
            ending["cached"] = True
        else:
            log.info("slice %s: %s; its share is begun", share, why)
            artifacts = lay_inputs(inputs, work / "inputs", store)
            task = task_of(artifacts, config)
            keeping.keep(task.take(config, read_tests(artifacts), artifacts, context, share), share, context)
        shutil.rmtree(work, ignore_errors=True)


def main(config: str, run: Mapping[str, str], share: str, inputs: Mapping[str, Any]) -> None:
    """The body of the component.

    Args:
        config: of the stage, as JSON.
        run: as `perform` has it.
        share: such as `2 of 4`.
        inputs: input name -> KFP artifact whose file is a manifest; None for one that is not there.
    """
    with logparts.shipped(run["id"], f"{_STAGE}-slice-{share.replace(' ', '-')}"):
        settle_in()
        try:
            settings = EvaluateConfig.model_validate_json(config)
            perform(settings, run, Share.read(share), read_manifests(inputs))
        except TuneyardError as error:
            log.error("%s slice %s: %s", _STAGE, share, error)
            sys.exit(error.exit_code)
