"""Submit: plan a pipeline, run what is not done yet, say how each stage went."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.shared import ledger
from components.shared.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, TuneyardError, UsageError
from components.shared.store import Store
from pipelines import graph, planner
from pipelines.embedded import platform
from pipelines.samples import fetch
from pipelines.spec import PipelineSpec, load
from pipelines.watch import Watcher

log = logging.getLogger("tuneyard.submit")

_STATUS = {EXIT_DONE: "done", EXIT_STOPPED: "stopped"}


@dataclass
class Report:
    """How a run went; `tuneyard submit --json` prints it."""

    run_id: str
    pipeline: str
    status: str = "done"
    exit_code: int = EXIT_DONE
    seconds: float = 0.0
    stages: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    verdict: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    endpoint: str | None = None
    error: dict[str, Any] | None = None
    log: str = ""

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def new_run_id(pipeline: str) -> str:
    """Sortable by time and unique: pipeline, UTC time, four random hex digits."""
    return f"{pipeline}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def run_local(name: str, overrides: Sequence[str] = (), screen: Any = sys.stderr) -> Report:
    """Run a pipeline on this machine.

    Args:
        name: a name in pipelines/ or the path of a YAML file.
        overrides: `section.key=value`.
        screen: where to show progress; None for nowhere.

    Raises:
        SpecError, UsageError: the pipeline file or the command is wrong; nothing has started.
        TuneyardError: the platform or the sample data cannot be had; no stage has started.
    """
    spec = load(name, overrides)
    started = time.monotonic()
    home = platform.home_dir()
    log.info("%s: no cluster is configured, running on this machine (%s)", spec.name, home)
    platform.preflight(home)
    embedded = platform.up(home)
    os.environ.update(platform.environment(embedded))
    with _one_at_a_time(home, spec.name):
        sources = [spec.ingest.source, spec.ingest.test_source or "", spec.train.base_model]
        fetch.ensure([uri for uri in sources if uri], home)
        store = Store.from_environment()
        report = Report(new_run_id(spec.name), spec.name)
        report.log = str(home / "runs" / report.run_id / "log.txt")
        planned = planner.plan(spec, store)
        done = {p.stage: p.commit for p in planned if p.commit}
        for stage, commit in done.items():
            log.info("\u2713 %s  unchanged, %s before", stage, "stopped" if commit["stop"] else "done")
        if len(done) < len(planned) and not planner.stopped(planned):
            _run_graph(spec, report, done, home, screen)
        _fill(report, spec, done, store, embedded.serving_url)
        report.seconds = round(time.monotonic() - started, 1)
        store.write_json(f"runs/{report.run_id}/run.json", asdict(report) | {"spec": spec.resolved()})
    return report


@contextlib.contextmanager
def _one_at_a_time(home: Path, pipeline: str) -> Iterator[None]:
    """Two submits of one pipeline would do the same work side by side."""
    from filelock import FileLock, Timeout

    lock = FileLock(home / f"submit-{pipeline}.lock")
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout as error:
        raise UsageError(
            f"another submit of {pipeline} is running here ({home})",
            "wait for it, or stop it with Ctrl-C there",
        ) from error


def _run_graph(
    spec: PipelineSpec, report: Report, done: Mapping[str, Mapping[str, Any]], home: Path, screen: Any
) -> None:
    """Run the stages that are left through KFP's local runner; how they went is in the store."""
    from kfp import local

    store = Store.from_environment()
    folder = home / "runs" / report.run_id
    manifests: dict[str, dict[str, str]] = {}
    for stage, commit in done.items():
        for output, uri in commit["outputs"].items():
            path = folder / "done" / f"{stage}-{output}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(store.read_manifest(uri).to_json())
            manifests.setdefault(stage, {})[output] = str(path)
    pipeline = graph.build(spec, report.run_id, manifests)
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(folder / "kfp"))
    watcher = Watcher(Path(report.log), screen)
    kfp_log = logging.getLogger()
    before = kfp_log.level
    try:
        with contextlib.redirect_stdout(watcher), _quiet_kfp():
            pipeline()
    except KeyboardInterrupt:
        raise
    except Exception as error:
        # KFP says only which task failed; the stage's own record, in the store, says why.
        log.debug("kfp: %s", error)
        report.error = {"what": str(error), "todo": f"see {report.log}", "exit_code": EXIT_FAILED}
    finally:
        kfp_log.setLevel(before)
        watcher.close()


@contextlib.contextmanager
def _quiet_kfp() -> Iterator[None]:
    """KFP logs its steps through the root logger and resets its format; ours are enough."""
    from kfp.local import logging_utils

    @contextlib.contextmanager
    def silent() -> Iterator[None]:
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.setLevel(level)

    original = logging_utils.local_logger_context
    logging_utils.local_logger_context = silent
    try:
        yield
    finally:
        logging_utils.local_logger_context = original


def _fill(
    report: Report, spec: PipelineSpec, done: Mapping[str, Mapping[str, Any]], store: Store, serving_url: str
) -> None:
    """Gather the report from the commits and the records of the run."""
    failed: dict[str, Any] | None = None
    for stage in spec.stages():
        record = store.read_json(f"runs/{report.run_id}/{stage}.json")
        commit = done.get(stage)
        if commit is None and record and record["status"] in ("done", "stopped"):
            commit = store.read_json(f"stages/{stage}/{record['key']}.json")
        seconds = record["seconds"] if record else 0.0
        status = (
            record["status"]
            if record
            else "stopped"
            if commit and commit["stop"]
            else "done"
            if commit
            else "not run"
        )
        cached = stage in done or bool(record and record.get("cached"))
        outputs = dict(commit["outputs"]) if commit else {}
        facts = {"name": stage, "status": status, "seconds": seconds, "cached": cached, "outputs": outputs}
        if commit and not cached:
            facts["arithmetic_seconds"] = commit["arithmetic_seconds"]
        report.stages.append(facts)
        if commit:
            _take(report, stage, commit, store, serving_url)
        if failed is None and record and record["status"] in ("failed", "interrupted"):
            failed = record["error"] | {"stage": stage}
        if failed is None and commit and commit["stop"]:
            facts = {"what": commit["stop"], "todo": commit["stop_todo"], "exit_code": EXIT_STOPPED}
            failed = facts | {"stage": stage}
    report.error = failed or report.error
    report.exit_code = int(report.error["exit_code"]) if report.error else EXIT_DONE
    report.status = _STATUS.get(report.exit_code, "failed")


def _take(report: Report, stage: str, commit: Mapping[str, Any], store: Store, serving_url: str) -> None:
    summary = commit["summary"]
    if stage == "evaluate":
        report.metrics = summary["metrics"]
        report.verdict = summary["verdict"]
    elif stage == "register":
        # The ledger and MLflow's aliases agree, and reading the ledger costs no import of MLflow (2.5 s).
        aliases = ledger.aliases(ledger.read(summary["name"], store))
        report.model = {
            "name": summary["name"],
            "version": int(summary["version"]),
            "aliases": sorted(a for a, version in aliases.items() if version == int(summary["version"])),
            "uri": summary["manifest"],
            "sha256": summary["digest"],
        }
    elif stage == "deploy":
        report.endpoint = serving_url


def interruptible() -> None:
    """Let SIGTERM end a submit as Ctrl-C does: the stage in work is stopped too, at its last checkpoint."""
    import psutil

    def stop(number: int, frame: Any) -> None:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGINT)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def explain(report: Report) -> str:
    """Why a run did not end well, for a person."""
    if not report.error:
        return ""
    error = TuneyardError(report.error["what"], report.error["todo"])
    stage = report.error.get("stage")
    return f"{stage}: {error}" if stage else str(error)
