"""The processes of one training, and the little that they say to each other: sums.

Every process holds all weights and all examples and computes its share of each update; gradients are summed,
so k processes do what one does (data parallelism). A process that trains alone says nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from components.shared import causal, digest

Item = TypeVar("Item")

# Gradients travel in pieces of this many numbers (64 MiB of float32): a message for each tensor would wait
# for the network hundreds of times, one message for all would need a second copy of every gradient.
_PIECE = 1 << 24
# Rank 0 uploads a checkpoint while the others wait for it in their next sum.
_PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the training.

    Args:
        rank: its number; 0 is the one that writes.
        count: how many there are.
        in_step: whether all must compute equally often, because weights are gathered in each pass.
    """

    rank: int = 0
    count: int = 1
    in_step: bool = False

    @property
    def writes(self) -> bool:
        """Whether this process writes checkpoints, curves and outputs."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every count-th item: neighbours, which are alike in length, go to different processes."""
        return list(items[self.rank :: self.count])

    def sum(self, value: float) -> float:
        """The sum over all processes, the very same number in each."""
        if self.count == 1:
            return value
        import torch
        from torch import distributed

        total = torch.tensor([value], dtype=torch.float64, device=causal.device())
        distributed.all_reduce(total)
        return float(total)

    def most(self, passes: int) -> int:
        """How many passes this process has to compute, with `passes` of its own."""
        if not self.in_step:
            return passes
        return round(self.furthest(passes))

    def furthest(self, number: float) -> float:
        """The largest of what the processes say."""
        import torch
        from torch import distributed

        found = torch.tensor(number, dtype=torch.float64, device=causal.device())
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return float(found)

    def told(self, number: int) -> int:
        """What rank 0 says."""
        return round(self.sum(number if self.rank == 0 else 0))

    def gathered(self, rows: Any) -> tuple[Any, int]:
        """The rows [n, ...] of all processes, in order of rank, and at which of them ours begin."""
        if self.count == 1:
            return rows, 0
        import torch
        from torch import distributed

        counts = torch.zeros(self.count, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        distributed.all_reduce(counts)
        start = int(counts[: self.rank].sum())
        every = rows.new_zeros(int(counts.sum()), *rows.shape[1:])
        every[start : start + len(rows)] = rows
        distributed.all_reduce(every)
        return every, start

    def add_gradients(self, weights: Sequence[Any]) -> None:
        """Replace each gradient by its sum over all processes.

        A weight that no process has a gradient for keeps none, so that the optimizer passes it over as it
        would in one process; a process without examples in this update adds zeros.
        """
        if self.count == 1:
            return
        import torch
        from torch import distributed

        moved = torch.tensor([float(w.grad is not None) for w in weights], device=causal.device())
        distributed.all_reduce(moved)
        found = [w for w, by in zip(weights, moved.tolist(), strict=True) if by]
        for weight in found:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        for piece in _pieces([w.grad for w in found]):
            flat = torch.cat([gradient.reshape(-1) for gradient in piece])
            distributed.all_reduce(flat)
            for gradient, summed in zip(piece, flat.split([g.numel() for g in piece]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def seed(self, seed: int, step: int) -> None:
        """Random state of one update, different in each process, the same whenever it is done again.

        Alone, a process goes on with the state it has, which its checkpoints hold.
        """
        if self.count == 1:
            return
        import torch

        torch.manual_seed(int(digest.of_value([seed, step, self.rank])[:15], 16))


ALONE = Ranks()


def _pieces(tensors: Sequence[Any]) -> Iterator[list[Any]]:
    """Tensors in groups of one type with `_PIECE` numbers at most, or a single larger one."""
    piece: list[Any] = []
    for tensor in tensors:
        full = sum(t.numel() for t in piece) + tensor.numel() > _PIECE
        if piece and (full or tensor.dtype != piece[0].dtype):
            yield piece
            piece = []
        piece.append(tensor)
    if piece:
        yield piece


def join() -> Ranks:
    """Meet the other processes that torchrun started; alone where it started none.

    torchrun gives each process RANK, WORLD_SIZE, LOCAL_RANK and where to meet (see torch.distributed.run).
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    import torch
    from torch import distributed

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Pieces that are kept in the memory of the host are added up there.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_PATIENCE)
    return Ranks(int(os.environ["RANK"]), count)


def part(ranks: Ranks) -> None:
    """Take leave of the other processes."""
    if ranks.count > 1:
        from torch import distributed

        distributed.destroy_process_group()
