"""The page of a training: what was found, and its figures over the steps as inline SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from components.shared.modelcard import ModelCard
from components.train.rules import Finding

_WIDTH, _HEIGHT, _PAD = 640, 220, 44
_COLOURS = {"loss": "#2563eb", "eval_loss": "#dc2626", "learning_rate": "#059669", "grad_norm": "#7c3aed"}


def _colour(name: str, at: int, count: int) -> str:
    """Its own, or one of as many hues as there are lines: layers in their order run from red to violet."""
    return _COLOURS.get(name, f"hsl({round(280 * at / max(1, count - 1))},70%,42%)")


def chart(
    history: Sequence[Mapping[str, float]],
    names: Sequence[str],
    title: str,
    over: str = "step",
    logarithmic: bool = False,
) -> str:
    """An SVG line chart of these columns; rows without a column are left out of its line.

    Args:
        history: the rows.
        names: of the columns.
        title: of the chart.
        over: the column that runs across; its logarithm where it is the learning rate.
        logarithmic: whether upwards is the logarithm to base 10; then what is not above 0 is left out.
    """
    lines = {name: _line(history, name, over, logarithmic) for name in names}
    points = [p for line in lines.values() for p in line]
    if not points:
        return ""
    colours = {name: _colour(name, at, len(names)) for at, name in enumerate(names)}
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points, strict=True))
    spans = (x1 - x0) or 1, (y1 - y0) or 1

    def place(x: float, y: float) -> str:
        right = _PAD + (x - x0) / spans[0] * (_WIDTH - 2 * _PAD)
        return f"{right:.1f},{_HEIGHT - _PAD / 2 - (y - y0) / spans[1] * (_HEIGHT - _PAD):.1f}"

    drawn = "".join(
        f'<polyline fill="none" stroke="{colours[name]}" stroke-width="2" '
        f'points="{" ".join(place(x, y) for x, y in line)}"><title>{html.escape(name)}</title></polyline>'
        for name, line in lines.items()
        if line
    )
    power = "10^" if logarithmic else ""
    ends = [f"step {x:.0f}" if over == "step" else f"rate {10**x:.2g}" for x in (x0, x1)]
    keys = " ".join(f'<b style="color:{colours[n]}">{html.escape(n)}</b>' for n in names if lines[n])
    return (
        f"<h2>{html.escape(title)}</h2><p>{keys}</p>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' width='{_WIDTH}' role='img'>"
        f"<text x='2' y='16' font-size='11'>{power}{y1:.4g}</text>"
        f"<text x='2' y='{_HEIGHT - 20}' font-size='11'>{power}{y0:.4g}</text>"
        f"<text x='{_PAD}' y='{_HEIGHT - 4}' font-size='11'>{ends[0]}</text>"
        f"<text x='{_WIDTH - 90}' y='{_HEIGHT - 4}' font-size='11'>{ends[1]}</text>{drawn}</svg>"
    )


def _line(
    history: Sequence[Mapping[str, float]], name: str, over: str, logarithmic: bool
) -> list[tuple[float, float]]:
    """The points of a column."""
    upwards = math.log10 if logarithmic else float
    across = math.log10 if over == "learning_rate" else float
    rows = [row for row in history if name in row and math.isfinite(row[name])]
    return [(across(row[over]), upwards(row[name])) for row in rows if row[name] > 0 or not logarithmic]


def groups(history: Sequence[Mapping[str, float]], prefix: str) -> list[str]:
    """The columns of each part of the model with this prefix, layers by number."""
    found = {name for row in history for name in row if name.startswith(prefix)}
    return sorted(
        found, key=lambda name: [(p.isdigit(), int(p) if p.isdigit() else p) for p in name.split(".")]
    )


def page(
    history: Sequence[Mapping[str, float]],
    card: ModelCard,
    counts: Mapping[str, Mapping[str, int]],
    findings: Sequence[Finding],
    range_test: Mapping[str, Any],
    before: Sequence[Mapping[str, float]] = (),
) -> str:
    """A page that needs nothing from a network.

    Args:
        history: the rows, with that of step 0.
        card: of the model.
        counts: side -> what became of its examples.
        findings: of the diagnosis.
        range_test: of ongoing.Fit.
        before: the rows of a first phase, with that of step 0.
    """
    rows = "".join(
        f"<tr><td>{html.escape(side)}<td>" + html.escape(", ".join(f"{n} {c}" for n, c in sorted(of.items())))
        for side, of in counts.items()
    )
    share = 100 * card.trainable_weights / card.total_weights
    return (
        "<!doctype html><meta charset=utf-8><title>training</title><style>"
        "body{font:15px system-ui;margin:2em;"
        "max-width:48em}td{padding:.3em 1em;border-bottom:1px solid #ddd}svg{background:#fafafa}</style>"
        f"<h1>Training</h1><p>{card.trainable_weights:,} of {card.total_weights:,} weights "
        f"moved ({share:.2f}%), "
        f"base {html.escape(card.base_model.uri)}.</p><table>{rows}</table>"
        + (_first(card, before) if before else "")
        + _findings(findings)
        + _charts(history)
        + (_range_test(range_test) if range_test else "")
    )


def _first(card: ModelCard, before: Sequence[Mapping[str, float]]) -> str:
    """The first phase in short."""
    first = card.first
    said = (
        f"<p>{first.objective} on {first.documents} documents of {html.escape(first.source)}, "
        f"{first.steps} steps: {first.base_eval_loss:.3f} to {first.eval_loss:.3f} nats on its eval.</p>"
        if first
        else ""
    )
    charts = chart(before, ("loss", "eval_loss"), "First phase: loss (nats)")
    charts += chart(before, ("grad_norm",), "First phase: gradient norm before clipping")
    return f"<h2>First phase: domain text</h2>{said}{charts}"


def _range_test(found: Mapping[str, Any]) -> str:
    title = f"Learning rate found: {found['rate']:.2g} (change of the loss in nats by rate)"
    return chart(found["curve"], ("change",), title, over="learning_rate")


def _findings(findings: Sequence[Finding]) -> str:
    told = "".join(
        f"<li><b>{html.escape(f.rule)}</b> since step {f.since}: {html.escape(f'{f.what}; {f.todo}')}"
        for f in findings
    )
    return f"<h2>Findings</h2><ul>{told or '<li>No rule found anything.'}</ul>"


def _charts(history: Sequence[Mapping[str, float]]) -> str:
    gpu = (
        "No figures of the GPU's use and temperature: they need NVIDIA's management library (nvidia-ml-py)."
        if any("gpu_memory_gib" in row for row in history)
        else "No GPU on this machine, so no use or temperature of one."
    )
    return (
        chart(history, ("loss", "eval_loss", "retention_loss"), "Loss (nats)")
        + chart(history, ("ewc_penalty", "base_divergence"), "Held to the base (nats)")
        + chart(history, ("learning_rate",), "Learning rate")
        + chart(history, ("grad_norm",), "Gradient norm before clipping")
        + chart(history, groups(history, "grad_norm."), "Gradient norm of each part", logarithmic=True)
        + chart(
            history, groups(history, "update_ratio."), "Update over weights (about 10^-3)", logarithmic=True
        )
        + chart(history, ("tokens_per_second",), "Tokens a second, mean so far")
        + chart(history, ("memory_gib", "gpu_memory_gib"), "Memory in use (GiB)")
        + (
            chart(history, ("gpu_use",), "GPU in use (0-1)")
            + chart(history, ("gpu_celsius",), "GPU temperature (degrees Celsius)")
            or f"<p>{gpu}</p>"
        )
    )
