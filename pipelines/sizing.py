"""Arithmetic of a training: steps, time, storage, cost, and which method suits how much data and model.

All of it is estimates, but for the steps. Needs no heavy library.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from components.shared import tasks
from components.shared.errors import UsageError
from components.train.config import TrainConfig
from components.train.data import total_steps
from components.train.first import First
from components.train.search import space

# Share of the matrix-product rate that a training step reaches. On a CPU 0.27 was measured for Gemma 3 270M
# (docs/figures.md); on a GPU NVIDIA's NeMo AutoModel publishes 402 of 989 TFLOP/s for LoRA of Llama 3 8B on
# an H100 (its docs/performance-summary). Nothing here was measured on a GPU.
CPU_EFFICIENCY = 0.27
GPU_EFFICIENCY = 0.40


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: dense bfloat16 peak in FLOP/s, and memory in GiB."""

    flop_per_second: float
    memory_gib: float


# NVIDIA's data sheets; dense figures, not those with sparsity.
GPUS: dict[str, Gpu] = {
    "3090": Gpu(71e12, 24),
    "4090": Gpu(165e12, 24),
    "l4": Gpu(121e12, 24),
    "l40s": Gpu(362e12, 48),
    "a6000": Gpu(155e12, 48),
    "a100": Gpu(312e12, 80),
    "h100": Gpu(989e12, 80),
    "h200": Gpu(989e12, 141),
}


def gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        UsageError: there is no such name.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise UsageError(f"--gpu {name}: its figures are not known", f"choose from {', '.join(GPUS)}")
    return found


def matmul_flop_per_second(seconds: float = 0.5) -> float:
    """What this machine's processors do in large matrix products, in the precision that trains best."""
    import torch

    from components.shared import causal

    a = torch.randn(1024, 1024).to(getattr(torch, causal.preferred_precision("auto")))
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        a @ a
        best = max(best, 2 * 1024**3 / (time.perf_counter() - started))
    return best


def at_once(config: TrainConfig) -> int:
    """How many trainings run at a time."""
    return config.search.parallel if config.search else 1


def trainings(config: TrainConfig) -> int:
    """How many trainings there are, at most."""
    return config.search.trials if config.search else 1


def heaviest(config: TrainConfig) -> TrainConfig:
    """The settings that need the most memory: those of a search with every number at its highest."""
    return space.extreme(config, largest=True) if config.search else config


def lightest(config: TrainConfig) -> TrainConfig:
    """The same with every number at its lowest: smaller batches make more steps."""
    return space.extreme(config, largest=False) if config.search else config


@dataclass(frozen=True)
class Work:
    """How much a training computes.

    Args:
        steps: optimizer updates; exact unless early stopping ends it sooner.
        tokens: in all of them.
        flop: of updates and evaluations.
    """

    steps: int
    tokens: float
    flop: float


def work(
    config: TrainConfig,
    examples: int,
    tokens_per_example: float,
    loss_share: float,
    body_weights: int,
    vocabulary_weights: int,
) -> Work:
    """Arithmetic of a run: 2 FLOP a weight and token forward, 2 for gradients of states, 2 of weights.

    Args:
        config: settings.
        examples: of train.
        tokens_per_example: on average.
        loss_share: of the tokens that the vocabulary projection sees, 0-1.
        body_weights: that every token passes.
        vocabulary_weights: of the projection; 0 for a model without.
    """
    steps = total_steps(examples, config)
    batch = config.per_device_batch_size * config.gradient_accumulation_steps
    tokens = tokens_per_example * (
        min(steps * batch, examples * config.epochs) if config.epochs else steps * batch
    )
    each = body_weights + loss_share * vocabulary_weights
    update = (4 if config.adapter.frozen else 6) + (2 if config.gradient_checkpointing else 0)
    judged = evaluations(config, steps) * config.eval_examples * tokens_per_example
    return Work(steps, tokens, each * (update * tokens + 2 * judged))


def evaluations(config: TrainConfig, steps: int) -> int:
    """How often eval is judged: before the first update, between updates, and after the last one."""
    every = config.eval_steps or max(1, math.ceil(steps / 10))
    return 1 + math.ceil(steps / every)


def checkpoint_bytes(moving_weights: int, count: int) -> int:
    """Disk for checkpoints: weights that move, two moments and the best weights, in float32."""
    return 4 * 4 * moving_weights * count


def remarks(config: TrainConfig, examples: int, total_weights: int) -> list[str]:
    """What usually suits this many examples and weights, where the file asks for something else.

    Where the rules by data and by model differ, both are said; nothing is refused.
    """
    kind, full = config.adapter.kind, not config.adapter.frozen
    found = []
    if examples < 100:
        found.append(
            f"{examples} examples: fewer than 100 rarely move a model for the better; try a prompt with "
            "examples in it, retrieval, or more data (synthetic, or of a similar domain) first"
        )
    elif examples < 1000 and full:
        found.append(f"{examples} examples: below 1,000 lora or pfeiffer overfits less (it is {kind})")
    elif examples < 10_000 and full and config.learning_rate != "auto" and config.learning_rate > 5e-5:
        found.append(
            f"{examples:,} examples: full fine-tuning of fewer than 10,000 wants a small learning rate, 1e-5 "
            f"to 5e-5 (it is {config.learning_rate:g}), or lora"
        )
    elif examples >= 100_000 and kind == "full" and getattr(config.adapter, "layer_decay", 1.0) == 1.0:
        found.append(
            f"{examples:,} examples: from 100,000 progressive unfreezing or a layer_decay of 0.95 keeps more "
            "of what the base knows"
        )
    elif examples >= 10_000 and not full and total_weights < 1e9:
        found.append(
            f"{examples:,} examples: from 10,000 on full fine-tuning usually reaches more than {kind}"
        )
    if total_weights > 1e9 and full:
        found.append(
            f"{total_weights / 1e9:.1f} billion weights: above one billion use lora or qlora (it is {kind})"
        )
    elif total_weights < 100e6 and not full and examples >= 1000:
        found.append(
            f"{total_weights / 1e6:.0f} million weights: below 100 million full "
            f"fine-tuning is cheap (it is {kind})"
        )
    low, high = _suited(examples)
    if not low <= total_weights <= high:
        found.append(
            f"{examples:,} examples suit a base of {_range(low, high)} weights; this one has "
            f"{total_weights / 1e6:,.0f} million"
        )
    return found


def _suited(examples: int) -> tuple[float, float]:
    """Fewest and most weights of a base for this many examples."""
    if examples < 1000:
        return 0, 100e6
    return (100e6, 1e9) if examples <= 10_000 else (1e9, float("inf"))


def _range(low: float, high: float) -> str:
    if not low:
        return f"fewer than {high / 1e6:.0f} million"
    if high == float("inf"):
        return f"more than {low / 1e6:,.0f} million"
    return f"{low / 1e6:.0f} to {high / 1e6:,.0f} million"


def fitting_gpus(peak_bytes: int) -> Sequence[str]:
    """Names of GPUs whose memory holds this, a tenth left free."""
    return [name for name, each in GPUS.items() if peak_bytes < 0.9 * each.memory_gib * 2**30]


def bytes_in_pieces(
    kind: str, offload: str, processes: int, weights: tuple[int, int, int], held: int, peak: int, layers: int
) -> int:
    """Memory of one GPU of several, from that of a dry run of one process: simple arithmetic, an estimate.

    A dry run holds between updates the weights, two moments and a copy of the best weights, and during one
    gradients and activations. What is cut up is divided by the processes; where weights are, the layer in
    work and the one that is fetched meanwhile are whole, and so is what is outside the layers. DeepSpeed
    keeps a float32 copy of the weights that move. Its buffers for messages are not counted.

    Args:
        kind: as in `hardware.sharding`.
        offload: as in `hardware.offload`.
        processes: of the training.
        weights: (all, moving, of the layers), counted.
        held: bytes between updates.
        peak: bytes at most.
        layers: of the model.
    """
    total, moving, body = weights
    moments, gradients, best = 8 * moving, 4 * moving, 4 * moving
    whole = held - moments - best
    activations = max(0, peak - held - gradients)
    # What the GPU holds of its own pieces; offloaded ones are in the memory of the host.
    here = 0 if offload == "cpu" else 1 / processes
    if kind == "zero1":
        return round(whole + gradients + (moments + 4 * moving) * here + activations)
    if kind == "zero2":
        return round(whole + (gradients + moments + 4 * moving) * here + activations)
    gathered = (whole + gradients) / max(1, total) * (total - body + min(2, layers) * body / max(1, layers))
    copy = 4 * moving if kind == "zero3" else 0
    return round((whole + gradients + moments + copy) * here + gathered + activations)


def surely_fits(config: TrainConfig, shape: dict[str, object], base_bytes: int, limit_bytes: float) -> bool:
    """Whether a training needs less than a limit even by a bound far above what it can need.

    A dry run costs seconds of imports; most trainings need none to be let through. Weights, gradients, two
    moments and two copies in float32 of weights that are stored in 16 bits or more; activations of a
    transformer layer by Korthikanti et al. 2022 (arXiv:2205.05198, equation 1), in float32 and doubled.

    Args:
        config: settings.
        shape: the base's config.json.
        base_bytes: of the base's files.
        limit_bytes: of memory.
    """
    if (
        config.retain
        or config.objective.kind in tasks.ANSWERING
        or getattr(config.objective, "teacher", None)
    ):
        return False  # more than one model: only the dry run knows
    text = shape.get("text_config", shape)
    sizes = {} if not isinstance(text, dict) else text
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    found = [sizes.get(name) for name in names]
    if not all(isinstance(value, int) for value in found):
        return False
    width, layers, heads, words = (int(str(value)) for value in found)
    width = max(width, int(str(sizes.get("intermediate_size", 0))) // 4)
    every: list[TrainConfig | First] = [config, config.first] if config.first else [config]
    activations = max(
        2
        * each.per_device_batch_size
        * each.max_length
        * layers
        * (68 * width + 10 * heads * each.max_length)
        for each in every
    )
    logits = 8 * 4 * 1024 * words
    # What the first of two phases moved is held in the second.
    copies = 14 if config.first else 12
    return 3 * 2**30 + copies * base_bytes + activations + logits < limit_bytes
