"""Bottleneck adapters: two small products and a skip, put behind a sub-layer of every layer.

Houlsby et al. 2019 (arXiv:1902.00751, section 2.1) put one behind the attention and one behind the
feed-forward, each after the projection back to the model's width and before the residual is added, and
train the layer norms too. Pfeiffer et al. 2020 (arXiv:2005.00247, section 3.1) put one behind the
feed-forward and train nothing else.
"""

from __future__ import annotations

from typing import Any, Literal

from components.shared import families
from components.shared.errors import TuneyardError

# Houlsby et al., section 3.6: standard deviations up to 1e-2 all work; the skip makes it a near-identity.
_INITIAL_DEVIATION = 1e-2
CHILD = "bottleneck"


def add(model: Any, kind: Literal["houlsby", "pfeiffer"], size: int) -> list[str]:
    """Put bottlenecks into every layer of a model.

    Args:
        model: a transformers model; what it computes stays nearly as it was.
        kind: which of the two placements.
        size: neurons of a bottleneck.

    Returns:
        Names of the base's own weights that move with them: houlsby's layer norms.

    Raises:
        TuneyardError: the layers are of a family whose parts are not known.
    """
    wanted = [families.FEED_FORWARD_OUT]
    if kind == "houlsby":
        wanted.insert(0, families.ATTENTION_OUT)
    moved = []
    for name, layer in families.layers(model).items():
        for patterns in wanted:
            paths = families.parts(layer, patterns)
            if len(paths) != 1:
                raise TuneyardError(
                    f"adapter {kind}: {name} of {type(model).__name__} has {len(paths)} parts like "
                    f"{', '.join(p.lstrip('.') for p in patterns)}; one is needed",
                    "use lora or last_layers on this family",
                )
            _graft(layer.get_submodule(paths[0]), size, kind)
        if kind == "houlsby":
            moved += [f"{name}.{norm}" for norm in families.norms(layer)]
    return moved


def _graft(host: Any, size: int, kind: str) -> None:
    """Give a linear layer a bottleneck that its output goes through: out + up(f(down(out)))."""
    import torch

    width = host.out_features if hasattr(host, "out_features") else host.nf
    bottleneck = torch.nn.ModuleDict(
        {"down": torch.nn.Linear(width, size), "up": torch.nn.Linear(size, width)}
    ).to(next(host.parameters()).device)
    for linear in bottleneck.values():
        torch.nn.init.trunc_normal_(
            linear.weight, std=_INITIAL_DEVIATION, a=-2 * _INITIAL_DEVIATION, b=2 * _INITIAL_DEVIATION
        )
        torch.nn.init.zeros_(linear.bias)
    activation = torch.nn.functional.gelu if kind == "houlsby" else torch.nn.functional.relu
    host.add_module(CHILD, bottleneck)

    def through(module: Any, inputs: Any, out: Any) -> Any:
        down, up = module.bottleneck["down"], module.bottleneck["up"]
        # The adapter is float32 whatever the base is stored in.
        return out + up(activation(down(out.to(down.weight.dtype)))).to(out.dtype)

    host.register_forward_hook(through)
