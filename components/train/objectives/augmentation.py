"""What objectives over files have in common whose examples are changed anew in every update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from components.train.objectives.base import Arithmetic, Objective


class Augmented(Objective):
    """An objective that changes an example by a draw of the update and the example's id, and nothing else."""

    _draw = 0

    def turns(
        self, batches: Sequence[Sequence[Any]], arithmetic: Arithmetic
    ) -> Iterable[Sequence[Sequence[Any]]]:
        """One optimizer update; all that its augmentation depends on is drawn here, once."""
        import torch

        # PyTorch's state is in the checkpoints, so an update that is done again draws the same.
        self._draw = int(torch.randint(2**62, ()))
        return [batches]
