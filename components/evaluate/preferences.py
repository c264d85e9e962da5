"""Judging a causal model that learned from preferences: what it answers, and what it prefers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from components.evaluate import answers, pairs, sitting
from components.evaluate.config import EvaluateConfig
from components.evaluate.findings import Findings
from components.evaluate.slices.share import Part, Share, joined
from components.shared import causal
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context

Tests = Sequence[Mapping[str, Any]]


def take(
    config: EvaluateConfig, tests: Tests, inputs: Mapping[str, Artifact], context: Context, share: Share
) -> Part:
    """Do a share of the exam (see `sitting.take`), and of the losses of both answers of each pair.

    Raises:
        TuneyardError: as `answers.take`, or no pair fits into the model.
    """
    part = answers.take(config, tests, inputs, context, share)
    found = pairs.read(tests, sitting.tokenizer_of(inputs), part.facts["window_tokens"])
    precision = part.facts["precision"]
    systems: dict[str, Callable[[], Any]] = {
        "base": lambda: causal.load_base(ModelCard.read(inputs["model"].path), context.store, precision),
        "tuned": lambda: causal.load(inputs[sitting.shipped(inputs)].path, context.store, precision)[0],
    }
    for name, load in systems.items():
        model = load()
        part.arrays.update(sitting.losses(f"{name}-pairs", model, found.both, share))
        del model
        gc.collect()
    return part


def judge(
    config: EvaluateConfig,
    tests: Tests,
    inputs: Mapping[str, Artifact],
    context: Context,
    parts: Sequence[Part],
) -> Findings:
    """What `answers.judge` says, and how often a chosen answer gained more than the rejected one.

    The reward of an answer is log(p / p_base), the implicit one of DPO without its beta (Rafailov et al.
    2023, arXiv:2305.18290, section 4), so the base prefers nothing: 0.5 and 0 by definition.

    Args:
        config: see EvaluateConfig.
        tests: preference examples sorted by id.
        inputs: `model`, and `compressed` where there is that stage.
        context: of the stage.
        parts: what `take` found in every share.

    Raises:
        TuneyardError: the parts do not add up.
    """
    findings = answers.judge(config, tests, inputs, context, parts)
    found = pairs.read(tests, sitting.tokenizer_of(inputs), parts[0].facts["window_tokens"])
    base, tuned = (joined(parts, f"{name}-pairs/nats").tolist() for name in ("base", "tuned"))
    moved = found.halves([before - after for before, after in zip(base, tuned, strict=True)])
    findings.systems["base"] |= {"pair_accuracy": 0.5, "pair_margin_nats": 0.0}
    scored = pairs.score(*moved)
    findings.systems["tuned"]["intervals"] |= scored.pop("intervals")
    findings.systems["tuned"] |= scored
    findings.systems |= pairs.plainer(found, base)
    findings.facts["pairs"] = {"judged": len(found.tests), "of": len(tests)}
    margins = {row["id"]: c - r for row, c, r in zip(found.tests, *moved, strict=True)}
    rejected = {row["id"]: row["rejected"] for row in tests}
    for row in findings.answers:
        row |= {"rejected": rejected[row["id"]], "tuned_margin_nats": margins.get(row["id"])}
    return findings
