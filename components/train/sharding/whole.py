"""Weights that lie whole in every process: what a fit asks of where its state lies, answered plainly.

`Whole` is data parallelism, and a training of one process. fsdp2.py and zero.py answer the same questions for
a state that is cut up. A part is what this process holds of a weight; of a whole state it is the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from components.train import checkpoint, measures
from components.train.objectives.base import Objective
from components.train.ranks import Ranks


class Whole:
    """The state of a fit, whole in every process.

    Attributes:
        ranks: the processes.
        model: that is trained.
        optimizer: of its weights.
        in_pieces: whether a process needs the others to write down what there is.
    """

    in_pieces = False

    def __init__(self, ranks: Ranks, optimizer: Any = None) -> None:
        self.ranks = ranks
        self.model: Any = None
        self.optimizer = optimizer

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Within the block the base model is read, gets its adapter and is checked."""
        yield

    def begin(
        self, objective: Objective, make_optimizer: Callable[[Any], Any], largest: float, spare: Any
    ) -> None:
        """Lay out the state before the first update.

        Args:
            objective: with its model, adapter applied.
            make_optimizer: of a model.
            largest: norm that a gradient may have.
            spare: an example to compute for nothing, see Objective.spare.
        """
        self.model = objective.model
        self.optimizer = make_optimizer(objective.model)

    def forward_only(self) -> Any:
        """Context of an evaluation."""
        import torch

        # What is gathered in inference mode could not be used with gradients later.
        return torch.no_grad() if self.in_pieces else torch.inference_mode()

    def reduce(self, weights: Mapping[str, Any]) -> None:
        """Make the gradients those of all processes, after the last backward pass of an update."""
        self.ranks.add_gradients(list(weights.values()))

    def parts(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        """What this process holds of weights, to be looked at; empty where that cannot be."""
        return weights

    def clip(self, weights: Mapping[str, Any], largest: float) -> dict[str, float]:
        """Clip gradients to a global norm; see measures.clip."""
        return measures.clip(weights, largest)

    def moved(self, before: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, float]:
        """How far an update moved the weights, from a sample of their parts before; see `measures`."""
        return measures.moved(before, parts)

    def step(self) -> dict[str, float]:
        """Move the weights by their gradients, and forget these. Returns what is noted of it."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {}

    def copy(self) -> dict[str, Any]:
        """A copy of this process's parts of the weights that move, on the CPU."""
        return checkpoint.copy_weights(self.model)

    def restore(self, parts: Mapping[str, Any]) -> None:
        """Put copied parts back."""
        checkpoint.restore_weights(self.model, parts)

    def whole(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Weights of which all processes give their parts; in those that do not write perhaps none."""
        return dict(parts)

    def part_of(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """This process's parts of whole weights."""
        return dict(weights)

    def moments(self) -> dict[str, Any]:
        """The optimizer's state, whole, `weight/name` -> tensor; as `whole` where processes do not write."""
        return {
            f"{name}/{key}": value.contiguous()
            for name, weight in checkpoint.trainable(self.model).items()
            for key, value in self.optimizer.state[weight].items()
        }

    def load(self, weights: Mapping[str, Any], moments: Mapping[str, Any]) -> None:
        """Put whole weights and the optimizer's whole state in their places."""
        self.restore(self.part_of(weights))
        found: dict[str, dict[str, Any]] = {}
        for place, value in moments.items():
            name, key = place.rsplit("/", 1)
            found.setdefault(name, {})[key] = value
        for name, weight in checkpoint.trainable(self.model).items():
            if name in found:
                self.optimizer.state[weight] = {
                    key: value if key == "step" else self.placed(weight, value)
                    for key, value in found[name].items()
                }

    def placed(self, weight: Any, value: Any) -> Any:
        """A whole moment of a weight, as the optimizer holds it."""
        return value.to(weight.device)

    def end(self, everything: bool) -> None:
        """After the fit: make the model's weights whole again where they are not, in the process that writes.

        Args:
            everything: frozen ones too; else those that moved.
        """
