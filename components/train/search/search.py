"""A search: trials of the training with other settings, several at a time, and the best one's model.

Here nothing is computed: this process proposes settings, ends trials that fall behind and keeps the journal;
the processes of crew.py make the trials. See docs/decisions/0017.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.shared import tracking
from components.shared.errors import EXIT_STOPPED, StageStopped, TuneyardError
from components.shared.progress import Progress
from components.shared.stage import Artifact, Context, Result
from components.train.config import TrainConfig
from components.train.search import report
from components.train.search.config import Range, SearchConfig
from components.train.search.crew import Crew
from components.train.search.lasting import Lasting
from components.train.search.space import whole, with_settings
from components.train.search.study import Study, Trial, best, identity_of
from components.train.search.worker import folder_of

log = logging.getLogger("tuneyard.train")

# A process that vanished may have been killed with others; its trial goes on from its checkpoint, once.
_DEATHS = 1


def search(
    config: TrainConfig,
    asked: SearchConfig,
    inputs: Mapping[str, Artifact],
    context: Context,
    start_run: Callable[[dict[str, Any]], str],
) -> Result:
    """Make the trials; what comes out is what the training of the best one gave, and a table of all.

    Args:
        config: settings of the stage.
        asked: its search.
        inputs: `train` and `eval`.
        context: of the stage; an attempt that was cut off left its trials in `work`.
        start_run: starts the MLflow run that those of the trials are nested in; given further facts.

    Raises:
        StageStopped: no trial could use the data.
        TuneyardError: every trial failed.
    """
    home = context.work / "search"
    digests = {name: artifact.manifest.digest for name, artifact in inputs.items()}
    whole_ones = {
        name for name, values in asked.space.items() if isinstance(values, Range) and whole(config, name)
    }
    lasting = Lasting(context, home)
    lasting.resume()
    study = Study(home, asked, whole_ones, identity_of(config.model_dump(mode="json"), digests))
    crew, ended, run_id = Crew(home, asked.parallel), "FAILED", ""
    try:
        run_id = _run_of(home, start_run, asked)
        _write_job(home, config, asked, inputs, context, run_id)
        _tokens(crew)
        state = _Ongoing(config, study, crew, home, lasting, Progress("search", asked.trials, "trials"))
        state.make_all()
        found = state.take_best(context.out)
        result = report.add(found, study.trials(), state.chosen, config, context, run_id)
        ended = "FINISHED"
        return result
    except KeyboardInterrupt:
        ended = "KILLED"
        log.info("train: interrupted; the search goes on where it is when it is submitted again")
        raise
    finally:
        crew.stop()
        study.close()
        tracking.end_run(run_id, ended)  # type: ignore[arg-type]


def _run_of(home: Path, start_run: Callable[[dict[str, Any]], str], asked: SearchConfig) -> str:
    """The MLflow run of the search: that of an attempt that was cut off, or a new one."""
    note = home / "mlflow_run"
    if not note.exists():
        run_id = start_run({"search": asked.model_dump(mode="json")})
        note.write_text(run_id)
    return note.read_text()


def _write_job(
    home: Path,
    config: TrainConfig,
    asked: SearchConfig,
    inputs: Mapping[str, Artifact],
    context: Context,
    run_id: str,
) -> None:
    """What the processes need to know, for all trials."""
    lengths = asked.space.get("max_length")
    job = {
        "config": config.model_dump(mode="json"),
        "run": context.run,
        "pipeline": context.pipeline,
        "key": context.key,
        "store": context.store is not None,
        "mlflow_run": run_id,
        "longest_judged": 0
        if lengths is None
        else int(lengths.high if isinstance(lengths, Range) else max(lengths)),
        "inputs": {
            name: {"manifest": given.manifest.to_json(), "path": str(given.path)}
            for name, given in inputs.items()
        },
    }
    (home / "job.json").write_text(json.dumps(job))


def _tokens(crew: Crew) -> None:
    """Have the examples encoded, once for all trials."""
    crew.tell(0, tokens=True)
    while True:
        for _, message in crew.heard():
            if "tokens" in message:
                return
            if "refused" in message:
                facts = message["refused"]
                kind = StageStopped if facts["exit_code"] == EXIT_STOPPED else TuneyardError
                raise kind(facts["what"], facts["todo"])
            raise TuneyardError(
                f"train.search: encoding the examples failed: {message['gone']}", crew.last_words(0)
            )


@dataclass
class _Ongoing:
    """A search while its trials are made.

    Args:
        config: settings of the stage.
        study: what is known of the trials.
        crew: makes them.
        home: folder of the search.
        lasting: keeps it for another pod.
        progress: shows how it goes.
        busy: slot -> the trial that is made there.
        at: number of a trial -> its optimizer updates so far.
        deaths: number of a trial -> processes that vanished with it.
        chosen: the trial whose model is taken.
    """

    config: TrainConfig
    study: Study
    crew: Crew
    home: Path
    lasting: Lasting
    progress: Progress
    busy: dict[int, Trial] = field(default_factory=dict)
    at: dict[int, int] = field(default_factory=dict)
    deaths: dict[int, int] = field(default_factory=dict)
    chosen: Trial | None = None

    def make_all(self) -> None:
        """Make those that were cut off, then new ones, until there are enough."""
        waiting = [trial for trial in self.study.trials() if trial.state == "running"]
        done = len([trial for trial in self.study.trials() if trial.state != "running"])
        if done or waiting:
            log.info("train: the search goes on; %d trials are done, %d were cut off", done, len(waiting))
        self.progress.done = done
        while True:
            for slot in range(self.crew.size):
                if slot not in self.busy and (trial := waiting.pop(0) if waiting else self.study.propose()):
                    self._begin(slot, trial)
            if not self.busy:
                return
            for slot, message in self.crew.heard():
                self._take(slot, message)

    def _begin(self, slot: int, trial: Trial) -> None:
        self.busy[slot] = trial
        log.info("train: trial %d: %s", trial.number, report.words(trial.chosen))
        self.crew.tell(slot, number=trial.number, chosen=trial.chosen)

    def _take(self, slot: int, message: Mapping[str, Any]) -> None:
        """What a process says."""
        trial = self.busy.get(slot)
        if trial is None:
            return  # it ended when it had nothing to do
        if "at" in message:
            self.at[trial.number] = message["at"]
        elif "judged" in message:
            self.at[trial.number] = message["judged"]
            end = self.study.saw(trial, message["judged"], message["loss"])
            self.crew.tell(slot, end=end)
        elif "gone" in message:
            self.deaths[trial.number] = self.deaths.get(trial.number, 0) + 1
            if self.deaths[trial.number] > _DEATHS:
                log.warning("train: trial %d: %s", trial.number, self.crew.last_words(slot))
                self._end(slot, {"ended": "failed", "reason": message["gone"]})
            else:
                log.warning("train: trial %d: %s; it goes on", trial.number, message["gone"])
                self._begin(slot, trial)
        else:
            self._end(slot, message)
        self._show(slot not in self.busy)

    def _end(self, slot: int, message: Mapping[str, Any]) -> None:
        """A trial has ended: into the journal first; then what nobody will ask for goes."""
        trial, state = self.busy.pop(slot), message["ended"]
        steps = message.get("steps", self.at.get(trial.number, 0))
        before = best(self.study.trials())
        self.study.end(trial, state, steps, message.get("loss"), message.get("reason", ""))
        leading = best(self.study.trials())
        if state == "failed":
            log.warning("train: trial %d failed: %s", trial.number, message["reason"])
        for each in (trial, before):
            if each is not None and (leading is None or each.number != leading.number):
                shutil.rmtree(self._folder(each), ignore_errors=True)
        complete = leading if leading and leading.state == "complete" else None
        kept = self._folder(complete) if complete else None
        if kept is not None:
            shutil.rmtree(kept / "checkpoints", ignore_errors=True)
        self.lasting.keep(kept)

    def _folder(self, trial: Trial) -> Path:
        return folder_of(self.home, with_settings(self.config, trial.chosen))

    def _show(self, ended: bool) -> None:
        leading = best(self.study.trials())
        made = ", ".join(f"{t.number} (step {self.at.get(t.number, 0)})" for t in self.busy.values())
        shown = f"{leading.loss:.4f} of trial {leading.number}" if leading else "none yet"
        self.progress.advance(int(ended), trial=made or "-", best=shown)

    def take_best(self, out: Path) -> dict[str, Any]:
        """Lay what the best trial left into `out`.

        Returns:
            Its result.

        Raises:
            TuneyardError: every trial failed.
        """
        trials = self.study.trials()
        self.chosen = best(trials)
        if self.chosen is None:
            reasons = "; ".join(dict.fromkeys(f"{t.reason}" for t in trials))
            first = ", ".join(str(t.number) for t in trials[:5])
            raise TuneyardError(
                f"train.search: all {len(trials)} trials failed ({first}...): {reasons}",
                "narrow train.search.space, first of all its learning rates",
            )
        home = self._folder(self.chosen)
        if not (home / "result.json").exists():
            self._make_to_the_end(self.chosen)
        shutil.copytree(home / "out", out, dirs_exist_ok=True, copy_function=os.link)
        found: dict[str, Any] = json.loads((home / "result.json").read_text())
        return found

    def _make_to_the_end(self, trial: Trial) -> None:
        """Make a trial whose model is not there: none was complete, or its folder is gone.

        Raises:
            TuneyardError: it fails.
        """
        log.info("train: trial %d is the best; training it to its end", trial.number)
        self.crew.tell(0, number=trial.number, chosen=trial.chosen)
        while True:
            for _, message in self.crew.heard():
                if "judged" in message:
                    self.crew.tell(0, end=False)
                elif message.get("ended") == "complete":
                    return
                elif "gone" in message or "ended" in message:
                    raise TuneyardError(
                        f"train.search: the best trial ({trial.number}: {report.words(trial.chosen)}) failed "
                        f"when it was trained to its end: {message.get('reason') or message['gone']}",
                        "narrow train.search.space to what trains, or set pruner: null",
                    )
