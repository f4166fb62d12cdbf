"""What scoring is measured on: structures of some size, noise for images, and the engine's way to run them.

Legend: P population, G genes, N images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.calibrated import calibrate, count_correct
from engine.data import ImageSet, Preprocessing
from engine.evolution import Parents, mutate
from engine.population import ScoringImages
from engine.pruningnet import PruningNet
from engine.random import stream_key
from engine.sampling import draw
from engine.space.budget import Budget
from engine.space.costs import CostModel
from engine.trie import plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDE = 224
CLASSES = 1000


def in_precision(net: PruningNet, dtype: torch.dtype) -> PruningNet:
    """The same PruningNet, scored in a dtype."""
    return net if dtype == torch.float32 else copy.deepcopy(net).to_precision(dtype)


def ours(net: PruningNet, genome_PG: Tensor, images: ScoringImages) -> Callable[[Tensor, Tensor], Tensor]:
    """A population with its weights and statistics: a function of images and labels, the losses float64 ``[P, N]``."""
    calibrated = calibrate(net, plan(net.space, genome_PG), images.calibration_NCHW)

    def losses(images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        _, loss_PN = count_correct(calibrated, images_NCHW, labels_N)
        return loss_PN

    return losses


def first_within(costs: CostModel, low: float, high: float, count: int, propose: Callable[[int], Tensor]) -> Tensor:
    """The first ``count`` genomes ``[P, G]`` from ``propose(key)`` with MACs from ``low`` to ``high``."""
    kept_PG = torch.empty(0, len(costs.space.genes), dtype=torch.int64)
    attempt = 0
    while len(kept_PG) < count:
        genome_KG = propose(stream_key("benchmark", attempt))
        macs_K = costs.macs(genome_KG)
        kept_PG = torch.cat([kept_PG, genome_KG[(macs_K >= low) & (macs_K <= high)]])
        attempt += 1
    return kept_PG[:count]


def random_population(costs: CostModel, low: float, high: float, count: int) -> Tensor:
    """Random genomes ``[P, G]`` with MACs in a range."""
    anything = Budget(costs.space, torch.device("cpu"))
    return first_within(costs, low, high, count, lambda key: draw(key, 1024, anything))


def search_population(costs: CostModel, budget: float, count: int, parents: int = 4) -> Tensor:
    """Genomes ``[P, G]`` within a budget: half of them random, half mutants of a few of those."""
    random_PG = random_population(costs, 0, budget, count - count // 2)
    parents = min(parents, len(random_PG))
    best, anything = Parents(random_PG[:parents], torch.arange(parents)), Budget(costs.space, torch.device("cpu"))
    mutants_PG = first_within(costs, 0, budget, count // 2, lambda key: mutate(key, best, count, anything, 0.1)[0])
    return torch.cat([random_PG, mutants_PG])


def noise_images(calibration: int, scored: int, side: int = SIDE, device: torch.device | str = "cpu") -> ScoringImages:
    """Noise with random labels."""
    generator = torch.Generator().manual_seed(0)
    preprocessing = Preprocessing(side, side, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    shape = (calibration + scored, 3, side, side)
    stored = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
    labels = torch.randint(CLASSES, (scored,), generator=generator).to(device)
    subset = ImageSet("sub_validation", torch.arange(scored), labels, stored[calibration:])
    return ScoringImages(preprocessing(stored[:calibration]), subset, preprocessing)


def scored_images(images: ScoringImages) -> tuple[Tensor, Tensor]:
    """All scored images, normalised, and their labels."""
    return images.preprocessing(images.subset.images(slice(None))), images.subset.labels


def losses_of(logits: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy in nats ``[P, N]``, float64, of logits ``[P, N, classes]``."""
    return F.cross_entropy(logits.double().transpose(1, 2), labels_N.expand(len(logits), -1), reduction="none")


def root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
