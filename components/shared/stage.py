"""What happens around every stage: inputs in, the work, outputs committed, a record of how it went.

The same function runs in a local subprocess and in a pod.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from components.shared import clock, digest, logparts
from components.shared.commit import (
    commit_name,
    raise_if_stopped,
    read_commit,
    stage_key,
    write_commit,
)
from components.shared.errors import TuneyardError
from components.shared.manifest import Manifest
from components.shared.recording import recorded, work_folder
from components.shared.settings import Settings
from components.shared.store import Store

log = logging.getLogger("tuneyard.stage")

# What a stage keeps in the store below work/<stage>/<key>/ until it has committed.
_KEPT = ("step-", "slice-", "trial-")


@dataclass(frozen=True)
class Artifact:
    """An input of a stage: its manifest, and a local folder with its files."""

    manifest: Manifest
    path: Path


@dataclass(frozen=True)
class Context:
    """Where a stage runs.

    Args:
        run: id of the pipeline run.
        pipeline: name in the pipeline file.
        stage: name of the stage.
        key: the stage's key.
        store: for what is no input artifact, such as the base model.
        out: an empty folder; what the stage leaves in `out/<output name>/` becomes that output.
        work: a folder of this key that outlives a killed attempt; checkpoints go here.
    """

    run: str
    pipeline: str
    stage: str
    key: str
    store: Store
    out: Path
    work: Path


@dataclass
class Result:
    """What a stage says besides the files it leaves.

    Args:
        kinds: output name -> manifest kind (`dataset`, `model`, `report`).
        metadata: output name -> facts that go into its manifest.
        metrics: flat numbers for the run's record and the KFP page.
        summary: small JSON for the run's record (counts by reason, verdict, model version...).
        page: an HTML file in `out`, shown in the KFP page; None when there is none.
        stop: when set, the stage commits and then stops the line: what was found.
        stop_todo: what the reader can do about it.
    """

    kinds: dict[str, str]
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    page: Path | None = None
    stop: str = ""
    stop_todo: str = ""


Verb = Callable[[Any, Mapping[str, Artifact], Context], Result]


def _run_verb(
    verb: Verb, config: Settings, inputs: Mapping[str, Manifest], context: Context
) -> dict[str, Any]:
    started, computed = time.time(), clock.arithmetic_seconds()
    shutil.rmtree(context.out, ignore_errors=True)
    artifacts = lay_inputs(inputs, context.out.parent / "inputs", context.store)
    context.out.mkdir(parents=True)
    result = verb(config, artifacts, context)
    made_by = {
        "stage": context.stage,
        "key": context.key,
        "code": digest.of_code(context.stage),
        "settings": config.model_dump(mode="json"),
        "inputs": {name: manifest.digest for name, manifest in inputs.items()},
    }
    manifests = {
        name: context.store.put_tree(
            context.out / name, kind, result.metadata.get(name, {}), made_by, given=True
        )
        for name, kind in result.kinds.items()
    }
    page = result.page.read_text() if result.page else ""
    commit = {
        **{k: v for k, v in asdict(result).items() if k in ("metrics", "summary", "stop", "stop_todo")},
        "stage": context.stage,
        "key": context.key,
        "run": context.run,
        "made_by": made_by,
        "page": page,
        "seconds": round(time.time() - started, 3),
        "arithmetic_seconds": round(clock.arithmetic_seconds() - computed, 3),
        "peak_memory_gib": round(clock.peak_memory_gib(), 3),
        "outputs": {name: context.store.manifest_uri(manifest) for name, manifest in manifests.items()},
    }
    return write_commit(commit, context.store)


def perform(
    verb: Verb, config: Settings, run: Mapping[str, str], inputs: Mapping[str, Manifest]
) -> dict[str, Any]:
    """Do a stage unless its key is committed; leave a record either way.

    Args:
        verb: the stage's logic; its package names the stage.
        config: resolved settings.
        run: `id`, `pipeline`, `slot` and `due` of the run (slots.py).
        inputs: input name -> manifest.

    Returns:
        The commit.

    Raises:
        StageStopped: a check stopped the line (after the commit).
        TuneyardError: whatever the stage found wrong.
    """
    stage = verb.__module__.split(".")[1]
    store = Store.from_environment()
    with recorded(run, stage, store) as ending:
        key = stage_key(stage, config, {name: manifest.digest for name, manifest in inputs.items()}, store)
        commit = read_commit(stage, key, config, store)
        ending |= {"cached": commit is not None, "key": key}
        if commit is None:
            # One that no longer holds goes first, so that what is found afterwards is of now.
            store.remove(commit_name(stage, key))
            work = work_folder(stage, key)
            context = Context(run["id"], run["pipeline"], stage, key, store, work / "out", work)
            commit = _run_verb(verb, config, inputs, context)
            shutil.rmtree(work, ignore_errors=True)
            for kept in _KEPT:
                for name in store.names(f"work/{stage}/{key}/{kept}"):
                    store.remove(name)
        ending["status"] = "stopped" if commit["stop"] else "done"
    raise_if_stopped(commit)
    return commit


def settle_in() -> None:
    """Make a process of Kubeflow Pipelines one of ours: it ends as we do, and says what we say."""
    # A submit that runs in the background hands down an ignored SIGINT; a pod is ended by SIGTERM.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    # KFP's executor has set up the root logger for its own lines.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("tuneyard").setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # DeepSpeed is imported where a model is saved, and has a word for every machine without a GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda said: "Setting accelerator" not in said.getMessage())


def read_manifests(inputs: Mapping[str, Any]) -> dict[str, Manifest]:
    """Input name -> manifest, of the KFP artifacts that are there."""
    return {
        n: Manifest.from_json(Path(a.path).read_text(), a.path) for n, a in inputs.items() if a is not None
    }


def lay_inputs(inputs: Mapping[str, Manifest], folder: Path, store: Store) -> dict[str, Artifact]:
    """Input name -> artifact, its files laid into a folder of that name."""
    return {
        name: Artifact(manifest, store.get_tree(manifest, folder / name)) for name, manifest in inputs.items()
    }


def execute(
    verb: Verb,
    config_class: type[Settings],
    config: str,
    run: tuple[str, str, str, str],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    page: Any,
    metrics: Any,
    facts: Mapping[str, str] | None = None,
) -> None:
    """The body of every KFP component.

    Args:
        verb: the stage's logic.
        config_class: its settings class.
        config: the settings as JSON.
        run: id of the run, name of the pipeline, what the schedule passed ('' for none), when it was due.
        inputs: input name -> KFP artifact whose file is a manifest.
        outputs: output name -> KFP artifact to write the manifest to.
        page: KFP HTML artifact.
        metrics: KFP Metrics artifact.
        facts: entry of the stage's summary -> file to write it to, for what the graph decides by it.
    """
    stage = verb.__module__.split(".")[1]
    with logparts.shipped(run[0], stage):
        settle_in()
        manifests = read_manifests(inputs)
        try:
            named = dict(zip(("id", "pipeline", "slot", "due"), run, strict=True))
            commit = perform(verb, config_class.model_validate_json(config), named, manifests)
            _hand_over(commit, outputs, page, metrics)
            for name, path in (facts or {}).items():
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_text(json.dumps(commit["summary"][name]))
        except TuneyardError as error:
            log.error("%s: %s", stage, error)
            sys.exit(error.exit_code)


def _hand_over(commit: Mapping[str, Any], outputs: Mapping[str, Any], page: Any, metrics: Any) -> None:
    """Leave for KFP what the commit says."""
    store = Store.from_environment()
    for name, artifact in outputs.items():
        manifest = store.read_manifest(commit["outputs"][name])
        Path(artifact.path).parent.mkdir(parents=True, exist_ok=True)
        Path(artifact.path).write_text(manifest.to_json())
        artifact.metadata.update(
            digest=manifest.digest, uri=commit["outputs"][name], size_bytes=manifest.size
        )
    Path(page.path).parent.mkdir(parents=True, exist_ok=True)
    Path(page.path).write_text(commit["page"] or "<p>no page</p>")
    for name, value in commit["metrics"].items():
        metrics.log_metric(name, value)
