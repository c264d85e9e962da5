"""The trials of a search and what is known of each: an Optuna study in a journal that survives a kill.

One process writes the journal. Its records are synced one by one, so that what was told is kept; a record
that a kill cut is dropped when it is opened again. A trial is known by the digest of all its settings: where
an attempt was cut off, the same settings go on from their checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.shared import digest
from components.shared.errors import TuneyardError
from components.train.search.config import Range, SearchConfig, Values

# Proposals at random before the estimator begins; Optuna's own ten are most of a small search.
_STARTUP, _STARTUP_SHARE = 10, 3
# Combinations drawn to find one that was not tried.
_DRAWS = 10_000
_DUPLICATE, _REASON, _STEPS, _IDENTITY = "duplicate", "reason", "steps", "identity"


@dataclass(frozen=True)
class Trial:
    """A trial as it stands.

    Args:
        number: from 0, in the order of the proposals.
        chosen: settings by name.
        state: running, complete, pruned or failed.
        loss: on eval; of a complete one the lowest, of others the last; None before the first.
        steps: optimizer updates it made.
        reason: why it failed.
        curve: (step, loss on eval).
        handle: Optuna's.
    """

    number: int
    chosen: dict[str, Any]
    state: str
    loss: float | None
    steps: int
    reason: str
    curve: list[tuple[int, float]] = field(default_factory=list)
    handle: Any = None


class Study:
    """The journal of a search.

    Args:
        folder: of the search, which outlives a killed attempt.
        search: settings.
        whole: names of the settings that take whole numbers alone.
        identity: digest of whatever else decides what a trial gives.

    Raises:
        TuneyardError: another process has it open, or it is of other settings or data.
    """

    def __init__(self, folder: Path, search: SearchConfig, whole: set[str], identity: str) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TuneyardError(
                f"another process runs the search in {folder}", "wait for it, or end it; then submit again"
            ) from error
        journal = folder / "journal.log"
        _mend(journal)
        self._search, self._whole = search, whole
        pruner = optuna.pruners.NopPruner()
        if search.pruner:
            pruner = optuna.pruners.SuccessiveHalvingPruner(
                min_resource=search.pruner.min_steps, reduction_factor=search.pruner.reduction_factor
            )
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name="search",
            load_if_exists=True,
            direction="minimize",
            pruner=pruner,
        )
        known = self._study.user_attrs.get(_IDENTITY)
        if known not in (None, identity):
            raise TuneyardError(
                f"the search in {folder} is of other settings or data ({known[:12]}, now {identity[:12]})",
                "delete that folder",
            )
        if known is None:
            self._study.set_user_attr(_IDENTITY, identity)

    def close(self) -> None:
        """Let another process have it."""
        self._lock.close()

    def trials(self) -> list[Trial]:
        """All of them, in order."""
        every = self._study.get_trials(deepcopy=False)
        found = [t for t in every if _DUPLICATE not in t.user_attrs and t.state.name != "WAITING"]
        return [self._trial(number, frozen) for number, frozen in enumerate(found)]

    def propose(self) -> Trial | None:
        """A new trial, its settings in the journal; None when there are enough."""
        import optuna

        known = self.trials()
        if len(known) >= self._search.trials:
            return None
        count = len(self._study.get_trials(deepcopy=False))
        # A seed for each proposal: a search that was cut off goes on with those it would have made.
        startup = min(_STARTUP, -(-self._search.trials // _STARTUP_SHARE))
        self._study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=startup,
            seed=int(digest.of_value([self._search.seed, count])[:8], 16),
            constant_liar=self._search.parallel > 1,
        )
        chosen = self._suggest(self._study.ask())
        seen = [trial.chosen for trial in known]
        if chosen not in seen:
            return self.trials()[-1]
        # It would give what it gave; something else is tried in its place.
        doubled = self._handle(self._study.get_trials(deepcopy=False)[-1])
        fresh = self._unseen(seen, count)
        if fresh:
            self._study.enqueue_trial(fresh)
        doubled.set_user_attr(_DUPLICATE, True)
        self._study.tell(doubled, state=optuna.trial.TrialState.FAIL)
        return self.propose() if fresh else None

    def _unseen(self, seen: list[dict[str, Any]], count: int) -> dict[str, Any]:
        """A combination, as Optuna has it, that was not tried; empty where none is found."""
        draw = random.Random(f"{self._search.seed}/{count}")
        for _ in range(_DRAWS):
            given = {name: self._drawn(name, values, draw) for name, values in self._search.space.items()}
            if self._read(given) not in seen:
                return given
        return {}

    def _drawn(self, name: str, values: Values, draw: random.Random) -> Any:
        if not isinstance(values, Range):
            return json.dumps(draw.choice(values))
        if name in self._whole:
            return draw.randint(int(values.low), int(values.high))
        return draw.uniform(values.low, values.high)

    def _read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings from what Optuna has: what a list may hold, it knows as JSON."""
        listed = {n for n, values in self._search.space.items() if not isinstance(values, Range)}
        return {n: json.loads(given[n]) if n in listed else given[n] for n in self._search.space}

    def _suggest(self, handle: Any) -> dict[str, Any]:
        """The settings of a trial: those it has, or new ones."""
        given: dict[str, Any] = {}
        for name, values in self._search.space.items():
            if not isinstance(values, Range):
                given[name] = handle.suggest_categorical(name, list(map(json.dumps, values)))
            elif name in self._whole:
                given[name] = handle.suggest_int(name, int(values.low), int(values.high), log=values.log)
            else:
                given[name] = handle.suggest_float(name, values.low, values.high, log=values.log)
        return self._read(given)

    def _handle(self, frozen: Any) -> Any:
        import optuna

        return optuna.trial.Trial(self._study, frozen._trial_id)

    def _trial(self, number: int, frozen: Any) -> Trial:
        state = "failed" if frozen.state.name == "FAIL" else frozen.state.name.lower()
        running = state == "running"
        handle = self._handle(frozen) if running else None
        curve = sorted(frozen.intermediate_values.items())
        last = curve[-1][1] if curve else None
        return Trial(
            number,
            # One that was cut off while it was proposed gets the rest of its settings now.
            self._suggest(handle) if running else self._read(frozen.params),
            state,
            frozen.value if state == "complete" else last,
            frozen.user_attrs.get(_STEPS, curve[-1][0] if curve else 0),
            frozen.user_attrs.get(_REASON, ""),
            curve,
            handle,
        )

    def saw(self, trial: Trial, step: int, loss: float) -> bool:
        """Note an evaluation of a running trial. Returns whether to end it."""
        known = dict(trial.curve)
        if step not in known:
            trial.handle.report(loss, step)
            trial.curve.append((step, loss))
        return bool(trial.handle.should_prune())

    def end(self, trial: Trial, state: str, steps: int, loss: float | None = None, reason: str = "") -> None:
        """Note how a running trial ended: complete with its loss, pruned, or failed for a reason."""
        import optuna

        trial.handle.set_user_attr(_STEPS, steps)
        if reason:
            trial.handle.set_user_attr(_REASON, reason)
        states = optuna.trial.TrialState
        if state == "complete":
            self._study.tell(trial.handle, loss)
        else:
            self._study.tell(trial.handle, state=states.PRUNED if state == "pruned" else states.FAIL)


def best(trials: list[Trial]) -> Trial | None:
    """The complete trial with the lowest loss, where none is complete the pruned one; the first of equals."""
    for state in ("complete", "pruned"):
        found = [t for t in trials if t.state == state and t.loss is not None]
        if found:
            return min(found, key=lambda t: (t.loss, t.number))
    return None


def _mend(journal: Path) -> None:
    """Drop the end of a record that was cut, and what an attempt that was killed held the journal by."""
    for held in journal.parent.glob("journal.log.lock*"):
        held.unlink()
    if journal.exists():
        text = journal.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            with journal.open("r+b") as stream:
                stream.truncate(whole)
                os.fsync(stream.fileno())


def identity_of(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Digest of what decides what the trials of a search give.

    Args:
        settings: of train.
        inputs: name -> digest.
    """
    return digest.of_value([dict(settings), dict(inputs)])
