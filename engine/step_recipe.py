"""Which structures a training step of a PruningNet is for, and the loss that it makes of their answers.

Shape suffixes: S structures, G genes, N images, n images of one structure, T classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import UserError
from engine.random import random_integers, random_uniform, stream_key
from engine.space import Space
from engine.space.costs import CostModel, cost_model

Sampling = Literal["widths", "macs"]
# Structures of a step with the sandwich rule, if nothing else is asked for, and at least.
SANDWICH, LEAST_SANDWICH = 4, 3
# Steps whose structures are drawn together where one at a time would take milliseconds.
BLOCK = 64
# Halvings of a ray: far more points than it has structures.
BISECTIONS = 16


@dataclass(frozen=True)
class StepRecipe:
    """What one step trains.

    Plainly, ``structures`` random ones among whom the batch is split, one in the paper. With ``sandwich`` the largest,
    the smallest and random others, all on the same images; with ``distill`` the largest then learns from the labels
    and the others from its answers (Yu & Huang: Universally Slimmable Networks, ICCV 2019, sections 3.2 and 3.4).
    ``sampling`` says what the random ones are uniform in.
    """

    structures: int = 1
    sandwich: bool = False
    distill: bool = False
    sampling: Sampling = "widths"

    def check(self) -> None:
        """Raise `UserError` if this makes no sense."""
        if self.distill and not self.sandwich:
            raise UserError("--distill needs --sandwich: structures learn from the largest on images that it sees too")
        if self.sandwich and self.structures < LEAST_SANDWICH:
            raise UserError(
                f"--structures {self.structures}: with --sandwich at least {LEAST_SANDWICH}, "
                "the largest, the smallest and a random one"
            )

    def check_batch(self, batch: int) -> None:
        """Raise `UserError` if a batch of so many images cannot be split as this asks for."""
        if not self.sandwich and (2 * self.structures > batch or batch % self.structures):
            raise UserError(
                f"--structures {self.structures}: the batch of {batch} is split among them evenly, "
                "two images each or more"
            )

    def check_processes(self, processes: int) -> None:
        """Raise `UserError` if so many processes cannot share a step."""
        if processes > 1 and self.sandwich:
            raise UserError("--sandwich: all structures of a step see the same images, in one process")
        if self.structures % processes:
            raise UserError(
                f"--structures {self.structures}: they are split among {processes} processes evenly; "
                "give a multiple of that, or let torchrun start as many processes as divide them"
            )

    def structures_of(self, space: Space, seed: int) -> Callable[[int], Tensor]:
        """The function that gives the structures of a step, ``[S, G]``, from its number: the largest comes first.

        They are drawn on the host, where their widths have to be known.
        """
        if not self.sandwich:
            return random_structures(space, self.sampling, self.structures, seed)
        ends_2G = torch.cat([space.uniform_choice(space.choices - 1), space.uniform_choice(0)])
        others = random_structures(space, self.sampling, self.structures - len(ends_2G), seed)
        return lambda step: torch.cat([ends_2G, others(step)])

    def losses(self, logits_SnT: Tensor, labels_N: Tensor, label_smoothing: float) -> Tensor:
        """Each structure's part ``[S]`` of the mean cross-entropy of all, on its part of the images or on all of them.

        The parts add up to the loss. Those of some structures alone are what they are beside the others. The sandwich
        rule as published adds the losses up. Their mean has a gradient as large as that of one structure, so that a
        learning rate means the same with any number of them.
        """
        images = logits_SnT.shape[1]
        labels_Sn = labels_N.expand(len(logits_SnT), -1) if self.sandwich else labels_N.unflatten(0, (-1, images))
        targets: list[tuple[Tensor, float]] = [(labels_n, label_smoothing) for labels_n in labels_Sn]
        if self.distill:
            targets[1:] = [(logits_SnT[0].detach().softmax(1), 0.0)] * (len(logits_SnT) - 1)
        summed = [
            F.cross_entropy(logits_nT, target, label_smoothing=smoothing, reduction="sum")
            for logits_nT, (target, smoothing) in zip(logits_SnT, targets, strict=True)
        ]
        return torch.stack(summed) / (images * self.structures)


def random_structures(space: Space, sampling: Sampling, count: int, seed: int) -> Callable[[int], Tensor]:
    """The function that gives the random structures of a step, ``[count, G]``: it depends on ``seed`` and the step.

    Either every width is uniform over its choices, or the MACs are uniform between the least and the full network's:
    they are drawn first, and a structure of random widths is scaled to them.
    """
    if sampling == "widths":
        shape = (count, len(space.genes))
        return lambda step: random_integers(stream_key(seed, "structure", step), space.choices, shape)
    costs = cost_model(space)
    least, full = costs.macs(torch.cat([space.uniform_choice(0), space.uniform_choice(space.choices - 1)])).tolist()

    @lru_cache(maxsize=1)
    def block(number: int) -> Tensor:
        key, shape = stream_key(seed, "structures of uniform MACs", number), (BLOCK * count, len(space.genes))
        genome_KG = random_integers(stream_key(key, "genome"), space.choices, shape)
        rounding_KG = random_uniform(stream_key(key, "rounding"), shape)
        macs_K = least + (full - least) * random_uniform(stream_key(key, "macs"), shape[:1]).double()
        return scale_to_macs(costs, genome_KG, rounding_KG, macs_K).unflatten(0, (BLOCK, count))

    return lambda step: block(step // BLOCK)[step % BLOCK]


def scale_to_macs(costs: CostModel, genome_KG: Tensor, rounding_KG: Tensor, macs_K: Tensor) -> Tensor:
    """Scale genomes ``[K, G]`` down or up, as close to ``macs_K`` as that goes.

    A genome lies on a ray from the smallest structure (0) through itself (1) to the full one (2). Where a point of it
    falls between two choices, ``rounding_KG``, in [0, 1), decides: genes that changed all at once would leave gaps of
    several per cent of the full network's MACs.
    """
    top = costs.space.choices - 1

    def at(point_K: Tensor) -> Tensor:
        point_K1 = point_K[:, None]
        choice_KG = genome_KG * point_K1.clamp(max=1) + (top - genome_KG) * (point_K1 - 1).clamp(min=0)
        return (choice_KG + rounding_KG).long().clamp(max=top)

    low_K, width = torch.zeros_like(macs_K), 1.0
    for _ in range(BISECTIONS):
        low_K = torch.where(costs.macs(at(low_K + width)) <= macs_K, low_K + width, low_K)
        width /= 2
    # Twice the last width further is the first point known to have more.
    below_KG, above_KG = at(low_K), at(low_K + 2 * width)
    closer_K = costs.macs(above_KG) - macs_K < macs_K - costs.macs(below_KG)
    return torch.where(closer_K[:, None], above_KG, below_KG)
