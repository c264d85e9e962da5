"""Submit: plan a pipeline, run what is not done yet, say how each stage went."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.notify import notify
from components.notify.config import Event
from components.shared.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    TuneyardError,
    UsageError,
)
from components.shared.store import Store
from components.train.sharding.config import HERE, Processes
from pipelines import fits, graph, planner
from pipelines.embedded import platform
from pipelines.report import Report, explain, gather
from pipelines.samples import fetch
from pipelines.spec import PipelineSpec, load
from pipelines.watch import Watcher

log = logging.getLogger("tuneyard.submit")


def new_run_id(pipeline: str) -> str:
    """Sortable by time and unique: pipeline, UTC time, four random hex digits."""
    return f"{pipeline}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def run_local(name: str, overrides: Sequence[str] = (), screen: Any = sys.stderr) -> Report:
    """Run a pipeline on this machine.

    Args:
        name: a name in pipelines/ or the path of a YAML file.
        overrides: `section.key=value`.
        screen: where to show progress; None for nowhere.

    Returns:
        How it went, also where it was interrupted, or no stage has started because the platform or the sample
        data could not be had.

    Raises:
        SpecError, UsageError: the pipeline file or the command is wrong; nothing has started.
    """
    spec = load(name, overrides)
    started = time.monotonic()
    home = platform.home_dir()
    report = Report(new_run_id(spec.name), spec.name)
    report.log = str(home / "runs" / report.run_id / "log.txt")
    log.info("%s: no cluster is configured, running on this machine (%s)", spec.name, home)
    with told(report):
        platform.preflight(home)
        embedded = platform.up(home)
        os.environ.update(platform.environment(embedded))
        with _one_at_a_time(home, spec.name):
            _run(spec, report, home, embedded.serving_url, started, screen)
    report.seconds = round(time.monotonic() - started, 1)
    _notify(spec, report)
    return report


def _notify(spec: PipelineSpec, report: Report) -> None:
    """Tell the webhook how the run ended; whoever pressed Ctrl-C knows."""
    if spec.notify is None or report.exit_code == EXIT_INTERRUPTED:
        return
    events: dict[int, Event] = {EXIT_DONE: "done", EXIT_STOPPED: "stopped"}
    text = f"{spec.name}, run {report.run_id}: {report.status} in {report.seconds:,.0f} s\n{explain(report)}"
    try:
        notify.tell(spec.notify, notify.Ending(events.get(report.exit_code, "failed"), text.strip()))
    except TuneyardError as error:
        log.warning("%s", error)


def _run(
    spec: PipelineSpec, report: Report, home: Path, serving_url: str, started: float, screen: Any
) -> None:
    """Fetch samples, plan, run what is left; however that ends, gather the report and keep it."""
    store = Store.from_environment()
    done: dict[str, dict[str, Any]] | None = None
    kfp_says = ""
    with told(report):
        fetch.ensure([*spec.ingest.external_uris(), *spec.train.external_uris()], home)
        planned = planner.plan(spec, store)
        done = {p.stage: p.commit for p in planned if p.commit}
        for stage, commit in done.items():
            log.info("\u2713 %s  unchanged, %s before", stage, "stopped" if commit["stop"] else "done")
        if len(done) < len(planned) and not planner.stopped(planned):
            if "train" not in done:
                fits.refuse_unfit(spec, store)
            kfp_says = _run_graph(spec, report, done, home, screen)
    if report.error:  # the store may be why, and nobody waits for a minute to learn it again
        store = store.impatient()
    with told(report):
        if done is not None:
            gather(report, list(spec.stages()), done, store, serving_url)
        if kfp_says and not report.error:
            report.end({"what": kfp_says, "todo": f"see {report.log}", "exit_code": EXIT_FAILED})
        report.seconds = round(time.monotonic() - started, 1)
        store.write_json(f"runs/{report.run_id}/run.json", asdict(report) | {"spec": spec.resolved()})


@contextlib.contextmanager
def told(report: Report) -> Iterator[None]:
    """An error of ours or Ctrl-C ends the report and not the command, which has yet to keep and print it."""
    try:
        yield
    except UsageError:
        raise
    except TuneyardError as error:
        report.end(error.facts())
    except KeyboardInterrupt:
        todo = "submit again to go on from the last finished stage"
        report.end({"what": "interrupted", "todo": todo, "exit_code": EXIT_INTERRUPTED})


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
) -> str:
    """Run the stages that are left through KFP's local runner. Returns what KFP said of a failure, or ''.

    KFP says only which task failed; the stage's own record, in the store, says why.
    """
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
    os.environ.pop(HERE, None)
    if spec.hardware.processes > 1:
        asked = Processes(count=spec.hardware.processes, sharding=spec.hardware.sharded())
        os.environ[HERE] = asked.model_dump_json()
    pipeline = graph.build(spec, graph.OnThisMachine(report.run_id, manifests))
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(folder / "kfp"))
    watcher = Watcher(Path(report.log), screen)
    kfp_log = logging.getLogger()
    before = kfp_log.level
    try:
        with contextlib.redirect_stdout(watcher), _quiet_kfp():
            pipeline()
    except Exception as error:
        return str(error) or type(error).__name__
    finally:
        kfp_log.setLevel(before)
        watcher.close()
    return ""


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


def interruptible() -> None:
    """Let SIGINT and SIGTERM end a submit as Ctrl-C does: the stage stops too, at its last checkpoint."""
    import psutil

    def stop(number: int, frame: Any) -> None:
        if number == signal.SIGTERM or not _typed():
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(signal.SIGINT)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _typed() -> bool:
    """Whether SIGINT may be Ctrl-C's, which the stage has from the terminal; twice would cut its save off."""
    try:
        with Path("/dev/tty").open() as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
