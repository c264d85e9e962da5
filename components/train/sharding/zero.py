"""Optimizer state, gradients and weights in pieces, by DeepSpeed's ZeRO (arXiv:1910.02054).

DeepSpeed's engine takes the backward pass, clipping and the update; what an update is stays ours. Losses are
divided by the terms of the whole update, so its mean over processes is turned back into a sum. Checkpoints
are ours too: whole weights and moments, which any number of processes or another layout goes on from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from components.shared import causal, families
from components.train import checkpoint
from components.train.objectives.base import Objective
from components.train.ranks import Ranks
from components.train.sharding import engine
from components.train.sharding.config import Sharding
from components.train.sharding.fsdp2 import passing
from components.train.sharding.whole import Whole

# Of AdamW.
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero(Whole):
    """The state of a fit in the hands of DeepSpeed's engine.

    Args:
        ranks: the processes.
        sharding: settings.
    """

    in_pieces = True

    def __init__(self, ranks: Ranks, sharding: Sharding) -> None:
        super().__init__(ranks)
        self._sharding = sharding
        self._engine: Any = None

    @contextmanager
    def opening(self) -> Iterator[None]:
        """See Whole. Where weights are cut up, the whole model is in the memory of the host."""
        if not self._sharding.weights:
            yield
            return
        with causal.on_cpu():
            yield

    def begin(
        self, objective: Objective, make_optimizer: Callable[[Any], Any], largest: float, spare: Any
    ) -> None:
        """See Whole."""
        deepspeed = engine.library()
        self.model = objective.model
        settings = engine.settings_of(self._sharding, largest)
        around = passing(self.model)
        optimizer = make_optimizer(self.model)  # goes by shapes, which weights in pieces do not have
        backend = "nccl" if causal.device().type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        if self._sharding.weights:
            self._cut(deepspeed, around, settings)
        self._engine, *_ = deepspeed.initialize(
            model=around, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.optimizer = self._engine.optimizer
        objective.spare = spare
        objective.before_pass = self._engine.set_gradient_accumulation_boundary
        objective.summed_loss = self._through(objective.summed_loss)  # type: ignore[assignment, method-assign]

    def _cut(self, deepspeed: Any, around: Any, settings: dict[str, Any]) -> None:
        """Cut the weights up, one after the other on its way to the GPU, before anything takes them whole."""
        layers = list(families.layers(self.model).values())
        # Each layer is gathered as one: parts of it are computed by others than their own module.
        deepspeed.utils.set_z3_leaf_modules(around, list({type(layer) for layer in layers}))
        # A layer whose input needs no gradient, the first one over a frozen embedding, would be given up
        # before its own weights have theirs (DeepSpeed 0.19: its hook is one on the gradient of the input).
        self.model.enable_input_require_grads()
        deepspeed.zero.Init(module=around, config_dict_or_path=settings)
        inside = {id(weight) for layer in layers for weight in layer.parameters()}
        for weight in self.model.parameters():
            if id(weight) not in inside:  # tied embeddings are read again above the layers
                deepspeed.zero.register_external_parameter(around, weight)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(causal.device())

    def _through(self, loss: Callable[[Any, float], Any]) -> Callable[[Any, float], Any]:
        """The same loss, computed by the engine."""
        import torch

        kind, count = causal.device().type, self.ranks.count

        def computed(batch: Any, label_smoothing: float) -> Any:
            low, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

            def compute() -> Any:
                # The engine switches off what it was not told of.
                with torch.autocast(kind, dtype, enabled=low):
                    return loss(batch, label_smoothing)

            with torch.autocast(kind, enabled=False):
                found = self._engine(compute)
            if found.requires_grad:
                found.register_hook(lambda gradient: gradient * count)
            return found

        return computed

    def reduce(self, weights: Mapping[str, Any]) -> None:
        """The last backward pass has done it."""

    def parts(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        """None: they lie in buffers of the engine."""
        return {}

    def clip(self, weights: Mapping[str, Any], largest: float) -> dict[str, float]:
        """The engine does it in its step."""
        return {}

    def step(self) -> dict[str, float]:
        """See Whole."""
        self._engine.step()
        return {"grad_norm": float(self._engine.get_global_grad_norm())}

    def copy(self) -> dict[str, Any]:
        """See Whole. Weights that are not cut up are copied whole, in the process that writes."""
        found = checkpoint.trainable(self.model)
        if self._sharding.weights:
            return {name: w.ds_tensor.detach().to("cpu", copy=True) for name, w in found.items()}
        if not self.ranks.writes:
            return {}
        return {name: weight.detach().to("cpu", copy=True) for name, weight in found.items()}

    def whole(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """See Whole."""
        if not self._sharding.weights:
            return dict(parts)
        found = {}
        for name, weight in checkpoint.trainable(self.model).items():
            if name in parts:
                gathered = self._gathered(parts[name], weight)
                if self.ranks.writes:
                    found[name] = gathered
        return found

    def _gathered(self, part: Any, weight: Any) -> Any:
        """The whole weight on the CPU, of equal parts with padding at the end."""
        import torch
        from torch import distributed

        mine = part.to(causal.device())
        every = mine.new_empty(len(mine) * self.ranks.count)
        distributed.all_gather_into_tensor(every, mine)
        return torch.narrow(every, 0, 0, weight.ds_numel).view(weight.ds_shape).cpu()

    def part_of(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """See Whole."""
        import torch

        if not self._sharding.weights:
            return dict(weights) if self.ranks.writes else {}
        found = {}
        for name, weight in checkpoint.trainable(self.model).items():
            if name in weights:
                size = weight.ds_tensor.numel()
                padded = torch.zeros(size * self.ranks.count, dtype=weights[name].dtype)
                padded[: weight.ds_numel] = weights[name].reshape(-1)
                found[name] = padded[size * self.ranks.rank :][:size].clone()
        return found

    def restore(self, parts: Mapping[str, Any]) -> None:
        """See Whole."""
        import torch
        from torch import distributed

        with torch.no_grad():
            for name, weight in checkpoint.trainable(self.model).items():
                if self._sharding.weights:
                    weight.ds_tensor.copy_(parts[name])
                    continue
                if self.ranks.writes:
                    weight.copy_(parts[name])
                distributed.broadcast(weight, 0)
        self.optimizer.refresh_fp32_params()

    def _state(self, weight: Any) -> tuple[dict[str, Any], slice]:
        """The optimizer's state of the flat tensor that holds this process's part of a weight, and where.

        The slice is empty where none of the weight is here.
        """
        inner = self.optimizer.optimizer
        if self._sharding.weights:
            group, start, count = self.optimizer.grad_position[self.optimizer.get_param_id(weight)]
            flat, at = self.optimizer.fp32_partitioned_groups_flat[group], slice(start, start + count)
        else:
            place = weight._hp_mapping
            if place is None:
                return {}, slice(0, 0)
            flat = self.optimizer.single_partition_of_fp32_groups[place.param_group_index]
            start = place.hp_fragment_address.start
            at = slice(start, start + place.hp_fragment_address.numel)
        state = inner.state[flat]
        if not state:
            state |= {"step": flat.new_zeros(())} | {key: flat.new_zeros(flat.shape) for key in _MOMENTS}
        return state, at

    def moments(self) -> dict[str, Any]:
        """See Whole."""
        found: dict[str, Any] = {}
        for name, weight in checkpoint.trainable(self.model).items():
            state, at = self._state(weight)
            done = self.ranks.furthest(float(state["step"]) if state else 0.0)
            for key in _MOMENTS:
                part = state[key][at].detach() if state else None
                whole = self._gathered(part, weight) if self._sharding.weights else self._joined(part, weight)
                if self.ranks.writes:
                    found[f"{name}/{key}"] = whole
                    found[f"{name}/step"] = whole.new_tensor(done)
        return found

    def _joined(self, part: Any, weight: Any) -> Any:
        """A whole moment on the CPU, of which each process has a run of entries or none."""
        from torch import distributed

        every = weight.detach().new_zeros(weight.numel())
        if part is not None:
            start = weight._hp_mapping.lp_fragment_address.start
            every[start : start + len(part)] = part
        distributed.all_reduce(every)
        return every.view(weight.shape).cpu()

    def load(self, weights: Mapping[str, Any], moments: Mapping[str, Any]) -> None:
        """See Whole."""
        self.restore(self.part_of(weights))
        for name, weight in checkpoint.trainable(self.model).items():
            state, at = self._state(weight)
            if not state or f"{name}/step" not in moments:
                continue
            state["step"].fill_(float(moments[f"{name}/step"]))
            for key in _MOMENTS:
                whole = moments[f"{name}/{key}"].reshape(-1)
                begin = (
                    (at.stop - at.start) * self.ranks.rank
                    if self._sharding.weights
                    else weight._hp_mapping.lp_fragment_address.start
                )
                mine = whole[begin : begin + at.stop - at.start]  # without the padding at the end
                state[key][at.start : at.start + len(mine)].copy_(mine)

    def end(self, everything: bool) -> None:
        """See Whole."""
        import torch

        if not self._sharding.weights:
            return
        for module in self.model.modules():
            for name, weight in list(module._parameters.items()):
                if weight is None or not (everything or weight.requires_grad):
                    continue
                gathered = self._gathered(weight.ds_tensor.detach(), weight)
                if self.ranks.writes:
                    module._parameters[name] = torch.nn.Parameter(gathered, weight.requires_grad)
        if self.ranks.writes:
            self.model.tie_weights()
