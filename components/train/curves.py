"""The page of a training: loss, learning rate and gradient norm over the steps, as inline SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from components.shared.modelcard import ModelCard

_WIDTH, _HEIGHT, _PAD = 640, 220, 44
_COLOURS = {"loss": "#2563eb", "eval_loss": "#dc2626", "learning_rate": "#059669", "grad_norm": "#7c3aed"}


def chart(history: Sequence[Mapping[str, float]], names: Sequence[str], title: str) -> str:
    """An SVG line chart of these columns over `step`; rows without a column are left out of its line."""
    lines = {n: [(r["step"], r[n]) for r in history if n in r and math.isfinite(r[n])] for n in names}
    points = [p for line in lines.values() for p in line]
    if not points:
        return ""
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points, strict=True))
    spans = (x1 - x0) or 1, (y1 - y0) or 1

    def place(x: float, y: float) -> str:
        across = _PAD + (x - x0) / spans[0] * (_WIDTH - 2 * _PAD)
        return f"{across:.1f},{_HEIGHT - _PAD / 2 - (y - y0) / spans[1] * (_HEIGHT - _PAD):.1f}"

    drawn = "".join(
        f'<polyline fill="none" stroke="{_COLOURS[name]}" stroke-width="2" '
        f'points="{" ".join(place(x, y) for x, y in line)}"><title>{name}</title></polyline>'
        for name, line in lines.items()
        if line
    )
    keys = " ".join(f'<b style="color:{_COLOURS[n]}">{html.escape(n)}</b>' for n in names if lines[n])
    return (
        f"<h2>{html.escape(title)}</h2><p>{keys}</p>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' width='{_WIDTH}' role='img'>"
        f"<text x='2' y='16' font-size='11'>{y1:.4g}</text>"
        f"<text x='2' y='{_HEIGHT - 20}' font-size='11'>{y0:.4g}</text>"
        f"<text x='{_PAD}' y='{_HEIGHT - 4}' font-size='11'>step {x0:.0f}</text>"
        f"<text x='{_WIDTH - 90}' y='{_HEIGHT - 4}' font-size='11'>step {x1:.0f}</text>{drawn}</svg>"
    )


def page(
    history: Sequence[Mapping[str, float]], card: ModelCard, counts: Mapping[str, Mapping[str, int]]
) -> str:
    """A page that needs nothing from a network."""
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
        + chart(history, ("loss", "eval_loss"), "Loss (nats)")
        + chart(history, ("learning_rate",), "Learning rate")
        + chart(history, ("grad_norm",), "Gradient norm before clipping")
    )
