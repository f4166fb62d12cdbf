"""What tests share about structures: spaces, random genomes of them, and the networks they stand for."""

from functools import cache

import torch
from hypothesis import strategies as st
from torch import Tensor

from engine.pruned import PrunedNet
from engine.space import ARCHITECTURES, IMAGE, IMAGE_CHANNELS, Conv, Space, architecture, gene
from engine.space.budget import Budget, parse_limit, quantities
from engine.space.costs import CostModel
from engine.space.structure import convolutions

names = st.sampled_from(sorted(ARCHITECTURES))


@cache
def space_of(name: str, classes: int = 1000) -> Space:
    return architecture(name).build(classes)


@cache
def tiny_space(classes: int = 5) -> Space:
    """Every kind of layer once, in a network of 20 channels and total stride 8."""
    stem, wide, mid = gene("stem", 10), gene("wide", 20), gene("mid", 14)
    return Space(
        "tiny",
        classes,
        (stem, wide, mid),
        (
            Conv("stem", IMAGE, IMAGE_CHANNELS, stem, 5, 2, False, "relu", None, (stem,), 3, max_pool=True),
            Conv("reduce", "stem", stem, mid, 1, 1, False, "relu6", None, (mid, stem, wide), 4),
            Conv("depthwise", "reduce", mid, mid, 3, 2, True, "relu6", None, (mid, stem, wide), 4),
            Conv("shortcut", "stem", stem, wide, 1, 2, False, "none", None, (stem, wide), 4),
            Conv("expand", "depthwise", mid, wide, 1, 1, False, "relu", "shortcut", (mid, stem, wide), 4),
            Conv("same", "expand", wide, wide, 3, 1, False, "none", "expand", (wide,), 4),
            Conv("last", "same", wide, 16, 1, 1, False, "relu", None, (wide,), 3),
        ),
    )


def genomes(space: Space) -> st.SearchStrategy[Tensor]:
    """One genome, int64 ``[1, G]``: a uniform one, or any."""
    any_genome = st.integers(0, 2**32).map(lambda seed: random_genomes(space, 1, seed))
    return st.integers(0, space.choices - 1).map(space.uniform_choice) | any_genome


def random_genomes(space: Space, count: int, seed: int = 0) -> Tensor:
    """Genomes ``[P, G]`` drawn uniformly: the same ones every time."""
    return torch.randint(space.choices, (count, len(space.genes)), generator=torch.Generator().manual_seed(seed))


def pruned_net(space: Space, genome_PG: Tensor) -> PrunedNet:
    """The network of one genome ``[1, G]``, on the meta device: shapes without numbers."""
    with torch.device("meta"):
        return PrunedNet(convolutions(space, genome_PG[0]), space.classes).eval()


def budget_of(costs: CostModel, **limits: str | int) -> Budget:
    """A budget as the options of a search say it: ``budget_of(costs, flops="280M:300M", params="50%")``."""
    known = quantities(costs)
    return Budget(
        costs.space, torch.device("cpu"), tuple(parse_limit(str(text), known[name]) for name, text in limits.items())
    )
