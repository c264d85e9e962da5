"""Weights, gradients and optimizer state in pieces, by PyTorch's `fully_shard` (FSDP2).

Each layer is gathered for its own forward and backward pass and given up again (Zhao et al. 2023,
arXiv:2304.11277, for the first FSDP); what is outside the layers is gathered around the whole pass. Frozen
weights are cut up as those that move are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from components.shared import causal, families
from components.train import checkpoint, measures
from components.train.objectives.base import Objective
from components.train.ranks import Ranks
from components.train.sharding.config import Sharding
from components.train.sharding.whole import Whole


def passing(model: Any) -> Any:
    """A module around a model whose forward pass is whatever function it is given.

    A sharded model is gathered by hooks on its forward pass. The losses of our objectives do not go through
    the model's own (they project on the vocabulary only where there is loss), so they go through this one.
    """
    import torch

    class Passing(torch.nn.Module):
        """Calls a function."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, compute: Callable[[], Any]) -> Any:
            return compute()

    return Passing()


@dataclass
class Piece:
    """What this process holds of a weight, as measures.clip looks at it."""

    grad: Any
    requires_grad: bool


def _total(tensor: Any) -> Any:
    from torch import distributed

    distributed.all_reduce(tensor)
    return tensor


class Fsdp2(Whole):
    """The state of a fit as DTensors, cut along their first dimension.

    Args:
        ranks: the processes.
        sharding: settings.
    """

    in_pieces = True

    def __init__(self, ranks: Ranks, sharding: Sharding) -> None:
        super().__init__(ranks)
        self._offload = sharding.offload == "cpu"
        self._around: Any = None

    @contextmanager
    def opening(self) -> Iterator[None]:
        """The whole model is in the memory of the host: no GPU need hold it."""
        with causal.on_cpu():
            yield

    def begin(
        self, objective: Objective, make_optimizer: Callable[[Any], Any], largest: float, spare: Any
    ) -> None:
        """See Whole. One layer at a time moves to this process's device, in pieces."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

        self.model = objective.model
        gpu = causal.device().type
        mesh = init_device_mesh(gpu, (self.ranks.count,))
        policy = CPUOffloadPolicy(pin_memory=gpu == "cuda") if self._offload else OffloadPolicy()
        self._around = passing(self.model)
        for layer in families.layers(self.model).values():
            fully_shard(layer, mesh=mesh, offload_policy=policy)
        fully_shard(self._around, mesh=mesh, offload_policy=policy)
        for module in self._around.modules():
            if isinstance(module, FSDPModule):
                # Losses are divided by the terms of the whole update already: gradients are added.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        objective.spare = spare
        objective.summed_loss = self._through(objective.summed_loss)  # type: ignore[assignment, method-assign]
        self.optimizer = make_optimizer(self.model)

    def _through(self, loss: Callable[[Any, float], Any]) -> Callable[[Any, float], Any]:
        """The same loss, computed while the weights outside the layers are gathered."""
        import torch

        def computed(batch: Any, label_smoothing: float) -> Any:
            found = self._around(lambda: loss(batch, label_smoothing))
            if not torch.is_grad_enabled():
                self._around.reshard()  # after a forward pass alone they would stay
            return found

        return computed

    def reduce(self, weights: Mapping[str, Any]) -> None:
        """Each backward pass has done it."""

    def parts(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        """The pieces that are here."""
        return {name: weight.to_local().detach() for name, weight in weights.items()}

    def clip(self, weights: Mapping[str, Any], largest: float) -> dict[str, float]:
        """See Whole. The norm is that of all pieces: their squares are summed over the processes."""
        pieces = {
            name: Piece(None if weight.grad is None else weight.grad.to_local(), weight.requires_grad)
            for name, weight in weights.items()
        }
        return measures.clip(pieces, largest, _total)

    def moved(self, before: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, float]:
        """See Whole."""
        return measures.moved(before, parts, _total)

    def copy(self) -> dict[str, Any]:
        """See Whole."""
        found = checkpoint.trainable(self.model)
        return {name: weight.to_local().detach().to("cpu", copy=True) for name, weight in found.items()}

    def restore(self, parts: Mapping[str, Any]) -> None:
        """See Whole."""
        import torch

        with torch.no_grad():
            for name, weight in checkpoint.trainable(self.model).items():
                weight.to_local().copy_(parts[name])

    def whole(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """One weight after the other is gathered; the process that writes keeps them."""
        found = {}
        for name, weight in checkpoint.trainable(self.model).items():
            if name in parts:
                gathered = self._gathered(weight, parts[name])
                if self.ranks.writes:
                    found[name] = gathered
        return found

    def _gathered(self, like: Any, part: Any) -> Any:
        """The whole tensor on the CPU of which `part` is this process's piece, cut as `like` is."""
        from torch.distributed.tensor import DTensor

        mesh = like.device_mesh
        piece = DTensor.from_local(
            part.to(mesh.device_type), mesh, like.placements, shape=like.shape, stride=like.stride()
        )
        return piece.full_tensor().cpu()

    def _piece(self, like: Any, whole: Any) -> Any:
        """This process's piece of a whole tensor, where `like` has its own."""
        from torch.distributed.tensor import Shard

        (at,) = like.placements
        assert isinstance(at, Shard)
        mine = like.to_local()
        chunks = whole.chunk(self.ranks.count, dim=at.dim)
        if self.ranks.rank >= len(chunks):
            return mine.new_empty(mine.shape)  # fewer rows than processes
        return chunks[self.ranks.rank].to(mine.device, mine.dtype, copy=True).contiguous()

    def part_of(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """See Whole."""
        found = checkpoint.trainable(self.model)
        return {name: self._piece(found[name], weight).cpu() for name, weight in weights.items()}

    def moments(self) -> dict[str, Any]:
        """See Whole."""
        found = {}
        for name, weight in checkpoint.trainable(self.model).items():
            for key, value in self.optimizer.state[weight].items():
                whole = value if key == "step" else self._gathered(weight, value.to_local())
                if self.ranks.writes:
                    found[f"{name}/{key}"] = whole
        return found

    def placed(self, weight: Any, value: Any) -> Any:
        """See Whole."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            self._piece(weight, value),
            weight.device_mesh,
            weight.placements,
            shape=weight.shape,
            stride=weight.stride(),
        )

    def end(self, everything: bool) -> None:
        """See Whole."""
        import torch

        for module in self.model.modules():
            for name, weight in list(module._parameters.items()):
                if weight is None or not (everything or weight.requires_grad):
                    continue
                gathered = self._gathered(weight, weight.to_local().detach())
                if self.ranks.writes:
                    module._parameters[name] = torch.nn.Parameter(gathered, weight.requires_grad)
        self.model.tie_weights()
