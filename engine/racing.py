"""Racing: a structure that cannot be among the best any more is not shown the rest of the images.

All candidates see a first slice of the sub-validation images. Those that are significantly worse than the structure
they have to beat, the k-th best of all scored so far, stop there; the others go on to larger slices. The test is the
one-sided sign test on the images where exactly one of the two is right (McNemar's, exact), which does not need images
to be equally hard; the slices are random samples of the images, and the error allowed is shared by the tests.
What a candidate is held to was scored before its generation: neither its company nor memory changes the outcome.

The idea is that of Hoeffding races (Maron and Moore, NIPS 1993) and of F-race (Birattari et al., GECCO 2002).

Shape suffixes: P candidates, N images, K numbers of wins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from engine.random import random_bits, stream_key

# After which share of the images a candidate may stop.
TESTED_AT = (1 / 8, 1 / 4, 1 / 2)


@dataclass(frozen=True)
class Race:
    """Whom to beat, and how sure to be: ``bar_N`` says which images the k-th best structure is right about.

    A structure that would have come out among the best is stopped with a probability of at most ``1 - confidence``.
    """

    bar_N: Tensor
    confidence: float

    @cached_property
    def slices(self) -> list[Tensor]:
        """The images of every slice, positions in ascending order: together all of them, in an order fixed for all."""
        count = len(self.bar_N)
        order = random_bits(stream_key("race"), count).argsort(stable=True)
        ends = [*(math.ceil(share * count) for share in TESTED_AT), count]
        return [order[start:end].sort().values for start, end in zip([0, *ends], ends, strict=False) if end > start]

    def goes_on(self, right_PN: Tensor, seen_N: Tensor) -> Tensor:
        """Which candidates may still be among the best, bool ``[P]``, by the images ``seen_N`` so far.

        ``right_PN`` says which images each one is right about; what was not seen is not read.
        """
        bar_N, right_PN = self.bar_N.to(right_PN.device)[seen_N], right_PN[:, seen_N]
        wins_P, losses_P = (right_PN & ~bar_N).sum(1), (~right_PN & bar_N).sum(1)
        unseen = len(self.bar_N) - len(seen_N)
        can_catch_up_P = right_PN.sum(1) + unseen >= self.bar_N.sum()
        return can_catch_up_P & (sign_test(losses_P, wins_P) > (1 - self.confidence) / len(TESTED_AT))


def sign_test(losses_P: Tensor, wins_P: Tensor) -> Tensor:
    """The probability, float64 ``[P]``, of at least so many losses in so many fair coin flips (losses and wins)."""
    flips_P1 = (losses_P + wins_P).double()[:, None]
    most = int(flips_P1.max()) if len(flips_P1) else 0
    heads_K = torch.arange(most + 1, dtype=torch.float64, device=losses_P.device)
    ways_PK = (flips_P1 + 1).lgamma() - (heads_K + 1).lgamma() - (flips_P1 - heads_K + 1).clamp(min=1).lgamma()
    counted_PK = (heads_K >= losses_P[:, None]) & (heads_K <= flips_P1)
    return (ways_PK - flips_P1 * math.log(2)).exp().where(counted_PK, 0).sum(1)
