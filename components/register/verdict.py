"""What the evaluation said about the model that ships."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.shared import digest
from components.shared.errors import StageStopped, TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact


@dataclass(frozen=True)
class Verdict:
    """A passed evaluation.

    Args:
        metrics: numbers of the system that ships; what was not finite is None.
        judged_on: what two evaluations must share to be compared (see compare.incomparable).
        digest: of the evaluation artifact.
    """

    metrics: dict[str, float | None]
    judged_on: dict[str, Any]
    digest: str


def read_verdict(model: Artifact, evaluation: Artifact, card: ModelCard) -> Verdict:
    """Read evaluation.json and see that it passed this very model.

    Raises:
        StageStopped: the verdict failed.
        TuneyardError: the evaluation is of another model, or says nothing about it.
    """
    document = json.loads((evaluation.path / "evaluation.json").read_text())
    shipped = model.manifest.digest
    # The compressed model is the one that ships, so it must be the one that was judged.
    judged = document["model"].get("compressed", document["model"].get("model", ""))
    if judged != shipped:
        raise TuneyardError(
            f"the evaluation judged model {judged[:12]}, not {shipped[:12]} that is to be registered",
            "submit the pipeline again, so that the model that ships is the one that is judged",
        )
    verdict = document["verdict"]
    if not verdict["passed"]:
        failed = [gate["metric"] for gate in verdict["gates"] if not gate["passed"]]
        raise StageStopped(
            f"model {shipped[:12]} is not registered: its verdict failed ({', '.join(failed)})",
            "see the gates in evaluation.json; train better, or change evaluate.gates on purpose",
        )
    judged_on = {
        "test": document["test"]["digest"],
        "left_out": digest.of_value(document.get("truncated", {}).get("left_out", [])),
        "task": card.task,
        "base_model": card.base_model.fingerprint,
        "reward_model": card.reward_model.fingerprint if card.reward_model else None,
        "answered": document.get("answered"),
        "max_new_tokens": document.get("max_new_tokens"),
    }
    metrics = _numbers(document["systems"][verdict["system"]])
    return Verdict(metrics, judged_on, evaluation.manifest.digest)


def _numbers(system: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics of a system; None for NaN and infinity, which JSON cannot say."""
    return {
        name: float(value) if math.isfinite(value) else None
        for name, value in system.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
