"""What each process of test_sharding.py runs: one fit after the other, each with its own layout."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from components.train import ranks
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.fit import fit
from components.train.objectives.opening import open_objective
from components.train.sharding.config import Sharding
from components.train.sharding.opening import open_layout


class CutOffError(Exception):
    """As good as a kill: nothing is done after it."""


def opened(base, rows, config):
    torch.manual_seed(config.seed)
    made = open_objective(config, rows, base)
    apply_adapter(made, config)
    return made, [made.encode(row) for row in rows]


def fitted(base, rows, case, ours, folder, stop=None):
    """A fit; `stop` is called with the number of updates done. Returns objective, layout and history."""
    config = TrainConfig.model_validate(case["config"])
    layout = open_layout(Sharding.model_validate(case["sharding"]), ours)
    with layout.opening():
        made, encoded = opened(base, rows, config)

    def report(history, ended):
        if stop and not ended:
            stop(len(history))

    kept = encoded[4:], encoded[:4], config, "float32", folder, report, layout.ranks
    state = fit(made, *kept, layout=layout)
    return made, layout, [state.base_loss, state.history]


def cut_off(base, rows, case, ours, folder):
    """The fit of a case, cut off after five updates and taken up again."""

    def stop(done):
        if done == 5:
            raise CutOffError

    try:
        fitted(base, rows, case, ours, folder, stop)
    except CutOffError:
        # By others, where the case says so: a checkpoint is of no layout.
        return fitted(base, rows, case | {"sharding": case.get("then", case["sharding"])}, ours, folder)
    raise AssertionError("it was not cut off")


def interrupted(base, rows, case, ours, folder):
    """The fit of a case whose last process is told to end after three updates; taken up again."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def stop(done):
        if done == 3 and ours.rank == ours.count - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        fitted(base, rows, case, ours, folder, stop)
    except KeyboardInterrupt:
        ours.sum(0)  # the first process has written
        found = sorted(path.name for path in folder.glob("step-*"))
        assert found == ["step-2", "step-3"], found
        return fitted(base, rows, case, ours, folder)
    raise AssertionError("it was not interrupted")


def entries(weight):
    """How many entries of a weight are in this process."""
    if hasattr(weight, "to_local"):
        return weight.to_local().numel()
    return getattr(weight, "ds_tensor", weight).numel()


WAYS = {"plain": fitted, "cut-off": cut_off, "interrupted": interrupted}


def main() -> None:
    """Do the cases of a file and leave their weights and histories."""
    base, given, out = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    ours = ranks.join()
    for case in given["cases"]:
        # All processes read the checkpoints that the first one writes, as they do from the store.
        made, layout, history = WAYS[case["way"]](
            base, case["rows"], case, ours, out / case["name"] / "steps"
        )
        here = out / case["name"] / f"rank-{ours.rank}"
        here.mkdir(parents=True)
        held = sum(map(entries, made.model.parameters()))
        (here / "facts.json").write_text(json.dumps({"history": history, "held": held}))
        save_file(layout.copy(), here / "parts.safetensors")
        layout.end(everything=True)
        if ours.writes:
            save_file(
                {n: w.detach().clone() for n, w in made.model.named_parameters()}, here / "whole.safetensors"
            )
    ranks.part(ours)


if __name__ == "__main__":
    main()
