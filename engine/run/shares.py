"""Who scores what when several ranks share the work, and how their answers become one.

Shape suffixes: P population, G genes, N images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.population import Scores
from engine.rows import group_rows


class Share(NamedTuple):
    """What one rank scores: ``members`` are positions in the population, ``images`` those it shows (None: all)."""

    members: Tensor
    images: Tensor | None


def share_out(genome_PG: Tensor, ranks: int, calibration: int, images: int, whole: bool = False) -> list[Share]:
    """Share genomes ``[P, G]`` out to ranks: neighbours in lexicographic order, which share prefixes, stay together.

    There are as many groups of genomes as let the busiest rank show the fewest images. Where that is fewer than
    there are ranks, teams of ranks have a group each, calibrate all of it and share the scored images out among them;
    with ``whole`` they do not, and one rank of each team works. A rank without work has an empty share.
    """
    order = group_rows(genome_PG)[0].argsort(stable=True).cpu()

    def split(groups: int) -> list[tuple[Tensor, int]]:
        """Groups of genomes, and how many ranks each one has."""
        teams = torch.arange(ranks).tensor_split(groups)
        return list(zip(order.tensor_split(groups), map(len, teams), strict=True))

    def busiest(groups: int) -> int:
        """Images that the busiest rank runs through a network, times genomes."""
        shown = ((len(members), images if whole else math.ceil(images / team)) for members, team in split(groups))
        return max(genomes * (calibration + scored) for genomes, scored in shown)

    groups = min(range(min(len(order), ranks), 0, -1), key=busiest)
    shares = []
    for members, team in split(groups):
        if whole or team == 1:
            shares += [Share(members, None), *[Share(members[:0], None)] * (team - 1)]
            continue
        for part in torch.arange(images).tensor_split(team):
            shares.append(Share(members if len(part) else members[:0], part))
    return shares


class Joined:
    """The answers of all ranks, put together as they come in."""

    def __init__(self, shares: Sequence[Share], genomes: int, images: int, device: torch.device) -> None:
        self.scores = Scores.empty(genomes, images, device)
        self.awaited_P = torch.zeros(genomes, dtype=torch.int64)
        for share in shares:
            self.awaited_P[share.members] += 1

    @property
    def complete(self) -> bool:
        """Whether nothing is awaited any more."""
        return not bool(self.awaited_P.any())

    def add(self, members: Tensor, part: Scores) -> tuple[Tensor, Scores]:
        """Take in what one rank answered for some genomes; returns those that nobody works on any more."""
        for name, whole_PN in vars(self.scores).items():
            whole_PN[members] = torch.where(part.seen_PN, getattr(part, name), whole_PN[members])
        self.awaited_P[members] -= 1
        done = members[self.awaited_P[members] == 0]
        return done, Scores(**{name: whole_PN[done] for name, whole_PN in vars(self.scores).items()})
