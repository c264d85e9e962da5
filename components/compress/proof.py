"""What must hold between a base model, its adapted form and the export: measured, then judged.

Logits say that the export answers as the adapted model does; digests of the weights say that nothing else
moved. An export that silently is the base model passes every quality metric of a weak fine-tuning, so it is
refused here, by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from components.shared import clock
from components.shared.errors import TuneyardError

# float32 arithmetic in another order moves a logit by about 1e-5; a model that was tuned for even one step
# moves some by more than this.
MIN_BASE_DIFFERENCE = 1e-3
# The tuning must stand out of what the export adds to it (rounding of the merged weights).
SIGNAL_TO_NOISE = 10.0
# Rounding all merged weights to 16 bits moves a logit here and there by some tenths, as it did the base's.
# What counts is that the answers stay: its divergence must be at most a hundredth of the tuning's.
MAX_ROUNDING_SHARE = 0.01
ROUNDED = ("bfloat16", "float16")


@dataclass(frozen=True)
class Gap:
    """How far two models are apart on the same tokens.

    Args:
        max_difference: largest absolute difference of a logit.
        kl_nats: Kullback-Leibler divergence of the second's next-token distribution from the first's,
            mean over tokens.
        agreement: share of tokens (0-1) after which both find the same token most likely.
    """

    max_difference: float
    kl_nats: float
    agreement: float


@dataclass(frozen=True)
class Proof:
    """Everything measured about an export of a causal model.

    Args:
        exported_adapted: the saved export, reloaded, against the adapted model.
        adapted_base: the adapted model against the base.
        exported_base: the saved export, reloaded, against the base.
        tuned_tensors: how many tensors training could move.
        unmoved: names of those that are bit-identical to the base.
        strayed: names of tensors that differ from the base though training could not move them.
        damaged: names of tensors whose bytes on disk are not what was to be written.
        tokens: how many the logits were compared at.
        storage: what the weights are stored in.
        trained_adapted: the adapted model against what was trained, where that stood on a quantised base:
            what it costs to leave the quantisation behind. It is stated and has no bound: evaluate judges
            the export.
    """

    exported_adapted: Gap
    adapted_base: Gap
    exported_base: Gap
    tuned_tensors: int
    unmoved: tuple[str, ...]
    strayed: tuple[str, ...]
    damaged: tuple[str, ...]
    tokens: int
    storage: str
    trained_adapted: Gap | None = None

    def facts(self) -> dict[str, Any]:
        """As JSON for the run's record."""
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """What an export is measured against.

    Args:
        sequences: token ids of the probes.
        base: the base's logits on them.
        adapted: the adapted model's logits on them.
        base_digests: of the base's tensors.
        tuned: names of the tensors that training could move.
    """

    sequences: list[list[int]]
    base: list[Any]
    adapted: list[Any]
    base_digests: dict[str, str]
    tuned: set[str]


def logits(model: Any, sequences: Sequence[Sequence[int]]) -> list[Any]:
    """float32 logits [tokens, vocabulary] of each sequence; one at a time, so padding plays no part."""
    import torch

    device = next(model.parameters()).device
    with clock.arithmetic(), torch.inference_mode():
        return [
            model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in sequences
        ]


def compare(first: Sequence[Any], second: Sequence[Any]) -> Gap:
    """Measure the gap between two models' logits, as `logits` gives them."""
    import torch

    largest, divergence, same, tokens = 0.0, 0.0, 0, 0
    for a, b in zip(first, second, strict=True):
        # nan_to_num: a NaN compares false with everything and would pass as "no difference".
        largest = max(largest, float((a - b).abs().nan_to_num(nan=torch.inf).max()))
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        divergence += float(torch.nn.functional.kl_div(log_b, log_a, reduction="sum", log_target=True))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        tokens += len(a)
    return Gap(largest, max(divergence, 0.0) / tokens, same / tokens)


def digests(model: Any) -> dict[str, str]:
    """Tensor name -> sha256 of its values in float32 (exact for bfloat16 and float16); tied tensors once."""
    found: dict[str, str] = {}
    for name, tensor in model.named_parameters():
        values = tensor.detach().float().contiguous().cpu().numpy()
        found[name] = hashlib.sha256(values.reshape(-1).view("u1").data).hexdigest()
    return found


def differing(first: Mapping[str, str], second: Mapping[str, str]) -> set[str]:
    """Names whose digests differ, or that only one side has."""
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}


def measure(model: Any, reference: Reference, written: Mapping[str, str], storage: str) -> Proof:
    """Measure an export against its reference.

    Args:
        model: the export, in float32.
        reference: see Reference.
        written: digests of the tensors that were to be written.
        storage: what the weights are stored in.
    """
    exported, now = logits(model, reference.sequences), digests(model)
    moved = differing(now, reference.base_digests)
    return Proof(
        exported_adapted=compare(reference.adapted, exported),
        adapted_base=compare(reference.base, reference.adapted),
        exported_base=compare(reference.base, exported),
        tuned_tensors=len(reference.tuned),
        unmoved=tuple(sorted(reference.tuned - moved)),
        strayed=tuple(sorted(moved - reference.tuned)),
        damaged=tuple(sorted(differing(now, written))),
        tokens=sum(map(len, reference.sequences)),
        storage=storage,
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_base(proof: Proof) -> list[str]:
    return [
        f"the export is the base model: the largest logit difference between the {what} model and the "
        f"base over {proof.tokens} probe tokens is {gap.max_difference:.2g}, "
        f"at least {MIN_BASE_DIFFERENCE:g} is needed"
        for what, gap in (("adapted", proof.adapted_base), ("exported", proof.exported_base))
        if not gap.max_difference >= MIN_BASE_DIFFERENCE
    ]


def _difference(proof: Proof, max_logit_difference: float) -> list[str]:
    off, moved = proof.exported_adapted.max_difference, proof.adapted_base.max_difference
    found = []
    if not off <= max_logit_difference:
        found.append(
            f"the export differs from the adapted model by {off:.3g} in a logit, more than "
            f"max_logit_difference {max_logit_difference:g}"
        )
    if off * SIGNAL_TO_NOISE > moved:
        found.append(f"the export is {off:.2g} off, not a tenth of what the tuning moved ({moved:.2g})")
    return found


def _rounding(proof: Proof) -> list[str]:
    off, moved = proof.exported_adapted.kl_nats, proof.adapted_base.kl_nats
    if off <= MAX_ROUNDING_SHARE * moved:
        return []
    return [
        f"stored in {proof.storage} its answers are {off:.2g} nats from the adapted model's, more than "
        f"{MAX_ROUNDING_SHARE:.0%} of what the tuning moved ({moved:.2g})"
    ]


def faults(proof: Proof, max_logit_difference: float) -> list[str]:
    """What is wrong with an export, one sentence each; empty when it is proved."""
    found = _is_base(proof)
    found += _rounding(proof) if proof.storage in ROUNDED else _difference(proof, max_logit_difference)
    if proof.unmoved:
        share = f"{len(proof.unmoved)} of {proof.tuned_tensors}"
        found.append(f"{share} tuned tensors equal the base: {_some(proof.unmoved)}")
    if proof.strayed:
        found.append(f"{len(proof.strayed)} tensors that were not tuned differ: {_some(proof.strayed)}")
    if proof.damaged:
        found.append(f"{len(proof.damaged)} tensors on disk are not the merged ones: {_some(proof.damaged)}")
    return found


def insist(proof: Proof, max_logit_difference: float, where: str) -> None:
    """Accept an export or refuse it.

    Raises:
        TuneyardError: with every fault and its numbers.
    """
    found = faults(proof, max_logit_difference)
    if found:
        listed = "\n".join(f"  {fault}" for fault in found)
        raise TuneyardError(
            f"{where}: the export was refused\n{listed}",
            "check that training moved the weights (its loss fell, learning rate > 0), then submit again",
        )
