"""Steps, tokens, time and cost of a training before it starts, phase by phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from components.shared import tasks
from components.train.config import TrainConfig
from pipelines import sizing
from pipelines.pace import Pace

ROUGH = (
    "the seconds are rough, arithmetic over an assumed rate: once a training like this one has run on such "
    "hardware, its own rate is taken"
)


@dataclass(frozen=True)
class Part:
    """A phase of a training: its settings, what its dry run says, and how many examples it has.

    Args:
        name: `first` or `second`; of a training with one phase `only`.
        config: settings, of a search all it may try.
        needs: footprint.Footprint of it.
        examples: of train, documents of the first phase.
    """

    name: str
    config: TrainConfig
    needs: Any
    examples: int


def parts_of(config: TrainConfig, needs: Any, examples: int, documents: int) -> list[Part]:
    """The phases of a training, in order.

    Args:
        config: settings.
        needs: by its dry run.
        examples: of train.
        documents: of train, for the first of two phases.
    """
    if needs.first is None:
        return [Part("only", config, needs, examples)]
    alone = config.model_copy(update={"first": None})
    first = Part("first", config.first_phase(), needs.first, documents)
    return [first, Part("second", alone, needs, examples)]


def run(
    parts: Sequence[Part],
    paces: Sequence[Pace | None],
    gpu: str,
    dollars_per_hour: float | None,
    peak: Callable[[], float] = sizing.matmul_flop_per_second,
) -> dict[str, Any]:
    """How long a training goes on: the sum over its phases, which are told apart where there are two.

    Args:
        parts: its phases.
        paces: of each, where one like it has run; None for arithmetic.
        gpu: a name of `sizing.GPUS`; empty for this machine's processors.
        dollars_per_hour: price of the machine; None leaves the cost out.
        peak: FLOP/s of this machine's processors; asked where there is no measured pace.
    """
    whole = parts[-1].config
    rate, efficiency = 0.0, sizing.GPU_EFFICIENCY if gpu else sizing.CPU_EFFICIENCY
    if not all(paces):
        rate = sizing.gpu(gpu).flop_per_second if gpu else peak()
    phases = [_phase(each, pace, rate * efficiency) for each, pace in zip(parts, paces, strict=True)]
    # A run that told both phases has started once.
    start = sum({pace.run: pace.start_seconds for pace in paces if pace}.values())
    seconds = sum(phase["seconds"] for phase in phases) + start
    found: dict[str, Any] = {
        "examples": parts[-1].examples,
        "steps": sum(phase["steps"] for phase in phases),
        "tokens": sum(phase["tokens"] for phase in phases),
        "seconds": round(seconds, 1),
        "seconds_from": "; ".join(dict.fromkeys(phase["seconds_from"] for phase in phases)),
        "seconds_notes": list(dict.fromkeys(note for phase in phases for note in phase.pop("notes"))),
        "on": gpu or "this machine's processors",
    }
    if any(paces):
        found["start_seconds"] = round(start, 1)
    if rate:
        found |= {"peak_gflop_per_second": round(rate / 1e9), "efficiency": efficiency}
    if len(phases) > 1:
        found["phases"] = {part.name: phase for part, phase in zip(parts, phases, strict=True)}
    else:
        found |= {name: value for name, value in phases[0].items() if name not in found}
    if whole.search:
        found["trials"] = sizing.trainings(whole)  # none of them ended early: an upper bound
    if dollars_per_hour is not None:
        found["dollars"] = round(seconds / 3600 * dollars_per_hour, 2)
    return found


def _phase(part: Part, pace: Pace | None, flop_per_second: float) -> dict[str, Any]:
    """Steps, tokens and seconds of a phase without its start, and where the seconds come from."""
    needs, config = part.needs, part.config
    sizes = needs.tokens_per_example, needs.loss_share, needs.body_weights
    head, encoded = needs.total_weights - needs.body_weights, round(part.examples * needs.pieces)
    ends = [sizing.work(each(config), encoded, *sizes, head) for each in (sizing.heaviest, sizing.lightest)]
    times = sizing.trainings(config)
    steps, tokens, flop = (
        times * max(getattr(e, name) for e in ends) for name in ("steps", "tokens", "flop")
    )
    found = {"steps": steps, "tokens": round(tokens)}
    if pace is None:
        notes = [ROUGH, *_left_out(config)]
        return found | {
            "seconds": round(flop / flop_per_second, 1),
            "seconds_from": "arithmetic",
            "notes": notes,
        }
    judged = sizing.evaluations(config, steps) * pace.evaluation_seconds
    saved = (steps - 1) // config.checkpoint_steps * pace.checkpoint_seconds
    updates = tokens / pace.tokens_per_second
    differing = [f"{pace.run} had {', '.join(pace.differing)}"] if pace.differing else []
    return found | {
        "seconds": round(updates + judged + saved, 1),
        "seconds_from": f"measured in {pace.run}",
        "tokens_per_second": round(pace.tokens_per_second, 1),
        "update_seconds": round(updates, 1),
        "evaluation_seconds": round(judged, 1),
        "checkpoint_seconds": round(saved, 1),
        "notes": differing,
    }


def _left_out(config: TrainConfig) -> list[str]:
    """What the arithmetic does not count, a sentence each."""
    kind = config.objective.kind
    if kind in tasks.ANSWERING:
        return ["the answers that the model draws in each step are not in the seconds, its updates alone"]
    if getattr(config.objective, "level", "") == "sequence":
        return ["the answers that the teacher writes first are not in the seconds"]
    if getattr(config.objective, "teacher", None):
        return ["what the teacher reads is not in the seconds"]
    if config.retain and config.retain.distil_from_base:
        return ["what the base predicts beside each update is not in the seconds"]
    return []
