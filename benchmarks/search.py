"""How much of a grid's steps the search of `train.search` uses, and how often it finds the grid's best.

The problem is real and small: a Gemma 3 of two layers learns the reference manual of Python, which Python
itself ships (pydoc_data.topics), as language modelling. All 27 points of a grid are trained to their end,
once, by the stage's own loop, and their losses on eval kept. The search is then replayed over these curves
for 20 seeds: the same study that the stage runs, told at each evaluation what the trial measured there. That
is exact, since what a trial measures does not depend on what is proposed when. Trials come one at a time.

Peer: Optuna's HyperbandPruner over the same curves, its trials in the random order of its GridSampler, so
that it too sees each point once, with the same reduction factor and least steps.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GRID: dict[str, list[Any]] = {
    "learning_rate": [1e-4, 1e-3, 1e-2],
    "per_device_batch_size": [2, 4, 8],
    "warmup_fraction": [0.0, 0.1, 0.3],
}
_STEPS, _LEAST_STEPS, _FACTOR, _SEEDS = 81, 3, 3, 20
_NEAR = 1.01
_PIECE_TOKENS, _VOCABULARY = 64, 512
_TRAIN, _EVAL = 600, 32

Curves = dict[str, list[tuple[int, float]]]


def _name(chosen: Mapping[str, Any]) -> str:
    return json.dumps(dict(sorted(chosen.items())))


def base_model(folder: Path) -> list[str]:
    """A random model and a tokenizer of the manual in `folder`. Returns its texts."""
    from pydoc_data import topics

    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    texts = [topics.topics[name] for name in sorted(topics.topics)]
    trained = ByteLevelBPETokenizer()
    special = ["<pad>", "<bos>", "<eos>"]
    trained.train_from_iterator(texts, vocab_size=_VOCABULARY, special_tokens=special, show_progress=False)
    PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=_VOCABULARY, **shape, **ids)).save_pretrained(folder)
    return texts


def _curve(folder: Path, texts: list[str], chosen: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(step, loss on eval) of one point, by the stage's loop."""
    import torch

    from components.train.adapters.applying import apply_adapter
    from components.train.config import TrainConfig
    from components.train.fit import fit
    from components.train.objectives.base import choose_attention
    from components.train.objectives.language_modeling import LanguageModeling

    settings = {"objective": "language-modeling", "base_model": str(folder), "adapter": "full"}
    settings |= {"max_steps": _STEPS, "eval_steps": _LEAST_STEPS, "checkpoint_steps": _STEPS + 1}
    settings |= {"early_stopping": None, "precision": "float32", "max_length": _PIECE_TOKENS}
    config = TrainConfig.model_validate(settings | dict(chosen))
    torch.manual_seed(config.seed)
    objective = LanguageModeling(folder, "float32")
    choose_attention(objective, config.max_length)
    apply_adapter(objective, config)
    pieces = [
        piece
        for number, text in enumerate(texts)
        for piece in objective.pieces(objective.encode({"id": str(number), "text": text}), _PIECE_TOKENS)
    ]
    random.Random(0).shuffle(pieces)
    with tempfile.TemporaryDirectory() as kept:
        train, judged = pieces[:_TRAIN], pieces[_TRAIN : _TRAIN + _EVAL]
        found = fit(objective, train, judged, config, "float32", Path(kept), lambda *_: None)
    return [(int(row["step"]), row["eval_loss"]) for row in found.history if "eval_loss" in row]


def _curves(folder: Path) -> Curves:
    texts = base_model(folder)
    found: Curves = {}
    for values in itertools.product(*GRID.values()):
        chosen = dict(zip(GRID, values, strict=True))
        began = time.monotonic()
        found[_name(chosen)] = _curve(folder, texts, chosen)
        lowest = min(loss for _, loss in found[_name(chosen)])
        seconds = time.monotonic() - began
        print(f"  {_name(chosen)}: {lowest:.4f} in {seconds:.0f} s", file=sys.stderr, flush=True)
    return found


def _ours(curves: Curves, seed: int, folder: Path) -> tuple[int, float]:
    """(steps, loss of the model that goes on) of a search as the stage makes it."""
    from components.train.search.config import SearchConfig
    from components.train.search.study import Study, best

    search = SearchConfig(
        space=GRID,
        trials=len(curves),
        pruner={"min_steps": _LEAST_STEPS, "reduction_factor": _FACTOR},
        seed=seed,
    )
    study = Study(folder / str(seed), search, set(), "replay")
    while trial := study.propose():
        curve = curves[_name(trial.chosen)]
        ended = next((step for step, loss in curve if study.saw(trial, step, loss) and step < _STEPS), None)
        if ended:
            study.end(trial, "pruned", ended)
        else:
            study.end(trial, "complete", _STEPS, min(loss for _, loss in curve))
    found = best(study.trials())
    assert found is not None and found.loss is not None
    study.close()
    return sum(trial.steps for trial in study.trials()), found.loss


def _hyperband(curves: Curves, seed: int) -> tuple[int, float]:
    """The same of Optuna's Hyperband."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.HyperbandPruner(
        min_resource=_LEAST_STEPS, max_resource=_STEPS, reduction_factor=_FACTOR
    )
    sampler = optuna.samplers.GridSampler(GRID, seed=seed)
    study = optuna.create_study(sampler=sampler, pruner=pruner, direction="minimize", study_name=str(seed))
    steps = 0

    def measured(trial: Any) -> float:
        nonlocal steps
        chosen = {name: trial.suggest_categorical(name, values) for name, values in GRID.items()}
        curve = curves[_name(chosen)]
        for step, loss in curve:
            trial.report(loss, step)
            if trial.should_prune() and step < _STEPS:
                steps += step
                raise optuna.TrialPruned
        steps += _STEPS
        return min(loss for _, loss in curve)

    study.optimize(measured, n_trials=len(curves))
    return steps, study.best_value


def run() -> dict[str, Any]:
    """Train the grid, replay both searches over it."""
    with tempfile.TemporaryDirectory(prefix="tuneyard-bench-") as folder:
        (Path(folder) / "model").mkdir()
        curves = _curves(Path(folder) / "model")
        ours = [_ours(curves, seed, Path(folder)) for seed in range(_SEEDS)]
    peer = [_hyperband(curves, seed) for seed in range(_SEEDS)]
    grid, lowest = len(curves) * _STEPS, min(loss for curve in curves.values() for _, loss in curve)
    figures: dict[str, Any] = {
        "grid_points": len(curves),
        "grid_steps": grid,
        "grid_best_eval_loss": round(lowest, 4),
        "points_within_a_hundredth": sum(
            min(loss for _, loss in curve) <= _NEAR * lowest for curve in curves.values()
        ),
        "seeds": _SEEDS,
    }
    for name, found in (("search", ours), ("hyperband", peer)):
        figures |= {
            f"{name}.share_of_grid_steps": round(statistics.mean(steps for steps, _ in found) / grid, 3),
            f"{name}.largest_share_of_grid_steps": round(max(steps for steps, _ in found) / grid, 3),
            f"{name}.seeds_within_a_hundredth": sum(loss <= _NEAR * lowest for _, loss in found),
        }
    return figures
