"""Training throughput of Gemma 3 270M with LoRA on LawBench, beside a plain transformers + PEFT loop.

Both see the same batches in one process, in turn, and must have the same loss first (float32, within 1e-3).
The peer is the loop of most tutorials: pad the batch, pass `labels`, full logits over 262,144 words at every
position, float32.

Limit by arithmetic: a LoRA step costs 4 FLOP a weight and token in the body (100M weights) and, for each
answer token, 4 FLOP a weight of the vocabulary projection (168M).
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from components.shared import causal, jsonl, sources
from components.shared.store import Store
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.objectives.base import choose_attention
from components.train.objectives.sft import Sft
from pipelines.embedded import platform
from pipelines.samples import fetch

_BATCHES, _SIZE = 6, 4
_BODY_WEIGHTS, _HEAD_WEIGHTS = 100e6, 168e6


def _batches(store: Store, objective: Sft) -> list[list[Any]]:
    rows = []
    for name in ("consultation", "statute"):
        for path in sorted(store.get_prefix(f"s3://corpora/legal/{name}").rglob("*.jsonl")):
            rows += [{"prompt": r["query"], "completion": r["response"]} for r in jsonl.read(path)]
    chosen = random.Random(42).sample(rows, _BATCHES * _SIZE)
    encoded = [objective.encode(row) for row in chosen]
    return [encoded[i : i + _SIZE] for i in range(0, len(encoded), _SIZE)]


def _ours(objective: Sft, batch: list[Any], precision: causal.Precision) -> float:
    from components.train.update import autocast

    with autocast(precision):
        loss = objective.summed_loss(batch, 0.0) / sum(map(objective.terms, batch))
    loss.backward()
    return float(loss.detach())


def _plain(objective: Sft, batch: list[Any]) -> float:
    tensors = causal.pad(batch, objective.tokenizer.pad_token_id)
    loss = objective.model(**tensors, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def run() -> dict[str, Any]:
    """Time both on the same batches, in turn, and compare losses."""
    import torch

    with tempfile.TemporaryDirectory(prefix="tuneyard-bench-") as folder:
        home = Path(folder)
        os.environ.update(platform.environment(platform.up(home)))
        try:
            fetch.ensure(["s3://corpora/legal", "s3://models/gemma-3-270m"], home)
            store = Store.from_environment()
            model = sources.model_folder("s3://models/gemma-3-270m", store)
            fast = causal.preferred_precision("auto")
            return _measure(store, model, fast, torch)
        finally:
            platform.down(home)


def _measure(store: Store, folder: Path, fast: causal.Precision, torch: Any) -> dict[str, Any]:
    adapter = {"kind": "lora", "dropout": 0.0}  # as sft_legal has it
    config = TrainConfig(objective="sft", base_model="s3://models/gemma-3-270m", adapter=adapter)
    quick, exact = Sft(folder, fast), Sft(folder, "float32")
    for objective in (quick, exact):
        torch.manual_seed(0)
        apply_adapter(objective, config)
    choose_attention(quick, config.max_length)
    batches = _batches(store, exact)
    gaps = []
    for objective in (quick, exact):
        objective.model.eval()  # no dropout while losses are compared
    for batch in batches[:2]:
        with torch.no_grad():
            tensors = causal.pad(batch, exact.tokenizer.pad_token_id)
            reference = float(exact.model(**tensors, use_cache=False).loss)
        # With gradient, as in training: without, another function computes the loss.
        found = float(exact.summed_loss(batch, 0.0).detach()) / sum(map(exact.terms, batch))
        gaps.append(abs(found - reference))
    for objective in (quick, exact):
        objective.model.train()
    _ours(quick, batches[0], fast)
    _plain(exact, batches[0])
    ours, plain = [], []
    for batch in batches:
        tokens = sum(map(len, batch))
        started = time.perf_counter()
        _ours(quick, batch, fast)
        middle = time.perf_counter()
        _plain(exact, batch)
        ours.append(tokens / (middle - started))
        plain.append(tokens / (time.perf_counter() - middle))
    tokens = sum(len(e) for batch in batches for e in batch)
    answers = sum(len(e.answer) for batch in batches for e in batch)
    flop = 4 * (_BODY_WEIGHTS * tokens + _HEAD_WEIGHTS * answers) / tokens
    speed = statistics.median(ours)
    return {
        "peer": "transformers + PEFT, padded batch, full logits, float32",
        "cores": os.cpu_count(),
        "precision": fast,
        "loss_difference_in_float32": max(gaps),
        "tokens_per_second": round(speed, 1),
        "peer_tokens_per_second": round(statistics.median(plain), 1),
        "ratio": round(statistics.median(a / b for a, b in zip(ours, plain, strict=True)), 2),
        "gflop_per_token": round(flop / 1e9, 3),
        "gflop_per_second": round(flop * speed / 1e9, 1),
        "matmul_gflop_per_second_of_this_machine": round(_matmul_rate(fast, torch), 1),
    }


def _matmul_rate(precision: causal.Precision, torch: Any) -> float:
    """GFLOP/s of a large matrix product: what the processor can do at best."""
    a = torch.randn(2048, 2048).to(getattr(torch, precision))
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started) / 1e9)
    return best
