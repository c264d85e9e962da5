"""What a search says of itself: a table and a chart of its trials, figures, rows of the ledger."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Mapping, Sequence
from typing import Any

from components.shared import jsonl, tracking
from components.shared.errors import TuneyardError
from components.shared.stage import Context, Result
from components.train import curves
from components.train.config import TrainConfig
from components.train.search.study import Trial


def words(chosen: Mapping[str, Any]) -> str:
    """Settings in words."""
    return ", ".join(f"{name} {_shown(value)}" for name, value in chosen.items())


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def add(
    found: Mapping[str, Any],
    trials: Sequence[Trial],
    chosen: Trial | None,
    config: TrainConfig,
    context: Context,
    run_id: str,
) -> Result:
    """The stage's result: that of the chosen trial, with the search in its page, ledger and summary.

    Args:
        found: what the process of the chosen trial left: `result`, `loss`, `steps`.
        trials: all.
        chosen: the one whose model is taken.
        config: settings of the stage.
        context: of the stage; `out` has the chosen trial's outputs.
        run_id: of the MLflow run of the search.
    """
    assert chosen is not None
    rows = [_row(trial, trial.number == chosen.number) for trial in trials]
    jsonl.write(context.out / "ledger" / "trials.jsonl", rows)
    page = context.out / "page.html"
    # The chosen trial's files may be links to what a later attempt looks for.
    text = page.read_text() + section(trials, chosen)
    page.unlink()
    page.write_text(text)
    counts = {s: sum(t.state == s for t in trials) for s in ("complete", "pruned", "failed")}
    steps = sum(trial.steps for trial in trials)
    result = Result(**found["result"], page=page)
    result.metrics |= {"search_trials": len(trials), "search_steps": steps}
    result.summary["search"] = {
        "trial": chosen.number,
        "chosen": chosen.chosen,
        "eval_loss": found["loss"],
        "trials": {state: count for state, count in counts.items() if count},
        "steps": steps,
        "mlflow_run": run_id,
        "tried": rows,
    }
    tracking.log_metrics(run_id, {"eval_loss": found["loss"], "search_steps": steps, **counts})
    with contextlib.suppress(TuneyardError):
        tracking.log_artifact_text(run_id, "search.html", text)
    return result


def _row(trial: Trial, chosen: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"trial": trial.number, "state": trial.state, "steps": trial.steps}
    row |= {"eval_loss": trial.loss, "chosen": chosen, "settings": trial.chosen}
    return row | ({"reason": trial.reason} if trial.reason else {})


def section(trials: Sequence[Trial], chosen: Trial) -> str:
    """The part of the page on the search: what was tried, the best first, and loss over steps of all."""
    names = list(chosen.chosen)
    head = "".join(f"<th>{html.escape(n)}" for n in ("trial", *names, "eval loss", "steps", "how it ended"))
    ranked = sorted(trials, key=lambda t: (t.state != "complete", t.loss is None, t.loss or 0.0, t.number))
    body = ""
    for trial in ranked:
        cells = [str(trial.number), *(_shown(trial.chosen[n]) for n in names)]
        cells += ["-" if trial.loss is None else f"{trial.loss:.4f}", str(trial.steps)]
        cells += [trial.state + (f": {trial.reason}" if trial.reason else "")]
        mark = " style='font-weight:bold'" if trial.number == chosen.number else ""
        body += f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}" for cell in cells)
    history = [{"step": step, f"trial {t.number}": loss} for t in trials for step, loss in t.curve]
    lines = [f"trial {t.number}" for t in trials]
    told = f"Trial {chosen.number} of {len(trials)} was chosen: {words(chosen.chosen)}."
    return f"<h2>Search</h2><p>{html.escape(told)}</p><table><tr>{head}{body}</table>" + curves.chart(
        history, lines, "Loss on eval of each trial (nats)"
    )
