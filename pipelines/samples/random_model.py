"""Makes a small model of random weights. A program of its own: see convert.py.

Nothing was learned, so nothing can be expected of it but that every stage takes it as it takes a real one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Passes of noise from which a batch norm takes the mean and variance that it then keeps.
_PASSES = 200


def main(asked: Path, out: Path) -> None:
    """Write a model folder.

    Args:
        asked: JSON file with what catalogue.RandomModel has.
        out: to be made.
    """
    import torch

    spec = json.loads(asked.read_text())
    torch.manual_seed(spec["seed"])
    model = {"resnet": _resnet}[spec["family"]](spec["config"], spec["processor"], out)
    found = sum(weight.numel() for weight in model.parameters())
    if found != spec["parameters"]:
        sys.exit(f"{found} weights came out, the catalogue expects {spec['parameters']}")
    model.eval().save_pretrained(out)


def _resnet(config: Mapping[str, Any], processor: Mapping[str, Any], out: Path) -> Any:
    """A ResNet without a head; its norms know what its layers give on noise."""
    import torch
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetModel

    prepared = ConvNextImageProcessorPil(**processor)
    prepared.save_pretrained(out)
    model = ResNetModel(ResNetConfig(**config)).train()
    side = prepared.size["shortest_edge"]
    with torch.no_grad():
        for _ in range(_PASSES):
            model(torch.randn(16, 3, side, side))
    return model


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
