"""What each process of test_worker.py's fits runs: the real fit, or one with a mistake in how it adds up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from components.shared.causal import Encoded
from components.train import checkpoint, ranks
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.fit import fit
from components.train.objectives.opening import open_objective
from components.train.objectives.sft import Sft


class MeanOfMeans(ranks.Ranks):
    """Each process takes the mean over its own terms, and the means are averaged: wrong, and often seen."""

    def share(self, items):
        mine = super().share(items)
        if isinstance(items[0], Encoded):
            whole, own = (sum(len(e.answer) for e in part) for part in (items, mine))
            object.__setattr__(self, "factor", whole / (own or 1) / self.count)
        return mine

    def add_gradients(self, weights):
        for weight in weights:
            if weight.grad is not None:
                weight.grad *= self.factor
        super().add_gradients(weights)


def main() -> None:
    """Fit on the rows of a file with settings of another, and leave weights and history."""
    base, given, out, mistaken = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), *sys.argv[3:]
    config = TrainConfig.model_validate(given["config"])
    ours = ranks.join()
    if mistaken == "mean-of-means":
        ours = MeanOfMeans(ours.rank, ours.count)
    torch.manual_seed(config.seed)
    plain = config.objective.kind == "sft"
    made = Sft(base, "float32") if plain else open_objective(config, given["rows"], base)
    apply_adapter(made, config)
    encoded = [made.encode(row) for row in given["rows"]]
    folder = Path(out) / f"rank-{ours.rank}"
    folder.mkdir(parents=True)
    state = fit(made, encoded[4:], encoded[:4], config, "float32", folder, lambda *_: None, ours)
    save_file(checkpoint.copy_weights(made.model), folder / "weights.safetensors")
    (folder / "history.json").write_text(json.dumps([state.base_loss, state.history]))
    ranks.part(ours)


if __name__ == "__main__":
    main()
