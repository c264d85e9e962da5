"""Rules over the figures of a training that say what is wrong with it, and what to change.

A rule is a function of the history alone, so it says the same live, after a resume and in the report. Those
of overfitting and of the learning rate are the usual ones of practice (a loss above twice its start; a change
below 0.01; slopes over the last five evaluations).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, float]

POINTS, SLOPE_POINTS, SLOPE_NATS = 10, 5, 0.01
HIGHER, LOWER_NATS, LOWER_POINTS = 2.0, 0.01, 5
EXPLODES, JUMP, JUMP_ROWS, JUMP_WINDOW = 100.0, 10.0, 10, 50
VANISHES, VANISHING_ROWS = 1e-4, 3
RATIO_LOW, RATIO_HIGH, RATIO_ROWS = 1e-5, 1e-1, 2
STILL_ROWS = 2


@dataclass(frozen=True)
class Finding:
    """Something that goes wrong.

    Args:
        rule: its name.
        since: the step at which it began.
        what: was seen, with the numbers.
        todo: what to change.
    """

    rule: str
    since: int
    what: str
    todo: str

    def __str__(self) -> str:
        return f"{self.rule} since step {self.since}: {self.what}; {self.todo}"


def overfitting(history: Sequence[Row]) -> Finding | None:
    """From ten evaluations on: over the last five, the loss on train falls while that on eval rises."""
    points: list[tuple[int, float, float]] = []
    since_last: list[float] = []
    for row in history:
        since_last.append(row["loss"])
        if "eval_loss" not in row:
            continue
        points.append((int(row["step"]), statistics.fmean(since_last), row["eval_loss"]))
        since_last = []
        if len(points) < POINTS:
            continue
        last = points[-SLOPE_POINTS:]
        train, evaluated = slope([p[1] for p in last]), slope([p[2] for p in last])
        if train < -SLOPE_NATS and evaluated > SLOPE_NATS:
            return Finding(
                "overfitting",
                last[0][0],
                f"over {SLOPE_POINTS} evaluations the loss moved from one to the next by {train:+.3f} nats "
                f"on train, and by {evaluated:+.3f} on eval",
                "fewer epochs, more examples, a smaller adapter rank, or more dropout and weight_decay",
            )
    return None


def slope(values: Sequence[float]) -> float:
    """Of the least-squares line through values one apart."""
    middle, mean = (len(values) - 1) / 2, statistics.fmean(values)
    over = sum((at - middle) * (value - mean) for at, value in enumerate(values))
    return over / sum((at - middle) ** 2 for at in range(len(values)))


def too_high(history: Sequence[Row]) -> Finding | None:
    """The loss of three steps (their median) above twice that of the first."""
    if not history or history[0]["loss"] <= 0:
        return None  # an objective whose loss has no natural zero: twice it means nothing
    start = history[0]["loss"]
    for at in range(2, len(history)):
        now = statistics.median(row["loss"] for row in history[at - 2 : at + 1])
        if now > HIGHER * start:
            what = f"the loss is {now:.3f}, more than twice the {start:.3f} it began with"
            return Finding("learning rate too high", int(history[at]["step"]), what, _rate(history, 0.1))
    return None


def too_low(history: Sequence[Row], base_loss: float) -> Finding | None:
    """After five evaluations neither the loss on eval nor that on train has ever moved by 0.01."""
    means: list[float] = []
    since_last: list[float] = []
    points = []
    for row in history:
        since_last.append(row["loss"])
        if "eval_loss" in row:
            points.append(row)
            means.append(statistics.fmean(since_last))
            since_last = []
    if len(points) < LOWER_POINTS:
        return None
    furthest = max(abs(row["eval_loss"] - base_loss) for row in points)
    if furthest >= LOWER_NATS or max(means) - min(means) >= LOWER_NATS:
        return None
    what = (
        f"in {len(points)} evaluations the loss on eval never moved by more than {furthest:.4f} nats from "
        f"the base's {base_loss:.3f}"
    )
    return Finding("learning rate too low", int(points[0]["step"]), what, _rate(history, 10))


def _rate(history: Sequence[Row], factor: float) -> str:
    peak = max(row["learning_rate"] for row in history)
    doing = "divide train.learning_rate by 10" if factor < 1 else "multiply train.learning_rate by 10"
    return f"{doing}: {peak * factor:.3g}"


def exploding(history: Sequence[Row]) -> Finding | None:
    """A gradient norm above 100, or ten times the median of the fifty steps before."""
    for at, row in enumerate(history):
        norm = row["grad_norm"]
        before = [r["grad_norm"] for r in history[max(0, at - JUMP_WINDOW) : at]]
        usual = statistics.median(before) if len(before) >= JUMP_ROWS else float("inf")
        if norm > EXPLODES or norm > JUMP * usual > 0:
            beside = f", {norm / usual:.0f} times the median before" if 0 < usual < float("inf") else ""
            return Finding(
                "exploding gradients",
                int(row["step"]),
                f"the gradient norm is {norm:.3g} before clipping{beside}",
                "lower train.learning_rate or train.max_grad_norm, lengthen train.warmup_fraction, and look "
                "at the examples of that step",
            )
    return None


def vanishing(history: Sequence[Row]) -> Finding | None:
    """A layer whose gradient is below a ten-thousandth of the layers' median, three looks in a row."""
    looks = [(int(row["step"]), layers) for row in history if len(layers := _layers(row)) > 1]
    for run in _runs(looks, VANISHING_ROWS):
        faint = [
            {
                name
                for name, norm in layers.items()
                if 0 < norm < VANISHES * statistics.median(layers.values())
            }
            for _, layers in run
        ]
        if found := set.intersection(*faint):
            (since, _), (_, layers) = run[0], run[-1]
            usual = statistics.median(layers.values())
            figures = {name: layers[name] for name in found}
            return Finding(
                "vanishing gradients",
                since,
                f"gradient norms of {_listed(figures)} beside {usual:.2g} in the layers' median",
                "raise train.learning_rate for them, train fewer layers, or compute in float32",
            )
    return None


def _layers(row: Row) -> dict[str, float]:
    """Gradient norms of the layers, which are alike; not of embeddings and head."""
    found = _columns(row, "grad_norm.")
    return {name: norm for name, norm in found.items() if any(part.isdigit() for part in name.split("."))}


def odd_updates(history: Sequence[Row]) -> Finding | None:
    """After warm-up, an update outside 1e-5 to 1e-1 of its weights in two looks in a row; 1e-3 is usual.

    The end of the schedule, where the rate is below a tenth of its peak, is meant to move little.
    """
    peak = max((row["learning_rate"] for row in history), default=0.0)
    looks = [
        (int(row["step"]), _columns(row, "update_ratio."))
        for row in _after_warm_up(history)
        if row["learning_rate"] >= peak / 10
    ]
    for run in _runs([look for look in looks if look[1]], RATIO_ROWS):
        for low in (True, False):
            odd = [{n for n, r in of.items() if (r < RATIO_LOW if low else r > RATIO_HIGH)} for _, of in run]
            if found := set.intersection(*odd):
                figures = {name: run[-1][1][name] for name in found}
                return Finding(
                    "updates too small" if low else "updates too large",
                    run[0][0],
                    f"an update moves {_listed(figures)} of their weights; about 1e-3 is usual",
                    f"{'raise' if low else 'lower'} train.learning_rate",
                )
    return None


def still_weights(history: Sequence[Row]) -> Finding | None:
    """After warm-up, weights that have no gradient or did not move in two looks in a row."""
    looks = [(int(row["step"]), _still(row)) for row in _after_warm_up(history) if row["learning_rate"]]
    for run in _runs([look for look in looks if look[1]], STILL_ROWS):
        still = [{name for name, share in of.items() if share > 0} for _, of in run]
        if found := set.intersection(*still):
            figures = {name: run[-1][1][name] for name in found}
            return Finding(
                "dead weights",
                run[0][0],
                f"of the tensors that should move, these shares do not: {_listed(figures)}",
                "report the class of the model: the adapter sits where the loss does not reach, or is frozen",
            )
    return None


def _still(row: Row) -> dict[str, float]:
    """Share of each group's tensors that do not move: they have no gradient, or its update is 0."""
    unmoved = {name: 1.0 for name, ratio in _columns(row, "update_ratio.").items() if ratio == 0}
    return _columns(row, "still.") | unmoved


def _after_warm_up(history: Sequence[Row]) -> Sequence[Row]:
    """The rows after the one with the highest learning rate so far."""
    rates = [row["learning_rate"] for row in history]
    return history[rates.index(max(rates)) + 1 :] if rates else []


def _columns(row: Row, prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def _runs(
    looks: Sequence[tuple[int, dict[str, float]]], length: int
) -> Iterator[Sequence[tuple[int, dict[str, float]]]]:
    for end in range(length, len(looks) + 1):
        yield looks[end - length : end]


def _listed(figures: Mapping[str, float], shown: int = 3) -> str:
    names = sorted(figures)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(f"{name} {figures[name]:.2g}" for name in names[:shown]) + more
