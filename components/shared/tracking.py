"""What a run leaves in MLflow: settings, curves, system metrics, texts.

Without a tracking URI there is no run, and its id is empty: then each function does nothing, so that
callers need no condition.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal
from urllib.parse import quote

from components.shared.errors import TuneyardError
from components.shared.mlflow_database import attempt, client, tracking_uri

log = logging.getLogger("tuneyard.tracking")

# mlflow/utils/validation.py of 3.17
_PARAM_CHARACTERS = 6000
_TAG_CHARACTERS = 8000
_SYSTEM_METRICS_SECONDS = 5


def start_run(experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> str:
    """Start a run, its experiment made at need with its artifacts under TUNEYARD_MLFLOW_ARTIFACTS.

    Args:
        experiment: the pipeline's name.
        name: what the run is called in the page.
        params: settings; nested ones become `section.key`. A value too long for MLflow is cut there and kept
            whole in the artifact `long_params/<key>.txt`.
        tags: digests, code, who started it.

    Returns:
        The run's id; '' when MLFLOW_TRACKING_URI is not set.

    Raises:
        TuneyardError: MLflow or its artifact store refused.
    """
    if not tracking_uri():
        return ""
    mlflow = client()
    short_tags = {key: str(value)[:_TAG_CHARACTERS] for key, value in tags.items()}
    experiment_id = _experiment(experiment)
    run = attempt("starting a run", lambda: mlflow.create_run(experiment_id, tags=short_tags, run_name=name))
    run_id = str(run.info.run_id)
    log_settings(run_id, params)
    return run_id


def log_settings(run_id: str, params: Mapping[str, Any]) -> None:
    """Log settings, as `start_run` does; one that is logged again must be as it was."""
    if not run_id:
        return
    from mlflow.entities import Param

    flat = {key: str(value) for key, value in _flat(params).items()}
    rows = [Param(key, value[:_PARAM_CHARACTERS]) for key, value in flat.items()]
    attempt("logging settings", partial(client().log_batch, run_id, params=rows))
    for key, value in flat.items():
        if len(value) > _PARAM_CHARACTERS:
            log_artifact_text(run_id, f"long_params/{key}.txt", value)


def log_metrics(run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
    """Log numbers at one step."""
    log_history(run_id, [{"step": step, **metrics}])


def log_history(run_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log curves; MLflow makes transactions of a thousand numbers.

    Args:
        run_id: of `start_run`.
        rows: each with `step` and numbers by name; None and texts are left out, a row may carry its
            `time` in seconds since the epoch (then MLflow's time axis is right for a resumed run).
    """
    if not run_id:
        return
    from mlflow.entities import Metric

    now = time.time()
    mlflow = client()
    metrics = [
        Metric(key, float(value), int(1000 * row.get("time", now)), int(row["step"]))
        for row in rows
        for key, value in row.items()
        if key not in ("step", "time") and isinstance(value, int | float)
    ]
    attempt("logging metrics", partial(mlflow.log_batch, run_id, metrics=metrics))


def log_artifact_text(run_id: str, name: str, text: str) -> None:
    """Keep a text (a report, a curve as CSV) with the run, in the artifact store.

    Raises:
        TuneyardError: the artifact store cannot be written.
    """
    if not run_id:
        return
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    mlflow = client()
    try:
        attempt(f"keeping {name}", lambda: mlflow.log_text(run_id, text, name))
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise TuneyardError(
            f"{name} of MLflow run {run_id} cannot be written to the artifact store ({error})",
            "see that S3 is up (`tuneyard status`) and that TUNEYARD_MLFLOW_ARTIFACTS names a bucket of it",
        ) from error


@contextmanager
def system_metrics(run_id: str) -> Iterator[None]:
    """Log processor, memory, disk and network (and GPU when there is one) of this machine every 5 seconds.

    A monitor that fails says so in the log and leaves the training alone.
    """
    if not run_id:
        yield
        return
    client()
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    # It would tell everybody without a GPU how to be told more about that.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
    monitor = SystemMetricsMonitor(
        run_id, sampling_interval=_SYSTEM_METRICS_SECONDS, tracking_uri=tracking_uri()
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def end_run(run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
    """End a run."""
    if run_id:
        mlflow = client()
        attempt("ending a run", lambda: mlflow.set_terminated(run_id, status))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _experiment(name: str) -> str:
    """Id of an experiment. Two processes may make it at once: the second finds the first's."""
    from mlflow.exceptions import MlflowException

    root = os.environ.get("TUNEYARD_MLFLOW_ARTIFACTS")
    if not root and tracking_uri().startswith("sqlite:"):
        # MLflow would write to ./mlruns of whatever directory we are in.
        raise TuneyardError(
            "TUNEYARD_MLFLOW_ARTIFACTS is not set", "start through `tuneyard submit`, which sets it"
        )
    mlflow = client()

    def find_or_make() -> str:
        found = mlflow.get_experiment_by_name(name)
        if found is None:
            try:
                return str(mlflow.create_experiment(name, f"{root}/{quote(name)}" if root else None))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = mlflow.get_experiment_by_name(name)
        return str(found.experiment_id)

    return attempt(f"making experiment {name!r}", find_or_make)
