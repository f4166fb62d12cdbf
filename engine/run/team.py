"""What the ranks that train one network together exchange.

Each rank has an equal part of the structures of a step, and of its images. It hands out the gradients of the weights
it generated and receives those of the others; from there on all ranks compute the same, so their networks stay equal
bit for bit, which `Team.verify` checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from engine.errors import RankError
from engine.run import ranks

Shape = Sequence[int]

# Integers of the size of an element, whose sum says whether bits are the same.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Team:
    """A training process on its own: it has all the parts, and an exchange gives back what it was given.

    ``exchanged`` counts the bytes that all ranks together have handed out to each other.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size, self.exchanged = rank, size, 0

    def own(self, count: int) -> slice:
        """Which of ``count`` things, a multiple of the number of ranks, this rank has."""
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def gather(self, own: Tensor) -> Tensor:
        """What every rank hands out ``[ranks, …]``: tensors equal in shape, dtype and kind of device."""
        if self.size == 1:
            return own[None]
        import torch.distributed as dist

        whole = own.new_empty(self.size, *own.shape)
        ranks.together(lambda: dist.all_gather(list(whole), own.contiguous()))
        self.exchanged += whole.nbytes
        return whole

    def gather_numbers(self, own: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, equally many on each."""
        return self.gather(torch.tensor(own, dtype=torch.float64)).tolist()

    def gather_lists(self, own: list[list[Tensor]], shapes: Sequence[Sequence[Shape]]) -> list[list[Tensor]]:
        """The tensors of all structures, in order, from those of the own ones (`own`); equal in dtype.

        ``shapes`` are those of all structures' tensors, which every rank knows. All that a rank has travels at once,
        in as much room as the largest part needs. The tensors of several ranks are contiguous.
        """
        if self.size == 1:
            return own
        parts = [shapes[first : first + len(own)] for first in range(0, len(shapes), len(own))]
        rooms = [sum(prod(shape) for structure in part for shape in structure) for part in parts]
        room = own[0][0].new_zeros(max(rooms))
        torch.cat([tensor.reshape(-1) for tensors in own for tensor in tensors], out=room[: rooms[self.rank]])
        found: list[list[Tensor]] = []
        for row, part in zip(self.gather(room), parts, strict=True):
            start = 0
            for structure in part:
                found.append([])
                for shape in structure:
                    found[-1].append(row[start : start + prod(shape)].view(*shape))
                    start += prod(shape)
        return found

    def verify(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `RankError` unless all ranks have the same bits in these tensors."""
        if self.size == 1:
            return
        names = sorted(tensors)
        bits = (tensors[name].detach().view(BITS[tensors[name].itemsize]) for name in names)
        sums = torch.stack([x.sum(dtype=torch.int64) for x in bits]).cpu()
        for rank, others in enumerate(self.gather(sums)):
            differing = [names[index] for index in (others != sums).nonzero()[:, 0].tolist()]
            if differing:
                first, second = sorted((self.rank, rank))
                raise RankError(
                    f"rank {second} has another {differing[0]} than rank {first}, which must be the same in every bit: "
                    "give all ranks the same files and the same kind of processor, and check their memory"
                )


ALONE = Team()
